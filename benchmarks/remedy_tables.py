"""What the lines of `benchmarks/remedies.py` come to: what each remedy changes, which are tested, what tests say."""

from collections.abc import Mapping, Sequence
from statistics import mean

from benchmarks import comparison_tables as tables
from gift.benchmark.intervals import LEVEL, paired_interval
from gift.benchmark.runs import SEARCH
from gift.benchmark.tables import NOTHING, table

Line = tables.Line

UNCHANGED = "none"  # name of the remedy that changes nothing
LOSES, FEWEST = 1.0, 2  # points from which GIFT loses a task; tasks that are looked at if it loses none
GAINS, HARMS = 1.0, 1.0  # points on the tasks that are lost from which, and on any other up to which, one is tested


def lost(lines: Sequence[Line]) -> tuple[str, ...]:
    """Return the tasks on which GIFT of the chosen size loses to LoRA, the worst first; `lines` are the comparison's.

    Raises:
        ValueError: If the primary question has no answer, or a run of it diverged.
    """
    found = tables.answer(lines)
    changes = {
        task: tables.difference(lines, found.chosen, tables.LORA, (task,)) if found else None for task in tables.TASKS
    }
    means = {task: change.mean for task, change in changes.items() if change is not None}
    if len(means) < len(tables.TASKS):
        raise ValueError("The primary question has no answer, so it is not known where GIFT loses.")
    worst = sorted(means, key=lambda task: means[task])
    return tuple(task for task in worst if means[task] < -LOSES) or tuple(worst[:FEWEST])


def changes(lines: Sequence[Line]) -> dict[str, dict[str, float] | None]:
    """Return by remedy and task how many points it is better than none on validation images.

    A remedy of which runs are missing, or diverged, has None.

    Raises:
        ValueError: If runs without a remedy are missing.
    """
    tasks = _tasks(lines)
    unchanged = {task: _by_seed(lines, UNCHANGED, task) for task in tasks}
    if not tasks or not all(unchanged.values()):
        raise ValueError("Runs without a remedy are missing.")
    found: dict[str, dict[str, float] | None] = {}
    for name in dict.fromkeys(line["remedy"] for line in lines):
        own = {task: _by_seed(lines, name, task) for task in tasks}
        whole = all(own[task].keys() == unchanged[task].keys() for task in tasks)
        found[name] = (
            {t: round(mean(own[t].values()) - mean(unchanged[t].values()), 6) for t in tasks} if whole else None
        )
    return found


def to_test(lines: Sequence[Line], where_lost: Sequence[str]) -> list[str]:
    """Return the remedies that help on validation images as much as the plan asks for.

    Raises:
        ValueError: If runs without a remedy, or on one of the tasks, are missing.
    """
    if missing := set(where_lost) - set(_tasks(lines)):
        raise ValueError(f"Runs on {', '.join(sorted(missing))} are missing.")
    return [
        name
        for name, change in changes(lines).items()
        if change is not None
        and name != UNCHANGED
        and mean(change[task] for task in where_lost) >= GAINS
        and all(value >= -HARMS for task, value in change.items() if task not in where_lost)
    ]


def table_of_remedies(lines: Sequence[Line], comparison: Sequence[Line]) -> str:
    """Return how much better each remedy is than none on validation images, and what tests say of those that help."""
    try:
        where_lost, by_remedy = lost(comparison), changes(lines)
        tested = to_test(lines, where_lost)
    except ValueError as error:
        return f"Not finished: {error}"
    tasks = [*where_lost, *(task for task in _tasks(lines) if task not in where_lost)]
    titles = {line["remedy"]: line["title"] for line in lines}
    unchanged = [_by_seed(lines, UNCHANGED, task) for task in tasks]
    cells = [f"{mean(one.values()):.1f}" for one in unchanged]
    over_lost = mean(mean(one.values()) for one in unchanged[: len(where_lost)])
    rows = [(float("inf"), [titles[UNCHANGED], *cells, f"{over_lost:.1f}"])]
    for name, change in by_remedy.items():
        if change is None:
            rows.append((float("-inf"), [titles[name], *[NOTHING] * len(tasks), NOTHING]))
        elif name != UNCHANGED:
            own = [_by_seed(lines, name, task) for task in where_lost]
            over_lost = tables.points(paired_interval(own, unchanged[: len(where_lost)], LEVEL), 1)
            in_cells = [f"{change[task]:+.1f}" for task in tasks]
            rows.append((mean(change[task] for task in where_lost), [titles[name], *in_cells, over_lost]))
    head = ["validation", *tasks, f"mean of the first {len(where_lost)}, where it loses [95 %]"]
    shown = table(head, [row for _, row in sorted(rows, key=lambda row: -row[0])])
    return f"{shown}\n\n{_tests(lines, comparison, tested, titles)}"


def _tests(lines: Sequence[Line], comparison: Sequence[Line], tested: Sequence[str], titles: Mapping[str, str]) -> str:
    """Return what the tests of some remedies say, on all tasks."""
    rule = f"gains {GAINS:.1f} points where GIFT loses without losing more than {HARMS:.1f} on another task"
    if not tested:
        return f"No remedy {rule}: none was tested."
    found = tables.answer(comparison)
    assert found is not None
    together = [*comparison, *lines]
    rows = []
    for name in tested:
        method = f"{found.chosen}+{name}"
        by_task = [tables.points(tables.difference(together, method, found.chosen, (t,)), 1) for t in tables.TASKS]
        whole = [
            tables.points(tables.difference(together, method, other, tables.TASKS))
            for other in (found.chosen, tables.LORA)
        ]
        rows.append([titles[name], *by_task, *whole])
    head = ["test, less that of nothing changed [95 %]", *tables.TASKS, f"mean of {len(tables.TASKS)}"]
    return f"What {rule} was tested:\n\n{table([*head, 'mean, less that of LoRA'], rows)}"


def _tasks(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line["task"] for line in lines if line["phase"] == SEARCH))


def _by_seed(lines: Sequence[Line], remedy: str, task: str) -> dict[int, float]:
    """Return accuracies in %, without those of runs that diverged."""
    own = [line for line in lines if (line["phase"], line["remedy"], line["task"]) == (SEARCH, remedy, task)]
    return {line["seed"]: 100 * line["accuracy"] for line in own if line["accuracy"] is not None}
