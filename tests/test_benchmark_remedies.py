"""Remedies: each changes what its title says, and nothing else."""

import re
import shutil
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from benchmarks import comparison, remedies, remedy_tables
from benchmarks import comparison_tables as tables
from gift.baselines.methods import method_config
from gift.benchmark.perform import UNKNOWN
from gift.benchmark.runs import SEARCH, TEST
from gift.pretrained import SMALL, load_backbone
from gift.training import finetune
from gift.training.arguments import FinetuneOptions
from gift.tuner import model as tuner
from gift.tuner.generator import WeightGenerator
from tests.comparison import CHOSEN, primary

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


LOST = ("caltech97", "flowers17")  # by more than a point in `comparison_lines`, the worst first


def comparison_lines():
    return primary((90, 50, 50, 79.5, 78, 37), (90, 50, 50, 80, 80, 40))


def place(tmp_path):
    return comparison.Place(tmp_path, tmp_path / "photos", tmp_path / "runs")


def as_searched(lines, tasks):
    """Return the lines with ids and rates of the searches that the protocol has, the second one the best."""
    rates = [(0.001, 0.01), (0.005, 0.001), (0.01, 0.0001), (0.05, 0)]
    for task in tasks:
        own = [one for one in lines if (one["task"], one["method"], one["phase"]) == (task, CHOSEN, SEARCH)]
        for line, (rate, decay) in zip(own, rates, strict=True):
            tried = f"learning_rate={rate:g},weight_decay={decay:g}"
            line |= {"id": f"{task}/{CHOSEN}/search/{tried}", "learning_rate": rate, "weight_decay": decay}
    return lines


def test_runs_have_the_rates_that_were_best_and_folders_of_their_own(monkeypatch, tmp_path):
    lines = as_searched(comparison_lines(), ["digits"])
    planned = remedies.runs_of(place(tmp_path), ["digits"], lines)
    assert len(planned) == 3 * len(remedies.REMEDIES)
    assert {(run.learning_rate, run.weight_decay, run.phase) for run in planned} == {(0.005, 0.001, SEARCH)}
    assert {run.seed for run in planned} == {101, 102, 103}
    assert "(101 to 103)" in PLAN
    assert len({run.folder(tmp_path / f"seed={run.seed}") for run in planned}) == len(planned)
    by_remedy = {run.method.name.removeprefix(f"{CHOSEN}+"): run for run in planned}
    assert by_remedy.keys() == remedies.REMEDIES.keys()
    assert by_remedy["warm-up"].options(tmp_path).warmup_ratio == 0.3
    assert not by_remedy["warm-up"].options(tmp_path).train_on_validation
    assert by_remedy["scaling-4"].options(tmp_path).method_options["scaling"] == 4
    adapters = {name: run.described()["adapter"] for name, run in by_remedy.items()}
    assert [adapters[name]["scaling"] for name in ("none", "scaling-4", "scaling-0.25")] == [1, 4, 0.25]
    assert adapters["recover-bias"]["recover_bias"]


def test_what_helps_is_tested_on_all_tasks_with_five_seeds(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "TASKS", drawn := ("digits", "dsprites_loc"))
    lines = as_searched([line for line in comparison_lines() if line["task"] in drawn], drawn)
    planned = remedies.tests_of(place(tmp_path), ["warm-up", "gain"], lines)
    assert len(planned) == 2 * len(drawn) * 5
    run = next(one for one in planned if one.seed == 4)
    options = run.options(tmp_path)
    assert (run.id, run.task.name) == (f"digits/{CHOSEN}+warm-up/test/seed=4", "digits")
    assert (options.warmup_ratio, options.train_on_validation, options.evaluate_test) == (0.3, True, True)
    assert (run.learning_rate, run.weight_decay) == (0.005, 0.001)
    assert "is tested with five seeds on all six tasks" in PLAN
    assert not remedies.tests_of(place(tmp_path), [], lines)


class AtOnce:
    """An executor that does what it is given at once, in this process."""

    def __init__(self, *arguments, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *arguments):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except ValueError as error:
            future.set_exception(error)
        return future


