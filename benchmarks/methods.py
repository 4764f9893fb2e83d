"""Every method of `gift train` on one folder of images, with the backbone that ships: accuracy, size, time, memory.

    python benchmarks/methods.py --data flowers --upstream tinyimagenet64-train.parquet --runs runs/methods \
        --out results/methods.json --write_docs docs/training.md

First a feedback path of TOAST is pre-trained on the upstream images, with the reconstruction term. Then every method
has four tries of learning rates on the validation images that `gift train` makes (a seed of its own); the best, of
equals the one with the smaller loss, is trained on all training images by the command `gift train` and tested once per
seed. At the end steps and predictions are timed in turn, on a machine that does nothing else. Killed, it goes on where
it was; `--phases` runs a part.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.documents import replace_between
from benchmarks.interleaved import environment, estimate, interleave, write_json
from gift.adapters import load_adapter
from gift.training.options import TrainOptions
from gift.training.train import train

SEARCH_SEED, SEARCH_EPOCHS, EPOCHS, BATCH = 100, 5, 8, 32
PHASES = ("upstream", "search", "train", "time")
HEAD_RATES = (2e-3, 1e-2)
START, END = "<!-- methods -->", "<!-- /methods -->"


@dataclass(frozen=True)
class Row:
    """A row of the table: how `gift train` is called, and the learning rates of adapter and head to try."""

    title: str
    method: str
    rates: tuple[float, ...] = (2e-3, 8e-3)
    head_rates: tuple[float, ...] = HEAD_RATES
    options: dict[str, Any] = field(default_factory=dict)
    merges: bool = True

    def tries(self) -> list[tuple[float, float]]:
        return list(product(self.rates, self.head_rates))


def rows(runs: Path) -> dict[str, Row]:
    feedback = {"feedback": str(runs / "upstream" / "adapter")}
    return {
        "linear-probe": Row("linear probe", "linear-probe", (3e-3, 1e-2, 3e-2, 1e-1), (0.0,)),
        "bitfit": Row("BitFit", "bitfit"),
        "lora": Row("LoRA r=8", "lora"),
        "vpt-deep": Row("VPT-deep p=5", "vpt-deep", merges=False),
        "toast-lite-random": Row("TOAST-lite, random feedback", "toast-lite", merges=False),
        "toast-lite": Row("TOAST-lite, pre-trained feedback", "toast-lite", options=feedback, merges=False),
        "gift": Row("GIFT paca r=16 M=96", "gift"),
        "gift-linear": Row("GIFT linear r=16", "gift", options={"generator": "linear"}),
        "full": Row("full fine-tuning", "full", (2e-4, 6e-4)),
    }


def options(row: Row, data: str, folder: Path, rates: tuple[float, float], **changes: Any) -> dict[str, Any]:
    """Return what `gift train` is given; a linear probe has the rate of its head only."""
    rate, head_rate = rates
    given = {"data": data, "method": row.method, "method_options": row.options, "output_dir": str(folder)}
    given |= {"learning_rate": rate, "head_learning_rate": head_rate or rate, "batch_size": BATCH, "progress": False}
    return given | changes


def pretrain_feedback(upstream: str, folder: Path) -> dict[str, Any]:
    given = {"data": upstream, "method": "toast", "output_dir": str(folder), "epochs": 1, "batch_size": 64}
    given |= {"learning_rate": 1e-3, "reconstruction": 0.1, "seed": SEARCH_SEED, "progress": False}
    result = train(TrainOptions(**given))
    return {"options": given | {"data": Path(upstream).name}, "validation": result.evaluations["validation"].accuracy}


def search(name: str, row: Row, data: str, runs: Path) -> list[dict[str, float]]:
    """Return all tries, the best first."""
    found = []
    for rates in row.tries():
        folder = runs / "search" / name / f"{rates[0]:g}-{rates[1]:g}"
        result = train(TrainOptions(**options(row, data, folder, rates, epochs=SEARCH_EPOCHS, seed=SEARCH_SEED)))
        metrics = result.run.metrics
        found.append(
            {"rate": rates[0], "head_rate": rates[1], "accuracy": metrics["accuracy"], "loss": metrics["loss"]}
        )
        print(f"{name}: {found[-1]}", flush=True)
    return sorted(found, key=lambda entry: (-entry["accuracy"], entry["loss"]))


def train_by_command(row: Row, data: str, folder: Path, rates: tuple[float, float], seed: int) -> dict[str, Any]:
    """Return what a run of the command leaves; one that is complete is not repeated."""
    given = options(row, data, folder, rates, epochs=EPOCHS, seed=seed, train_on_validation=True)
    method_options = given.pop("method_options")
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    words += [word for name, value in method_options.items() for word in (f"--method_options.{name}", str(value))]
    if not (folder / "evaluation.json").exists():
        subprocess.run([str(Path(sys.executable).with_name("gift")), "train", *words], check=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    test = json.loads((folder / "evaluation.json").read_text())["test"]
    return {name: test[name] for name in ("accuracy", "interval", "calibration_error")} | {
        name: metrics[name]
        for name in ("seed", "seconds", "peak_memory_mb", "trained_parameters", "trained_parameters_without_head")
    }


def measure(chosen: dict[str, Row], runs: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Return milliseconds per image of a training step, and of a prediction, merged where it can be, in turn."""
    images = torch.randn(BATCH, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(BATCH) % 2
    steps: dict[str, Callable[[], float]] = {}
    predictions: dict[str, Callable[[], float]] = {}
    for name, row in chosen.items():
        folder = runs / "train" / name / "0"
        steps[name] = _timed_step(folder, images, labels)
        predictions[name] = _timed_prediction(folder, row.merges, images)
    result: dict[str, dict[str, Any]] = {name: {} for name in steps}
    for key, measurements in (("step_ms", steps), ("predict_ms", predictions)):
        for name, values in interleave(measurements, rounds).items():
            result[name][key] = estimate([1000 * value / BATCH for value in values])._asdict()
    return result


def _timed_step(folder: Path, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    model: Any = _trainable(folder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step() -> float:
        started = time.perf_counter()
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def _trainable(folder: Path) -> Any:
    model: Any = load_adapter(folder).model
    if hasattr(model, "peft_config"):
        model.set_adapter("default")  # loading freezes it
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or ".modules_to_save.default." in name)
    return model.train()


def _timed_prediction(folder: Path, merges: bool, images: torch.Tensor) -> Callable[[], float]:
    model: Any = load_adapter(folder).model
    if merges and hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.eval()

    def predict() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            model(pixel_values=images)
        return time.perf_counter() - started

    return predict


def table(results: dict[str, Any], titles: dict[str, str]) -> str:
    """Return the table of `docs/training.md`."""
    lines = [
        "| method | test accuracy in % | trained without / with head | training s | step ms | prediction ms | MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of_method in results["methods"].items():
        of_seeds, times = of_method["seeds"], of_method.get("times", {})
        bounds = [[100 * bound for bound in run["interval"]] for run in of_seeds]
        shown = ", ".join(
            f"{100 * run['accuracy']:.1f} [{low:.1f}, {high:.1f}]"
            for run, (low, high) in zip(of_seeds, bounds, strict=True)
        )
        trained = f"{of_seeds[0]['trained_parameters_without_head']:,} / {of_seeds[0]['trained_parameters']:,}"
        seconds = f"{statistics.median(run['seconds'] for run in of_seeds):.0f}"
        measured = " | ".join(f"{times[key]['median']:.2f}" if times else "" for key in ("step_ms", "predict_ms"))
        memory = f"{statistics.median(run['peak_memory_mb'] for run in of_seeds):,.0f}"
        lines.append(f"| {titles[name]} | {shown} | {trained} | {seconds} | {measured} | {memory} |")
    return "\n".join(lines)


def main(  # noqa: PLR0913, PLR0917 - its command line
    data: str,
    upstream: str,
    runs: Path,
    out: Path,
    phases: tuple[str, ...] = PHASES,
    seeds: tuple[int, ...] = (0,),
    rounds: int = 15,
    write_docs: Path | None = None,
    methods: tuple[str, ...] | None = None,
) -> None:
    """Pre-train, search, train and time.

    Args:
        data: Folder of images, split into train and test.
        upstream: Images to pre-train TOAST's feedback path on.
        runs: Folder for all runs.
        out: JSON file to write; what it holds of other phases stays.
        phases: Which to run.
        seeds: Of the final runs.
        rounds: Of the timing.
        write_docs: Document whose table is written anew.
        methods: Which rows; by default all.
    """
    chosen = {name: row for name, row in rows(runs).items() if methods is None or name in methods}
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"methods": {}}
    of_methods = results["methods"]
    if "upstream" in phases:
        results["upstream"] = pretrain_feedback(upstream, runs / "upstream")
    for phase in ("search", "train"):
        for name, row in chosen.items() if phase in phases else ():
            of_method = of_methods.setdefault(name, {})
            if phase == "search":
                of_method["tries"] = search(name, row, data, runs)
            else:
                best = of_method["tries"][0]
                of_method["seeds"] = [
                    train_by_command(
                        row, data, runs / "train" / name / str(seed), (best["rate"], best["head_rate"]), seed
                    )
                    for seed in seeds
                ]
                print(f"{name}: {of_method['seeds']}", flush=True)
            write_json(out, results)
    if "time" in phases:
        for name, times in measure(chosen, runs, rounds).items():
            of_methods[name]["times"] = times
        results["timed on"] = environment()
        write_json(out, results)
    if write_docs is not None:
        titles = {name: row.title for name, row in rows(runs).items()}
        replace_between(write_docs, START, END, table(results, titles))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
