"""Checkpoints of a run: when they are written, which are kept, when training stops early."""

import json
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gift.training.arguments import FinetuneOptions
from gift.training.folder import COMPLETE, complete_checkpoints, delete_checkpoints, read_state, sync, write


class CheckpointSaver(TrainerCallback):
    """Save at the ends of epochs; mark a checkpoint as complete, then delete all but it and the best.

    Only there is a continued run exact: inside an epoch accelerate reads one batch ahead, so the random numbers of the
    next batch would be drawn before the checkpoint and not be drawn again after it.

    Attributes:
        latest: The latest checkpoint, which a run goes on from; None if there is none yet.
        best: Step, epoch and accuracy of the best evaluation so far, or None where nobody asks.
        stopped: Whether the last evaluations were no better for as long as patience lasts.
    """

    def __init__(self, folder: Path, options: FinetuneOptions) -> None:
        self.folder, self.options, self.started = folder, options, time.monotonic()
        complete = complete_checkpoints(folder)
        self.latest = str(complete[-1]) if complete else None
        state = read_state(complete[-1]) if complete else {"seconds": 0.0, "best": None, "stopped": False}
        self.seconds_before, self.best, self.stopped = state["seconds"], state["best"], state["stopped"]

    def seconds(self) -> float:
        """Return the time of training, without what was lost when the run was killed."""
        return self.seconds_before + time.monotonic() - self.started

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint of the best epoch, if it is to be the result."""
        return self.folder / f"checkpoint-{self.best['step']}" if self.options.select_best and self.best else None

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint where one is due."""
        epoch = round(state.epoch or 0)
        control.should_save = epoch % self.options.save_every_epochs == 0 or epoch == self.options.epochs

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Remember the best epoch so far, and stop once patience is over."""
        if not (self.options.select_best or self.options.patience):
            return
        epoch, accuracy = round(state.epoch or 0), given["metrics"]["eval_accuracy"]
        if self.best is None or accuracy > self.best["accuracy"]:
            self.best = {"step": state.global_step, "epoch": epoch, "accuracy": accuracy}
            control.should_save = control.should_save or self.options.select_best
        if self.options.patience and epoch - self.best["epoch"] >= self.options.patience:
            self.stopped = control.should_training_stop = control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint as complete, and delete those that are not needed any more."""
        PartialState().wait_for_everyone()  # every process has written its random numbers
        checkpoint = self.folder / f"checkpoint-{state.global_step}"
        self.latest = str(checkpoint)
        if args.process_index:
            return
        sync(checkpoint)
        progress = {"seconds": self.seconds(), "best": self.best, "stopped": self.stopped}
        write(checkpoint / COMPLETE, json.dumps(progress))
        sync(self.folder)
        best = self.best_checkpoint
        delete_checkpoints(self.folder, [checkpoint] if best is None else [checkpoint, best])
