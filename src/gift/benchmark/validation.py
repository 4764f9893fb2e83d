"""What searches came to: the best accuracy of every method on validation images, to choose between configurations.

Options are chosen here, and never by the test images. One seed, and the best of several tries: neither are there
intervals, nor is this what the method reaches on new images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from gift.benchmark.runs import SEARCH, is_at_end, rank
from gift.benchmark.tables import NOTHING, table

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Searched:
    """What the search of a method came to.

    Attributes:
        method: Its name.
        title: For tables.
        parameters: Trained ones without the head; the most of any task.
        best: By task, the line of the best try.
        tried: Tasks of which every try has a line, whatever came out.
        at_end: Tasks whose best learning rate is the lowest or highest that was tried, of several.
    """

    method: str
    title: str
    parameters: int | None
    best: Mapping[str, Line]
    tried: frozenset[str]
    at_end: frozenset[str]

    def accuracy(self, tasks: Sequence[str]) -> float | None:
        """Return the mean accuracy over tasks in %, or None if one of them lacks a result."""
        if not tasks or not set(tasks) <= self.best.keys():
            return None
        return 100 * mean(self.best[task]["accuracy"] for task in tasks)


def read_searches(lines: Sequence[Line]) -> list[Searched]:
    """Return what each method's search came to, methods in the order of the lines.

    Tries without accuracy, which diverged or were stopped, are left out.

    Raises:
        ValueError: If no line is of a search.
    """
    searches = [line for line in lines if line["phase"] == SEARCH]
    if not searches:
        raise ValueError(f"None of the {len(lines)} results is of a search (phase '{SEARCH}').")
    methods = dict.fromkeys(line["method"] for line in searches)
    return [_read([line for line in searches if line["method"] == method]) for method in methods]


def _read(lines: Sequence[Line]) -> Searched:
    best, tried, at_end = {}, set(), set()
    for task in dict.fromkeys(line["task"] for line in lines):
        tries = [line for line in lines if line["task"] == task]
        if len(tries) == tries[0].get("tries", len(tries)):
            tried.add(task)
        found = min(tries, key=rank)
        if found["accuracy"] is None:
            continue
        best[task] = found
        if is_at_end(found["learning_rate"], [line["learning_rate"] for line in tries]):
            at_end.add(task)
    counts = [line["trained_parameters_without_head"] for line in best.values()]
    return Searched(
        lines[0]["method"], lines[0]["title"], max(counts, default=None), best, frozenset(tried), frozenset(at_end)
    )


def validation_markdown(lines: Sequence[Line], reference: str) -> str:
    """Return the best accuracies as a table in Markdown, with differences of the means to a reference.

    Args:
        lines: Results, of any phase.
        reference: Name of a method.

    Raises:
        ValueError: If no line is of a search, or the reference is not among the methods.
    """
    methods = read_searches(lines)
    tasks = list(dict.fromkeys(task for method in methods for task in method.best))
    compared = next((method for method in methods if method.method == reference), None)
    if compared is None:
        raise ValueError(f"There is no search of {reference!r}: choose {', '.join(m.method for m in methods)}.")
    header = ["method", "trained without head", f"mean of {len(tasks)}", f"less that of {compared.title}", *tasks]
    rows = []
    for method in methods:
        own, other = method.accuracy(tasks), compared.accuracy(tasks)
        difference = NOTHING if own is None or other is None else f"{own - other:+.1f}"
        cells = [method.title, NOTHING if method.parameters is None else f"{method.parameters:,}"]
        cells += [NOTHING if own is None else f"{own:.1f}", "reference" if method is compared else difference]
        rows.append([*cells, *(_cell(method, task) for task in tasks)])
    note = "Accuracy in % on validation images: the best try of one seed. *: at the end of the learning rates tried."
    return f"{note}\n\n{table(header, rows)}\n"


def _cell(method: Searched, task: str) -> str:
    if task not in method.best:
        return NOTHING
    return f"{100 * method.best[task]['accuracy']:.1f}{' *' if task in method.at_end else ''}"
