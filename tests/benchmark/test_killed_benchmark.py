"""A benchmark killed at random moments gives the same results, repeats no finished run, writes no half line."""

import json
import subprocess
import sys

import pytest

from gift.benchmark.record import FILE, read_lines
from tests.benchmark import killed_benchmark
from tests.benchmark.small import lasting


@pytest.mark.slow
def test_kills_change_no_result_repeat_no_run_and_leave_no_half_line(pictures, backbone, tmp_path, repetitions):
    kills = repetitions(3, 5)
    command = [sys.executable, killed_benchmark.__file__, str(tmp_path), str(pictures), str(backbone), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["moments"]) == kills
    assert report["problems"] == []
    assert report["done"][-1] > 0  # some runs were finished before the last kill, and are the same after it
    expected, found = (read_lines(tmp_path / name) for name in ("complete", "killed"))
    assert sorted(map(str, map(lasting, found))) == sorted(map(str, map(lasting, expected)))
    tables = [(tmp_path / name / "table.md").read_text().split("\n### By task")[1] for name in ("complete", "killed")]
    assert tables[0] == tables[1]


def test_what_a_kill_could_do_to_results_would_be_found(tmp_path):
    good, other = ('{"id": "a", "date": 1}', '{"id": "a", "date": 2}')
    (tmp_path / FILE).write_text(f"{good}\n")
    before, problems = killed_benchmark.read(tmp_path)
    assert problems == []
    (tmp_path / FILE).write_text(f'{other}\n{other}\n{{"id": "b", "da')
    after, problems = killed_benchmark.read(tmp_path)
    assert [problem.partition(":")[0] for problem in problems] == ["half a line", "twice", "no JSON"]
    assert killed_benchmark.changed(before, after) == ["a"]
    assert killed_benchmark.changed(before, {}) == ["a"]
