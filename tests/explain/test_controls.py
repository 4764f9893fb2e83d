import numpy as np
import pytest
import torch
from peft import get_peft_model

from gift import GiftConfig
from gift.explain import controls, explain_images
from gift.explain.controls import k_means, principal_components, random_assignment, untrained_assignments
from tests.models import make_adapted_vit, make_images, make_vit, perturb

RNG = np.random.default_rng(0)


def blobs(seed=0):
    """Return tokens (2 images of 6 x 5 patches, 4 channels) around three far points, and the point of each."""
    rng = np.random.default_rng(seed)
    points = np.array([[9.0, 0, 0, 1], [0, 9, 0, 1], [0, 0, 9, 1]])
    owners = rng.integers(0, 3, (2, 6, 5))
    return torch.from_numpy(points[owners] + 0.2 * rng.normal(size=(2, 6, 5, 4))), owners


# ---- untrained clusters ----------------------------------------------------------------------------------------------


def fresh_model(seed, **options):
    backbone = make_vit()
    torch.manual_seed(seed)
    return get_peft_model(backbone, GiftConfig(**({"r": 4, "num_clusters": 6} | options))).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"generator": "linear"},
        {"target_modules": ["attn.qkv[q]", "attn.qkv[v]"]},
        {"generator_dtype": "float64"},
        {"position": "sincos"},
    ],
)
def test_untrained_clusters_are_those_of_an_adapter_made_with_the_same_seed(options):
    trained = perturb(fresh_model(3, **options), std=0.3)
    found = untrained_assignments(trained.base_model, seed=8)
    expected = explain_images(fresh_model(8, **options), make_images(1))
    assert set(found) == set(expected.layer_names)
    for name, assignment in zip(expected.layer_names, expected.assignments, strict=True):
        assert np.allclose(found[name], assignment, atol=1e-6)
        assert found[name].dtype == getattr(torch, options.get("generator_dtype", "float32"))
    now = explain_images(trained, make_images(1)).assignments
    assert not np.allclose(now, expected.assignments, atol=1e-2)


def test_untrained_clusters_do_not_depend_on_training_but_on_the_seed():
    model = make_adapted_vit()
    before = untrained_assignments(model.base_model)
    after = untrained_assignments(perturb(model, std=1.0, seed=9).base_model)
    other = untrained_assignments(model.base_model, seed=1)
    for name, assignment in before.items():
        assert torch.equal(assignment, after[name])
        assert not torch.allclose(assignment, other[name], atol=1e-2)
        assert not assignment.requires_grad


def test_untrained_clusters_are_of_the_block_that_is_asked_for():
    model = fresh_model(4, num_blocks=2)
    for block in (0, 1, -1):
        expected = explain_images(model, make_images(1), block=block).assignments
        for index, assignment in enumerate(untrained_assignments(model.base_model, block, seed=4).values()):
            assert np.allclose(assignment, expected[index], atol=1e-6)
    first, last = (untrained_assignments(model.base_model, block)["blocks.0.attn.proj"] for block in (0, -1))
    assert not torch.allclose(first, last, atol=1e-3)


def test_untrained_clusters_leave_the_generators_and_the_random_numbers_of_others_alone():
    model = make_adapted_vit()
    parameters, state = [one.clone() for one in model.parameters()], torch.get_rng_state()
    untrained_assignments(model.base_model, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(old, new) for old, new in zip(parameters, model.parameters(), strict=True))


# ---- random clusters -------------------------------------------------------------------------------------------------


def test_a_random_assignment_has_the_mean_and_the_variance_of_the_assignment():
    assignment = torch.from_numpy(RNG.gamma(2.0, size=(300, 100)) + np.linspace(0, 9, 100))
    found = random_assignment(assignment, np.random.default_rng(1)).numpy()
    entries = assignment.numpy().ravel()
    mean = sum(entries) / entries.size
    assert found.shape == (300, 100)
    assert found.mean() == pytest.approx(mean, abs=0.1)
    assert found.std() == pytest.approx((sum((entries - mean) ** 2) / entries.size) ** 0.5, rel=0.02)
    standard = (found.ravel() - found.mean()) / found.std()
    assert sum(standard**3) / standard.size == pytest.approx(0, abs=0.1)
    assert sum(standard**4) / standard.size == pytest.approx(3, abs=0.2)


def test_the_entries_of_a_random_assignment_have_nothing_to_do_with_the_old_ones_or_with_one_another():
    assignment = torch.from_numpy(RNG.normal(size=(400, 20)) + 3 * np.arange(20))
    found = random_assignment(assignment, np.random.default_rng(1)).numpy()
    assert abs(np.corrcoef(found.ravel(), assignment.numpy().ravel())[0, 1]) < 0.05
    between = np.corrcoef(found.T) - np.eye(20)
    assert np.abs(between).max() < 0.25
    assert np.ptp(found.mean(axis=0)) < 0.5 * np.ptp(assignment.numpy().mean(axis=0))


