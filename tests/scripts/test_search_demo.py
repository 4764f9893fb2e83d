import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from gift import demo

SCRIPTS = Path(__file__).parents[2] / "scripts"
BEST = {"probe": (2e-2, 2e-2), "lora": (1.2e-2, 1e-2), "gift": (4e-3, 2e-3)}  # what the faked runs like best


def fake_train(task, method, options):
    """Return a run that is the better the nearer its rates are to `BEST`; of two equals the second has less loss."""
    rates = (options.learning_rate, options.head_learning_rate)
    assert options.seed == 100
    assert len(task.test.labels) == (200 if task.name == "digits" else 4)  # a fifth of the training images
    accuracy = 0.9 if rates[0] == BEST[method.folder][0] else 0.5
    loss = 0.1 if rates == BEST[method.folder] else 0.2
    return SimpleNamespace(metrics={"accuracy": accuracy, "loss": loss})


def fake_demo(folder, seed):
    folder.mkdir(parents=True)
    rows = [{"task": "digits", "method": "a", "accuracy": 0.5 + 0.1 * seed}]
    (folder / demo.RECORD).write_text(json.dumps(demo.demo_description(seed) | {"rows": rows, "parts": []}))


def few_flowers():
    flowers, drawn = demo.draw_flowers(20, 0, 16)
    return demo.Task("flowers", flowers, flowers, 1, drawn, drawn)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("search_demo")
    monkeypatch.setattr(module, "train", fake_train)
    monkeypatch.setattr(module, "run_demo", fake_demo)
    monkeypatch.setattr(module, "flowers_task", few_flowers)
    return module


def test_rates_other_than_the_best_found_are_refused_and_the_search_is_kept(script, tmp_path):
    with pytest.raises(ValueError, match=r"linear probe on digits at .*, best is {'rate': 0\.02"):
        script.main(tmp_path, tmp_path / "result.json")
    found = json.loads((tmp_path / "result.json").read_text())["search"]["flowers"]
    for method in demo.METHODS:
        assert len(found[method.name]) == 8  # the same number of tries for everyone
        assert (found[method.name][0]["rate"], found[method.name][0]["head_rate"]) == BEST[method.folder]


def test_with_the_rates_found_every_seed_is_run_once_and_summarised(script, tmp_path, monkeypatch):
    for method in demo.METHODS:
        for task in method.rates:
            monkeypatch.setitem(method.rates, task, BEST[method.folder])
    script.main(tmp_path, tmp_path / "result.json", seeds=(0, 2))
    monkeypatch.setattr(script, "run_demo", None)  # what is complete is not run again
    script.main(tmp_path, tmp_path / "result.json", seeds=(0, 2))
    summary = json.loads((tmp_path / "result.json").read_text())["summary"]
    assert summary == [{"task": "digits", "method": "a", "accuracies": [50.0, 70.0], "mean": 60.0}]
