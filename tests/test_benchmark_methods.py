"""The table of methods: from what was measured to docs/training.md."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import feeding, methods
from benchmarks.documents import between
from gift.cli import main
from tests.training.pictures import make_pictures

ROOT = Path(__file__).parents[1]


def test_the_document_shows_what_was_measured():
    results = json.loads((ROOT / "results" / "methods.json").read_text())
    titles = {name: row.title for name, row in methods.rows(Path("runs/methods")).items()}
    assert between(ROOT / "docs" / "training.md", methods.START, methods.END) == methods.table(results, titles)
    assert len({len(of_method["seeds"]) for of_method in results["methods"].values()}) == 1
    assert all("times" in of_method for of_method in results["methods"].values())


def test_every_method_has_as_many_tries():
    assert {len(row.tries()) for row in methods.rows(Path("runs")).values()} == {4}


def test_the_best_rates_were_taken():
    results = json.loads((ROOT / "results" / "methods.json").read_text())
    for of_method in results["methods"].values():
        best = max(of_method["tries"], key=lambda entry: (entry["accuracy"], -entry["loss"]))
        assert of_method["tries"][0] == best
        assert len(of_method["tries"]) == 4


def test_fed_images_are_as_fast_as_the_document_says():
    share = json.loads((ROOT / "results" / "feeding.json").read_text())["fed / in memory"]
    text = (ROOT / "docs" / "training.md").read_text()
    assert f"{100 * share['median']:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}]" in text


@pytest.mark.slow
def test_the_benchmark_of_methods_runs_on_a_few_pictures(tmp_path, monkeypatch):
    pictures, runs, out = make_pictures(tmp_path / "pictures"), tmp_path / "runs", tmp_path / "methods.json"
    monkeypatch.setattr(methods, "SEARCH_EPOCHS", 1)
    monkeypatch.setattr(methods, "EPOCHS", 1)
    in_this_process = SimpleNamespace(run=lambda words, check: main(words[1:]))
    monkeypatch.setattr(methods, "subprocess", in_this_process)
    chosen = ("linear-probe", "toast-lite")
    methods.main(str(pictures), str(pictures), runs, out, rounds=2, methods=chosen)
    first = json.loads(out.read_text())
    methods.main(str(pictures), str(pictures), runs, out, phases=("train",), methods=chosen)
    assert json.loads(out.read_text()) == first  # what is complete is not repeated
    assert list(first["methods"]) == list(chosen)
    for name, of_method in first["methods"].items():
        assert len(of_method["tries"]) == 4
        assert [run["seed"] for run in of_method["seeds"]] == [0]
        assert of_method["times"]["step_ms"]["median"] > 0
        config = (runs / "train" / name / "0" / "config.yaml").read_text()
        assert f"learning_rate: {of_method['tries'][0]['rate']}" in config
    assert str(runs / "upstream" / "adapter") in (runs / "train" / "toast-lite" / "0" / "config.yaml").read_text()
    assert "| linear probe |" in methods.table(first, {name: row.title for name, row in methods.rows(runs).items()})


def test_the_benchmark_of_feeding_runs_on_a_few_pictures(tmp_path):
    feeding.main(str(make_pictures(tmp_path / "pictures", per_class=40)), tmp_path / "out.json", rounds=3, steps=1)
    assert 0.1 < json.loads((tmp_path / "out.json").read_text())["fed / in memory"]["median"] < 10
