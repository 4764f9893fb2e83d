"""The parts of documents that show what lies in `results/` of the comparison."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import ablation_tables, remedy_tables
from benchmarks import comparison_tables as tables
from benchmarks.documents import replace_between
from gift.benchmark.outcome import summary_of
from gift.benchmark.plots import draw_pareto
from gift.benchmark.record import read_lines
from gift.benchmark.summary import Summary
from gift.benchmark.tables import NOTHING, markdown, table


def read_results(results: Path) -> dict[str, list[tables.Line]]:
    """Return the lines that lie in the repository, by the name of their file."""
    names = ("comparison", "ablations", "remedies")
    return {name: [*read_lines(path)] for name in names if (path := results / f"{name}.jsonl").exists()}


def marks(name: str) -> tuple[str, str]:
    """Return the lines between which a part of a document stands."""
    return f"<!-- {name}: benchmarks/comparison.py write -->", f"<!-- end of {name} -->"


def texts(lines: Mapping[str, Sequence[tables.Line]]) -> dict[str, str]:
    """Return what documents show, by the name of the part."""
    found: dict[str, str] = {}
    if "comparison" in lines:
        summary = summary_of(lines["comparison"])
        found = {"answer": tables.answer_text(lines["comparison"]), "ranks": tables.table_of_ranks(lines["comparison"])}
        found |= {
            "tasks": tables.table_of_tasks(lines["comparison"]),
            "parts": tables.table_of_parts(lines["comparison"]),
            "equal-sizes": tables.table_of_equal_sizes(lines["comparison"]),
            "generators": tables.table_of_generators(lines["comparison"]),
            "rates": tables.table_of_rates(lines["comparison"]),
        }
        found |= {"table": all_tables(summary), "means": table_of_means(summary, lines["comparison"])}
    if "ablations" in lines:
        found["ablations"] = ablation_tables.table_of_ablations(lines["ablations"])
        found["tested"] = ablation_tables.table_of_tested(lines["ablations"])
        found["machines"] = tables.table_of_machines([*lines["ablations"], *lines.get("comparison", ())])
    if "remedies" in lines:
        found["remedies"] = remedy_tables.table_of_remedies(lines["remedies"], lines.get("comparison", ()))
    return found


PICTURE = "benchmarks-comparison.png"  # beside the document that has the table


def all_tables(summary: Summary) -> str:
    """Return the tables of `gift benchmark`, one level below a document's own headings, and the plot."""
    text = re.sub(r"^##", "###", markdown(summary), flags=re.MULTILINE)
    return f"{text}\n![Accuracy against trained parameters]({PICTURE})\n"


def table_of_means(summary: Summary, lines: Sequence[tables.Line]) -> str:
    """Return the means over tasks alone: of every method in its usual size, and of the size that was chosen."""
    reference = next((row.title for row in summary.rows if row.method == summary.reference), "")
    found = tables.answer(lines)
    aside = {name for sizes in tables.FAMILIES.values() for name in sizes.values()} | {tables.SMALLEST_LORA}
    aside -= {tables.LORA, tables.DEFAULT, "gift-linear", found.chosen if found else tables.DEFAULT}
    rows = []
    for row in (row for row in summary.rows if row.method not in aside):
        score = row.scores[summary.mean]
        rows.append(
            [
                row.title,
                NOTHING if row.parameters is None else f"{row.parameters:,}",
                tables.points(score.accuracy, 1, ""),
                tables.points(score.difference, 1),
            ]
        )
    return table(["", "trained without head", f"{summary.mean.title}, %", f"minus {reference} [95 %]"], rows)


def write_tables(document: Path, lines: Mapping[str, Sequence[tables.Line]]) -> None:
    """Write the parts that a document has places for, and the plot beside the one that has the table.

    Raises:
        ValueError: If it has a place for none.
    """
    found = {name: text for name, text in texts(lines).items() if marks(name)[0] in document.read_text()}
    if not found:
        raise ValueError(f"{document} has no place for a table: a line {marks('table')[0]!r}, say.")
    for name, text in found.items():
        replace_between(document, *marks(name), text)
    if "table" in found:
        draw_pareto(summary_of(lines["comparison"]), document.with_name(PICTURE))
