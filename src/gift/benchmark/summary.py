"""What the lines of a benchmark come to: means, intervals, differences, costs.

A line is the dictionary that one finished run leaves. Only lines of the phase "test" count: those of the phase "search"
hold accuracies on validation images, by which the learning rate was chosen. Accuracies are in %, differences in points.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from gift.benchmark.intervals import Accuracies, Column, Estimate, Score, score
from gift.benchmark.published import Published, published_notes, published_rows
from gift.benchmark.runs import is_at_end
from gift.data.catalog import TASKS

SUITES = {"fgvc": "FGVC", "vtab1k": "VTAB-1k"}

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A method, measured or published. What a published table does not say is None.

    Attributes:
        method: Unique name.
        title: For tables.
        parameters: Trained ones without the head; the mean over runs, should tasks differ.
        percent: These in % of the backbone.
        scores: By column.
        seeds: Fewest and most seeds that a task was tested with.
        rates: By task, the learning rates and weight decays of the test runs.
        at_end: Tasks whose learning rate is the lowest or highest of those that were tried.
        train_seconds: Median of a run.
        inference_ms: Median per image.
        merged: `yes` or `no` for what inference was measured with, `partly` if runs differ, else empty.
        peak_memory_mb: The most of any run.
        is_published: Whether it is from the paper.
    """

    method: str
    title: str
    parameters: int | None
    percent: float | None
    scores: Mapping[Column, Score]
    seeds: tuple[int, int] | None = None
    rates: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    at_end: frozenset[str] = frozenset()
    train_seconds: float | int | None = None
    inference_ms: float | int | None = None
    merged: str = ""
    peak_memory_mb: float | int | None = None
    is_published: bool = False


@dataclass(frozen=True)
class Summary:
    """All that tables and the plot show, of one suite, one model and one number of epochs.

    Attributes:
        suite: Name of the suite.
        model: Name of the backbone.
        epochs: Of every test run.
        reference: The method that others are compared with, or None.
        columns: The mean, the groups, the tasks.
        rows: Methods, in the order of the lines.
        published: Published rows of the suite, of another backbone perhaps.
        notes: What is missing, and what else has to be known.
    """

    suite: str
    model: str
    epochs: int | float
    reference: str | None
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    published: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def mean(self) -> Column:
        """The column over all tasks."""
        return self.columns[0]

    def of(self, scope: str) -> tuple[Column, ...]:
        """Return the columns of that scope."""
        return tuple(column for column in self.columns if column.scope == scope)


def summarise(lines: Sequence[Line], reference: str | None = None) -> Summary:
    """Return means, intervals and differences of all methods in the lines, of the phase "test" only.

    A method that lacks a test of some task that another method has, or whose training diverged there, has no mean, no
    difference over tasks and no mean of that group; a note says so.

    Args:
        lines: Results, of any phase.
        reference: Name of the method that the others are compared with.

    Raises:
        ValueError: If there is no test, if a run is there twice, if suites, backbones, epochs or the test images of a
            task differ, or if the reference is not among the methods.
    """
    runs = _tests(lines)
    suite, model, epochs = (_only(runs, key) for key in ("suite", "model", "epochs"))
    by_method = {method: [run for run in runs if run["method"] == method] for method in _distinct(runs, "method")}
    if reference is not None and reference not in by_method:
        raise ValueError(f"There is no test of the method {reference!r} to compare with: choose {_listed(by_method)}.")
    columns = _columns(suite, _distinct(runs, "task"))
    accuracies = {method: _accuracies(own) for method, own in by_method.items()}
    against: Accuracies = {} if reference is None else accuracies[reference]
    rows = tuple(
        _row(own, {c: score(c, accuracies[name], against if name != reference else {}) for c in columns})
        for name, own in by_method.items()
    )
    notes = [note for row in rows for note in _missing(row, by_method[row.method], columns[0], reference)]
    return Summary(
        suite=suite,
        model=model,
        epochs=epochs,
        reference=reference,
        columns=columns,
        rows=rows,
        published=tuple(_published(one, columns) for one in published_rows(suite)),
        notes=(*notes, *_circumstances(lines, runs), *published_notes(suite, model)),
    )


