"""The benchmarks of cluster maps in their smallest form, and the document that shows what they measured."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.utils import logging

from tests.models import make_adapted_vit, make_images

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "reading-cluster-maps.md"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_the_document_shows_what_was_measured(benchmark):
    tables = benchmark("cluster_tables")
    results = json.loads((ROOT / "results" / "cluster_maps.json").read_text())
    for name, text in tables.tables(results).items():
        start, end = tables.MARKS[name]
        assert benchmark("documents").between(DOCUMENT, start, end) == text.strip()
        assert len(text.splitlines()) > 2


def test_the_example_of_the_document_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[1]
    names = {"model": make_adapted_vit(), "images": make_images(), "loader": [{"pixel_values": make_images()}]}
    exec(compile(example, str(DOCUMENT), "exec"), names)
    assert names["found"].maps.shape == (2, 2, 6, 4, 4)
    assert (tmp_path / "segments" / "segments.json").exists()
    assert (tmp_path / "maps" / "manifest.json").exists()


def test_an_interval_is_students(benchmark):
    values = [0.1, 0.3, 0.2, 0.6, 0.3]
    half = 2.776 * np.std(values, ddof=1) / np.sqrt(5)  # the quantile of 4 degrees of freedom
    assert benchmark("cluster_tables").interval(values, 3) == f"0.300 ± {half:.3f}"


def test_the_place_of_the_cue_is_that_of_its_species_on_the_twig(benchmark):
    def shortcut(label, background, cue):
        return {"label": label, "lifts": {"background": background, "cue": cue}}

    listed = [shortcut(2, 1.0, 0.9), shortcut(3, 0.5, 4.0), shortcut(2, 0.8, 3.0), shortcut(2, 0.1, 9.0)]
    assert benchmark("cluster_tables").place_of_cue({"shortcuts": listed}, 2) == 3
    assert benchmark("cluster_tables").place_of_cue({"shortcuts": listed[:2]}, 2) is None


@pytest.fixture
def small(benchmark, monkeypatch):
    module = benchmark("cluster_maps")
    variant = module.Variant(module.APART | {"r": 4, "num_clusters": 4}, (4e-3, 1e-2), seeds=1, whole=True)
    two_blocks = module.Variant(variant.config | {"num_blocks": 2}, (4e-3, 1e-2), blocks=(0, -1), seeds=1)
    sizes = {"TRAINING": 32, "TESTING": 8, "EPOCHS": 1, "IMAGES_PER_CLASS": 2}
    for name, value in (sizes | {"VARIANTS": {"apart": variant, "two": two_blocks}}).items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module.Variant, "draws", 2)
    level, threads = logging.get_verbosity(), torch.get_num_threads()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield module
    logging.set_verbosity(level)
    logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_stopped_benchmark_goes_on_and_its_tables_have_every_row(small, benchmark, tmp_path, monkeypatch):
    results = small.run(tmp_path, None)
    monkeypatch.setattr(small, "train", None)  # everything is there already
    again = small.run(tmp_path, None)
    assert again["variants"] == results["variants"]
    assert again["cue"] == results["cue"]
    assert [(one["variant"], one["block"]) for one in results["variants"]] == [("apart", -1), ("two", 0), ("two", -1)]
    tables = benchmark("cluster_tables").tables(results)
    assert len(tables["scores"].splitlines()) == 2 + 21
    assert len(tables["variants"].splitlines()) == 2 + 3
    assert len(tables["cue"].splitlines()) == 2 + 2


@pytest.mark.slow
def test_the_cost_of_maps_is_measured_in_turn(benchmark, tmp_path, monkeypatch, capsys):
    out = tmp_path / "explain.json"
    arguments = ["--architecture", "test_vit", "--rounds", "2", "--threads", "1", "--batches", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["explain.py", *arguments])
    benchmark("explain").main()
    measured = json.loads(out.read_text())["batches"]["1"]
    assert len(measured) == 5
    assert measured["plain forward"]["of a plain forward"]["median"] == 1
    assert "five best clusters" in capsys.readouterr().out
