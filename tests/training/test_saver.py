"""Which epoch is the result, when training stops early, and that a killed run does the same."""

import json

import pytest
import torch

from gift.training.averaging import MovingAverage
from gift.training.saver import CheckpointSaver
from tests.training.killed_run import train
from tests.training.test_finetune import Killed, adapter_bytes, interrupt
from tests.training.test_loop import run

NOISY = {"epochs": 8, "learning_rate": 0.3, "head_learning_rate": 0.3}  # accuracy goes up and down


def accuracies(folder):
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry]


def result_logged(folder):
    """Return the epoch and the step under which the result's evaluation, the last line, is logged."""
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert "eval_accuracy" in last
    return last["epoch"], last["step"]


@pytest.mark.parametrize("ema", [0, 0.9])
def test_the_best_epoch_is_the_result_the_first_of_several(ema, tmp_path):
    last = train(tmp_path / "last", ema=ema, **NOISY)
    best = train(tmp_path / "best", ema=ema, select_best=True, **NOISY)
    of_epochs = accuracies(tmp_path / "last")[:8]
    assert accuracies(tmp_path / "best")[:8] == of_epochs
    assert best.metrics["best_epoch"] == of_epochs.index(max(of_epochs)) + 1
    assert best.metrics["best_epoch"] < 8, "this seed must not end with its best epoch"
    assert best.metrics["epochs"] == 8
    assert result_logged(tmp_path / "best") == (best.metrics["best_epoch"], 5 * best.metrics["best_epoch"])
    assert result_logged(tmp_path / "last") == (8, 40)
    assert last.metrics["best_epoch"] is None
    shorter = train(tmp_path / "shorter", ema=ema, schedule="constant_with_warmup", **NOISY)
    assert adapter_bytes(tmp_path / "best") not in (
        adapter_bytes(tmp_path / "last"),
        adapter_bytes(tmp_path / "shorter"),
    )
    assert shorter.metrics["epochs"] == 8


def test_training_stops_once_patience_is_over(tmp_path):
    of_epochs = accuracies(tmp_path / "all") if train(tmp_path / "all", **NOISY) else []
    result = train(tmp_path / "stopped", patience=2, **NOISY)
    no_better = [max(of_epochs[epoch - 2 : epoch]) <= max(of_epochs[: epoch - 2]) for epoch in range(3, 9)]
    assert True in no_better[:-1], "this seed must stop early"
    assert result.metrics["epochs"] == 3 + no_better.index(True)


@pytest.mark.parametrize(
    "options", [{"select_best": True}, {"ema": 0.9}, {"patience": 2, "select_best": True, "ema": 0.8}]
)
@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 2])
def test_a_run_killed_while_saving_ends_with_the_same_result(options, at, tmp_path, monkeypatch):
    complete = train(tmp_path / "complete", **NOISY, **options)
    interrupt(monkeypatch, CheckpointSaver, "on_save", at)
    with pytest.raises(Killed):
        train(tmp_path / "killed", **NOISY, **options)
    continued = train(tmp_path / "killed", **NOISY, **options)
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "complete")
    assert continued.metrics["accuracy"] == complete.metrics["accuracy"]
    assert continued.metrics["epochs"] == complete.metrics["epochs"]


@pytest.mark.parametrize("options", [{}, {"ema": 0.8}])
def test_a_continued_run_that_stops_early_ends_with_its_last_epoch(options, tmp_path, monkeypatch):
    complete = train(tmp_path / "complete", patience=2, **NOISY, **options)
    interrupt(monkeypatch, CheckpointSaver, "on_save", at=1)
    with pytest.raises(Killed):
        train(tmp_path / "killed", patience=2, **NOISY, **options)
    continued = train(tmp_path / "killed", patience=2, **NOISY, **options)
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "complete")
    assert continued.metrics["accuracy"] == complete.metrics["accuracy"]
    assert continued.metrics["epochs"] == complete.metrics["epochs"] < 8


@pytest.mark.parametrize("options", [{}, {"select_best": True}, {"select_best": True, "ema": 0.8}])
def test_a_run_killed_after_it_stopped_early_trains_no_further_step(options, tmp_path, monkeypatch):
    complete = train(tmp_path / "complete", patience=2, **NOISY, **options)
    with monkeypatch.context() as patched:
        patched.setattr("gift.training.finetune._take_result", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(tmp_path / "killed", patience=2, **NOISY, **options)
        patched.undo()
    monkeypatch.setattr("gift.training.loop.AdapterTrainer.training_step", lambda *_, **__: pytest.fail("a step"))
    continued = train(tmp_path / "killed", patience=2, **NOISY, **options)
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "complete")
    # The last evaluation is of the result; its images are noisy, and no state of the generators is loaded for it.
    assert accuracies(tmp_path / "killed")[:-1] == accuracies(tmp_path / "complete")[:-1]
    assert continued.metrics["epochs"] == complete.metrics["epochs"]


def test_choosing_needs_images_to_choose_by(tmp_path):
    for options in ({"select_best": True}, {"patience": 3}):
        with pytest.raises(ValueError, match="need evaluation images"):
            run(tmp_path, **options)


def test_the_average_follows_its_formula(tmp_path, monkeypatch):
    steps = []
    taken = MovingAverage.on_step_end

    def watch(self, args, state, control, **given):
        steps.append({name: parameter.detach().double().clone() for name, parameter in self.trained.items()})
        if len(steps) == 1:
            watch.start = {name: average.double().clone() for name, average in self.average.items()}
        return taken(self, args, state, control, **given)

    monkeypatch.setattr(MovingAverage, "on_step_end", watch)
    result = train(tmp_path, epochs=2, ema=0.7)
    average = watch.start
    for number, parameters in enumerate(steps, start=1):
        decay = min(0.7, (1 + number) / (10 + number))
        average = {name: decay * average[name] + (1 - decay) * parameters[name] for name in average}
    final = dict(result.model.named_parameters())
    assert max((final[name].double() - average[name]).abs().max().item() for name in average) < 1e-6
    assert any(not torch.equal(steps[-1][name].float(), final[name]) for name in average)
