"""Lines of a comparison that nobody ran: searches, tests around given means, and all that its question needs."""

import numpy as np

from benchmarks import comparison_tables as tables
from tests.benchmark import result

SIZES = {"lora": 16_384, "gift-paca": 7_889, "gift-paca:r=8": 3_481, "gift-paca:r=4": 1_661}
LORA, CHOSEN = "lora", "gift-paca:r=8"


def searched(method, accuracies, tasks=tables.TASKS, parameters=None):
    """Return four tries of every task, of which the second is best."""
    return [
        result(
            *(task, method, 100, None if accuracy is None else accuracy - (0 if index == 1 else 0.01)),
            **{"phase": "search", "tries": 4, "learning_rate": (index + 1) / 1000},
            trained_parameters_without_head=parameters or SIZES.get(method, 5000),
        )
        for task, accuracy in zip(tasks, accuracies, strict=True)
        for index in range(4)
    ]


def finals(method, means, seeds=tables.PRIMARY_SEEDS, tasks=tables.TASKS):
    """Return tests around a mean in % for every task, spread by noise of each method's own."""
    noise = np.random.default_rng(sum(map(ord, method))).normal(0, 0.4, (len(tasks), len(seeds)))
    noise -= noise.mean(axis=1, keepdims=True)
    return [
        result(
            *(task, method, seed, float(mean + noise[row, column]) / 100),
            title=method,
            trained_parameters_without_head=SIZES.get(method, 5000),
        )
        for row, (task, mean) in enumerate(zip(tasks, means, strict=True))
        for column, seed in enumerate(seeds)
    ]


def primary(gift=(90, 50, 50, 80, 80, 40), lora=(90, 50, 50, 80, 80, 40)):
    lines = searched("lora", [0.5] * 6) + searched("gift-paca", [0.5] * 6)
    lines += searched("gift-paca:r=4", [0.6] + [0.4] * 5) + searched(CHOSEN, [0.8] + [0.5] * 5)
    return lines + finals(LORA, lora) + finals(CHOSEN, gift) + finals("gift-paca", (99,) * 6)
