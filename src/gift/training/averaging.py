"""An exponential moving average of what is trained, kept through checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

AVERAGE = "average.safetensors"  # in a checkpoint


class MovingAverage(TrainerCallback):
    """The average of the trained parameters: a <- d a + (1 - d) p after every step.

    d is the decay, at the start less: (1 + steps) / (10 + steps), so that the values at the start are soon forgotten.

    Args:
        model: What is trained.
        decay: From 0 to 1.
        latest: Checkpoint that the run goes on from, or None.
    """

    def __init__(self, model: nn.Module, decay: float | int, latest: str | None) -> None:
        self.decay = decay
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        stored = load_file(Path(latest) / AVERAGE) if latest else self.trained
        self.average: dict[str, Tensor] = {
            name: stored[name].detach().to(parameter.device, copy=True) for name, parameter in self.trained.items()
        }

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take a step's parameters into the average."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, parameter in self.trained.items():
            average = self.average[name] = self.average[name].to(parameter.device)
            average.lerp_(parameter.detach(), 1 - decay)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the average into the checkpoint, by the process that writes."""
        if not args.process_index:
            tensors = {name: average.contiguous() for name, average in self.average.items()}
            save_file(tensors, Path(args.output_dir or "") / f"checkpoint-{state.global_step}" / AVERAGE)

    @torch.no_grad()
    def install(self, stored: Path | None = None) -> None:
        """Give the model the average for good, or one that `on_save` wrote."""
        average = self.average if stored is None else load_file(stored)
        for name, parameter in self.trained.items():
            parameter.copy_(average[name])

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Let the model hold the average inside a `with`."""
        kept = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.install()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(kept[name])
