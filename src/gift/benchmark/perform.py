"""One run of a benchmark: trained, measured, timed, and what is then known of it in one line."""

import json
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from gift.adapters import read_classifier
from gift.backbones import classification_heads
from gift.benchmark.record import alone
from gift.benchmark.runs import TEST, Line, Run
from gift.merging import without_adapter
from gift.pretrained import load_backbone
from gift.training.folder import delete_checkpoints
from gift.training.loop import TrainingDivergedError
from gift.training.memory import forget_peak_memory
from gift.training.train import TrainResult, package_commit, package_versions, train

IMAGES_TIMED, TIMES, WARM_UP = 32, 5, 2
# What a line says of the outcome, in the order in which it stands there.
UNKNOWN: Line = dict.fromkeys(
    (
        *("accuracy", "interval", "loss", "images", "problem"),
        *("trained_parameters", "trained_parameters_without_head", "backbone_parameters"),
        *("train_seconds", "train_ms_per_image", "inference_ms_per_image", "merged", "peak_memory_mb"),
    )
)


def perform(run: Run, out: Path, after_epoch: Callable[[int, float], None] | None = None) -> Line:
    """Do a run, or go on with it where it was killed, and return its line.

    Args:
        run: What to train.
        out: Folder of the benchmark.
        after_epoch: As `gift.training.train.train` takes it; the run is evaluated after every epoch then.

    Raises:
        ValueError: If data, backbone or options cannot be used. A loss that is not finite is a result: a line without
            accuracy.
        OSError: If something cannot be written.
    """
    with alone(run.folder(out)):
        return _perform(run, out, after_epoch)


def _perform(run: Run, out: Path, after_epoch: Callable[[int, float], None] | None) -> Line:
    is_own_peak = forget_peak_memory()
    options = replace(run.options(out), evaluate_every_epoch=after_epoch is not None)
    try:
        result = train(options, after_epoch)
    except TrainingDivergedError as error:
        return run.described() | UNKNOWN | _surroundings() | {"problem": str(error)}
    measured = _measured(run, result) | ({} if is_own_peak else {"peak_memory_mb": None})
    about = json.loads((run.folder(out) / "run_of.json").read_text())
    made_with = {key: about[key] for key in ("commit", "versions", "python")}  # when it was trained
    timed = _timed(result) if run.phase == TEST else {}
    return run.described() | UNKNOWN | measured | timed | _surroundings() | made_with


def _measured(run: Run, result: TrainResult) -> Line:
    metrics, evaluation = result.run.metrics, result.evaluations[TEST if run.phase == TEST else "validation"]
    names = ("trained_parameters", "trained_parameters_without_head", "peak_memory_mb")
    seen = metrics["epochs"] * (run.task.train + (run.task.validation if run.phase == TEST else 0))
    return {
        "accuracy": evaluation.accuracy,
        "interval": evaluation.interval,
        "loss": evaluation.loss,
        "images": evaluation.images,
        "problem": None,
        **{name: metrics[name] for name in names},
        "backbone_parameters": backbone_parameters(run.options(Path()).model),
        "train_seconds": metrics["seconds"],
        "train_ms_per_image": 1000 * metrics["seconds"] / seen,
    }


def _timed(result: TrainResult) -> Line:
    """Return milliseconds per image of a prediction, and whether the adapter was merged, or None if there is none."""
    classifier = read_classifier(result.run.adapter_dir)
    assert classifier is not None
    model: Any = result.run.model
    merged = None
    if isinstance(model, PeftModel):
        try:
            model, merged = without_adapter(model, classifier.method), True
        except ValueError:
            merged = False
    milliseconds = inference_ms(model.eval(), classifier.geometry.size_px)
    return {"inference_ms_per_image": milliseconds, "merged": merged}


@lru_cache
def backbone_parameters(model: str) -> int:
    """Return the number of weights of a backbone, without its head."""
    backbone = load_backbone(model, ("a", "b"))
    heads = tuple(f"{head}." for head in classification_heads(backbone))
    return sum(weight.numel() for name, weight in backbone.named_parameters() if not name.startswith(heads))


def inference_ms(model: nn.Module, size_px: int) -> float:
    """Return milliseconds per image of a prediction in a batch of 32: the median of five, after two more."""
    device = next(model.parameters()).device
    images = torch.randn(IMAGES_TIMED, 3, size_px, size_px, generator=torch.Generator().manual_seed(0)).to(device)
    seconds = []
    for _ in range(WARM_UP + TIMES):
        synchronise()
        started = time.perf_counter()
        with torch.inference_mode():
            model(pixel_values=images)
        synchronise()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[WARM_UP:]) / IMAGES_TIMED


def synchronise() -> None:
    """Wait until the accelerator, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _surroundings() -> Line:
    return {
        "commit": package_commit(),
        "versions": package_versions(),
        "python": platform.python_version(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat("T", "seconds"),
    }


def device_name() -> str:
    """Return the name of the accelerator, or of the processor with its widest vectors, which names alone may hide."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    lines = information.read_text().splitlines() if information.exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def forget_weights(folder: Path) -> None:
    """Delete what was trained; the log, the options and what the run was made with stay."""
    (folder / "metrics.json").unlink(missing_ok=True)  # first: a folder without weights must not look complete
    delete_checkpoints(folder / "checkpoints", [])
    for name in ("adapter", "model", "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("curves.png", "evaluation.json"):  # large for many classes
        (folder / name).unlink(missing_ok=True)
