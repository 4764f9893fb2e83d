"""`gift train` killed at random moments goes on to the same bits, and leaves no file half-written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import killed_train


@pytest.mark.slow
def test_kills_at_random_moments_change_no_bit_and_leave_no_file_half_written(
    pictures, backbone, tmp_path, repetitions
):
    kills = repetitions(5, 10)
    command = [sys.executable, killed_train.__file__, str(tmp_path), str(pictures), str(backbone), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["moments"]) == kills
    assert report["problems"] == []
    expected = (tmp_path / "complete" / "adapter" / "adapter_model.safetensors").read_bytes()
    for number in range(report["runs"]):
        folder = tmp_path / f"killed-{number}"
        assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == expected
        same = (json.loads((where / "evaluation.json").read_text()) for where in (folder, tmp_path / "complete"))
        first, other = ({name: score["confusion"] for name, score in scores.items()} for scores in same)
        assert first == other


def test_a_file_that_was_cut_off_is_found(tmp_path):
    (tmp_path / "good.json").write_text("{}")
    assert killed_train.half_written(tmp_path) == []
    (tmp_path / "metrics.json").write_text('{"accuracy": 0.')
    Path(tmp_path / "adapter.safetensors").write_bytes(b"\x10")
    assert len(killed_train.half_written(tmp_path)) == 2
