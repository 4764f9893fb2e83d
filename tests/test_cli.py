"""The command `gift` as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest

from gift.cli import main

GIFT = Path(sys.executable).with_name("gift")


def test_a_damaged_checkpoint_is_one_line_on_stderr_and_exit_code_two(tmp_path, capsys):
    (tmp_path / "bad.pth.tar").write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(tmp_path / "bad.pth.tar"), str(tmp_path / "out")])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("gift: ")
    assert "bad.pth.tar" in message
    assert not (tmp_path / "out").exists()


def help_of(*command):
    printed = subprocess.run([GIFT, *command, "--help"], capture_output=True, text=True, check=True).stdout
    return " ".join(printed.split())  # lines are broken where the terminal ends


@pytest.mark.slow
def test_help_shows_every_command_with_a_real_example():
    assert "convert" in help_of()
    helped = help_of("convert")
    assert "gift convert Flowers.pth.tar flowers" in helped
    assert "must not exist or be empty" in helped
