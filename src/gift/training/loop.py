"""The Trainer of a run: its arguments and its optimizer, the loss, and what stops it."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms.v2 import CutMix, MixUp, RandomChoice
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from gift.backbones import classification_heads
from gift.baselines.toast import feedback_reconstruction
from gift.training.arguments import FinetuneOptions, check
from gift.training.averaging import MovingAverage
from gift.training.diversity import cluster_overlap
from gift.training.folder import complete_checkpoints

HEAD = ".modules_to_save."  # in the names of parameters of a PeftModel that are trained in full


class TrainingDivergedError(ValueError):
    """The loss, or what is trained, is not finite any more."""


class AdapterTrainer(Trainer):
    """Trainer that mixes images and adds terms to the loss while training, evaluates averages, and stops at NaN.

    Attributes:
        mix: Changes a batch of images and labels into mixed ones and label distributions, or None.
        terms: Further terms of the loss while training: weight and function of the model.
        average: The moving average that is evaluated, or None.
    """

    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    terms: tuple[tuple[float | int, Callable[[nn.Module], Tensor]], ...] = ()
    average: MovingAverage | None = None

    def set_up(self, model: nn.Module, options: FinetuneOptions, average: MovingAverage | None) -> None:
        """Take over what the options ask for beyond Trainer's own."""
        self.average = average
        terms = ((options.diversity, cluster_overlap), (options.reconstruction, feedback_reconstruction))
        self.terms = tuple(term for term in terms if term[0])
        classes = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
        mixing = [kind(alpha=alpha, num_classes=classes) for kind, alpha in _mixing(options)]
        self.mix = RandomChoice(mixing) if mixing else None
        if mixing or options.label_smoothing:
            self.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: _soft_loss(
                outputs.logits, labels, num_items_in_batch, options.label_smoothing if model.training else 0
            )

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss, of mixed images and with further terms while training."""
        if self.mix is not None and model.training:
            inputs["pixel_values"], inputs["labels"] = self.mix(inputs["pixel_values"], inputs["labels"])
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            # Trainer divides by the parts of a batch unless the loss was divided by the images of all of them.
            parts = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            for weight, term in self.terms:
                loss = loss + weight * term(model) / parts
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """Return the loss of one step (or of one part of a batch) once it is known to be finite."""
        loss = super().training_step(*arguments, **named)
        if not torch.isfinite(loss).all():
            raise TrainingDivergedError(self._diverged(f"The loss is {loss.mean().item()}"))
        return loss

    def evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """Return what Trainer measures, of the moving average if there is one."""
        with nullcontext() if self.average is None else self.average.instead():
            return super().evaluate(*arguments, **named)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the weights of a checkpoint; a whole model's by its own names, not those that it is published with."""
        if isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            self.model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)  # type: ignore[union-attr, operator]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise ValueError if a checkpoint is not the whole model: the rest would start anew."""
        missing = load_result.missing_keys
        if missing:
            raise ValueError(
                f"The latest checkpoint in {self.args.output_dir} lacks {missing[0]} (and {len(missing) - 1} more), so "
                "the run cannot go on from it. Train anew with resume=False (--resume false), or in another output_dir."
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        wrong = [n for n, p in self.model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]  # type: ignore[union-attr]
        if wrong:
            raise TrainingDivergedError(self._diverged(f"{wrong[0]} (and {len(wrong) - 1} more) is not finite"))
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(
                f"The checkpoint of step {self.state.global_step} could not be written into {self.args.output_dir}: "
                f"{error}. Is the disk full? The run goes on from the checkpoint before when it is started again."
            ) from error

    def _diverged(self, what: str) -> str:
        complete = complete_checkpoints(Path(self.args.output_dir or ""))
        kept = f"the last good checkpoint is {complete[-1]}" if complete else "there is no checkpoint yet"
        return (
            f"{what} at step {self.state.global_step + 1} (epoch {self.state.epoch or 0:.2f} of "
            f"{self.args.num_train_epochs:g}), so training was stopped; {kept}. Lower learning_rate, or train in "
            "float32, in another output_dir."
        )


class EpochWatcher(TrainerCallback):
    """Tells a function the number of each epoch that was evaluated, from 1, and its accuracy."""

    def __init__(self, after_epoch: Callable[[int, float], None]) -> None:
        self.after_epoch, self.told = after_epoch, 0

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Tell the function, once for every epoch: the last is evaluated again when training is over."""
        epoch = round(state.epoch or 0)
        if epoch > self.told:
            self.told = epoch
            self.after_epoch(epoch, given["metrics"]["eval_accuracy"])


def check_terms(model: nn.Module, options: FinetuneOptions) -> None:
    """Raise ValueError if a term of the loss is asked for that this model has not."""
    if options.diversity:
        cluster_overlap(model)


def _mixing(options: FinetuneOptions) -> list[tuple[Any, float | int]]:
    return [(kind, alpha) for kind, alpha in ((MixUp, options.mixup), (CutMix, options.cutmix)) if alpha]


def _soft_loss(logits: Tensor, labels: Tensor, images: Any, smoothing: float | int) -> Tensor:
    """Return the cross-entropy with labels or label distributions: the mean, or the share of a batch of `images`."""
    if images is None:
        return cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    return cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction="sum") / images


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return what the names of the head's trained parameters begin with, for a model that is trained as a whole."""
    return tuple(f"{head}." for head in classification_heads(model))


def is_of_head(name: str, heads: tuple[str, ...]) -> bool:
    """Return whether a parameter is of the head, or of what else is trained in full beside an adapter."""
    return HEAD in name or name.startswith(heads)


def make_optimizer(model: nn.Module, options: FinetuneOptions) -> torch.optim.Optimizer:
    """Return the optimizer: the head has its own rate, and only matrices have weight decay."""
    head_rate = options.learning_rate if options.head_learning_rate is None else options.head_learning_rate
    heads = head_names(model)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = head_rate if is_of_head(name, heads) else options.learning_rate
            groups.setdefault((rate, options.weight_decay * (parameter.ndim > 1)), []).append(parameter)
    settings = [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
    return torch.optim.SGD(settings, momentum=0.9) if options.optimizer == "sgd" else torch.optim.AdamW(settings)


def training_arguments(folder: Path, options: FinetuneOptions) -> TrainingArguments:
    """Return what Trainer is told, for a run in this folder."""
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        bf16=options.precision == "bf16",
        fp16=options.precision == "fp16",
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup_ratio,  # below 1 it is a share
        seed=options.seed,
        data_seed=options.seed,
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        use_cpu=not torch.accelerator.is_available(),  # or processes without accelerators would not find each other
        eval_strategy="epoch" if options.evaluates_every_epoch else "no",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        save_strategy="no",  # `CheckpointSaver` says when
        label_names=["labels"],  # Trainer cannot see through PeftModel what the backbone takes
        remove_unused_columns=False,
        disable_tqdm=not options.progress,
        report_to="none",  # `finetune` adds TensorBoard, in its own folder
    )
    if arguments.n_gpu > 1:  # Trainer would multiply the batch by them; processes are for torchrun to start
        arguments._n_gpu = 1
    parts = arguments.world_size * options.accumulation
    check(
        options.batch_size % parts == 0,
        f"batch_size is that of all processes and parts together, and {options.batch_size} cannot be divided among "
        f"{parts} ({arguments.world_size} processes, accumulation {options.accumulation}).",
    )
    arguments.per_device_train_batch_size = options.batch_size // parts
    return arguments


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    """Return the share of images whose class was predicted."""
    return {"accuracy": float(np.mean(predicted.predictions == predicted.label_ids))}
