"""What the lines of `benchmarks/comparison.py` come to: the primary question, ranks, ablations, tables of documents."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.documents import replace_between
from gift.benchmark.intervals import LEVEL, Estimate, paired_interval
from gift.benchmark.outcome import summary_of
from gift.benchmark.plots import draw_pareto
from gift.benchmark.record import read_lines
from gift.benchmark.runs import TEST
from gift.benchmark.summary import Summary
from gift.benchmark.tables import NOTHING, markdown, table
from gift.benchmark.validation import Searched, read_searches

Line = Mapping[str, Any]

TASKS = ("digits", "dsprites_loc", "dsprites_ori", "rendered_flowers", "flowers17", "caltech97")
SEEDS, PRIMARY_SEEDS = tuple(range(5)), tuple(range(10))
LORA, DEFAULT = "lora", "gift-paca"
PACA = (DEFAULT, "gift-paca:r=4", "gift-paca:r=8")
TIMES_SMALLER, MARGIN = 3, 0.5  # at most a third of LoRA's parameters; not worse by more than half a point
SPRITES, LEARNED = TASKS[1:3], 20.0  # a mean of LoRA's tests in % below which it has barely learned these
# Name of the sizes and their ranks, over a factor of four for each; LoRA r = 1 is shown beside.
FAMILIES = {
    "LoRA": {2: "lora:r=2,lora_alpha=2", 4: "lora:r=4,lora_alpha=4", 8: LORA},
    "GIFT paca": {4: "gift-paca:r=4", 8: "gift-paca:r=8", 16: DEFAULT},
    "GIFT linear": {8: "gift-linear:r=8", 16: "gift-linear", 32: "gift-linear:r=32"},
}

ABLATED_ON = ("digits", "rendered_flowers", "flowers17")
UNCHANGED = "none"  # name of the remedy that changes nothing
MATTERS, MOST_TESTED = 1.5, 8  # points on validation images from which an ablation is tested; how many are


@dataclass(frozen=True)
class Answer:
    """The primary question, answered.

    Attributes:
        chosen: The size of GIFT that was chosen on validation images.
        difference: Of the mean over tasks to LoRA, in points, with its 95 % interval.
        without_sprites: The same without dSprites, if LoRA barely learned these; else None.
        verdict: `yes`, `no` or `open`.
    """

    chosen: str
    difference: Estimate
    without_sprites: Estimate | None
    verdict: str


def choose(lines: Sequence[Line]) -> str:
    """Return the size of GIFT with the best mean on validation images, of those that are small enough.

    Of equals it is the smaller one.

    Raises:
        ValueError: If a search of LoRA or of a size is not finished, or none is small enough.
    """
    searches = {one.method: one for one in read_searches(lines)}
    unfinished = [name for name in (LORA, *PACA) if name not in searches or set(searches[name].tried) != set(TASKS)]
    if unfinished:
        raise ValueError(f"The search is not finished, of {', '.join(unfinished)}.")
    most = (searches[LORA].parameters or 0) / TIMES_SMALLER
    small = [searches[name] for name in PACA if (searches[name].parameters or 0) <= most]
    candidates = [one for one in small if one.accuracy(TASKS) is not None]  # not those that diverged in all tries
    if not candidates:
        raise ValueError(f"No size of GIFT with at most {most:,.0f} parameters has a result on every task.")
    return max(candidates, key=lambda one: (round(one.accuracy(TASKS) or 0.0, 6), -(one.parameters or 0))).method


def difference(
    lines: Sequence[Line], method: str, reference: str, tasks: Sequence[str], level: float = LEVEL
) -> Estimate | None:
    """Return the difference of two methods over tasks in points, seed by seed; None if a run is missing or diverged."""

    def accuracies(name: str, task: str) -> dict[int, float | None]:
        own = [line for line in lines if (line["phase"], line["method"], line["task"]) == (TEST, name, task)]
        return {line["seed"]: None if line["accuracy"] is None else 100.0 * line["accuracy"] for line in own}

    ours, theirs = ([accuracies(name, task) for task in tasks] for name in (method, reference))
    if any(None in one.values() or not one for one in (*ours, *theirs)):
        return None
    return paired_interval(ours, theirs, level)  # type: ignore[arg-type]


def answer(lines: Sequence[Line]) -> Answer | None:
    """Return the answer to the primary question, or None while runs of it are missing.

    Where a run diverged, the answer is open.
    """
    try:
        chosen = choose(lines)
    except ValueError:
        return None
    done = {(line["method"], line["task"], line["seed"]) for line in lines if line["phase"] == TEST}
    needed = {(name, task, seed) for name in (LORA, chosen) for task in TASKS for seed in PRIMARY_SEEDS}
    if not needed <= done:
        return None
    whole = difference(lines, chosen, LORA, TASKS)
    if whole is None:
        return Answer(chosen, Estimate(float("nan"), None, None), None, "open")
    of_lora = [line for line in lines if (line["phase"], line["method"]) == (TEST, LORA)]
    learned = mean(100 * line["accuracy"] for line in of_lora if line["task"] in SPRITES)
    rest = None
    if learned < LEARNED:
        rest = difference(lines, chosen, LORA, [task for task in TASKS if task not in SPRITES])
    verdicts = {verdict(one) for one in (whole, rest) if one is not None}
    return Answer(chosen, whole, rest, verdicts.pop() if len(verdicts) == 1 else "no" if "no" in verdicts else "open")


def verdict(estimate: Estimate) -> str:
    """Return whether a method is not worse by more than the margin: yes, no, or open."""
    if estimate.low is None or estimate.high is None:
        return "open"
    return "yes" if estimate.low > -MARGIN else "no" if estimate.high < -MARGIN else "open"


def answer_text(lines: Sequence[Line]) -> str:
    """Return the primary question's answer in words."""
    found = answer(lines)
    if found is None:
        return "Not finished: runs of the primary question are missing."
    by_method = {line["method"]: line for line in lines if line["phase"] == TEST}
    chosen, reference = by_method[found.chosen], by_method[LORA]
    sizes = "{:,} parameters against {:,}".format(
        *(line["trained_parameters_without_head"] or 0 for line in (chosen, reference))
    )
    said = {"yes": "Yes", "no": "No", "open": f"Open: {len(PRIMARY_SEEDS)} seeds do not tell"}[found.verdict]
    text = f"**{said}.** {chosen['title']}, {sizes}: {_points(found.difference)} on the mean of {len(TASKS)} tasks"
    if found.without_sprites is None:
        return f"{text}."
    return f"{text}, {_points(found.without_sprites)} without dSprites, which LoRA barely learns."


