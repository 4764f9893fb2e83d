"""The table of methods: from what was measured to docs/training.md, and the benchmark on a few pictures."""

import json
from pathlib import Path

import pytest

from benchmarks import feeding, methods
from benchmarks.documents import between
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
def test_the_benchmarks_run_on_a_few_pictures(tmp_path, monkeypatch, capsys):
    pictures = str(make_pictures(tmp_path / "pictures", per_class=40))
    kept = {name: row for name, row in methods.rows(tmp_path).items() if name in ("lora", "linear-probe")}
    monkeypatch.setattr(methods, "rows", lambda runs: kept)
    monkeypatch.setattr(methods, "SEARCH_EPOCHS", 1)
    monkeypatch.setattr(methods, "EPOCHS", 1)
    methods.main(pictures, pictures, tmp_path, tmp_path / "methods.json", ("search", "train", "time"), (0,), rounds=1)
    results = json.loads((tmp_path / "methods.json").read_text())
    assert "| LoRA r=8 |" in methods.table(results, {name: row.title for name, row in kept.items()})
    feeding.main(pictures, tmp_path / "feeding.json", rounds=1, steps=2)
    assert "fed / in memory" in capsys.readouterr().out
