"""What the lines of `benchmarks/comparison.py` come to: the primary question, tasks, ranks, rates and machines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from statistics import mean
from typing import Any

from gift.benchmark.intervals import LEVEL, Estimate, paired_interval
from gift.benchmark.runs import SEARCH, TEST
from gift.benchmark.tables import NOTHING, table
from gift.benchmark.validation import read_searches

Line = Mapping[str, Any]

TASKS = ("digits", "dsprites_loc", "dsprites_ori", "rendered_flowers", "flowers17", "caltech97")
SEEDS, PRIMARY_SEEDS = tuple(range(5)), tuple(range(10))
LORA, DEFAULT = "lora", "gift-paca"
SMALLEST_LORA = "lora:r=1,lora_alpha=1"
PACA = (DEFAULT, "gift-paca:r=4", "gift-paca:r=8")
TIMES_SMALLER, MARGIN = 3, 0.5  # at most a third of LoRA's parameters; not worse by more than half a point
SPRITES, LEARNED = TASKS[1:3], 20.0  # a mean of LoRA's tests in % below which it has barely learned these
LEARNABLE = tuple(task for task in TASKS if task not in SPRITES)
PHOTOS = ("flowers17", "caltech97")
PARTS = {
    "difference [95 %]": TASKS,
    "without dSprites": LEARNABLE,
    "digits and drawn flowers": tuple(task for task in LEARNABLE if task not in PHOTOS),
    "photos": PHOTOS,
}
# Name of the sizes and their ranks, over a factor of four for each; the smaller LoRAs are about as small as GIFT.
FAMILIES = {
    "LoRA": {2: "lora:r=2,lora_alpha=2", 4: "lora:r=4,lora_alpha=4", 8: LORA},
    "GIFT paca": {4: "gift-paca:r=4", 8: "gift-paca:r=8", 16: DEFAULT},
    "GIFT linear": {8: "gift-linear:r=8", 16: "gift-linear", 32: "gift-linear:r=32"},
}
SMALLER_LORA = {"LoRA, smaller": {1: SMALLEST_LORA, 2: "lora:r=2,lora_alpha=2", 4: "lora:r=4,lora_alpha=4"}}
# What is the same in two lines of one search.
SAME_RUN = ("learning_rate", "weight_decay", "method", "task", "seed", "images_digest", "backbone_digest")


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
    """Return the difference of two methods over tasks in points, seed by seed; None if a run is missing or diverged.

    Five seeds are needed; of more, those count that both have.
    """
    ours, theirs = (_accuracies(lines, name, tasks) for name in (method, reference))
    return None if ours is None or theirs is None else paired_interval(ours, theirs, level)


def difference_by_seed(lines: Sequence[Line], method: str, reference: str, tasks: Sequence[str]) -> Estimate | None:
    """Return `difference` with an interval that does not take the tasks of a seed as independent of each other.

    For each seed it is the mean over tasks that counts. Runs of a seed share the random start of the adapter.
    """
    both = [_accuracies(lines, name, tasks) for name in (method, reference)]
    if None in both:
        return None
    return paired_interval(*([_means_over(one)] for one in both if one is not None))


def _accuracies(lines: Sequence[Line], name: str, tasks: Sequence[str]) -> list[dict[int, float]] | None:
    """Return the accuracies in % of a method by seed, for each task; None if a run is missing or diverged."""
    found = []
    for task in tasks:
        own = [line for line in lines if (line["phase"], line["method"], line["task"]) == (TEST, name, task)]
        if any(line["accuracy"] is None for line in own) or not set(SEEDS) <= {line["seed"] for line in own}:
            return None
        found.append({line["seed"]: 100.0 * line["accuracy"] for line in own})
    return found


def _means_over(accuracies: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Return the mean over tasks for each seed that all of them have."""
    return {seed: mean(one[seed] for one in accuracies) for seed in set.intersection(*map(set, accuracies))}


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
        rest = difference(lines, chosen, LORA, LEARNABLE)
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
    text = f"**{said}.** {chosen['title']}, {sizes}: {points(found.difference)} on the mean of {len(TASKS)} tasks"
    parts = [TASKS]
    if found.without_sprites is not None:
        text = f"{text}, {points(found.without_sprites)} without dSprites, which LoRA barely learns"
        parts.append(LEARNABLE)
    by_seed = [difference_by_seed(lines, found.chosen, LORA, tasks) for tasks in parts]
    if None in by_seed:
        return f"{text}."
    return f"{text}. If tasks of a seed are not taken as independent: {' and '.join(map(points, by_seed))}."


def points(estimate: Estimate | None, digits: int = 2, sign: str = "+") -> str:
    """Return a figure in points and, in brackets, its interval."""
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
        change = points(difference(lines, found.chosen, LORA, (task,)))
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
    for family, sizes in (FAMILIES | SMALLER_LORA).items():
        means = {rank: _mean(lines, name) for rank, name in sizes.items()}
        known = [value for value in means.values() if value is not None]
        shown = ", ".join(f"{rank}: {NOTHING if value is None else f'{value:.1f}'}" for rank, value in means.items())
        spread = f"{max(known) - min(known):.1f}" if len(known) == len(means) else NOTHING
        rows.append([family, shown, spread, points(difference(lines, sizes[max(sizes)], sizes[min(sizes)], TASKS), 1)])
    head = [
        "method",
        f"mean of {len(TASKS)} tasks in % (seeds 0 to {SEEDS[-1]}), by r",
        "best less worst",
        "largest less smallest r [95 %]",
    ]
    return table(head, rows)


