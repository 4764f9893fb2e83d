"""Images fed from files: what was measured stands in docs/training.md."""

import json
from pathlib import Path

from benchmarks import feeding
from tests.training.pictures import make_pictures

ROOT = Path(__file__).parents[1]


def test_fed_images_are_as_fast_as_the_document_says():
    share = json.loads((ROOT / "results" / "feeding.json").read_text())["fed / in memory"]
    text = (ROOT / "docs" / "training.md").read_text()
    assert f"{100 * share['median']:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}]" in text


def test_the_benchmark_of_feeding_runs_on_a_few_pictures(tmp_path):
    feeding.main(str(make_pictures(tmp_path / "pictures", per_class=40)), tmp_path / "out.json", rounds=3, steps=1)
    assert 0.1 < json.loads((tmp_path / "out.json").read_text())["fed / in memory"]["median"] < 10
