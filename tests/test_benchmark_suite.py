"""The results of `gift benchmark` that lie in the repository, and what documents show of them."""

import json
from pathlib import Path

import pytest

from benchmarks import suite, vtab_cost
from benchmarks.documents import between
from gift.benchmark.outcome import summary_of
from gift.benchmark.record import read_lines
from gift.benchmark.runs import SEARCH, TEST
from tests.benchmark import results

ROOT = Path(__file__).parents[1]
OFFLINE = ROOT / "results" / "offline.jsonl"
DOCUMENT, README, SCALING = ROOT / "docs" / "benchmarks.md", ROOT / "README.md", ROOT / "docs" / "scaling.md"


def test_document_and_readme_show_what_was_measured():
    summary = summary_of(read_lines(OFFLINE))
    assert between(DOCUMENT, suite.START, suite.END) == suite.document(summary, "benchmarks-offline.png").strip()
    assert between(README, suite.README_START, suite.README_END) == suite.readme_table(summary)
    assert (ROOT / "docs" / "benchmarks-offline.png").stat().st_size > 5000


def test_every_method_had_as_many_tries_and_the_best_was_taken():
    lines = read_lines(OFFLINE)
    pairs = {(line["task"], line["method"]) for line in lines}
    assert len(pairs) == 4 * 6
    for pair in pairs:
        own = [line for line in lines if (line["task"], line["method"]) == pair]
        search, final = ([line for line in own if line["phase"] == phase] for phase in (SEARCH, TEST))
        assert (len(search), {line["seed"] for line in final}) == (4, {0, 1})
        best = min(search, key=lambda line: (-line["accuracy"], line["loss"], line["learning_rate"]))
        rates = {(line["learning_rate"], line["weight_decay"]) for line in final}
        assert rates == {(best["learning_rate"], best["weight_decay"])}


def test_results_are_of_one_commit_and_name_no_place_of_a_machine():
    lines = read_lines(OFFLINE)
    assert len({line["commit"].removesuffix("+") for line in lines}) == 1
    assert not any(line["commit"].endswith("+") for line in lines if line["phase"] == TEST)
    assert '"/' not in OFFLINE.read_text()


def test_lines_are_taken_over_and_documents_written_anew(tmp_path):
    runs, out = tmp_path / "runs.jsonl", tmp_path / "results" / "out.jsonl"
    lines = results("lora", {"digits": [0.5, 0.6]}) + results("gift", {"digits": [0.7, 0.8]})
    runs.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for name, marks in (("doc.md", (suite.START, suite.END)), ("README.md", (suite.README_START, suite.README_END))):
        (tmp_path / name).write_text("before\n{}\nold\n{}\nafter\n".format(*marks))
    suite.main(out, runs, tmp_path / "doc.md", tmp_path / "README.md")
    assert read_lines(out) == lines
    assert "| gift | 16,384 | 75.0 [" in (tmp_path / "README.md").read_text()
    assert "+20.0 [" in (tmp_path / "README.md").read_text()
    assert "![Accuracy against trained parameters](benchmarks-out.png)" in (tmp_path / "doc.md").read_text()
    assert (tmp_path / "benchmarks-out.png").stat().st_size > 5000


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
