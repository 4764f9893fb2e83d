"""Measuring several things in turn, and what is said of the numbers: medians, intervals, ratios, the machine."""

import json
import math
import platform
import random
import statistics
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch

WARM_UP_ROUNDS = 3


class Estimate(NamedTuple):
    """A median with an interval that covers it with a probability of at least 95 % (from 6 values on)."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:8.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Return the median and the interval between two order statistics, which assumes no distribution.

    The k-th smallest value lies above the median with the probability that a fair coin falls heads less than k times
    in n throws: k is the largest number for which that is at most 2.5 %. Fewer than 6 values give their extremes.
    """
    ordered = sorted(values)
    chances = [math.comb(len(ordered), heads) / 2 ** len(ordered) for heads in range(len(ordered))]
    rank = max([k for k in range(1, len(ordered) // 2 + 1) if sum(chances[:k]) <= 0.025], default=1)
    return Estimate(statistics.median(ordered), ordered[rank - 1], ordered[-rank])


def ratio(values: Sequence[float], references: Sequence[float]) -> Estimate:
    """Return the ratio of two measurements, taken round by round."""
    return estimate([value / reference for value, reference in zip(values, references, strict=True)])


def interleave(measurements: dict[str, Callable[[], float]], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Return what every measurement gave in every round; each round takes all of them once, in a new seeded order."""
    order = random.Random(seed)
    names = list(measurements)
    values: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-WARM_UP_ROUNDS, rounds):
        order.shuffle(names)
        for name in names:
            value = measurements[name]()
            if turn >= 0:
                values[name].append(value)
    return values


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge the numbers."""
    information = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    lines = information.read_text().splitlines() if information.exists() else []
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor()),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
    }


def write_json(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
