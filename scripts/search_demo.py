"""Choose the learning rates of the demo, then run the demo with several seeds.

    python scripts/search_demo.py --runs runs/demo --out results/demo.json

Search: every method has eight tries per task, trained on the first four fifths of the training images, with one seed
that the demo does not use; the best accuracy on the last fifth wins, of equals the smaller loss. Test images are not
looked at. The rates in `gift/demo.py` must be those found here, else the script says so and stops. Then `gift demo`
runs with each seed. About an hour on two cores; killed, it goes on where it was.
"""

import dataclasses
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from gift.demo import (
    METHODS,
    RECORD,
    THREADS,
    Method,
    Task,
    demo_description,
    demo_options,
    digits_task,
    flowers_task,
    run_demo,
    train,
)

RATES = {"lora": (6e-3, 1.2e-2, 2.4e-2, 4.8e-2), "gift": (1e-3, 2e-3, 4e-3, 8e-3)}  # GIFT's residual is scaled by 10
HEAD_RATES = (2e-3, 1e-2)
PROBE_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1)  # a linear probe has one rate: as many tries
SEARCH_SEED = 100


def held_out(task: Task) -> Task:
    """Return the task with the last fifth of its training images in place of its test images."""
    kept = len(task.train.labels) * 4 // 5
    return dataclasses.replace(task, train=task.train[:kept], test=task.train[kept:], drawn_train=[], drawn_test=[])


def tries(method: Method) -> list[tuple[float, float]]:
    """Return the pairs of learning rates, of adapter and head, that a method is tried with."""
    if method.folder == "probe":
        return [(rate, rate) for rate in PROBE_RATES]
    return list(product(RATES[method.folder], HEAD_RATES))


def search(task: Task, method: Method, runs: Path) -> list[dict[str, float]]:
    """Return all tries of a method on a task, the best first."""
    found = []
    for rate, head_rate in tries(method):
        tried = dataclasses.replace(method, rates={task.name: (rate, head_rate)})
        folder = runs / "search" / task.name / method.folder / f"{rate:g}-{head_rate:g}"
        metrics = train(task, tried, demo_options(task, tried, SEARCH_SEED, folder)).metrics
        found.append({"rate": rate, "head_rate": head_rate, "accuracy": metrics["accuracy"], "loss": metrics["loss"]})
        print(f"{task.name}, {method.name}: {found[-1]}", flush=True)
    return sorted(found, key=lambda entry: (-entry["accuracy"], entry["loss"]))


def main(runs: Path, out: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Search the rates, check those of the demo against them, run the demo.

    Args:
        runs: Folder for all runs.
        out: JSON file to write.
        seeds: Seeds of the demo.
    """
    torch.set_num_threads(THREADS)
    found = {
        task.name: {method.name: search(held_out(task), method, runs) for method in METHODS}
        for task in (digits_task(), flowers_task())
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"search seed": SEARCH_SEED, "search": found}, indent=2) + "\n")
    for name, methods in found.items():
        for method in METHODS:
            best = methods[method.name][0]
            if (best["rate"], best["head_rate"]) != method.rates[name]:
                raise ValueError(
                    f"gift/demo.py trains {method.name} on {name} at {method.rates[name]}, best is {best}."
                )
    demos = [demonstrate(runs / f"demo-{seed}", seed) for seed in seeds]
    result = {"search seed": SEARCH_SEED, "search": found, "demos": demos, "summary": summarise(demos)}
    out.write_text(json.dumps(result, indent=2) + "\n")


def demonstrate(folder: Path, seed: int) -> dict[str, Any]:
    """Return what a demo found; one that is complete is not run again."""
    record = folder / RECORD
    found = json.loads(record.read_text()) if record.exists() else {}
    if "rows" not in found or not demo_description(seed).items() <= found.items():
        run_demo(folder, seed)
    return json.loads(record.read_text())


def summarise(demos: list[dict]) -> list[dict]:
    """Return for every task and method the accuracies of all seeds, in percent, and their mean."""
    summary = []
    for rows in zip(*(demo["rows"] for demo in demos), strict=True):
        accuracies = [round(100 * row["accuracy"], 2) for row in rows]
        mean = round(sum(accuracies) / len(accuracies), 2)
        summary.append({"task": rows[0]["task"], "method": rows[0]["method"], "accuracies": accuracies, "mean": mean})
        print(summary[-1])
    return summary


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