def _points(estimate: Estimate | None, digits: int = 2, sign: str = "+") -> str:
    if estimate is None:
        return NOTHING
    shown = [f"{value:{sign}.{digits}f}" for value in (estimate.mean, estimate.low, estimate.high) if value is not None]
    return shown[0] if len(shown) == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def table_of_tasks(lines: Sequence[Line]) -> str:
    """Return the two methods of the primary question task by task, and their losses: whether they fit, or generalise.

    Losses are means over seeds; those of training are of the last epoch.
    """
    found = answer(lines)
    if found is None:
        return "Not finished: runs of the primary question are missing."
    tests = [line for line in lines if line["phase"] == TEST]
    titles = {line["method"]: line["title"] for line in tests}
    rows = []
    for task in TASKS:
        pair = [[line for line in tests if (line["method"], line["task"]) == (n, task)] for n in (LORA, found.chosen)]
        shown = [_mean_of(own, field) for field in ("accuracy", "train_loss", "loss") for own in pair]
        change = _points(difference(lines, found.chosen, LORA, (task,)))
        accuracies = [NOTHING if value is None else f"{100 * value:.1f}" for value in shown[:2]]
        losses = [NOTHING if value is None else f"{value:.3f}" for value in shown[2:]]
        rows.append([task, *accuracies, change, " / ".join(losses[:2]), " / ".join(losses[2:])])
    head = ["task", *(titles[name] for name in (LORA, found.chosen)), "difference [95 %]"]
    return table([*head, "loss in training, LoRA / GIFT", "on test images, LoRA / GIFT"], rows)


