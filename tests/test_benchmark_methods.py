"""The table of methods: from what was measured to docs/training.md."""

import json
from pathlib import Path

from benchmarks import methods
from benchmarks.documents import between

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