def test_runs_go_on_where_they_were_one_that_fails_stops_no_other_and_others_are_refused(monkeypatch, tmp_path):
    planned = remedies.runs_of(place(tmp_path), ["digits"], as_searched(comparison_lines(), ["digits"]))
    planned = [run for run in planned if run.method.name.endswith(("+gain", "+none"))]
    done = []

    def perform(run, out):
        assert out == tmp_path / "out" / f"seed={run.seed}"
        done.append(run)
        if len(done) == 2:
            raise ValueError("disk full")
        (run.folder(out) / "adapter").mkdir(parents=True)
        return run.described() | UNKNOWN | {"accuracy": 0.5}

    monkeypatch.setattr(remedies, "perform", perform)
    monkeypatch.setattr(remedies, "ProcessPoolExecutor", AtOnce)
    with pytest.raises(SystemExit, match=r"digits/gift-paca:r=8\+gain/search/.*, seed 101: disk full"):
        remedies.do_all(planned, tmp_path / "out", 2)
    assert len(done) == len(planned) == 6
    assert not list((tmp_path / "out").glob("**/adapter"))  # one with a remedy cannot be loaded without it
    lines = remedies.do_all(planned, tmp_path / "out", 2)
    assert len(done) == 7
    assert [(line["seed"], line["method"]) for line in lines] == [(run.seed, run.method.name) for run in planned]
    (tmp_path / "out" / "seed=104").mkdir()  # of which no run is done yet
    comparison.take_over_lines(tmp_path / "out" / "seed=104", tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()
    comparison.take_over_lines(tmp_path / "out", tmp_path / "remedies.jsonl")
    assert len((tmp_path / "remedies.jsonl").read_text().splitlines()) == 6
    shutil.rmtree(tmp_path / "out")
    comparison.bring_back(tmp_path, tmp_path / "elsewhere")
    assert remedies.do_all(planned, tmp_path / "elsewhere" / "remedies", 2) == [
        line | {"train_loss": None} for line in lines
    ]
    assert len(done) == 7
    with pytest.raises(ValueError, match="of other options: epochs was 5, now 9"):
        remedies.do_all([replace(planned[0], changes={"epochs": 9})], tmp_path / "elsewhere" / "remedies", 2)


def test_remedies_are_tried_where_gift_loses_and_on_two_others(monkeypatch, tmp_path):
    assert remedy_tables.lost(comparison_lines()) == LOST
    equal = primary((90, 50, 49.8, 80, 79.5, 40))
    assert remedy_tables.lost(equal) == ("flowers17", "dsprites_ori")  # the two where it does worst
    lines = comparison_lines()
    lines.remove(next(line for line in lines if (line["method"], line["phase"]) == (CHOSEN, TEST)))
    with pytest.raises(ValueError, match="primary question has no answer"):
        remedy_tables.lost(lines)
    monkeypatch.setattr(remedies, "read_lines", lambda folder: comparison_lines())
    for others in ("digits", "digits,flowers17", "digits,dsprites_loc,dsprites_ori", "digits,digits2"):
        with pytest.raises(ValueError, match=f"names 2 tasks on which GIFT does not lose, of digits, .*; got {others}"):
            remedies.run(others, runs=tmp_path)


def remedied(remedy, **points):
    """Return three seeds of a remedy, so many points better than 80 % on each task."""
    return [
        {"id": f"{task}/{remedy}/{seed}", "task": task, "seed": 101 + seed, "phase": SEARCH}
        | {"method": f"{CHOSEN}+{remedy}", "title": f"with {remedy}", "accuracy": (80 + seed + change) / 100}
        | {"trained_parameters_without_head": 3481}
        for task, change in points.items()
        for seed in range(3)
    ]


def tried():
    lines = remedied("none", flowers17=0, caltech97=-40, digits=10)
    lines += remedied("diverging", flowers17=9, caltech97=9, digits=9)
    lines[-1]["accuracy"] = None
    lines += remedied("worse", flowers17=-1, caltech97=-40, digits=12)
    lines += remedied("harming", flowers17=3, caltech97=-40, digits=8.9)
    lines += remedied("too-little", flowers17=1.8, caltech97=-40, digits=10)
    return lines + remedied("better", flowers17=3, caltech97=-41, digits=9.1)


def test_a_remedy_helps_that_gains_a_point_where_gift_loses_and_harms_nowhere():
    assert "gains at least a point on the mean over the tasks where GIFT lost, and loses no more than a point" in PLAN
    assert remedy_tables.to_test(tried(), LOST) == ["better"]
    assert remedy_tables.changes(tried())["diverging"] == {"flowers17": 9, "caltech97": 49, "digits": None}


def test_the_table_of_remedies_has_validation_best_first_and_the_tests_of_what_helps():
    of_tests = [
        line | {"method": f"{CHOSEN}+better", "title": "with better", "accuracy": line["accuracy"] + 0.02}
        for line in comparison_lines()
        if (line["method"], line["phase"]) == (CHOSEN, TEST) and line["seed"] < 5
    ]
    rows = remedy_tables.table_of_remedies(tried() + of_tests, comparison_lines()).splitlines()
    assert re.match(r"\| accuracy in %; .* \| caltech97 \| flowers17 \| digits \| mean of the first 2, where", rows[0])
    assert rows[2:8] == [
        "| with none | 3,481 | 41.0 | 81.0 | 91.0 | 61.0 |",
        "| with diverging | 3,481 | +49.0 | +9.0 | diverged | +29.0 [+29.0, +29.0] |",
        "| with harming | 3,481 | +0.0 | +3.0 | -1.1 | +1.5 [+1.5, +1.5] |",
        "| with better | 3,481 | -1.0 | +3.0 | -0.9 | +1.0 [+1.0, +1.0] |",
        "| with too-little | 3,481 | +0.0 | +1.8 | +0.0 | +0.9 [+0.9, +0.9] |",
        "| with worse | 3,481 | +0.0 | -1.0 | +2.0 | -0.5 [-0.5, -0.5] |",
    ]
    assert rows[-1].startswith("| with better | +2.0 [+2.0, +2.0] | +2.0 [+2.0, +2.0] |")
    assert re.search(r"\| \+2\.00 \[\+2\.00, \+2\.00\] \| \+1\.\d\d \[", rows[-1])
    without = [line for line in tried() if "+better" not in line["method"]]
    assert remedy_tables.table_of_remedies(without, comparison_lines()).endswith("none was tested.")
    without = remedy_tables.table_of_remedies(tried() + of_tests[1:], comparison_lines()).splitlines()[-1]
    assert without.startswith("| with better | – | +2.0")  # four of five seeds are no result


def test_remedies_that_are_half_run_are_said_to_be_so():
    def text(lines):
        return remedy_tables.table_of_remedies(lines, comparison_lines())

    for seed in remedies.SEEDS:
        assert text([line for line in tried() if line["seed"] != seed]).startswith("Not finished: 18 runs are missing")
    assert text(tried()[3:]).startswith("Not finished: 3 runs are missing, such as none flowers17 101")
    a_task = [line for line in tried() if line["task"] != "flowers17"]
    assert text(a_task).startswith("Not finished: Runs on flowers17 are missing")
    lines = tried()
    lines[0]["accuracy"] = None
    assert text(lines).startswith("Not finished: A run without a remedy diverged")
    assert "Not finished: The primary" in remedy_tables.table_of_remedies(tried(), [])