def _mean_of(lines: Sequence[Line], field: str) -> float | None:
    values = [line.get(field) for line in lines]
    return None if None in values or not values else mean(values)  # type: ignore[type-var]


def table_of_ranks(lines: Sequence[Line]) -> str:
    """Return how the mean depends on the rank: the means, best less worst, and largest less smallest rank."""
    rows = []
    for family, sizes in FAMILIES.items():
        means = {rank: _mean(lines, name) for rank, name in sizes.items()}
        known = [value for value in means.values() if value is not None]
        shown = ", ".join(f"{rank}: {NOTHING if value is None else f'{value:.1f}'}" for rank, value in means.items())
        spread = f"{max(known) - min(known):.1f}" if len(known) == len(means) else NOTHING
        rows.append([family, shown, spread, _points(difference(lines, sizes[max(sizes)], sizes[min(sizes)], TASKS), 1)])
    head = ["method", f"mean of {len(TASKS)} tasks in %, by r", "best less worst", "largest less smallest r [95 %]"]
    return table(head, rows)


def _mean(lines: Sequence[Line], method: str) -> float | None:
    """Return the mean over tasks of the means over the seeds that all methods have; None if one is missing."""
    own = [line for line in lines if (line["phase"], line["method"]) == (TEST, method) and line["seed"] in SEEDS]
    if any(line["accuracy"] is None for line in own) or len(own) < len(TASKS) * len(SEEDS):
        return None
    return 100 * mean(mean(line["accuracy"] for line in own if line["task"] == task) for task in TASKS)


def that_matter(lines: Sequence[Line], ablations: Iterable[str], always: Sequence[str]) -> list[str]:
    """Return the ablations to test: those that differ most from the default on validation images, and some always.

    Raises:
        ValueError: If the search of one is not finished.
    """
    searches = {one.method: one for one in read_searches(lines)}
    unfinished = [n for n in (DEFAULT, *ablations) if n not in searches or set(searches[n].tried) != set(ABLATED_ON)]
    if unfinished:
        raise ValueError(f"The screening is not finished, of {', '.join(unfinished)}.")
    changes = {name: abs(change) for name, change in _changes(searches.values()).items() if change is not None}
    largest = sorted((name for name in changes if changes[name] >= MATTERS), key=lambda name: -changes[name])
    return [*[name for name in largest if name not in always][:MOST_TESTED], *always]


def _changes(searches: Iterable[Searched]) -> dict[str, float | None]:
    """Return by method how much better than the default it is on validation images, without the default."""
    by_name = {searched.method: searched.accuracy(ABLATED_ON) for searched in searches}
    default = by_name.pop(DEFAULT)
    return {name: less(own, default) for name, own in by_name.items()}


def less(ours: float | None, theirs: float | None) -> float | None:
    """Return how much more the first is than the second, or None if one is missing."""
    return None if ours is None or theirs is None else ours - theirs


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
    return _points(difference(lines, method, DEFAULT, ABLATED_ON)) + (" *" if is_other else "")


def _in_words(method: str) -> str:
    if method == DEFAULT:
        return "nothing changed"
    return method.removeprefix(f"{DEFAULT}:").replace("gift-linear", "generator=linear").removeprefix("gift:")


