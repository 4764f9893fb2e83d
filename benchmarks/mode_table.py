"""What a way of running a model must give, what it gave, and the table of all of them."""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EXACT = 1e-10  # float64


@dataclass(frozen=True)
class Mode:
    """A way of running a model.

    Attributes:
        run: Generator in, largest (or relative) difference to plain eager out; or it raises.
        tolerance: Up to which difference the mode is right.
        raises: Regular expression for a part of the message of the error that the mode must raise instead.
        needs: Package without which the mode cannot be tried.
    """

    run: Callable[[str], float]
    tolerance: float = EXACT
    raises: str | None = None
    needs: str | None = None


def try_mode(mode: Mode, generator: str) -> dict[str, Any]:
    """Return what a mode gave: a difference, an error, or that it could not be tried; and whether that is right."""
    if mode.needs is not None and importlib.util.find_spec(mode.needs) is None:
        return {"not_tried": f"{mode.needs} is not installed"}
    try:
        difference = mode.run(generator)
    except Exception as error:  # whatever it is goes into the table
        message = f"{type(error).__name__}: {error}".partition("\n\n")[0]  # dynamo adds a stack
        return {"raised": message, "is_right": mode.raises is not None and bool(re.search(mode.raises, message))}
    return {"difference": difference, "is_right": mode.raises is None and difference <= mode.tolerance}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of what every mode gave for every generator, and below it the errors in full."""
    generators = list(next(iter(results.values())))
    lines = [f"| mode | {' | '.join(generators)} |", f"|---|{'---|' * len(generators)}"]
    raised: dict[str, list[str]] = {}
    for mode, by_generator in results.items():
        lines.append(f"| {mode} | {' | '.join(_cell(by_generator[generator]) for generator in generators)} |")
        for message in dict.fromkeys(one["raised"] for one in by_generator.values() if "raised" in one):
            raised.setdefault(message, []).append(mode)
    errors = [f"- {'; '.join(modes)}: `{message}`" for message, modes in raised.items()]
    return "\n".join([*lines, "", "What is raised:", "", *errors] if errors else lines)


def _cell(result: dict[str, Any]) -> str:
    if "not_tried" in result:
        return "not tried"
    wrong = "" if result["is_right"] else " WRONG"
    return f"{'raises' if 'raised' in result else format(result['difference'], '.0e')}{wrong}"
