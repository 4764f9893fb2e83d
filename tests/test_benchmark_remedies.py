"""Remedies: each changes what its title says, and nothing else."""

import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from benchmarks import comparison, remedies
from gift.baselines.methods import method_config
from gift.benchmark.perform import UNKNOWN
from gift.pretrained import SMALL, load_backbone
from gift.training import finetune
from gift.training.arguments import FinetuneOptions
from gift.tuner import model as tuner
from gift.tuner.generator import WeightGenerator

PLAN = " ".join((Path(__file__).parents[1] / "docs" / "plan-of-comparison.md").read_text().split())


def adapted(name):
    """Return the backbone adapted with a remedy in force, the images, and its loss's gradients."""
    torch.manual_seed(0)
    backbone = load_backbone(SMALL, ("a", "b"))
    model = get_peft_model(backbone, method_config("gift", backbone, dict(remedies.REMEDIES[name].options)))
    torch.manual_seed(1)
    images = torch.randn(2, 3, 64, 64)
    return model, images


def generator_of(model):
    return next(module for module in model.modules() if isinstance(module, WeightGenerator))


@pytest.mark.parametrize("name", remedies.REMEDIES)
def test_a_remedy_trains_from_the_pretrained_model_and_ends_with_its_run(name):
    before = (tuner.WeightGenerator, finetune.make_optimizer)
    with remedies.REMEDIES[name].change():
        model, images = adapted(name)
        optimizer = finetune.make_optimizer(model, FinetuneOptions("run", learning_rate=0.01))
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert trained == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        with model.disable_adapter():
            expected = model(pixel_values=images).logits
        moved = (model(pixel_values=images).logits - expected).abs().max()
        assert (moved > 0) == name.startswith("recover-0")
        for _ in range(2):  # the gradients of all but the recovery are zero in the first step
            optimizer.zero_grad()
            model(pixel_values=images, labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
        assert all(
            p.grad is not None and p.grad.abs().sum() > 0 for p in generator_of(model).parameters() if p.ndim < 3
        )
    assert (tuner.WeightGenerator, finetune.make_optimizer) == before


@pytest.mark.parametrize("name", ["unit-rows", "unit-weights"])
def test_weights_are_brought_to_one_length_before_the_reduction(name):
    weight = torch.randn(6, 128) * torch.arange(1, 7)[:, None]
    with remedies.REMEDIES[name].change():
        generator = generator_of(adapted(name)[0])
    read = generator._reduce(weight)
    assert torch.allclose(read, generator._reduce(5 * weight), atol=1e-6)
    of_rows = torch.allclose(read, generator._reduce(weight * torch.arange(1, 7)[:, None]), atol=1e-6)
    assert of_rows == (name == "unit-rows")


def test_the_scale_of_a_layer_is_learned_for_that_layer():
    with remedies.REMEDIES["layer-scales"].change():
        generator = generator_of(adapted("layer-scales")[0])
        weights = [torch.randn(128, 128) for _ in range(len(generator.scales))]
        plain = generator(weights).left
        with torch.no_grad():
            generator.scales[1] *= 3
        scaled = generator(weights).left
    assert torch.allclose(scaled[1], 3 * plain[1], atol=1e-5)
    assert torch.equal(scaled[0], plain[0])


def test_end_maps_have_their_own_learning_rate():
    model, _ = adapted("ends-4")
    with remedies.REMEDIES["ends-4"].change():
        optimizer = finetune.make_optimizer(model, FinetuneOptions("run", learning_rate=0.01))
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(0.04 if re.search(r"\.(reduce|recover)\b", name) else 0.01)


def test_runs_have_the_rates_that_were_best_and_ids_of_their_own(monkeypatch, tmp_path):
    best = {"digits": {"learning_rate": 0.005, "weight_decay": 0.001}}
    monkeypatch.setattr(remedies.tables, "choose", lambda lines: "gift-paca:r=8")
    searched = [type("Searched", (), {"method": "gift-paca:r=8", "best": best})]
    monkeypatch.setattr(remedies, "read_searches", lambda lines: searched)
    place = comparison.Place(tmp_path, tmp_path / "photos", tmp_path / "runs")
    planned = remedies.runs_of(place, ["digits"], [])
    assert len(planned) == 3 * len(remedies.REMEDIES)
    assert {(it.learning_rate, it.weight_decay, it.phase) for _, it in planned.values()} == {(0.005, 0.001, "search")}
    assert {it.seed for _, it in planned.values()} == set(remedies.SEEDS)
    assert "(101 to 103)" in PLAN
    folders = {str(it.folder(tmp_path / f"seed={it.seed}")) for _, it in planned.values()}
    assert len(folders) == len(planned)
    assert planned["digits/warm-up/seed=101"][1].options(tmp_path).warmup_ratio == 0.3
    assert planned["digits/scaling-4/seed=101"][1].options(tmp_path).method_options["scaling"] == 4
    monkeypatch.setattr(remedies, "perform", lambda run, out: UNKNOWN | {"id": run.id, "folder": str(out)})
    assert remedies.do("gain", planned["digits/gain/seed=102"][1], tmp_path)["folder"] == str(tmp_path / "seed=102")
