"""What the lines of `benchmarks/remedies.py` come to: what each remedy changes, which are tested, what tests say."""

from collections.abc import Mapping, Sequence
from statistics import mean

from benchmarks import comparison_tables as tables
from benchmarks.comparison_tables import Line, less
from gift.benchmark.intervals import LEVEL, paired_interval
from gift.benchmark.runs import SEARCH, TEST
from gift.benchmark.tables import NOTHING, table

SEEDS = (101, 102, 103)  # of every remedy on validation images
UNCHANGED = "none"  # name of the remedy that changes nothing
LOSES, FEWEST = 1.0, 2  # points from which GIFT loses a task; tasks that are looked at if it loses none
GAINS, HARMS = 1.0, 1.0  # points on the tasks that are lost from which, and on any other up to which, one is tested


def lost(lines: Sequence[Line]) -> tuple[str, ...]:
    """Return the tasks on which GIFT of the chosen size loses to LoRA, the worst first; `lines` are the comparison's.

    Raises:
        ValueError: If the primary question has no answer, or a run of it diverged.
    """
    found = tables.answer(lines)
    of_tasks = {t: tables.difference(lines, found.chosen, tables.LORA, (t,)) for t in tables.TASKS} if found else {}
    means = {task: change.mean for task, change in of_tasks.items() if change is not None}
    if len(means) < len(tables.TASKS):
        raise ValueError("The primary question has no answer, so it is not known where GIFT loses.")
    worst = sorted(means, key=lambda task: means[task])
    return tuple(task for task in worst if means[task] < -LOSES) or tuple(worst[:FEWEST])


def method_of(chosen: str, remedy: str) -> str:
    """Return the name of a method with a remedy."""
    return f"{chosen}+{remedy}"


def remedy_of(method: str) -> str:
    """Return the remedy in the name of a method."""
    return method.rpartition("+")[2]


def changes(lines: Sequence[Line]) -> dict[str, dict[str, float | None]]:
    """Return by remedy and task how many points it is better than none on validation images; None if a run diverged.

    Raises:
        ValueError: If runs are missing, or one without a remedy diverged.
    """
    tasks, by_run = _tasks(lines), _by_run(lines)
    remedies = list(dict.fromkeys((UNCHANGED, *(remedy for remedy, _, _ in by_run))))
    needed = {(remedy, task, seed) for remedy in remedies for task in tasks for seed in SEEDS}
    if missing := needed - by_run.keys():
        raise ValueError(f"{len(missing)} runs are missing, such as {' '.join(map(str, min(missing)))}.")
    unchanged = {task: _mean_of(by_run, UNCHANGED, task) for task in tasks}
    if None in unchanged.values():
        raise ValueError("A run without a remedy diverged, so there is nothing to compare with.")
    of_each = {name: {task: less(_mean_of(by_run, name, task), unchanged[task]) for task in tasks} for name in remedies}
    del of_each[UNCHANGED]
    return of_each


def to_test(lines: Sequence[Line], where_lost: Sequence[str]) -> list[str]:
    """Return the remedies that help on validation images as much as the plan asks for.

    Raises:
        ValueError: If runs are missing, or one without a remedy diverged.
    """
    if missing := set(where_lost) - set(_tasks(lines)):
        raise ValueError(f"Runs on {', '.join(sorted(missing))} are missing.")
    found = []
    for name, by_task in changes(lines).items():
        known = {task: change for task, change in by_task.items() if change is not None}
        helps = known == by_task and mean(known[task] for task in where_lost) >= GAINS
        if helps and all(change >= -HARMS for task, change in known.items() if task not in where_lost):
            found.append(name)
    return found


def table_of_remedies(lines: Sequence[Line], comparison: Sequence[Line]) -> str:
    """Return how much better each remedy is than none on validation images, and what tests say of those that help."""
    try:
        where_lost = lost(comparison)
        tested, by_remedy = to_test(lines, where_lost), changes(lines)
    except ValueError as error:
        return f"Not finished: {error}"
    tasks = [*where_lost, *(task for task in _tasks(lines) if task not in where_lost)]
    by_run, methods = _by_run(lines), {remedy_of(line["method"]): line for line in lines}
    first = [_mean_of(by_run, UNCHANGED, task) or 0.0 for task in tasks]
    rows = [
        (float("inf"), [*_named(methods[UNCHANGED]), *[f"{it:.1f}" for it in (*first, mean(first[: len(where_lost)]))]])
    ]
    for name, change in by_remedy.items():
        cells = ["diverged" if change[task] is None else f"{change[task]:+.1f}" for task in tasks]
        whole, order = NOTHING, float("-inf")
        if "diverged" not in cells[: len(where_lost)]:
            pair = [
                [{seed: by_run[it, task, seed] for seed in SEEDS} for task in where_lost] for it in (name, UNCHANGED)
            ]
            estimate = paired_interval(*pair, LEVEL)
            whole, order = tables.points(estimate, 1), estimate.mean
        rows.append((order, [*_named(methods[name]), *cells, whole]))
    head = ["accuracy in %; below, what each remedy adds", "trained without head", *tasks]
    head.append(f"mean of the first {len(where_lost)}, where it loses [95 %]")
    shown = table(head, [row for _, row in sorted(rows, key=lambda row: -row[0])])
    return f"{shown}\n\n{_tests(lines, comparison, tested)}"


def _named(line: Line) -> list[str]:
    return [line["title"], f"{line['trained_parameters_without_head'] or 0:,}"]


def _tests(lines: Sequence[Line], comparison: Sequence[Line], tested: Sequence[str]) -> str:
    """Return what the tests of some remedies say, on all tasks."""
    rule = f"gains {GAINS:.1f} points where GIFT loses without losing more than {HARMS:.1f} on another task"
    if not tested:
        return f"No remedy {rule}: none was tested."
    found = tables.answer(comparison)
    assert found is not None
    together, rows = [*comparison, *(line for line in lines if line["phase"] == TEST)], []
    for name in tested:
        method = method_of(found.chosen, name)
        title = next(line["title"] for line in lines if line["method"] == method)
        over = [((task,), found.chosen, 1) for task in tables.TASKS]
        over += [(tables.TASKS, found.chosen, 2), (tables.TASKS, tables.LORA, 2)]
        cells = [tables.points(tables.difference(together, method, other, tasks), n) for tasks, other, n in over]
        rows.append([title, *cells])
    head = ["on test images, less nothing changed [95 %]", *tables.TASKS, f"mean of {len(tables.TASKS)}"]
    return f"What {rule} was tested:\n\n{table([*head, 'mean, less that of LoRA'], rows)}"


def _tasks(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line["task"] for line in lines if line["phase"] == SEARCH))


def _by_run(lines: Sequence[Line]) -> dict[tuple[str, str, int], float | None]:
    """Return accuracies on validation images in % by remedy, task and seed."""
    searches = {(remedy_of(it["method"]), it["task"], it["seed"]): it for it in lines if it["phase"] == SEARCH}
    return {run: None if it["accuracy"] is None else 100 * it["accuracy"] for run, it in searches.items()}


def _mean_of(by_run: Mapping[tuple[str, str, int], float | None], remedy: str, task: str) -> float | None:
    values = [by_run[remedy, task, seed] for seed in SEEDS]
    return None if None in values else round(mean(value for value in values if value is not None), 6)
