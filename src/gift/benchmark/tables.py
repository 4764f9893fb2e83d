"""Results of a benchmark as tables, in Markdown and as CSV."""

import csv
import io
from collections.abc import Sequence
from typing import Any, Literal

from gift.benchmark.intervals import Column, Estimate
from gift.benchmark.published import MODEL
from gift.benchmark.summary import SUITES, Row, Summary

NOTHING = "–"
COVERAGE = (
    "Brackets are 95 % intervals over seeds: they cover other trainings on the same tasks and test images, not other "
    "test images, other tasks or another choice of learning rates. Differences are taken seed by seed, over the seeds "
    "that both methods have."
)


def markdown(summary: Summary) -> str:
    """Return three tables in Markdown: means and costs, accuracy by task, and the learning rates that were chosen."""
    tasks, rows = summary.of("task"), (*summary.rows, *summary.published)
    header = ["method", *(column.title for column in tasks)]
    shown = [row for row in rows if not row.is_published or any(row.scores[column].accuracy for column in tasks)]
    by_task = [[row.title, *(_cell(row.scores[column].accuracy, summary) for column in tasks)] for row in shown]
    rates = [[row.title, *(_rates(row, column.name) for column in tasks)] for row in summary.rows]
    parts = [
        f"## {_plain(SUITES.get(summary.suite, summary.suite))}: {_plain(summary.model)}, {summary.epochs} epochs",
        "Accuracy in % on test images. Seconds and milliseconds are medians of runs, memory is the most of any run.",
        table(_main_header(summary), [_main_cells(row, summary) for row in rows]),
        "\n".join(f"- {_plain(note)}" for note in (COVERAGE, *summary.notes)),
        "### By task",
        table(header, by_task),
        "### Learning rate / weight decay",
        "Of the test runs; chosen on validation images, not on those of the tables above. *: the lowest or highest "
        "learning rate that was tried.",
        table(header, rates),
    ]
    return "\n\n".join(parts) + "\n"


def _rates(row: Row, task: str) -> str:
    return " / ".join(row.rates.get(task, (NOTHING,))) + (" *" if task in row.at_end else "")


def csv_text(summary: Summary) -> str:
    """Return all figures as CSV in long form: a line per method and column (the mean, each group, each task).

    `pandas.read_csv` reads figures as numbers and what is missing as NaN. `source` is measured or published; `scope`
    (mean, group, task) and `name` tell what the accuracy is over, `tasks` of how many, `is_whole` whether these are all
    of the suite or group, `seeds` the fewest of a task. Accuracies are in %, differences in points, both with their
    95 % interval (`low`, `high`). Costs are of the method, the same in all its lines; rates stand in lines of tasks.
    """
    shared = {"suite": summary.suite, "epochs": summary.epochs, "reference": summary.reference}
    measured = [{"model": summary.model, **shared, **_record(row, c)} for row in summary.rows for c in summary.columns]
    published = [
        {"model": MODEL, "suite": summary.suite, **_record(row, column)}
        for row in summary.published
        for column in summary.columns
        if row.scores[column].accuracy is not None
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(measured[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(measured + published)
    return text.getvalue()


def _record(row: Row, column: Column) -> dict[str, Any]:
    """Return the line of a method and column for CSV; what is None is left empty there."""
    one = row.scores[column]
    rate, decay = row.rates.get(column.name, ("", "")) if column.scope == "task" else ("", "")
    return {
        "source": "published" if row.is_published else "measured",
        "method": row.method,
        "title": row.title,
        "scope": column.scope,
        "name": column.name,
        "tasks": len(column.tasks),
        "is_whole": column.is_whole,
        "seeds": one.seeds,
        **_ends("accuracy", one.accuracy),
        **_ends("difference", one.difference),
        "difference_seeds": one.difference_seeds,
        "trained_parameters_without_head": row.parameters,
        "percent_of_backbone": row.percent,
        "train_seconds": row.train_seconds,
        "inference_ms_per_image": row.inference_ms,
        "merged": row.merged,
        "peak_memory_mb": row.peak_memory_mb,
        "learning_rate": rate,
        "weight_decay": decay,
    }


def _main_header(summary: Summary) -> list[str]:
    means = [column.title for column in (*summary.of("group"), summary.mean)]
    compared = [f"difference to {row.title} in points" for row in summary.rows if row.method == summary.reference]
    costs = ["train s", "inference ms per image", "peak MB"]
    return ["method", "seeds", "trained without head (of backbone)", *means, *compared, *costs]


def _main_cells(row: Row, summary: Summary) -> list[str]:
    seeds = "–".join(str(count) for count in dict.fromkeys(row.seeds or ()))
    trained = NOTHING if row.percent is None else f"{row.percent:.3g} %"
    if row.parameters is not None and not row.is_published:
        trained = f"{row.parameters:,} ({trained})"
    cells = [row.title, seeds or NOTHING, trained]
    cells += [_cell(row.scores[column].accuracy, summary) for column in (*summary.of("group"), summary.mean)]
    if summary.reference is not None:
        is_reference = row.method == summary.reference and not row.is_published
        cells.append("reference" if is_reference else _cell(row.scores[summary.mean].difference, summary, "+"))
    merged = {"yes": ", merged", "partly": ", partly merged", "no": ", not merged"}.get(row.merged, "")
    return [*cells, _cost(row.train_seconds), _cost(row.inference_ms) + merged, _cost(row.peak_memory_mb)]


def _cell(estimate: Estimate | None, summary: Summary, sign: Literal["", "+"] = "") -> str:
    """Return a mean and its interval; to two digits where published figures are printed so."""
    if estimate is None:
        return NOTHING
    form = f"{sign}.{2 if summary.suite in SUITES else 1}f"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:{form}}"
    return f"{estimate.mean:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _cost(value: float | int | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; cells may hold any text."""
    lines = [map(_plain, header), ["---"] * len(header), *(map(_plain, row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: str) -> str:
    """Return text of others on one line, without what would be read as a table or as HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _ends(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    mean, low, high = (None,) * 3 if estimate is None else (estimate.mean, estimate.low, estimate.high)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
