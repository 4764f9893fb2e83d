"""How long people wait: from what was measured to docs/looking.md, and the targets."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.documents import between
from tests.explain.conftest import striped, trained  # noqa: F401 - fixtures

looking = pytest.importorskip("benchmarks.looking", reason="Playwright is not installed")
ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "results" / "looking.json").read_text())


def test_the_document_shows_what_was_measured():
    assert between(ROOT / "docs" / "looking.md", looking.START, looking.END) == looking.table(RESULTS)


def test_what_was_measured_meets_the_targets():
    assert RESULTS["report"]["pictures"] == 50
    assert RESULTS["report"]["megabytes"] < 15
    assert RESULTS["report"]["seconds"]["high"] < 2
    assert RESULTS["explorer"]["slowest in seconds"] < 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_benchmark_runs_on_a_few_pictures(trained, striped, tmp_path):  # noqa: F811
    document = tmp_path / "looking.md"
    document.write_text(f"{looking.START}\n{looking.END}\n")
    options = {"adapter": trained[0], "images": striped / "test", "out": tmp_path / "out.json", "write_docs": document}
    options |= {"rounds": 2, "count": 3}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, looking.__file__, *words], check=True, capture_output=True)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["report"]["pictures"] == 3
    assert found["explorer"]["pictures"] == 2
    assert f"| {found['report']['megabytes']:.1f} MB |" in document.read_text()
