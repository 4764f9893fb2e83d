"""What the lines of `benchmarks/comparison.py` come to: the primary question, ranks, ablations, tables of documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import suite
from benchmarks.documents import replace_between
from gift.benchmark.intervals import Estimate
from gift.benchmark.outcome import summary_of
from gift.benchmark.plots import draw_pareto
from gift.benchmark.runs import TEST
from gift.benchmark.summary import Row, Summary, summarise
from gift.benchmark.tables import NOTHING, table
from gift.benchmark.validation import Searched, read_searches

Line = Mapping[str, Any]

LORA, DEFAULT = "lora", "gift-paca"
PACA = (DEFAULT, "gift-paca:r=4", "gift-paca:r=8")
FAMILIES = {
    "LoRA": ("lora:r=1,lora_alpha=1", "lora:r=2,lora_alpha=2", "lora:r=4,lora_alpha=4", LORA),
    "GIFT paca": ("gift-paca:r=4", "gift-paca:r=8", DEFAULT),
    "GIFT linear": ("gift-linear:r=8", "gift-linear", "gift-linear:r=32"),
}
SHARE, MARGIN = 3, 0.5  # at most a third of LoRA's parameters; not worse by more than half a point
SPRITES, LEARNED = ("dsprites_loc", "dsprites_ori"), 20.0  # below this accuracy in % LoRA has barely learned a task
MATTERS, MOST = 1.5, 8  # points on validation images from which an ablation gets five seeds, and how many get them

FILES = ("comparison", "ablations")


@dataclass(frozen=True)
class Answer:
    """The primary question, answered.

    Attributes:
        chosen: The size of GIFT that was chosen on validation images.
        reference: LoRA r = 8.
        difference: Of the means over tasks in points, with its 95 % interval.
        verdict: `yes`, `no` or `open`.
    """

    chosen: Row
    reference: Row
    difference: Estimate
    verdict: str


def choose(searches: Sequence[Searched]) -> str:
    """Return the size of GIFT with the best mean on validation images, of those that are small enough.

    Of equals it is the smaller one.
    """
    by_name = {searched.method: searched for searched in searches}
    tasks = tuple(by_name[LORA].best)
    most = (by_name[LORA].parameters or 0) / SHARE
    candidates = [by_name[name] for name in PACA if name in by_name and (by_name[name].parameters or 0) <= most]
    if not candidates or any(one.accuracy(tasks) is None for one in candidates):
        raise ValueError(f"No size of GIFT with at most {most:,.0f} parameters was searched for on every task of LoRA.")
    return max(candidates, key=lambda one: (round(one.accuracy(tasks) or 0.0, 6), -(one.parameters or 0))).method


def answer(lines: Sequence[Line], without: Sequence[str] = ()) -> Answer:
    """Return the answer to the primary question, on all tasks or without some; the choice is made on all."""
    chosen = choose(read_searches(lines))
    summary = summarise([line for line in lines if line["task"] not in without], LORA)
    rows = {row.method: row for row in summary.rows}
    difference = rows[chosen].scores[summary.mean].difference
    assert difference is not None
    return Answer(rows[chosen], rows[LORA], difference, verdict(difference))


def verdict(difference: Estimate) -> str:
    """Return whether a method is not worse by more than the margin: yes, no, or open."""
    if difference.low is None or difference.high is None:
        return "open"
    return "yes" if difference.low > -MARGIN else "no" if difference.high < -MARGIN else "open"


def that_matter(lines: Sequence[Line], always: Sequence[str]) -> list[str]:
    """Return the ablations that differ most from the default on validation images, and those that are always run."""
    searches = read_searches(lines)
    changes = {name: abs(change) for name, change in _changes(searches).items() if change is not None}
    largest = sorted((name for name in changes if changes[name] >= MATTERS), key=lambda name: -changes[name])
    return list(dict.fromkeys([*[name for name in largest if name not in always][:MOST], *always]))


def _changes(searches: Sequence[Searched]) -> dict[str, float | None]:
    default = next(searched for searched in searches if searched.method == DEFAULT)
    tasks, changes = tuple(default.best), {}
    for searched in searches:
        own, other = searched.accuracy(tasks), default.accuracy(tasks)
        if searched is not default:
            changes[searched.method] = None if own is None or other is None else own - other
    return changes


def write_tables(document: Path, lines: Mapping[str, Sequence[Line]]) -> None:
    """Write the tables that a document has places for."""
    text = document.read_text()
    for name, part in parts(lines, document).items():
        start, end = marks(name)
        if start in text:
            replace_between(document, start, end, part)


def marks(name: str) -> tuple[str, str]:
    """Return the lines between which a part stands."""
    return f"<!-- {name}: benchmarks/comparison.py write -->", f"<!-- end of {name} -->"


def parts(lines: Mapping[str, Sequence[Line]], document: Path) -> dict[str, str]:
    """Return the text of every part by its name, and draw the plot beside the document that shows it."""
    found: dict[str, str] = {}
    if "comparison" in lines:
        summary = summary_of(lines["comparison"])
        picture = document.with_name("benchmarks-comparison.png")
        if marks("comparison")[0] in document.read_text():
            draw_pareto(summary, picture)
        found |= {"answer": answer_text(lines["comparison"]), "comparison": suite.document(summary, picture.name)}
        found |= {"ranks": table_of_ranks(summary), "means": suite.readme_table(summary)}
    if "ablations" in lines:
        found["ablations"] = table_of_ablations(lines["ablations"])
    return found


def answer_text(lines: Sequence[Line]) -> str:
    """Return the primary question's answer in words, and what was said beforehand to be said with it."""
    main = answer(lines)
    sizes = f"{main.chosen.parameters:,} parameters against {main.reference.parameters:,}"
    better = main.difference.low is not None and main.difference.low > 0
    said = {"yes": "Yes", "no": "No", "open": "Open: five seeds do not tell"}[main.verdict]
    text = [f"**{said}{', and better' if better else ''}.** {main.chosen.title} ({sizes}): {_points(main.difference)}."]
    accuracies = [
        100 * line["accuracy"]
        for line in lines
        if line["phase"] == TEST and line["method"] == LORA and line["task"] in SPRITES
    ]
    if accuracies and sum(accuracies) / len(accuracies) < LEARNED:
        rest = answer(lines, without=SPRITES)
        text.append(f"Without dSprites, which LoRA barely learns: {rest.verdict}, {_points(rest.difference)}.")
    return " ".join(text)


