"""The benchmarks run in their smallest form, and the arithmetic of what they report is held against formulas."""

import argparse
import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# What --tiny measures: 2 layers of 32 x 32, each on an input of 2 x 5 tokens in float32.
LAYERS, WIDTH, TOKENS, FLOAT_BYTES = 2, 32, 2 * 5, 4


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("layer")


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("step")


@pytest.fixture
def interleaved(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("interleaved")


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", BENCHMARKS / script, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def layer_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    path = tmp_path_factory.mktemp("benchmarks") / "new" / "layer.json"
    printed = run("layer.py", "--tiny", "--rounds", "2", "--apply", "factored", "--sweep", "--out", str(path))
    return json.loads(path.read_text()), printed


@pytest.mark.slow
def test_layer_measures_every_variant_in_every_round(layer_run: tuple[dict[str, Any], str]) -> None:
    results, _ = layer_run
    kinds = ["gift linear r=16", "gift paca r=16", "gift paca r=32", "gift paca r=96"]
    names = ["frozen", "lora r=8", *(kind + way for kind in kinds for way in ("", " factored"))]
    assert list(results["variants"]) == names
    for measured in results["variants"].values():
        assert len(measured["training_s_by_round"]) == len(measured["evaluation_s_by_round"]) == 2
        assert min(measured["training_s_by_round"] + measured["evaluation_s_by_round"]) > 0
        assert measured["training_to_lora"]["low"] <= measured["training_to_lora"]["high"]
    assert results["environment"]["torch"] == torch.__version__
    assert results["environment"]["threads"] == 1


@pytest.mark.slow
def test_layer_counts_the_bytes_that_formulas_predict(layer_run: tuple[dict[str, Any], str]) -> None:
    variants = layer_run[0]["variants"]
    inputs = LAYERS * TOKENS * WIDTH * FLOAT_BYTES
    reduced = LAYERS * TOKENS * 8 * FLOAT_BYTES  # LoRA keeps its reduced tokens,
    left_factors = LAYERS * WIDTH * 16 * FLOAT_BYTES  # and GIFT makes its own anew, but has generated factors
    assert (variants["frozen"]["saved_bytes"], variants["frozen"]["saved_bytes_without_inputs"]) == (0, 0)
    assert variants["lora r=8"]["saved_bytes"] == inputs + reduced
    assert variants["lora r=8"]["saved_bytes_without_inputs"] == reduced
    assert variants["gift linear r=16"]["saved_bytes"] == inputs + left_factors
    assert variants["lora r=8"]["trainable_parameters"] == LAYERS * 2 * WIDTH * 8
    assert variants["gift linear r=16"]["trainable_parameters"] == 2 * WIDTH * 16


@pytest.mark.slow
def test_layer_prints_a_verdict_for_every_target(layer_run: tuple[dict[str, Any], str]) -> None:
    results, printed = layer_run
    assert len(results["targets"]) == 2 + 4 + 4  # training of two variants; evaluation and memory of all four
    for target in results["targets"]:
        assert target["met"] == (target["measured"] <= target["at_most"])
        verdict = "met" if target["met"] else "missed"
        assert any(line.split()[0] == verdict and target["target"] in line for line in printed.splitlines() if line)


@pytest.mark.slow
def test_layer_sweep_finds_where_dense_wins(layer_run: tuple[dict[str, Any], str]) -> None:
    results, printed = layer_run
    sweep = results["sweep"]
    assert [(point["tokens"], point["features"], point["rank"]) for point in sweep["points"]] == [
        (16, 32, 8),
        (64, 32, 8),
    ]
    assert sweep["break_evens"][0]["dense_wins_from"] in (None, 16 / 32, 64 / 32)
    assert sweep["largest_cost_of_rule"] >= 0
    assert "32 out_features, rank  8: dense wins" in printed


@pytest.mark.slow
def test_layer_profile_names_the_operators() -> None:
    printed = run("layer.py", "--tiny", "--profile", "gift paca r=32")
    assert "aten::addmm" in printed
    assert "Self CPU time total" in printed


@pytest.mark.slow
def test_step_compares_all_methods_with_the_frozen_bound(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    printed = run("step.py", "--tiny", "--batch", "2", "--rounds", "2", "--dtype", "bfloat16", "--out", str(path))
    results = json.loads(path.read_text())
    parameters = {name: m["trainable_parameters_without_head"] for name, m in results["methods"].items()}
    assert parameters.pop("gift paca r=16") > 2 * WIDTH * 16
    assert parameters.pop("full fine-tuning") > 2 * 12 * WIDTH**2  # of each block: attention 4, MLP 8
    assert parameters == {
        "frozen bound": WIDTH,  # the bias of the first projection, which pulls the gradient through the blocks
        "linear probe": 0,
        "lora r=8": LAYERS * 2 * WIDTH * 8,
        "gift linear r=16": 2 * WIDTH * 16,
    }
    for name, measured in results["methods"].items():
        assert name in printed
        assert len(measured["step_s_by_round"]) == 2
        assert min(measured["step_s_by_round"]) > 0
        assert measured["peak_memory_bytes"] is None
    assert results["methods"]["frozen bound"]["step_to_bound"] == {"median": 1, "low": 1, "high": 1}
    assert results["skipped"] == {}
    kept = json.loads((BENCHMARKS.parent / "results" / "step_cpu.json").read_text())["methods"]
    assert kept.keys() == results["methods"].keys()
    assert kept["frozen bound"].keys() == results["methods"]["frozen bound"].keys()
    options = {name: results["options"][name] for name in ("model", "compile", "dtype")}
    assert options == {"model": "vit_base_patch16_224", "compile": False, "dtype": "bfloat16"}


@pytest.mark.slow
def test_step_measures_a_suite_plain_and_compiled(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    options = ["--model", "vit_base_patch16_224", "--batch", "2", "--rounds", "2", "--out", str(path)]
    printed = run("step.py", "--tiny", "--suite", *options)
    plain, compiled = json.loads(path.read_text())["runs"]
    assert (plain["compile"], compiled["compile"]) == (False, True)
    assert plain["skipped"] == compiled["skipped"] == {}
    assert list(compiled["methods"]) == ["frozen bound", "lora r=8", "gift paca r=16", "full fine-tuning"]
    for name, measured in compiled["methods"].items():
        trained = measured["trainable_parameters_without_head"]
        assert trained == plain["methods"][name]["trainable_parameters_without_head"]
        assert len(measured["step_s_by_round"]) == 2
    assert "vit_base_patch16_224, compiled" in printed


# ---- the document ----------------------------------------------------------------------------------------------------

ROWS_OF_LAYER = {
    "LoRA r=8": "lora r=8",
    "GIFT `linear` r=16": "gift linear r=16",
    "GIFT `paca` r=16 (default)": "gift paca r=16",
    "GIFT `paca` r=32": "gift paca r=32",
}


def test_the_document_shows_what_was_measured() -> None:
    document, results = ((BENCHMARKS.parent / name) for name in ("docs/benchmarks.md", "results"))
    text = " ".join(document.read_text().split())
    measured = json.loads((results / "layer.json").read_text())["variants"]

    def in_words(name: str, ratio: str) -> str:
        median, low, high = (f"{measured[name][ratio][key]:.2f}" for key in ("median", "low", "high"))
        return "1" if median == low == high else f"{median} [{low}, {high}]"

    assert f"| frozen layers | {in_words('frozen', 'training_to_lora')} | 1 | |" in text
    for title, name in ROWS_OF_LAYER.items():
        ratios = " | ".join(in_words(name, ratio) for ratio in ("training_to_lora", "evaluation_to_frozen"))
        assert f"| {title} | {ratios} | {measured[name]['saved_bytes'] / 1e6:.1f} MB |" in text
    steps = json.loads((results / "step_cpu.json").read_text())["methods"]
    names = ("gift paca r=16", "gift linear r=16", "lora r=8", "full fine-tuning")
    ratios = [f"{steps[name]['step_to_bound']['median']:.2f}" for name in names]
    assert "`paca` r=16 {}, `linear` r=16 {}, LoRA r=8 {}, full {};".format(*ratios) in text
    trained = ", ".join(f"{steps[name]['trainable_parameters_without_head']:,}" for name in names)
    assert f"trained: {trained} numbers" in text
    readme = " ".join((BENCHMARKS.parent / "README.md").read_text().split())
    assert f"takes {ratios[0]} of that of a frozen backbone (LoRA {ratios[2]}, full {ratios[3]})" in readme


# ---- step.py: what does not fit --------------------------------------------------------------------------------------


def make_setting(step: ModuleType) -> Any:
    arguments = argparse.Namespace(tiny=True, batch=2, dtype="float32", device="cpu")
    return step.make_setting("vit_tiny_patch16_224", False, arguments)


def run_out_of_memory(*_: object) -> Any:
    raise torch.OutOfMemoryError("Tried to allocate 8 GiB.\nMore lines")


def make_training(step: ModuleType, take: Any, seconds: float = 1.0) -> Any:
    return step.Training(take, seconds, parameters=1, peak_memory_bytes=300)


def test_a_method_that_does_not_fit_is_named_and_the_others_are_measured(
    step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {step.BOUND: step.METHODS[step.BOUND], "too large": run_out_of_memory, "linear probe": step.train_head}
    monkeypatch.setattr(step, "METHODS", methods)
    result = step.compare(make_setting(step), rounds=1, deadline=math.inf)
    assert list(result["methods"]) == [step.BOUND, "linear probe"]
    assert result["skipped"] == {"too large": "OutOfMemoryError beside 1 other models: Tried to allocate 8 GiB."}


def test_a_method_without_room_among_the_others_is_not_timed(step: ModuleType) -> None:
    trainings = {
        "small": make_training(step, lambda: 2.0),
        "large": make_training(step, run_out_of_memory),
        "other": make_training(step, lambda: 3.0),
    }
    skipped: dict[str, str] = {}
    seconds = step.time_steps(trainings, skipped, "cpu", rounds=2, deadline=math.inf)
    assert seconds == {"small": [2.0, 2.0], "other": [3.0, 3.0]}
    assert skipped == {"large": "OutOfMemoryError beside 2 other models; its own peak is 300 bytes"}


def test_without_the_frozen_bound_there_are_no_ratios(step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "METHODS", {step.BOUND: run_out_of_memory, "linear probe": step.train_head})
    result = step.compare(make_setting(step), rounds=1, deadline=math.inf)
    assert result["methods"]["linear probe"]["step_to_bound"] is None
    step.print_comparison(result)


def test_nothing_is_made_after_the_time(step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "prepare", run_out_of_memory)
    result = step.compare(make_setting(step), rounds=1, deadline=time.monotonic())
    assert result["methods"] == {}
    assert result["skipped"] == dict.fromkeys(step.METHODS, step.TIME_IS_UP)


def test_rounds_are_as_many_as_fit_into_the_time(step: ModuleType) -> None:
    trainings = {name: make_training(step, float, seconds) for name, seconds in {"a": 10.0, "b": 20.0}.items()}
    later = time.monotonic() + 5  # of which the test itself takes less
    assert step.rounds_in_time(trainings, 21, later + (3 + 4) * 30) == 4
    assert step.rounds_in_time(trainings, 2, later + (3 + 4) * 30) == 2
    assert step.rounds_in_time(trainings, 21, later) == 1
    assert step.rounds_in_time(trainings, 21, math.inf) == 21


def test_a_models_memory_is_what_the_others_do_not_hold(step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(step, "held_bytes", lambda device: events.append("held") or 1000)
    make_backbone = step.make_backbone
    monkeypatch.setattr(step, "make_backbone", lambda setting: events.append("make") or make_backbone(setting))
    monkeypatch.setattr(step, "step_seconds", lambda *_: events.append("step") or 1.0)
    monkeypatch.setattr(step, "forget_peak", lambda device: events.append("forget"))
    monkeypatch.setattr(step, "peak_bytes", lambda device: events.append("peak") or 1700)
    assert step.prepare("linear probe", make_setting(step)).peak_memory_bytes == 700
    assert events == ["held", "make", "step", "forget", "step", "peak"]


def test_a_suite_can_be_narrowed(step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["step.py", "--suite", "--batch", "16"])
    suite = step.parse()
    assert (suite.batch, suite.compile, len(suite.model), suite.minutes) == (16, "both", 2, 9)
    monkeypatch.setattr(sys, "argv", ["step.py", "--rounds", "9", "--compile"])
    plain = step.parse()
    assert (plain.batch, plain.compile, len(plain.model), plain.minutes) == (8, "yes", 1, None)


# ---- interleaved.py --------------------------------------------------------------------------------------------------


def test_the_interval_of_a_median_lies_between_two_of_the_values(interleaved: ModuleType) -> None:
    values = [float(number) for number in range(1, 22)]
    # 21 throws of a fair coin fall heads less than 6 times in 1.3 % of cases, less than 7 times in 3.9 %.
    assert interleaved.estimate(values[::-1]) == (11.0, 6.0, 16.0)
    assert interleaved.estimate([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert interleaved.estimate([5.0]) == (5.0, 5.0, 5.0)


def test_a_ratio_is_taken_round_by_round(interleaved: ModuleType) -> None:
    slow_rounds, reference = [2.0, 20.0, 200.0], [1.0, 10.0, 100.0]
    assert interleaved.ratio(slow_rounds, reference) == (2.0, 2.0, 2.0)


def test_every_round_takes_every_measurement_once_in_a_changing_order(interleaved: ModuleType) -> None:
    calls: list[str] = []
    measurements = {name: lambda name=name: float(calls.append(name) or len(calls)) for name in "abc"}
    values = interleaved.interleave(measurements, rounds=5)
    rounds = [tuple(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert len(rounds) == interleaved.WARM_UP_ROUNDS + 5
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1
    assert all(len(of_one) == 5 and min(of_one) > 3 * interleaved.WARM_UP_ROUNDS for of_one in values.values())


def test_dense_must_win_at_all_larger_sizes(layer: ModuleType) -> None:
    ratios = {16: 0.9, 64: 1.1, 128: 0.9, 256: 0.8}  # the win at 16 tokens is not lasting
    points = [
        {"tokens": tokens, "features": 64, "rank": 8, "dense_to_factored": {"median": value}}
        for tokens, value in ratios.items()
    ]
    assert layer.break_evens(points) == [{"features": 64, "rank": 8, "dense_wins_from": 2.0}]
    assert layer.break_evens(points[:2]) == [{"features": 64, "rank": 8, "dense_wins_from": None}]


def test_the_cost_of_a_rule_is_what_the_other_way_would_have_saved(
    layer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "dense_is_faster", lambda tokens, out_features: tokens >= out_features)
    points = [
        {"tokens": tokens, "features": 64, "rank": 8, "dense_to_factored": {"median": value}}
        for tokens, value in ((16, 0.8), (32, 1.1), (64, 1.1), (128, 0.8))
    ]
    assert layer.costs_of_rule(points) == pytest.approx([0.25, 0, 0.1, 0])