def table_of_remedies(lines: Sequence[Line]) -> str:
    """Return how much better each remedy is than none on validation images, by task and on the mean over tasks."""
    titles = {line["remedy"]: line["title"] for line in lines}
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    unchanged = [_by_seed(lines, UNCHANGED, task) for task in tasks]
    if not all(unchanged):
        return "Not finished: runs without a remedy are missing."
    cells = [f"{mean(one.values()):.1f}" for one in unchanged]
    rows = [(0.0, [titles.pop(UNCHANGED), *cells, f"{mean(mean(one.values()) for one in unchanged):.1f}"])]
    for name, title in titles.items():
        own = [_by_seed(lines, name, task) for task in tasks]
        if any(a.keys() != b.keys() for a, b in zip(own, unchanged, strict=True)):
            rows.append((float("-inf"), [title, *[NOTHING] * len(tasks), NOTHING]))
            continue
        changes = [mean(a.values()) - mean(b.values()) for a, b in zip(own, unchanged, strict=True)]
        whole = _points(paired_interval(own, unchanged, LEVEL), 1)
        rows.append((mean(changes), [title, *[f"{change:+.1f}" for change in changes], whole]))
    rows[1:] = sorted(rows[1:], key=lambda row: -row[0])
    return table(["validation", *tasks, "mean [95 %]"], [row for _, row in rows])


def _by_seed(lines: Sequence[Line], remedy: str, task: str) -> dict[int, float]:
    """Return accuracies in %, without those of runs that diverged."""
    own = [line for line in lines if (line["remedy"], line["task"]) == (remedy, task)]
    return {line["seed"]: 100 * line["accuracy"] for line in own if line["accuracy"] is not None}


# ---- documents -------------------------------------------------------------------------------------------------------


def read_results(results: Path) -> dict[str, list[Line]]:
    """Return the lines that lie in the repository, by the name of their file."""
    names = ("comparison", "ablations", "remedies")
    return {name: [*read_lines(path)] for name in names if (path := results / f"{name}.jsonl").exists()}


def marks(name: str) -> tuple[str, str]:
    """Return the lines between which a part of a document stands."""
    return f"<!-- {name}: benchmarks/comparison.py write -->", f"<!-- end of {name} -->"


def texts(lines: Mapping[str, Sequence[Line]]) -> dict[str, str]:
    """Return what documents show, by the name of the part."""
    found: dict[str, str] = {}
    if "comparison" in lines:
        summary = summary_of(lines["comparison"])
        found = {"answer": answer_text(lines["comparison"]), "ranks": table_of_ranks(lines["comparison"])}
        found["tasks"] = table_of_tasks(lines["comparison"])
        found |= {"table": all_tables(summary), "means": table_of_means(summary, lines["comparison"])}
    if "ablations" in lines:
        found["ablations"] = table_of_ablations(lines["ablations"])
    if "remedies" in lines:
        found["remedies"] = table_of_remedies(lines["remedies"])
    return found


PICTURE = "benchmarks-comparison.png"  # beside the document that has the table


def all_tables(summary: Summary) -> str:
    """Return the tables of `gift benchmark`, one level below a document's own headings, and the plot."""
    tables = re.sub(r"^##", "###", markdown(summary), flags=re.MULTILINE)
    return f"{tables}\n![Accuracy against trained parameters]({PICTURE})\n"


def table_of_means(summary: Summary, lines: Sequence[Line]) -> str:
    """Return the means over tasks alone: of every method in its usual size, and of the size that was chosen."""
    reference = next((row.title for row in summary.rows if row.method == summary.reference), "")
    found = answer(lines)
    aside = {name for sizes in FAMILIES.values() for name in sizes.values()} | {"lora:r=1,lora_alpha=1"}
    aside -= {LORA, DEFAULT, "gift-linear", found.chosen if found else DEFAULT}
    rows = []
    for row in (row for row in summary.rows if row.method not in aside):
        score = row.scores[summary.mean]
        rows.append([row.title, f"{row.parameters:,}", _points(score.accuracy, 1, ""), _points(score.difference, 1)])
    return table(["", "trained without head", f"{summary.mean.title}, %", f"less that of {reference} [95 %]"], rows)


def write_tables(document: Path, lines: Mapping[str, Sequence[Line]]) -> None:
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
