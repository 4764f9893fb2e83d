"""Every command that README and documents show can be parsed, and the walk-throughs run."""

import re
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest

from gift.cli import main, parse
from tests.training.pictures import make_pictures

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^(?:    )?(?:\.venv/bin/)?gift (.+)$", re.MULTILINE)


def walk_through(document):
    """Return the lines of a document that are to be typed in order."""
    text = (ROOT / "docs" / document).read_text()
    return text.partition("<!-- walk-through")[2].partition("```\n")[2].partition("```")[0].splitlines()


def walk(lines):
    for line in lines:
        words = shlex.split(line)[1:]
        shorter = ["--epochs", "1", "--progress", "false"] if words[0] == "train" else []
        # Drawn stripes look alike, which `gift data check` says, and ends with code 1.
        with pytest.raises(SystemExit, match="1") if words[:2] == ["data", "check"] else nullcontext():
            main([*words, *shorter])


def commands():
    return [(path.name, line) for path in DOCUMENTS for line in COMMAND.findall(path.read_text())]


def test_there_are_commands_in_the_documents():
    assert len(commands()) >= 15
    assert {"README.md", "training.md", "data.md", "reproduce.md"} <= {name for name, _ in commands()}


@pytest.mark.parametrize(("document", "line"), commands())
def test_every_command_of_the_documents_is_understood(document, line, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the recipes are
    parse(shlex.split(line))


def test_a_command_that_is_not_understood_would_be_noticed(capsys):
    with pytest.raises(SystemExit):
        parse(shlex.split("train --data flowers --methd gift --output_dir runs/flowers"))
    assert "Did you mean --method?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_walk_through_of_training_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "flowers", per_class=8)
    lines = walk_through("training.md")
    assert len(lines) >= 8
    walk(lines)
    assert (tmp_path / "predictions.csv").read_text().count("\n") == 25
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert (tmp_path / "runs" / "full" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_walk_through_of_looking_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "flowers", per_class=8)
    lines = walk_through("looking.md")
    assert len(lines) == 3
    walk(lines)
    assert (tmp_path / "explained" / "report.html").stat().st_size > 100_000
    assert len(list((tmp_path / "explained" / "classes").iterdir())) == 1  # what was explained before is replaced


def test_every_program_that_is_named_is_there():
    named = re.compile(r"\b(?:benchmarks|scripts|examples)/\w+\.py\b")
    files = [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]
    files += [file for folder in ("src", "tests", "benchmarks", "scripts") for file in (ROOT / folder).rglob("*.py")]
    found = {(name, file.name) for file in files for name in named.findall(file.read_text())}
    assert len(found) > 10
    assert [each for each in sorted(found) if not (ROOT / each[0]).exists()] == []