def table_of_parts(lines: Sequence[Line]) -> str:
    """Return every tested method beside LoRA r = 8, also on some of the tasks alone."""
    sizes = _sizes(lines)
    titles = _titles(lines, sizes)
    rows = [[titles[name], *_parts(lines, name, LORA)] for name in sizes if name != LORA]
    return table(["method, trained without head", *PARTS], rows)


def table_of_equal_sizes(lines: Sequence[Line]) -> str:
    """Return every size of GIFT beside the smallest LoRA that trains as many numbers or more."""
    sizes = _sizes(lines)
    titles = _titles(lines, sizes)
    loras = sorted((sizes[name], name) for name in (SMALLEST_LORA, *FAMILIES["LoRA"].values()) if name in sizes)
    rows = []
    for name in (name for family in ("GIFT paca", "GIFT linear") for name in FAMILIES[family].values()):
        lora = next((lora for size, lora in loras if name in sizes and size >= sizes[name]), None)
        if lora is not None:
            rows.append([titles[name], titles[lora], *_parts(lines, name, lora)])
    return table(["GIFT, trained without head", "LoRA with as many or more", *PARTS], rows)


def table_of_generators(lines: Sequence[Line]) -> str:
    """Return every size of GIFT `linear` beside the size of `paca` nearest to it, by their ratio, and its rank."""
    sizes = _sizes(lines)
    titles = _titles(lines, sizes)
    paca, linear = (
        {r: name for r, name in FAMILIES[f"GIFT {one}"].items() if name in sizes} for one in ("paca", "linear")
    )
    rows = []
    for r, name in linear.items() if paca else ():
        nearest = min(paca.values(), key=lambda other: abs(log(sizes[other] / sizes[name])))
        for other in dict.fromkeys((nearest, paca.get(r, nearest))):
            rows.append([titles[name], titles[other], *_parts(lines, name, other)])
    return table(["GIFT linear, trained without head", "GIFT paca nearest in size, or of the same rank", *PARTS], rows)


def _sizes(lines: Sequence[Line]) -> dict[str, int]:
    """Return the numbers that are trained without the head, of every method that was tested."""
    tests = [line for line in lines if line["phase"] == TEST and line["accuracy"] is not None]
    return {line["method"]: line["trained_parameters_without_head"] for line in tests}


def _titles(lines: Sequence[Line], sizes: Mapping[str, int]) -> dict[str, str]:
    """Return the title of every method, with its size."""
    return {line["method"]: f"{line['title']}: {sizes[line['method']]:,}" for line in lines if line["method"] in sizes}


def _parts(lines: Sequence[Line], method: str, other: str) -> list[str]:
    """Return by how much the first of two methods is better on the parts of the tasks."""
    return [points(difference(lines, method, other, tasks), 1) for tasks in PARTS.values()]


def table_of_rates(lines: Sequence[Line]) -> str:
    """Return what every learning rate came to on validation images, of the methods whose search is finished."""
    rows = []
    for one in (one for one in read_searches(lines) if set(one.tried) == set(TASKS)):
        own = [line for line in lines if (line["phase"], line["method"]) == (SEARCH, one.method)]
        rates = sorted({line["learning_rate"] for line in own})
        means = [_mean_of([line for line in own if line["learning_rate"] == rate], "accuracy") for rate in rates]
        shown = [NOTHING if value is None else f"{100 * value:.1f}" for value in means]
        rows.append([one.title, ", ".join(f"{rate:g}: {value}" for rate, value in zip(rates, shown, strict=True))])
    return table(["method", f"mean of {len(TASKS)} tasks in % on validation images, by learning rate"], rows)


def table_of_machines(lines: Sequence[Line]) -> str:
    """Return how far the same searches differ between machines, by learning rate; `lines` may be of several files.

    They are of the same images and backbone, and diverged on none.
    """
    by_run: dict[tuple[Any, ...], dict[str, Line]] = {}
    for line in (line for line in lines if line["phase"] == SEARCH and line["accuracy"] is not None):
        key = tuple(line.get(name) for name in SAME_RUN)
        by_run.setdefault(key, {}).setdefault(line.get("device"), line)
    twice = {key: [*one.values()] for key, one in by_run.items() if len(one) > 1}
    rows = []
    for rate in sorted({key[0] for key in twice}):
        pairs = [one for key, one in twice.items() if key[0] == rate]
        of_accuracy, of_loss = ([_spread(one, field) for one in pairs] for field in ("accuracy", "loss"))
        shown = [f"{100 * max(of_accuracy):.1f}", f"{max(of_loss):.1g}"]
        rows.append([f"{rate:g}", str(len(pairs)), str(of_accuracy.count(0)), *shown])
    head = ["learning rate", "searches run on two machines", "of the same accuracy"]
    return table([*head, "most points between them", "most between losses"], rows)


def _spread(lines: Sequence[Line], field: str) -> float:
    values = [line[field] for line in lines]
    return max(values) - min(values)


def _mean(lines: Sequence[Line], method: str) -> float | None:
    """Return the mean over tasks of the means over the seeds that all methods have; None if one is missing."""
    found = _accuracies([line for line in lines if line["seed"] in SEEDS], method, TASKS)
    return None if found is None else mean(mean(one.values()) for one in found)


def less(ours: float | None, theirs: float | None) -> float | None:
    """Return how much more the first is than the second, or None if one is missing."""
    return None if ours is None or theirs is None else ours - theirs
