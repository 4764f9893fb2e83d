"""The tables of benchmarks/modes.py and benchmarks/parallel_training.py: every way of running gives right gradients.

Both run in processes of their own: the shape checks of this test suite break compiled graphs.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GENERATORS = ["paca", "linear"]  # the program takes five, and minutes for each; `results/modes.json` has them all


@pytest.fixture
def modes(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("modes")


def run(script, folder, *options):
    path = folder / "results.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, BENCHMARKS / script, "--out", path, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text()), done.stdout


@pytest.mark.slow
def test_every_mode_has_the_gradients_of_plain_eager_or_raises_as_it_must(tmp_path, modes, repetitions):
    generators = GENERATORS[: repetitions(1, len(GENERATORS))]
    results, printed = run("modes.py", tmp_path, "--generators", *generators)
    parallel = importlib.import_module("parallel")
    assert list(results["modes"]) == [*modes.MODES, *parallel.MODES]
    for name, mode in {**modes.MODES, **parallel.MODES}.items():
        row = results["modes"][name]
        assert list(row) == generators
        assert f"| {name} |" in printed
        for result in row.values():
            if mode.raises is not None:
                assert result["is_right"], (name, result)
            elif "not_tried" in result:
                assert mode.needs in result["not_tried"]
            else:
                assert result["difference"] <= mode.tolerance, (name, result)


@pytest.mark.slow
def test_trainings_on_two_processes_end_where_one_process_does(tmp_path):
    results, _ = run("parallel_training.py", tmp_path)
    assert len(results["ways"]) == 6
    for way, measured in results["ways"].items():
        assert measured["largest_difference"] <= 1e-5, way
        assert measured["largest_difference_of_logits"] <= 1e-5, way
        assert measured["logits_moved_by"] > 1e-2, way


@pytest.mark.parametrize("spoil", ["sign", "missing", "late"])
def test_a_wrong_gradient_does_not_pass_as_right(modes, spoil):
    def step(model, images):
        gradients = modes.backward(model, images)
        name = next(name for name in gradients if "recover" in name)
        if spoil == "missing":
            del gradients[name]
        else:
            gradients[name] = -gradients[name] if spoil == "sign" else gradients[name] * (1 + 1e-6)
        return gradients

    def mode(generator):
        model, images = modes.adapt(modes.make_backbone(), generator), modes.make_images()
        expected = modes.plain_gradients(model, images)
        return modes.largest_difference(step(model, images), expected)

    assert not modes.try_mode(modes.Mode(mode), "linear")["is_right"]


def test_an_error_where_none_is_expected_is_wrong_and_so_is_another_one(modes):
    def fail(generator):
        raise RuntimeError("something else")

    assert not modes.try_mode(modes.Mode(fail), "paca")["is_right"]
    assert not modes.try_mode(modes.Mode(fail, raises="this"), "paca")["is_right"]
    assert modes.try_mode(modes.Mode(fail, raises="some.* else"), "paca")["is_right"]
    assert not modes.try_mode(modes.Mode(lambda generator: 0.0, raises="this"), "paca")["is_right"]


def test_the_reference_is_the_backbone_whose_weights_are_replaced(modes):
    """Held against finite differences, since everything else is held against it."""
    model, images = modes.adapt(modes.make_backbone(), "paca").eval(), modes.make_images(2)
    gradients = modes.plain_gradients(model, images)
    generator = model.base_model.gift_generators["default"]["all-32"]
    name, step = "gift_generators.default.all-32.recover", 1e-6
    losses = []
    with torch.no_grad():
        for change in (step, -2 * step):
            generator.recover[1, 3] += change
            losses.append(modes.loss_of(model(images)).item())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(gradients[name][1, 3].item(), rel=1e-5)


@pytest.mark.parametrize("script", ["modes", "parallel_training"])
def test_the_document_shows_what_was_measured(script, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    program, documents = importlib.import_module(script), importlib.import_module("documents")
    root = BENCHMARKS.parent
    results = json.loads((root / "results" / f"{script}.json").read_text())
    shown = documents.between(root / "docs" / "running.md", program.START, program.END)
    assert shown == program.table(results["ways" if script == "parallel_training" else "modes"])
