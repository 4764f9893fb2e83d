"""Results of benchmarks that never ran, for the tests of tables and plots."""

from collections.abc import Mapping, Sequence
from typing import Any


def result(task: str, method: str, seed: int, accuracy: float | None, **changes: Any) -> dict[str, Any]:
    """Return the line of a finished test with an accuracy as a share; `changes` are other fields of it."""
    return {
        "id": f"{task}/{method}/test/seed={seed}",
        "suite": "offline",
        "task": task,
        "method": method,
        "title": method,
        "phase": "test",
        "seed": seed,
        "learning_rate": 0.001,
        "weight_decay": 0.0001,
        "accuracy": accuracy,
        "loss": 0.2,
        "images": 797,
        "problem": None,
        "trained_parameters": 17674,
        "trained_parameters_without_head": 16384,
        "backbone_parameters": 1638400,
        "train_seconds": 50.0,
        "inference_ms_per_image": 0.5,
        "merged": True,
        "peak_memory_mb": 900,
        "model": "small",
        "epochs": 5,
        "config": {},
        "commit": "abc",
        "versions": {"torch": "2.15.0"},
        "date": "2026-01-01",
    } | changes


def results(method: str, accuracies: Mapping[str, Sequence[float | None]], **changes: Any) -> list[dict[str, Any]]:
    """Return the lines of a method with an accuracy for each seed, by task."""
    return [
        result(task, method, seed, accuracy, **changes)
        for task, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]
