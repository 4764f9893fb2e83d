"""The folder of a run: what it is a run of, what is written whole or not at all, and what is deleted of it.

What a run leaves in `output_dir`, in the order in which it is written:

    run.json         what decides the result: options, adapter configuration, digest of the frozen weights
    checkpoints/     at the ends of epochs; one is complete once it holds `complete.json`
    adapter/         the trained adapter and head, for `PeftModel.from_pretrained`; after full fine-tuning `model/`
    log.jsonl        losses, learning rates and evaluations, one line each
    metrics.json     written last: a folder that holds it holds a complete run
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from gift.training.arguments import FinetuneOptions, check

COMPLETE = "complete.json"  # in a checkpoint
RESULTS = ("adapter", "model", "tensorboard")
# What `gift train` adds to them.
FILES = ("config.yaml", "evaluation.json", "run_of.json", "curves.png", "log.jsonl")


def prepare_once(folder: Path, run: dict[str, Any], options: FinetuneOptions) -> None:
    """Prepare the folder in one process; whatever is wrong with it is raised in all of them."""
    problem: list[str | None] = [None]
    if PartialState().is_main_process:
        try:
            _prepare(folder, run, options)
        except (ValueError, OSError) as error:
            problem = [str(error)]
    message = broadcast_object_list(problem)[0]
    check(message is None, str(message))


def _prepare(folder: Path, run: dict[str, Any], options: FinetuneOptions) -> None:
    """Leave in the folder a complete run, or what an unfinished one goes on from, or a new one; of these options."""
    checkpoints, metrics_file, run_file = folder / "checkpoints", folder / "metrics.json", folder / "run.json"
    _check_own(folder)
    if not options.resume:
        _delete_run(folder)
    if metrics_file.exists() or complete_checkpoints(checkpoints):
        _check_same_run(run_file, run)
    if metrics_file.exists():
        delete_unneeded(checkpoints, options)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(run_file, json.dumps(run, indent=2))
    except OSError as error:
        raise OSError(f"Nothing can be written into {folder}, so nothing was trained: {error}") from error
    delete_checkpoints(checkpoints, _resumable(checkpoints))


def _resumable(checkpoints: Path) -> list[Path]:
    """Return the latest complete checkpoint, and the one that it knows as the best so far."""
    latest = complete_checkpoints(checkpoints)[-1:]
    best = [state["best"]["step"] for state in map(read_state, latest) if state["best"]]
    return [*latest, *(checkpoints / f"checkpoint-{step}" for step in best)]


def _delete_run(folder: Path) -> None:
    (folder / "metrics.json").unlink(missing_ok=True)  # first: what is half deleted must not look complete
    delete_checkpoints(folder / "checkpoints", [])
    for name in RESULTS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def _check_own(folder: Path) -> None:
    """Raise ValueError if a folder holds anything but a run: what a run deletes must be its own."""
    is_taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    check(
        not is_taken or list(folder.glob("run.json*")),
        f"{folder} exists and holds no run of finetune (run.json). Choose another output_dir.",
    )


def _check_same_run(run_file: Path, run: dict[str, Any]) -> None:
    stored = json.loads(run_file.read_text())
    names = [name for name in sorted(stored.keys() | run.keys()) if stored.get(name) != run.get(name)]
    differences = "; ".join(f"{name} was {stored.get(name)!r}, now {run.get(name)!r}" for name in names)
    check(
        not names,
        f"{run_file.parent} holds a run of other options: {differences}. "
        "Choose another output_dir, or delete that run with resume=False (--resume false).",
    )


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoints, the latest last."""
    found = [marker.parent for marker in checkpoints.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return what a complete checkpoint says of the run: seconds so far, the best epoch, whether it stopped early."""
    try:
        return {"best": None, "stopped": False} | json.loads((checkpoint / COMPLETE).read_text())
    except ValueError as error:
        raise ValueError(f"{checkpoint / COMPLETE} is damaged: {error}. Delete {checkpoint} to train anew.") from error


def delete_checkpoints(folder: Path, kept: list[Path]) -> None:
    """Delete every checkpoint but those to keep."""
    for checkpoint in set(folder.glob("checkpoint-*")) - set(kept):
        (checkpoint / COMPLETE).unlink(missing_ok=True)  # first, as above
        shutil.rmtree(checkpoint)


def delete_unneeded(checkpoints: Path, options: FinetuneOptions) -> None:
    """Delete all checkpoints of a complete run, unless they are to be kept."""
    if checkpoints.exists() and not options.keep_checkpoints:
        delete_checkpoints(checkpoints, [])
        if not any(checkpoints.iterdir()):
            checkpoints.rmdir()


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    sync(partial)
    partial.rename(path)
    sync(path.parent)


def write_folder(folder: Path, save: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all: `save` fills one beside it, which then takes its place."""
    partial = folder.with_name(f"{folder.name}.partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    save(partial)
    sync(partial)
    partial.rename(folder)


def sync(path: Path) -> None:
    """Bring a file, or a folder and the files in it, to the disk."""
    for entry in [*path.glob("*"), path]:
        handle = os.open(entry, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
