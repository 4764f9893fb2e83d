"""What a benchmark comes to, as files: the table and the plot of its lines."""

import logging
from collections.abc import Sequence
from pathlib import Path

from gift.benchmark.plots import draw_pareto
from gift.benchmark.record import read_lines
from gift.benchmark.runs import SEARCH, TEST, Line
from gift.benchmark.summary import Summary, summarise
from gift.benchmark.tables import csv_text, markdown
from gift.benchmark.validation import validation_markdown
from gift.training.folder import write

logger = logging.getLogger(__name__)
REFERENCE = "lora"  # where it is among the methods
OUTCOME = ("table.md", "table.csv", "pareto.png", "pareto.svg")  # of tests
FORMATS = {".md": markdown, ".csv": csv_text}


def summary_of(lines: Sequence[Line], reference: str | None = None) -> Summary:
    """Return what lines come to, with differences to `reference`, or to LoRA, or to the first method."""
    return summarise(lines, _reference(lines, TEST, reference))


def _reference(lines: Sequence[Line], phase: str, given: str | None) -> str:
    methods = list(dict.fromkeys(line["method"] for line in lines if line["phase"] == phase))
    return given or (REFERENCE if REFERENCE in methods or not methods else methods[0])


def _reference_there(lines: Sequence[Line], phase: str, given: str | None) -> str:
    if given is None or any(line["method"] == given for line in lines if line["phase"] == phase):
        return _reference(lines, phase, given)
    other = _reference(lines, phase, None)
    logger.warning("The reference %s has no %s, so differences are taken to %s.", given, phase, other)
    return other


def write_outcome(lines: Sequence[Line], out: Path, reference: str | None) -> None:
    """Write what the searches came to, and, if there is a test yet, table (Markdown, CSV) and plot (PNG, SVG).

    Where no line is of the reference, all of its runs failed: another is taken then.
    """
    if any(line["phase"] == SEARCH for line in lines):
        write(out / "validation.md", validation_markdown(lines, _reference_there(lines, SEARCH, reference)))
    if not any(line["phase"] == TEST for line in lines):
        return
    summary = summary_of(lines, _reference_there(lines, TEST, reference))
    for kind, as_text in FORMATS.items():
        write(out / f"table{kind}", as_text(summary))
    if not any(row.scores[summary.mean].accuracy for row in summary.rows):
        logger.warning("No method has a result on every task, so there is nothing to draw yet.")
        return
    for kind in ("png", "svg"):
        draw_pareto(summary, out / f"pareto.{kind}")


def write_table(results: Path, reference: str | None, out: Path | None, validation: bool = False) -> str:
    """Return the table of results in Markdown, or write it and say where; with `validation` that of the searches.

    Raises:
        ValueError: If there are no results, or `out` is no .md or .csv.
    """
    formats = (".md",) if validation else tuple(FORMATS)
    if out is not None and out.suffix not in formats:
        raise ValueError(f"This table is written as {' or '.join(formats)}, got {out}.")
    lines, kind = read_lines(results), ".md" if out is None else out.suffix
    if validation:
        text = validation_markdown(lines, _reference(lines, SEARCH, reference))
    else:
        text = FORMATS[kind](summary_of(lines, reference))
    if out is None:
        return text
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, text)
    return f"Wrote {out}."


def write_plot(results: Path, out: Path) -> str:
    """Draw results, and say where."""
    summary = summary_of(read_lines(results))
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_pareto(summary, out)
    return f"Wrote {out}."
