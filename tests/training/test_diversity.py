import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from gift import GiftConfig
from gift.training.arguments import FinetuneOptions
from gift.training.diversity import cluster_overlap
from gift.training.finetune import finetune
from tests.models import make_adapted_vit, make_vit, perturb
from tests.training.killed_run import Stripes, make_backbone


def assignments_of(model, block=-1):
    """Return the assignment of every layer as the generators give it, each called for the weights of its layers."""
    found = []
    for group, targets in model.base_model.gift_source.groups["default"].items():
        weights = [model.base_model.model.get_submodule(target.layer).weight for target in targets]
        generator = model.base_model.gift_generators["default"][group]
        found += [of_blocks[block].detach().double().numpy() for of_blocks in generator(weights).assignments]
    return found


def overlap_by_hand(assignment):
    """Return 1 - (sum e)^2 / (M sum e^2), with e the eigenvalues of the covariance of the columns."""
    clusters = assignment.shape[1]
    means = [sum(column) / len(column) for column in assignment.T]
    covariance = np.zeros((clusters, clusters))
    for row in assignment:
        covariance += np.outer(row - means, row - means) / len(assignment)
    eigenvalues = np.linalg.eigvalsh(covariance)
    return 1 - sum(eigenvalues) ** 2 / (clusters * sum(eigenvalues**2))


def with_columns(*of_layers):
    """Return a model whose `linear` generator, whose assignment is the reduced weight, gives these assignments."""
    model = make_adapted_vit(dtype=torch.float64, generator="linear", generator_dtype="float64")
    layers = [block.attn.proj.base_layer for block in model.base_model.model.blocks]
    (generator,) = model.base_model.gift_generators["default"].values()
    with torch.no_grad():
        generator.reduce.weight.copy_(torch.eye(4, 32))
        for layer, columns in zip(layers, of_layers, strict=True):
            layer.weight[:, :4] = torch.from_numpy(np.asarray(columns, np.float64))
    return model


def orthogonal():
    """Return four columns of 32 numbers that are centred, orthogonal and vary alike."""
    signs = np.array([[(-1) ** bin(row & mask).count("1") for mask in (1, 2, 4, 8)] for row in range(32)], np.float64)
    assert not signs.sum(axis=0).any()
    return signs


# ---- the term --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"generator": "linear", "r": 5},
        {"num_blocks": 2},
        {"assignment": "softmax"},
        {"target_modules": ["attn.proj", "mlp.fc1", "mlp.fc2"]},
    ],
)
def test_overlap_is_its_formula_in_the_eigenvalues_of_the_columns_covariance_meaned_over_layers(options):
    model = make_adapted_vit(generator_dtype="float64", **options)
    by_hand = [overlap_by_hand(assignment) for assignment in assignments_of(model)]
    found = cluster_overlap(model)
    assert found.shape == ()
    assert found.item() == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-9)
    assert max(by_hand) - min(by_hand) > 1e-6


def test_clusters_that_are_not_correlated_and_vary_alike_do_not_overlap():
    columns = orthogonal() + np.array([0, 5, -3, 100])
    assert cluster_overlap(with_columns(columns, 0.01 * columns)).item() == pytest.approx(0, abs=1e-9)


def test_copies_overlap_by_all_but_one_share_also_inverted_ones():
    one = np.random.default_rng(0).normal(size=32)
    copies = np.stack([one, one + 2, -one, one], axis=1)
    assert cluster_overlap(with_columns(copies, copies)).item() == pytest.approx(1 - 1 / 4)


def test_layers_count_alike_whatever_the_size_of_their_assignments():
    one = np.random.default_rng(0).normal(size=32)
    copies = 1000 * np.stack([one, one, one, one], axis=1)
    assert cluster_overlap(with_columns(orthogonal(), copies)).item() == pytest.approx(0.75 / 2)


def test_a_cluster_that_does_not_vary_counts_as_missing_and_is_not_rewarded():
    columns = orthogonal()
    overlaps = [cluster_overlap(with_columns(columns, columns)).item()]
    for factor in (0.5, 0.1, 0.0):
        columns = orthogonal() * [1, 1, 1, factor] + [0, 0, 0, 3]
        overlaps.append(cluster_overlap(with_columns(columns, columns)).item())
    assert overlaps == sorted(overlaps)
    assert overlaps[-1] == pytest.approx(1 - 3 / 4)


def test_clusters_of_which_none_varies_overlap_most_and_have_a_finite_gradient():
    model = with_columns(np.zeros((32, 4)), np.zeros((32, 4)))
    overlap = cluster_overlap(model)
    overlap.backward()
    assert overlap.item() == 1
    assert all(torch.isfinite(one.grad).all() for one in model.parameters() if one.grad is not None)