def _tests(lines: Sequence[Line]) -> list[Line]:
    """Return the tests, each there once and all of a task on the same number of images."""
    runs = [line for line in lines if line["phase"] == "test"]
    if not runs:
        raise ValueError(
            f"None of the {len(lines)} results is a test (phase 'test'). Searches are on validation images, of which "
            f"no table is made: let the benchmark finish."
        )
    seen: set[tuple[str, str, int]] = set()
    images: dict[str, int] = {}
    for run in runs:
        key = (run["task"], run["method"], run["seed"])
        if key in seen:
            raise ValueError(
                f"Task {key[0]}, method {key[1]}, seed {key[2]} is there twice: remove one of the results, or pass one "
                f"file of results only."
            )
        seen.add(key)
        if run["images"] is not None and images.setdefault(run["task"], run["images"]) != run["images"]:
            raise ValueError(
                f"Task {key[0]} was tested on {images[key[0]]} images and on {run['images']} ({run['id']}): pass "
                f"results of the same test images."
            )
    return runs


def _only(runs: Sequence[Line], key: str) -> Any:
    found = _distinct(runs, key)
    if len(found) > 1:
        raise ValueError(
            f"The results come with {len(found)} values of {key!r}: {_listed(found)}. Pass results of one suite, one "
            f"model and one number of epochs."
        )
    return found[0]


def _columns(suite: str, tasks: Sequence[str]) -> tuple[Column, ...]:
    """Return the mean, the groups of the suite, and the tasks, in the catalogue's order or else as they came."""
    known = [name for name, task in TASKS.items() if suite in SUITES and task.suite == suite]
    tasks = [task for task in known if task in tasks] + [task for task in tasks if task not in known]
    groups = list(dict.fromkeys(TASKS[task].group for task in tasks if task in known and TASKS[task].group))
    is_whole = bool(known) and set(tasks) == set(known)
    title = f"mean of {'all ' if is_whole else ''}{len(tasks)} task{'s' if len(tasks) > 1 else ''}"
    columns = [Column("mean", "mean", title, tuple(tasks), is_whole)]
    for group in groups:
        members = [task for task in known if TASKS[task].group == group]
        found = tuple(task for task in members if task in tasks)
        title = group if len(found) == len(members) else f"{group} ({len(found)} of {len(members)} tasks)"
        columns.append(Column("group", group, title, found, len(found) == len(members)))
    titles = {task: TASKS[task].title if task in TASKS else task for task in tasks}
    return (*columns, *(Column("task", task, titles[task], (task,), task in known) for task in tasks))


def _accuracies(runs: Sequence[Line]) -> dict[str, dict[int, float]]:
    """Return a method's accuracies, without the tasks where any of its runs diverged."""
    diverged = {run["task"] for run in runs if _is_diverged(run)}
    found: dict[str, dict[int, float]] = {run["task"]: {} for run in runs if run["task"] not in diverged}
    for run in runs:
        if run["task"] in found:
            found[run["task"]][run["seed"]] = 100.0 * run["accuracy"]
    return found


def _is_diverged(run: Line) -> bool:
    return run["accuracy"] is None or not math.isfinite(run["accuracy"])


