"""The cost of VTAB-1k that docs/scaling.md shows."""

import json
from pathlib import Path

import pytest

from benchmarks import vtab_cost
from benchmarks.documents import between

ROOT = Path(__file__).parents[1]
SCALING = ROOT / "docs" / "scaling.md"


def test_the_cost_of_vtab_is_that_of_its_images():
    written = json.loads((ROOT / "results" / "vtab_cost.json").read_text())
    assert between(SCALING, vtab_cost.START, vtab_cost.END) == vtab_cost.table(written)
    assert written["runs of a method"] == 19 * 24 + 19 * written["seeds"]
    trained, predicted = vtab_cost.images(written["seeds"])
    assert trained == 19 * 100 * (24 * 800 + written["seeds"] * 1000)
    for cost in written["methods"].values():
        milliseconds = trained * cost["train_ms"] + predicted * cost["predict_ms"]
        seconds = milliseconds / 1000 + written["runs of a method"] * written["seconds added per run"]
        assert cost["hours"] == pytest.approx(seconds / 3600)