def _points(estimate: Estimate) -> str:
    if estimate.low is None:
        return f"{estimate.mean:+.2f} points"
    return f"{estimate.mean:+.2f} points [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def table_of_ranks(summary: Summary) -> str:
    """Return how the mean depends on the rank, by family."""
    by_name = {row.method: row for row in summary.rows}
    rows = []
    for family, names in FAMILIES.items():
        found = [by_name[name] for name in names if name in by_name]
        means = [(row, row.scores[summary.mean].accuracy) for row in found]
        known = [(row, mean.mean) for row, mean in means if mean is not None]
        if len(known) > 1:
            values = [value for _, value in known]
            shown = ", ".join(f"{_rank_of(row)}: {value:.1f}" for row, value in known)
            rows.append([family, shown, f"{max(values) - min(values):.1f}"])
    return table(["method", f"{summary.mean.title} in %, by r", "best less worst"], rows)


def _rank_of(row: Row) -> str:
    return next(word for word in row.title.split() if word.startswith("r=")).removeprefix("r=")


def table_of_ablations(lines: Sequence[Line]) -> str:
    """Return every ablation: on validation images (one seed), and on test images where it had five."""
    searches = read_searches(lines)
    changes, tested = _changes(searches), [line for line in lines if line["phase"] == TEST]
    default = next(searched for searched in searches if searched.method == DEFAULT)
    tasks = tuple(default.best)
    summary = summarise(lines, DEFAULT) if tested else None
    differences = {row.method: row.scores[summary.mean].difference for row in summary.rows} if summary else {}
    rows = []
    for searched in sorted(searches, key=lambda one: -(changes.get(one.method) or 0.0)):
        mean, change = searched.accuracy(tasks), changes.get(searched.method)
        difference = differences.get(searched.method)
        cells = ["default" if searched is default else _change_in_words(searched), f"{searched.parameters or 0:,}"]
        cells += [NOTHING if mean is None else f"{mean:.1f}", "" if change is None else f"{change:+.1f}"]
        rows.append([*cells, "" if difference is None else _points(difference).replace(" points", "")])
    head = ["GIFT paca r=16 M=96 with", "trained without head", f"validation, mean of {len(tasks)} tasks"]
    return table([*head, "less default", "test, less default [95 %]"], rows)


def _change_in_words(searched: Searched) -> str:
    return searched.method.removeprefix(f"{DEFAULT}:").replace("gift-linear", "generator=linear").removeprefix("gift:")