def test_a_random_assignment_follows_its_generator_of_numbers_and_keeps_the_dtype():
    assignment = torch.randn(8, 5)
    first, again = (random_assignment(assignment, np.random.default_rng(2)) for _ in range(2))
    rng = np.random.default_rng(2)
    drawn = [random_assignment(assignment, rng) for _ in range(2)]
    assert torch.equal(first, again)
    assert torch.equal(first, drawn[0])
    assert not torch.allclose(drawn[0], drawn[1], atol=0.1)
    assert first.dtype == torch.float32


# ---- k-means ---------------------------------------------------------------------------------------------------------


def test_nearness_is_the_negative_squared_distance_to_every_fitted_mean(monkeypatch):
    fitted = []

    class Recorded(controls.MiniBatchKMeans):
        def fit(self, *args, **kwargs):
            fitted.append(self)
            return super().fit(*args, **kwargs)

    monkeypatch.setattr(controls, "MiniBatchKMeans", Recorded)
    nearness, (other, _) = k_means(blobs()[0], 3, seed=0), blobs(seed=1)
    found, means = nearness(other), fitted[0].cluster_centers_
    assert found.shape == (2, 3, 6, 5)
    for image, mean, row, column in np.ndindex(2, 3, 6, 5):
        distance = sum((other[image, row, column].numpy() - means[mean]) ** 2)
        assert found[image, mean, row, column] == pytest.approx(-distance, abs=1e-4)


def test_far_groups_of_tokens_are_found_whatever_the_seed():
    (tokens, owners), (others, their_owners) = blobs(), blobs(seed=1)
    for seed in range(3):
        nearness = k_means(tokens, 3, seed)
        nearest = nearness(others).argmax(dim=1).numpy()
        number_of = [nearness(tokens).argmax(dim=1).numpy()[owners == owner][0] for owner in range(3)]
        assert sorted(number_of) == [0, 1, 2]
        assert np.array_equal(nearest, np.array(number_of)[their_owners])
        assert nearness(others).max(dim=1).values.min() > -4


def test_means_are_the_same_for_the_same_seed_and_of_single_precision_tokens_single():
    tokens = torch.from_numpy(RNG.normal(size=(2, 6, 5, 4))).float()
    first, again, other = (k_means(tokens, 5, seed)(tokens) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)
    assert first.dtype == torch.float32


# ---- principal components --------------------------------------------------------------------------------------------


def mixed_tokens():
    """Return tokens whose channels are mixed, with five strengths, and a mean far from zero."""
    numbers = RNG.normal(size=(2, 6, 5, 5)) * [5.0, 3.0, 2.0, 1.0, 0.5]
    return torch.from_numpy(numbers @ np.linalg.qr(RNG.normal(size=(5, 5)))[0] + 7)


@pytest.mark.parametrize(("count", "half"), [(6, 3), (7, 3), (2, 1), (1, 1), (40, 5)])
def test_maps_of_principal_components_are_projections_of_centred_tokens_and_their_negatives(count, half):
    tokens = mixed_tokens()
    maps = principal_components(tokens, count, seed=0)(tokens).numpy()
    flat = tokens.reshape(60, 5).numpy()
    directions = np.linalg.eigh(np.cov(flat.T))[1][:, ::-1]
    assert maps.shape == (2, 2 * half, 6, 5)
    for component in range(half):
        for image, row, column in np.ndindex(2, 6, 5):
            expected = sum((tokens[image, row, column].numpy() - flat.mean(axis=0)) * directions[:, component])
            assert abs(maps[image, component, row, column]) == pytest.approx(abs(expected), abs=1e-8)
    assert np.allclose(maps[:, half:], -maps[:, :half], atol=1e-12)


def test_directions_of_principal_components_are_orthogonal_units_in_the_order_of_their_variance():
    tokens = mixed_tokens()
    readout = principal_components(tokens, 8, seed=0)
    directions, maps = readout.matrix[:, :4], readout(tokens)
    assert torch.allclose(directions.T @ directions, torch.eye(4, dtype=torch.float64), atol=1e-8)
    responses = maps[:, :4].transpose(0, 1).reshape(4, 60)
    assert torch.allclose(responses.mean(dim=1), torch.zeros(4, dtype=torch.float64), atol=1e-8)
    covariance = np.cov(responses.numpy())
    assert np.allclose(covariance, np.diag(np.diag(covariance)), atol=1e-8)
    assert (np.diff(np.diag(covariance)) < 0).all()


def test_components_are_of_the_tokens_they_were_fitted_to_not_of_those_they_read():
    tokens, others = mixed_tokens(), mixed_tokens() + 3
    readout = principal_components(tokens, 4, seed=0)
    shift = (others - tokens).mean(dim=(0, 1, 2)) @ readout.matrix
    difference = readout(others).mean(dim=(0, 2, 3)) - readout(tokens).mean(dim=(0, 2, 3))
    assert torch.allclose(difference, shift, atol=1e-8)
    assert shift.abs().max() > 0.1
