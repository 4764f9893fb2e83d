"""What the ablations of `benchmarks/comparison.py` come to: which are tested, and what validation and tests say."""

from collections.abc import Iterable, Sequence

from benchmarks.comparison_tables import DEFAULT, Line, difference, less, points
from gift.benchmark.intervals import LEVEL
from gift.benchmark.runs import TEST
from gift.benchmark.tables import NOTHING, table
from gift.benchmark.validation import Searched, read_searches

ABLATED_ON = ("digits", "rendered_flowers", "flowers17")
MATTERS, MOST_TESTED = 1.5, 8  # points on validation images from which an ablation is tested; how many are


def that_matter(lines: Sequence[Line], ablations: Iterable[str], always: Sequence[str]) -> list[str]:
    """Return the ablations to test: those that differ most from the default on validation images, and some always.

    Raises:
        ValueError: If the search of one is not finished.
    """
    searches = {one.method: one for one in read_searches(lines)}
    unfinished = [n for n in (DEFAULT, *ablations) if n not in searches or set(searches[n].tried) != set(ABLATED_ON)]
    if unfinished:
        raise ValueError(f"The screening is not finished, of {', '.join(unfinished)}.")
    changes = {
        name: round(abs(change), 6) for name, change in _changes(searches.values()).items() if change is not None
    }
    largest = sorted((name for name in changes if changes[name] >= MATTERS), key=lambda name: -changes[name])
    return [*[name for name in largest if name not in always][:MOST_TESTED], *always]


def _changes(searches: Iterable[Searched]) -> dict[str, float | None]:
    """Return by method how much better than the default it is on validation images, without the default."""
    by_name = {searched.method: searched.accuracy(ABLATED_ON) for searched in searches}
    default = by_name.pop(DEFAULT)
    return {name: less(own, default) for name, own in by_name.items()}


def table_of_ablations(lines: Sequence[Line]) -> str:
    """Return every ablation: on validation images (one seed), and on test images where it was tested.

    A star marks a difference without 0 at the level at which all that were tested together have 95 % (Bonferroni).
    """
    searches = read_searches(lines)
    changes = _changes(searches)
    tested = {line["method"] for line in lines if line["phase"] == TEST} - {DEFAULT}
    strict = 1 - (1 - LEVEL) / max(len(tested), 1)
    rows = []
    for searched in sorted(searches, key=lambda one: -(changes.get(one.method) or 0.0)):
        own, change = searched.accuracy(ABLATED_ON), changes.get(searched.method)
        cells = [_in_words(searched.method), f"{searched.parameters or 0:,}", NOTHING if own is None else f"{own:.1f}"]
        cells.append("" if searched.method == DEFAULT else NOTHING if change is None else f"{change:+.1f}")
        rows.append([*cells, _tested(lines, searched.method, strict) if searched.method in tested else ""])
    head = ["GIFT paca r=16 M=96, with", "trained without head", f"validation, mean of {len(ABLATED_ON)} tasks"]
    return table([*head, "less default", "test, less default [95 %]"], rows)


def _tested(lines: Sequence[Line], method: str, strict: float) -> str:
    strictly = difference(lines, method, DEFAULT, ABLATED_ON, strict)
    is_other = strictly is not None and strictly.low is not None and strictly.high is not None
    is_other = is_other and not strictly.low <= 0 <= strictly.high  # type: ignore[union-attr,operator]
    return points(difference(lines, method, DEFAULT, ABLATED_ON)) + (" *" if is_other else "")


def table_of_tested(lines: Sequence[Line]) -> str:
    """Return the ablations that were tested task by task: how many points better than the default, with intervals."""
    tested = dict.fromkeys(line["method"] for line in lines if line["phase"] == TEST)
    tested.pop(DEFAULT, None)
    rows = [
        [_in_words(name), *(points(difference(lines, name, DEFAULT, (task,)), 1) for task in ABLATED_ON)]
        for name in tested
    ]
    return table(["test, less default [95 %]", *ABLATED_ON], rows)


def _in_words(method: str) -> str:
    if method == DEFAULT:
        return "nothing changed"
    return method.removeprefix(f"{DEFAULT}:").replace("gift-linear", "generator=linear").removeprefix("gift:")
