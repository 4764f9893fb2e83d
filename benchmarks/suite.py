"""The results of `gift benchmark` into the repository: lines, tables, plot, and the table of the README.

    gift benchmark offline --out runs/offline --data runs/data --reduced true --seeds 0 1 \
        --methods linear-probe lora toast-lite vpt-deep gift-paca gift-linear
    python benchmarks/suite.py --runs runs/offline --out results/offline.jsonl --document_file docs/benchmarks.md \
        --readme README.md

Without --runs, documents are written anew from what lies in the repository.
"""

import json
import re
import sys
from pathlib import Path

from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.documents import replace_between
from gift.benchmark.outcome import summary_of
from gift.benchmark.plots import draw_pareto
from gift.benchmark.record import read_lines
from gift.benchmark.summary import Summary
from gift.benchmark.tables import NOTHING, markdown

START, END = "<!-- tables of `gift benchmark` -->", "<!-- /tables of `gift benchmark` -->"
README_START, README_END = "<!-- table of `gift benchmark` -->", "<!-- /table of `gift benchmark` -->"


def readme_table(summary: Summary) -> str:
    """Return the means alone."""
    mean = summary.mean
    reference = next((row.title for row in summary.rows if row.method == summary.reference), "")
    measured = f"{summary.suite}, {summary.epochs} epochs"
    lines = [
        f"| {measured} | trained without head | {mean.title}, % | less that of {reference} |",
        "|---|---|---|---|",
    ]
    for row in summary.rows:
        score = row.scores[mean]
        cells = [row.title, f"{row.parameters:,}", _shown(score.accuracy, ""), _shown(score.difference, "+")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(estimate, sign: str) -> str:
    if estimate is None:
        return NOTHING
    if estimate.low is None:
        return f"{estimate.mean:{sign}.1f}"
    return f"{estimate.mean:{sign}.1f} [{estimate.low:{sign}.1f}, {estimate.high:{sign}.1f}]"


def document(summary: Summary, picture: str) -> str:
    """Return the tables, one level below the document's own headings, and the plot."""
    tables = re.sub(r"^##", "###", markdown(summary), flags=re.MULTILINE)
    return f"{tables}\n![Accuracy against trained parameters]({picture})\n"


def main(out: Path, runs: Path | None = None, document_file: Path | None = None, readme: Path | None = None) -> None:
    """Take over the lines of a benchmark, and write what shows them.

    Args:
        out: JSON lines in the repository.
        runs: Folder of a benchmark whose lines are taken over.
        document_file: Document whose tables are written anew, with the plot beside it.
        readme: README whose table is written anew.
    """
    if runs is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(f"{json.dumps(line)}\n" for line in read_lines(runs)))
    summary = summary_of(read_lines(out))
    if document_file is not None:
        picture = document_file.with_name(f"benchmarks-{out.stem}.png")
        draw_pareto(summary, picture)
        replace_between(document_file, START, END, document(summary, picture.name))
    if readme is not None:
        replace_between(readme, README_START, README_END, readme_table(summary))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
