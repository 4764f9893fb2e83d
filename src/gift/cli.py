"""The command `gift`: words in, one of `gift.commands` called, errors in one line."""

import difflib
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from safetensors import SafetensorError

from gift.commands import COMMANDS, Command, benchmark, explain, explore, prepare, train


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error ends it with one line and exit code 2, Ctrl-C with exit code 130."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("gift").setLevel(logging.INFO)
    # PEFT 0.21.2 reads this of every model of transformers, which has renamed it.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        name, given = parse(words)
        COMMANDS[name](**given)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"gift: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        what = {"train": "training", "benchmark": "benchmark"}.get("".join(words[:1]))
        hint = f" A {what} goes on when the same command is given again." if what else ""
        print(f"gift: stopped.{hint}", file=sys.stderr)
        raise SystemExit(130) from error


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the name of a command and what it is called with; a wrong word ends the program with exit code 2."""
    name, words = _choose(words)
    parser = _Parser(prog=f"gift {name}", description=_described(COMMANDS[name]))
    return name, _add_arguments(parser, COMMANDS[name])(words)


class _Parser(ArgumentParser):
    """A parser that says in one line what it does not know, and what is near."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = {name for action in self._actions for name in (*action.option_strings, action.dest)}
        unknown = re.findall(r"(?:Option|Key) '([\w.]+)' is not|unrecognized arguments: (--[\w.]+)", str(message))
        near = [match for found in unknown for match in difflib.get_close_matches("".join(found), known, 1)]
        hint = f" Did you mean {near[0]}?" if near else ""
        said = " ".join(str(message).split()).rstrip(".")
        print(f"gift: {said}.{hint} `{self.prog} --help` lists the options.", file=sys.stderr)
        raise SystemExit(2)


def _choose(words: list[str]) -> tuple[str, list[str]]:
    """Return the name of the command and the words after it; without one, list the commands and end."""
    for length in (2, 1):
        if (name := " ".join(words[:length])) in COMMANDS:
            return name, words[length:]
    if not words or words in (["-h"], ["--help"], ["help"], ["data"], ["data", "--help"]):
        width = max(map(len, COMMANDS)) + 2
        lines = [f"  gift {name:<{width}}{_described(command).splitlines()[0]}" for name, command in COMMANDS.items()]
        print("\n".join(["Fine-tune vision Transformers and see what they learned.", "", *lines]))
        raise SystemExit(0)
    wanted = " ".join(words[: 2 if words[0] == "data" else 1])
    near = difflib.get_close_matches(wanted, COMMANDS, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    print(f"gift: there is no command {wanted}.{hint} `gift --help` lists the commands.", file=sys.stderr)
    raise SystemExit(2)


def _described(command: Command) -> str:
    """Return what the docstring says before its arguments."""
    return (command.__doc__ or "").partition("Args:")[0].strip()


def _add_arguments(parser: ArgumentParser, command: Command) -> Callable[[list[str]], dict[str, Any]]:
    """Add the arguments of a command; return what makes words into what it is called with."""
    if command is train:
        from gift.training.options import TrainOptions, add_train_arguments  # noqa: PLC0415

        add_train_arguments(parser)
        return lambda words: {"options": TrainOptions(**_values(parser, words, leave={"config"}))}
    if command is benchmark:
        from gift.benchmark.options import BenchmarkOptions, add_benchmark_arguments  # noqa: PLC0415

        add_benchmark_arguments(parser)
        return lambda words: {"options": BenchmarkOptions(**_values(parser, words))}
    if command is prepare:  # `from` is no name in Python
        parser.add_argument("task", help="Its name in `gift data tasks`.")
        parser.add_argument(
            "--from", type=Path | None, help="Folder of archives or TFDS exports; none for digits and drawn tasks."
        )
        parser.add_argument("--out", type=Path, required=True, help="Folder to write; must not exist.")
        parser.add_argument("--count", type=int | None, help="Number of test images, where there is no --from.")
        parser.add_argument("--seed", type=int, default=0, help="Of what is drawn, images or a validation part.")
        return lambda words: {{"from": "source"}.get(key, key): value for key, value in _values(parser, words).items()}
    if command in (explain, explore):  # words after --images are a list
        parser.add_function_arguments(command, as_group=False, skip={"images"})
        options: dict[str, Any] = {"required": True} if command is explain else {"default": []}
        parser.add_argument("--images", nargs="+", type=Path, help="Pictures, or folders of them.", **options)
        return lambda words: _values(parser, words)
    parser.add_function_arguments(command, as_positional=True, as_group=False)
    return lambda words: _values(parser, words)


def _values(parser: ArgumentParser, words: list[str], leave: Iterable[str] = ()) -> dict[str, Any]:
    return {key: value for key, value in parser.parse_args(words).as_dict().items() if key not in leave}
