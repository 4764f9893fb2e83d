"""The command `gift` as a user types it."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from gift.baselines.methods import method_names
from gift.cli import COMMANDS, main
from gift.training.options import TrainOptions

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


def stop(capsys, *words):
    """Return the exit code and the last line on stderr of a command that ends with an error."""
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return stopped.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def test_help_lists_every_command_with_what_it_does(capsys):
    for words in ([], ["--help"], ["data"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0
        printed = capsys.readouterr().out
        assert all(f"gift {name}" in printed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does_with_a_real_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*name.split(), "--help"])
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())  # lines are broken where the terminal ends
    assert f"e.g. `gift {name}" in printed
    assert f"usage: gift {name}" in printed


def test_every_option_of_training_is_described(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for option in fields(TrainOptions):
        assert f"--{option.name}" in printed
        described = printed.partition(f"--{option.name} {option.name.upper()} ")[2][:12]
        assert option.type is bool or described.strip(" ()"), option.name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "there is no command trian. Did you mean train?"),
        (["train", "--data", "x", "--output_dir", "y", "--lerning_rate", "1"], "Did you mean --learning_rate?"),
        (["train", "--data", "x", "--output_dir", "y", "--epochs", "many"], "epochs"),
        (["train", "--output_dir", "y"], "data"),
        (["train", "--data", "x", "--output_dir", "y", "--schedule", "cosin"], "Unknown schedule 'cosin'"),
        (["train", "--data", "x", "--output_dir", "y", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["info", "/nowhere"], "/nowhere holds no adapter"),
        (["data", "prepare", "cubs", "--out", "x"], "cub"),
        (["evaluate", "/nowhere", "--spilt", "test"], "Did you mean --split?"),
    ],
)
def test_a_wrong_word_is_one_line_that_names_what_is_near(words, message, capsys):
    code, line = stop(capsys, *words)
    assert code == 2
    assert line.startswith("gift: ")
    assert message in line


def test_an_unknown_key_of_a_recipe_is_refused_and_the_near_one_named(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("data: x\noutput_dir: y\nlearning_rat: 0.1\n")
    code, line = stop(capsys, "train", "--config", str(tmp_path / "recipe.yaml"))
    assert code == 2
    assert "learning_rat" in line
    assert "Did you mean learning_rate?" in line


def test_print_config_shows_a_recipe_with_everything(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--data", "x", "--output_dir", "y", "--method_options.r", "8", "--print_config"])
    assert stopped.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["method_options"] == {"r": 8}
    assert set(printed) >= {option.name for option in fields(TrainOptions)} - {"validation", "test"}


def test_methods_and_tasks_are_listed(capsys):
    main(["methods"])
    printed = capsys.readouterr().out
    assert set(method_names()) <= set(printed.replace(",", " ").split())
    assert {"toast-lite", "ia3"} <= set(method_names())
    main(["data", "tasks"])
    assert len(capsys.readouterr().out.splitlines()) == 27


@pytest.mark.slow
def test_the_command_is_installed():
    printed = subprocess.run([GIFT, "--help"], capture_output=True, text=True, check=True).stdout
    assert "gift convert" in printed