def _row(runs: Sequence[Line], scores: Mapping[Column, Score]) -> Row:
    def values(key: str) -> list[Any]:
        return [run[key] for run in runs if run[key] is not None]

    def rates(task: str) -> tuple[str, str]:
        own = [run for run in runs if run["task"] == task]
        rate, decay = (
            ", ".join(f"{value:g}" for value in _distinct(own, k)) for k in ("learning_rate", "weight_decay")
        )
        return rate, decay

    counts = [sum(run["task"] == task for run in runs) for task in _distinct(runs, "task")]
    merged = set(values("merged"))
    trained, total = (values(key) for key in ("trained_parameters_without_head", "backbone_parameters"))
    return Row(
        method=runs[0]["method"],
        title=runs[0]["title"],
        parameters=round(float(np.mean(trained))) if trained else None,
        percent=100 * float(np.mean(trained) / np.mean(total)) if trained else None,
        seeds=(min(counts), max(counts)),
        scores=scores,
        rates={task: rates(task) for task in _distinct(runs, "task")},
        at_end=frozenset(
            run["task"] for run in runs if is_at_end(run["learning_rate"], [r for r, _ in run.get("pairs_tried", ())])
        ),
        train_seconds=median(values("train_seconds")) if values("train_seconds") else None,
        inference_ms=median(values("inference_ms_per_image")) if values("inference_ms_per_image") else None,
        merged="partly" if len(merged) > 1 else {True: "yes", False: "no"}.get(merged.pop(), "") if merged else "",
        peak_memory_mb=max(values("peak_memory_mb"), default=None),
    )


def _published(one: Published, columns: Sequence[Column]) -> Row:
    found = {column: one.accuracy(column.name, column.is_whole) for column in columns}
    scores = {c: Score() if value is None else Score(Estimate(value, None, None)) for c, value in found.items()}
    return Row(one.method, one.title, one.parameters, one.percent, scores, is_published=True)


def _missing(row: Row, runs: Sequence[Line], mean: Column, reference: str | None) -> list[str]:
    """Return what a method lacks."""
    lacking = [task for task in mean.tasks if task not in row.rates]
    notes = [f"{row.title} has no test of {_listed(lacking)}: no mean over these tasks."] if lacking else []
    diverged = [run for run in runs if _is_diverged(run)]
    places = [f"{run['task']} seed {run['seed']}" for run in diverged]
    reasons = _distinct([run for run in diverged if run["problem"]], "problem")
    because = f" ({'; '.join(reasons)})" if reasons else ""
    notes += [f"{row.title} diverged on {_listed(places)}{because}: no mean over these tasks."] if diverged else []
    odd = [run for run in runs if run["problem"] and run not in diverged]
    notes += [f"{row.title}, {run['task']} seed {run['seed']}: {run['problem']}" for run in odd]
    apart = [column.name for column, one in row.scores.items() if column.scope == "task" and one.difference_seeds == 0]
    if apart:
        notes.append(
            f"{row.title} and {reference} have no common seed on {_listed(apart)}: no difference over these tasks."
        )
    if any(run["trained_parameters_without_head"] not in (None, row.parameters) for run in runs):
        notes.append(f"Trained parameters of {row.title} differ between tasks: their mean is shown.")
    return notes


def _circumstances(lines: Sequence[Line], runs: Sequence[Line]) -> list[str]:
    """Return which methods were only searched for, and what differed between runs."""
    tested = _distinct(runs, "method")
    waiting = _distinct([line for line in lines if line["method"] not in tested], "title")
    notes = [f"Searched for, not tested, and so not shown: {_listed(waiting)}."] if waiting else []
    for key, what in (("commit", "commits"), ("device", "devices"), ("threads", "numbers of threads")):
        found = _distinct([run for run in runs if key in run], key)
        notes += [f"The results are of {len(found)} {what}: {_listed(found)}."] if len(found) > 1 else []
        if key == "device" and len(found) > 1:
            notes.append("Seconds and milliseconds compare methods only where they are of one device.")
    for key in ("tries", "scheduler"):
        found = _distinct([line for line in lines if key in line], key)
        notes += [f"Searches differ in {key}: {_listed(found)}."] if len(found) > 1 else []
    if any(line.get("scheduler", "fifo") != "fifo" for line in lines):
        notes.append("Tries that were behind were stopped early, which the protocol of published tables does not do.")
    for name in dict.fromkeys(name for run in runs for name in run["versions"]):
        found = list(dict.fromkeys(str(run["versions"].get(name)) for run in runs))
        notes += [f"The results are of several versions of {name}: {_listed(found)}."] if len(found) > 1 else []
    return notes


def _distinct(lines: Iterable[Line], key: str) -> list[Any]:
    return list(dict.fromkeys(line[key] for line in lines))


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
