"""Means over tasks with what chance in training does to them, and which methods no other method beats.

A result is the accuracy of one training, given by task and seed. Trainings are taken as independent of each other.

What a 95 % interval of this file covers: other trainings (seeds: the new head, the order of the images, dropout) of
the same method on the same tasks, with the same learning rates, tested on the same images. What it does not cover:
other test images, other training images, other tasks (the tasks are fixed, so the spread between tasks does not widen
it), and the choice of the learning rate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

LEVEL = 0.95

Accuracies = Mapping[str, Mapping[int, float]]  # in %, by task and seed


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    Attributes:
        mean: Mean over tasks of the means over seeds.
        low: Lower end of the interval; None where a task has one seed only, which says nothing about chance.
        high: Upper end of the interval, or None.
    """

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Column:
    """What an accuracy is over.

    Attributes:
        scope: One task, the tasks of one group, or the mean over all tasks.
        name: Of the task or group; `mean` for the mean.
        title: For tables; says how many tasks there are where some of the suite are missing.
        tasks: Names of the tasks.
        is_whole: Whether these are all tasks that the suite has there, as published figures need.
    """

    scope: Literal["task", "group", "mean"]
    name: str
    title: str
    tasks: tuple[str, ...]
    is_whole: bool


@dataclass(frozen=True)
class Score:
    """What a method reaches on some tasks; all None where it has no accuracy of one of them.

    Attributes:
        accuracy: In %; the interval is cut at 0 and 100.
        difference: To the reference in points, over the seeds that both have.
        seeds: Fewest seeds of a task.
        difference_seeds: Fewest seeds of a task that both have.
    """

    accuracy: Estimate | None = None
    difference: Estimate | None = None
    seeds: int | None = None
    difference_seeds: int | None = None


def mean_interval(
    values: Float[np.ndarray, "tasks seeds"] | Sequence[Float[np.ndarray, "_"]], level: float = LEVEL
) -> Estimate:
    """Return the mean over tasks of the means over seeds, with its t interval over seeds, by default of 95 %.

    With T tasks, and S seeds and the sample variance s^2 of each, the variance of the mean is the sum of s^2 / (S T^2),
    and its degrees of freedom are those of Welch and Satterthwaite. For one task this is the usual t interval. The
    interval covers other trainings on the same tasks and test images. It does not cover other test images, and the
    tasks are fixed. Values that are all the same within each task give an interval of width zero, which for two or
    three seeds is luck, not certainty.

    For normal values of which five are there per task, 95 % of such intervals hold the true mean. With two it is rough:
    simulated, 97 to 99 % do if tasks spread alike, but only 89 % if one of 19 tasks spreads 25 times as much as others.

    Args:
        values: A row of values per task, one of each seed; rows may differ in length.
        level: Share of such intervals that hold the true mean.

    Raises:
        ValueError: If there is no task, or a task without a value.
    """
    tasks = [np.asarray(task, dtype=np.float64) for task in values]
    if not tasks or any(len(task) == 0 for task in tasks):
        raise ValueError(
            f"Each task needs a value to take a mean of, got {[len(task) for task in tasks]} values by task: leave "
            f"tasks without results out."
        )
    # Taken from the first value, so that equal values have a variance of exactly zero.
    deviations = [task - task[0] for task in tasks]
    mean = float(np.mean([task[0] + deviation.mean() for task, deviation in zip(tasks, deviations, strict=True)]))
    seeds = np.array([len(task) for task in tasks])
    if seeds.min() < 2:
        return Estimate(mean, None, None)
    parts = np.array([deviation.var(ddof=1) for deviation in deviations]) / (seeds * len(tasks) ** 2)
    variance = parts.sum()
    if variance == 0:
        return Estimate(mean, mean, mean)
    freedom = 1 / ((parts / variance) ** 2 / (seeds - 1)).sum()
    half = float(stdtrit(freedom, (1 + level) / 2) * np.sqrt(variance))
    return Estimate(mean, mean - half, mean + half)


def paired_interval(
    ours: Sequence[Mapping[int, float]], theirs: Sequence[Mapping[int, float]], level: float = LEVEL
) -> Estimate | None:
    """Return the mean difference of two methods, ours minus theirs, with its interval, by default of 95 %.

    Differences are taken on the same task and seed, of the seeds that both methods have, and then treated as in
    `mean_interval`: what two trainings of one seed share (the order of the images, the new head) drops out. The same is
    covered as there: other trainings, not other test images or tasks. With many methods in a table, about one
    comparison of equals in twenty has an interval without 0 by chance.

    Args:
        ours: By task, the values by seed.
        theirs: The same tasks in the same order.
        level: Share of such intervals that hold the true difference.

    Returns:
        None if the two have no common seed on some task.
    """
    common = [sorted(one.keys() & other.keys()) for one, other in zip(ours, theirs, strict=True)]
    if not all(common):
        return None
    tasks = zip(ours, theirs, common, strict=True)
    return mean_interval([np.array([one[seed] - other[seed] for seed in seeds]) for one, other, seeds in tasks], level)


def pareto_front(points: Mapping[str, tuple[float | int, float | int]]) -> list[str]:
    """Return the names of the points that no other point dominates, by rising cost.

    A point dominates another if it costs as much or less and is worth as much or more, and one of the two truly. Points
    that are equal in both do not dominate each other. Chance is not looked at: with other seeds the front may differ.

    Args:
        points: By name, the cost (trained parameters) and the worth (mean accuracy).
    """

    def is_dominated(cost: float | int, worth: float | int) -> bool:
        return any(
            other_cost <= cost and other_worth >= worth and (other_cost, other_worth) != (cost, worth)
            for other_cost, other_worth in points.values()
        )

    return sorted((name for name, point in points.items() if not is_dominated(*point)), key=lambda name: points[name])


def score(column: Column, ours: Accuracies, theirs: Accuracies) -> Score:
    """Return a method's mean over the column's tasks and its difference to a reference, as far as both have all tasks.

    Args:
        column: What the mean is over.
        ours: Accuracies of the method.
        theirs: Those of the reference; empty for none.
    """
    tasks = column.tasks
    if not set(tasks) <= ours.keys():
        return Score()
    own = [ours[task] for task in tasks]
    accuracy = mean_interval([np.array(list(one.values())) for one in own])
    if accuracy.low is not None and accuracy.high is not None:
        accuracy = Estimate(accuracy.mean, max(0.0, accuracy.low), min(100.0, accuracy.high))
    seeds = min(len(one) for one in own)
    if not set(tasks) <= theirs.keys():
        return Score(accuracy, seeds=seeds)
    other = [theirs[task] for task in tasks]
    common = min(len(one.keys() & two.keys()) for one, two in zip(own, other, strict=True))
    return Score(accuracy, paired_interval(own, other), seeds, common)
