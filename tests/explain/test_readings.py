import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from gift import GiftConfig
from gift.explain import Reading, explain_images
from gift.explain.readings import STATISTICS_FILE, Readout, TokenStatistics
from gift.explain.recording import token_statistics
from tests.models import make_adapted_vit, make_images, make_vit, perturb

RNG = np.random.default_rng(0)
NAME = "blocks.0.attn.proj"


def some_tokens(count=400, channels=5, seed=0):
    """Return tokens with a large mean whose channels are mixed, and of different strength."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(channels, channels)) + np.diag(np.arange(2.0, channels + 2))
    return torch.from_numpy(rng.normal(size=(count, channels)) @ mixing + 3 * rng.normal(size=channels))


def ridged(covariance):
    """Return a covariance with the documented ridge: 1 % of the mean variance on every direction."""
    return covariance + 0.01 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))


def whitening_of(covariance):
    values, vectors = np.linalg.eigh(ridged(covariance))
    return vectors @ np.diag(values**-0.5) @ vectors.T


# ---- the formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "centred", "own"])
def test_a_reading_is_its_formula(kind):
    tokens, assignment = RNG.normal(size=(2, 3, 4, 5)) + 1, RNG.normal(size=(5, 6)) + 2
    found = Reading(kind).readout(NAME, torch.from_numpy(assignment))(torch.from_numpy(tokens))
    expected = np.zeros((2, 6, 3, 4))
    for image in range(2):
        for cluster in range(6):
            column = assignment[:, cluster].copy()
            if kind != "plain":
                column -= [sum(assignment[channel]) / 6 for channel in range(5)]
            for row in range(3):
                for place in range(4):
                    expected[image, cluster, row, place] = sum(tokens[image, row, place] * column)
            if kind == "own":
                expected[image, cluster] -= expected[image, cluster].sum() / 12
    assert np.allclose(found, expected, atol=1e-12)


def test_the_whitened_reading_is_centred_on_tokens_that_are_centred_and_whitened():
    tokens, assignment = some_tokens(24), RNG.normal(size=(5, 6)) + 2
    statistics = TokenStatistics.of([{NAME: some_tokens()}])
    readout = Reading("whitened", statistics).readout(NAME, torch.from_numpy(assignment))
    found = readout(tokens.reshape(2, 3, 4, 5)).double().numpy()
    of_all = some_tokens().numpy()
    mean, whitening = of_all.mean(axis=0), whitening_of(np.cov(of_all.T, bias=True))
    for image in range(2):
        for cluster in range(6):
            for row in range(3):
                for place in range(4):
                    white = whitening @ (tokens[12 * image + 4 * row + place].numpy() - mean)
                    expected = sum(white * (assignment[:, cluster] - assignment.mean(axis=1)))
                    assert found[image, cluster, row, place] == pytest.approx(expected, abs=1e-4)


def test_whitening_is_the_symmetric_root_of_the_inverse_covariance_with_its_ridge():
    statistics = TokenStatistics.of([{NAME: some_tokens()}])
    whitening = statistics.whitening(NAME).double().numpy()
    covariance = np.cov(some_tokens().numpy().T, bias=True)
    assert np.allclose(whitening, whitening.T, atol=1e-6)
    assert np.linalg.eigvalsh(whitening).min() > 0
    assert np.allclose(whitening @ ridged(covariance) @ whitening, np.eye(5), atol=1e-4)


def test_whitened_tokens_have_almost_unit_covariance_where_it_is_well_conditioned():
    tokens = torch.from_numpy(RNG.normal(size=(4000, 4)) * [1.0, 1.5, 2.0, 1.2] + 7)
    white = tokens @ TokenStatistics.of([{NAME: tokens}]).whitening(NAME).double()
    assert not np.allclose(np.cov(tokens.T, bias=True), np.eye(4), atol=0.5)
    assert np.allclose(np.cov(white.T, bias=True), np.eye(4), atol=0.03)


def test_directions_in_which_nothing_varies_are_whitened_to_finite_numbers():
    tokens = torch.from_numpy(RNG.normal(size=(50, 4)) * [1.0, 2.0, 0.0, 0.0])
    tokens[:, 3] = tokens[:, 0]
    whitening = TokenStatistics.of([{NAME: tokens}]).whitening(NAME)
    variances = [tokens[:, channel].numpy().var() for channel in range(4)]
    assert torch.isfinite(whitening).all()
    assert whitening[2, 2] == pytest.approx((0.01 * sum(variances) / 4) ** -0.5, rel=1e-3)


def test_some_maps_of_a_readout_are_those_columns_with_their_offsets():
    tokens = torch.from_numpy(RNG.normal(size=(2, 3, 4, 5)))
    matrix, offset = torch.from_numpy(RNG.normal(size=(5, 6))), torch.from_numpy(RNG.normal(size=6))
    for readout in (Readout(matrix, offset), Readout(matrix), Readout(matrix, offset, centre=True)):
        assert torch.allclose(readout.select([4, 1])(tokens), readout(tokens)[:, [4, 1]], atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "centred"])
def test_half_precision_assignments_are_read_in_single_and_tokens_of_any_precision(kind):
    assignment, tokens = torch.randn(5, 6), torch.randn(1, 2, 2, 5)
    readout = Reading(kind).readout(NAME, assignment.bfloat16())
    maps = readout(tokens.bfloat16())
    expected = Reading(kind).readout(NAME, assignment.bfloat16().double())(tokens.bfloat16().double())
    assert maps.dtype == torch.float32
    assert torch.allclose(maps.double(), expected, atol=1e-5)


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_statistics_over_batches_are_those_of_all_tokens_at_once():
    layers = {"a": some_tokens(100, 5), "b": some_tokens(100, 3, seed=1).float()}
    batches = [{name: one[start:end] for name, one in layers.items()} for start, end in ((0, 64), (64, 65), (65, 100))]
    found = TokenStatistics.of(iter(batches))
    assert list(found.means) == list(found.covariances) == ["a", "b"]
    for name, tokens in layers.items():
        assert np.allclose(found.means[name], tokens.double().mean(dim=0), atol=1e-5)
        assert np.allclose(found.covariances[name], np.cov(tokens.double().T, bias=True), atol=1e-4)


def test_a_small_variance_beside_a_large_mean_is_not_lost_in_single_precision():
    tokens = (1000 + torch.from_numpy(RNG.normal(size=(500, 2)))).float()
    found = TokenStatistics.of([{NAME: part} for part in tokens.split(100)])
    assert np.allclose(found.covariances[NAME], np.cov(tokens.double().T, bias=True), atol=1e-5)


def test_no_tokens_have_no_statistics():
    for nothing in ([], [{NAME: torch.zeros(0, 4)}]):
        with pytest.raises(ValueError, match="no tokens to take statistics of"):
            TokenStatistics.of(nothing)


def test_saved_statistics_are_loaded_to_the_bit_and_nothing_else_is_left_in_the_folder(tmp_path):
    statistics = TokenStatistics.of([{"blocks.0.attn.qkv[v]": some_tokens(), "head": some_tokens(400, 3)}])
    path = statistics.save(tmp_path / "new" / "folder")
    loaded = TokenStatistics.load(tmp_path / "new" / "folder")
    assert list(path.parent.iterdir()) == [path]
    assert set(loaded.means) == set(loaded.covariances) == {"blocks.0.attn.qkv[v]", "head"}
    for name in loaded.means:
        assert torch.equal(loaded.means[name], statistics.means[name])
        assert torch.equal(loaded.covariances[name], statistics.covariances[name])


def without(key):
    return lambda tensors: tensors.pop(key)


def changed(key, change):
    return lambda tensors: tensors.update({key: change(tensors[key])})


DAMAGES = {
    "no covariance": without("covariance.a"),
    "no mean of the only layer": without("mean.a"),
    "a covariance of another width": changed("covariance.a", lambda old: old[:4, :4]),
    "a covariance without some rows": changed("covariance.a", lambda old: old[:4]),
    "a covariance without some columns": changed("covariance.a", lambda old: old[:, :4]),
    "a mean that is not a number": changed("mean.a", lambda old: old * torch.nan),
    "an infinite covariance": changed("covariance.a", lambda old: old + torch.inf),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_statistics_are_not_loaded(tmp_path, damage):
    path = TokenStatistics.of([{"a": some_tokens()}]).save(tmp_path)
    tensors = load_file(path)
    DAMAGES[damage](tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(ValueError, match="is damaged: it must hold a finite mean and covariance of every target"):
        TokenStatistics.load(tmp_path)


def test_a_file_that_is_missing_or_cut_holds_no_statistics(tmp_path):
    with pytest.raises(ValueError, match=rf"{STATISTICS_FILE} holds no statistics of tokens"):
        TokenStatistics.load(tmp_path)
    path = TokenStatistics.of([{"a": some_tokens()}]).save(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{STATISTICS_FILE} holds no statistics of tokens"):
        TokenStatistics.load(tmp_path)


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_a_reading_whose_parts_do_not_fit_is_refused():
    statistics = TokenStatistics.of([{NAME: some_tokens()}])
    with pytest.raises(ValueError, match="no reading 'white'; choose one of plain, centred, own, whitened"):
        Reading("white")
    with pytest.raises(ValueError, match="and no other, takes statistics of the tokens"):
        Reading("whitened")
    for kind in ("plain", "centred", "own"):
        with pytest.raises(ValueError, match="and no other, takes statistics of the tokens"):
            Reading(kind, statistics)


@pytest.mark.parametrize(("name", "channels"), [("blocks.9.attn.proj", 5), (NAME, 6)])
def test_statistics_of_another_model_are_refused(name, channels):
    reading = Reading("whitened", TokenStatistics.of([{NAME: some_tokens()}]))
    with pytest.raises(ValueError, match=f"of another model: they lack {name} with {channels} channels"):
        reading.readout(name, torch.zeros(channels, 3))


# ---- of a model ------------------------------------------------------------------------------------------------------


def patch_tokens(model, pixels):
    """Return what a plain hook sees of the patch tokens of the two adapted layers, in float64."""
    outputs = {}
    hooks = [
        layer.register_forward_hook(lambda module, args, output, name=name: outputs.__setitem__(name, output))
        for name, layer in model.base_model.model.named_modules()
        if name.endswith("attn.proj")
    ]
    with torch.no_grad():
        model(pixels)
    for hook in hooks:
        hook.remove()
    return {name: output[:, 1:].double() for name, output in outputs.items()}


def assert_close(found, expected):
    """Compare on the scale of what is expected: the outputs of an untrained model are small."""
    assert np.allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_statistics_of_a_model_are_those_of_what_its_adapted_layers_put_out():
    model, pixels = make_adapted_vit(), make_images(70)
    found = token_statistics(model, pixels)
    by_hand = patch_tokens(model, pixels)
    in_batches = token_statistics(model, [{"pixel_values": part} for part in pixels.split(30)])
    assert list(found.means) == list(by_hand) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
    for name, tokens in by_hand.items():
        flat = tokens.reshape(70 * 16, 32).numpy()
        for statistics in (found, in_batches):
            assert_close(statistics.means[name], flat.mean(axis=0))
            assert_close(statistics.covariances[name], np.cov(flat.T, bias=True))


def test_statistics_are_taken_without_dropout_and_leave_the_mode_and_the_hooks_of_the_model_alone():
    backbone = make_vit(attn_drop_rate=0.5, proj_drop_rate=0.5)
    model = perturb(get_peft_model(backbone, GiftConfig(r=4, num_clusters=6))).eval()
    expected = token_statistics(model, make_images())
    model.train().base_model.model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    found = token_statistics(model, make_images())
    for name, covariance in expected.covariances.items():
        assert torch.equal(found.covariances[name], covariance)
    assert [module.training for module in model.modules()] == modes
    assert not model.base_model.model.blocks[0].attn.proj._forward_hooks


def test_whitened_maps_of_a_model_are_those_of_its_whitened_tokens():
    model, pixels = make_adapted_vit(), make_images(6)
    statistics = token_statistics(model, pixels)
    found = explain_images(model, pixels, clusters=[5, 0], reading=Reading("whitened", statistics))
    everything = explain_images(model, pixels[:1]).assignments.astype(np.float64)
    for layer, tokens in enumerate(patch_tokens(model, pixels).values()):
        flat = tokens.reshape(6 * 16, 32).numpy()
        white = (flat - flat.mean(axis=0)) @ whitening_of(np.cov(flat.T, bias=True))
        centred = everything[layer] - everything[layer].mean(axis=1, keepdims=True)
        assert_close(found.maps[:, layer], (white @ centred[:, [5, 0]]).reshape(6, 4, 4, 2).transpose(0, 3, 1, 2))
    assert found.reading == "whitened"