def test_the_gradient_reaches_the_generator_alone_and_is_the_slope_of_the_term():
    model = make_adapted_vit(dtype=torch.float64, generator_dtype="float64")
    cluster_overlap(model).backward()
    reached = {name: one for name, one in model.named_parameters() if one.grad is not None and one.grad.any()}
    assert reached
    assert all("gift_generators" in name for name in reached)
    directions = [torch.randn_like(parameter) for parameter in reached.values()]
    slope = sum((parameter.grad * way).sum() for parameter, way in zip(reached.values(), directions, strict=True))

    def overlap_at(step):
        with torch.no_grad():
            for parameter, direction in zip(reached.values(), directions, strict=True):
                parameter.add_(step * direction)
            return cluster_overlap(model).item()

    ahead, behind = overlap_at(1e-6), overlap_at(-2e-6)
    assert slope.item() == pytest.approx((ahead - behind) / 2e-6, rel=1e-4)
    assert abs(slope.item()) > 1e-4


def test_going_down_the_gradient_lowers_the_overlap():
    model = make_adapted_vit()
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.01)
    before = cluster_overlap(model).item()
    for _ in range(30):
        optimizer.zero_grad()
        cluster_overlap(model).backward()
        optimizer.step()
    assert cluster_overlap(model).item() < 0.8 * before


def test_the_active_adapter_is_looked_at():
    model = make_adapted_vit(modules_to_save=[])
    first = cluster_overlap(model).item()
    model.add_adapter("other", GiftConfig(r=4, num_clusters=9, modules_to_save=[]))
    assert cluster_overlap(model).item() == first
    model.base_model.set_adapter("other")
    perturb(model, adapter="other")
    assert abs(cluster_overlap(model).item() - first) > 1e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_vit, "VisionTransformer has no GIFT adapter"),
        (lambda: get_peft_model(make_vit(), LoraConfig(target_modules=["attn.proj"])), "has no GIFT adapter"),
        (lambda: make_adapted_vit(generator="mlp"), "no clusters to keep apart: only `paca` and `linear`"),
        (lambda: make_adapted_vit(num_clusters=1), "one cluster only"),
    ],
)
def test_a_model_without_clusters_to_keep_apart_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        cluster_overlap(make())


# ---- in a run --------------------------------------------------------------------------------------------------------


def run(folder, adapter=None, **changes):
    steps = {"epochs": 3, "batch_size": 8, "learning_rate": 0.01, "progress": False} | changes
    adapter = adapter or GiftConfig(r=4, num_clusters=6)
    return finetune(make_backbone(), adapter, Stripes(16), Stripes(8), FinetuneOptions(folder, **steps))


def stored(result):
    return load_file(result.adapter_dir / "adapter_model.safetensors")


def test_a_run_with_diversity_ends_with_other_clusters_that_overlap_less(tmp_path):
    without, apart = run(tmp_path / "without"), run(tmp_path / "apart", diversity=10)
    first, second = stored(without), stored(apart)
    changed = [name for name in first if "gift_generators" in name and not torch.equal(first[name], second[name])]
    assert changed
    assert cluster_overlap(apart.model).item() < 0.8 * cluster_overlap(without.model).item()
    assert apart.metrics["options"]["diversity"] == 10


def test_a_run_without_diversity_is_the_run_there_was_before(tmp_path, monkeypatch):
    plain = run(tmp_path / "plain", epochs=1)

    def never(model):
        raise AssertionError

    monkeypatch.setattr("gift.training.loop.cluster_overlap", never)
    again = run(tmp_path / "zero", epochs=1, diversity=0)
    assert all(torch.equal(one, stored(again)[name]) for name, one in stored(plain).items())


def test_the_loss_of_training_holds_the_weighted_term_and_that_of_evaluation_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr("gift.training.loop.cluster_overlap", lambda model: torch.tensor(3.0))
    losses = []
    for diversity in (0, 0.5):
        result = run(tmp_path / str(diversity), epochs=1, diversity=diversity, evaluate_every_epoch=True)
        log = (tmp_path / str(diversity) / "log.jsonl").read_text()
        losses.append({key: value for entry in map(json.loads, log.splitlines()) for key, value in entry.items()})
        assert result.metrics["accuracy"] is not None
    assert losses[1]["loss"] - losses[0]["loss"] == pytest.approx(1.5, abs=1e-3)
    assert losses[1]["eval_loss"] == pytest.approx(losses[0]["eval_loss"], abs=1e-5)


def test_diversity_of_an_adapter_without_clusters_is_refused(tmp_path):
    lora = LoraConfig(r=2, target_modules=["attention.o_proj"])
    with pytest.raises(ValueError, match="has no GIFT adapter, so there are no clusters to keep apart"):
        run(tmp_path, lora, diversity=1)


def test_a_negative_diversity_is_refused():
    with pytest.raises(ValueError, match="diversity"):
        FinetuneOptions("unused", diversity=-0.1)
