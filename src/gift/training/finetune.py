"""Fine-tune one image classifier with one adapter; a run that is killed continues where it was, to the same bits.

What a run leaves in `output_dir`, in the order in which it is written:

    run.json         what decides the result: options, adapter configuration, digest of the frozen weights
    checkpoints/     at the ends of epochs; one is complete once it holds `complete.json`
    adapter/         the trained adapter and head, for `PeftModel.from_pretrained`
    log.jsonl        losses, learning rates and evaluations, one line each
    metrics.json     written last: a folder that holds it holds a complete run
"""

import copy
import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from gift.backbones import classification_heads
from gift.training.arguments import FREE_OPTIONS, CheckedItems, FinetuneOptions, FinetuneResult, Items, check
from gift.training.diversity import cluster_overlap

COMPLETE = "complete.json"  # in a checkpoint
PACKAGES = ("gift-peft", "torch", "transformers", "peft", "accelerate", "timm")
HEAD = ".modules_to_save."  # in the names of parameters that are trained in full


def finetune(
    backbone: PreTrainedModel,
    config: PeftConfig | None,
    train: Items,
    evaluation: Items | None,
    options: FinetuneOptions,
) -> FinetuneResult:
    """Train an adapter and return it, or continue a run that was killed, or return one that is already complete.

    Under `torchrun` or `accelerate launch` several processes share the images of every step (DDP); one of them writes.

    On one CPU thread the adapter of a killed and continued run is bitwise that of an uninterrupted one, if all
    randomness in the datasets comes from the global generators of torch, numpy and `random`, and if the head of
    `backbone` was made after seeding: it is trained from the values that it has. The global generators are seeded.

    Args:
        backbone: Image classifier of transformers that returns loss and logits; changed in place, as PEFT does.
        config: Adapter to train. None is a linear probe: nothing but the classification head is trained, and stored
            as an adapter of PEFT without target layers. If `modules_to_save` is None, the head is trained too,
            whatever the method.
        train: Training images, all of one size: anything with a length and items
            `{"pixel_values": float tensor (channels, rows, columns), "labels": int}`, such as a list of them.
        evaluation: Images to measure accuracy on, or None.
        options: How to train, and in which folder.

    Returns:
        The model in eval mode, on the device it was trained on; what `metrics.json` holds; the folder of the adapter.
        If `output_dir` holds the complete run, it is loaded and nothing is trained. Runs on other images are told apart
        by the number of the images and by labels only.

    Raises:
        ValueError: If the backbone has no known head, an item is not what the backbone needs, or `output_dir` holds
            the run of other options, or other files. Of long datasets some items are checked before training, all when
            they are read.
    """
    folder = Path(options.output_dir)
    checkpoints, metrics_file = folder / "checkpoints", folder / "metrics.json"
    config = _with_head(backbone, config)
    classes = int(backbone.config.num_labels or 0)
    train_items = CheckedItems("train", train, classes)
    evaluation_items = None if evaluation is None else CheckedItems("evaluation", evaluation, classes)

    arguments = _training_arguments(checkpoints, options)
    run = _describe_run(backbone, config, train_items, evaluation_items, options)
    _prepare_folder_once(folder, run, options)
    if metrics_file.exists():
        model = PeftModel.from_pretrained(backbone, str(folder / "adapter"), is_trainable=True)
        return FinetuneResult(model.eval(), json.loads(metrics_file.read_text()), folder / "adapter")

    set_seed(options.seed)
    model: PeftModel = get_peft_model(backbone, config)  # type: ignore[assignment]
    if options.diversity:
        cluster_overlap(model)  # raises if there are no clusters
    saver = _CheckpointSaver(checkpoints, options)
    trainer = _Trainer(
        model,
        arguments,
        train_dataset=train_items,
        eval_dataset=evaluation_items,
        compute_metrics=_accuracy,
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(dim=-1),
        callbacks=[saver],
        optimizers=(_make_optimizer(model, options), None),
    )
    trainer.diversity = options.diversity
    check(not trainer.is_fsdp_enabled, "finetune trains with DDP only. For FSDP2 use Trainer, see docs/running.md.")
    if not options.progress:
        trainer.remove_callback(PrinterCallback)  # Trainer's substitute for a progress bar
    trainer.train(resume_from_checkpoint=saver.latest)
    scores = trainer.evaluate() if evaluation_items else {}

    metrics = _describe_result(model, scores, saver.seconds(), options)
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            _save_adapter(model.eval(), folder / "adapter")
            _write(folder / "log.jsonl", "".join(f"{json.dumps(entry)}\n" for entry in trainer.state.log_history))
            _write(metrics_file, json.dumps(metrics, indent=2))
            _delete_unneeded(checkpoints, options)
    return FinetuneResult(model, metrics, folder / "adapter")


def _with_head(backbone: nn.Module, config: PeftConfig | None) -> PeftConfig:
    """Return a copy of the configuration that trains the classification head too, unless it says what to train."""
    check(isinstance(backbone, PreTrainedModel), f"backbone must be a transformers model, got {type(backbone)}.")
    is_adapted = any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in backbone.modules())
    check(not is_adapted, "The backbone already has an adapter. Load a fresh one for every run.")
    config = LoraConfig(target_modules=DUMMY_TARGET_MODULES) if config is None else copy.deepcopy(config)
    if getattr(config, "modules_to_save", ()) is None:
        config.modules_to_save = classification_heads(backbone)  # type: ignore[attr-defined]
        check(
            config.modules_to_save,  # type: ignore[attr-defined]
            f"{type(backbone).__name__} has no classification head that gift.backbones knows. Load it with "
            "AutoModelForImageClassification, or name its head in the modules_to_save of the adapter's configuration.",
        )
    return config


def _make_optimizer(model: PeftModel, options: FinetuneOptions) -> torch.optim.AdamW:
    head_rate = options.learning_rate if options.head_learning_rate is None else options.head_learning_rate
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = head_rate if HEAD in name else options.learning_rate
            groups.setdefault((rate, options.weight_decay * (parameter.ndim > 1)), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
    )


def _training_arguments(checkpoints: Path, options: FinetuneOptions) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup_ratio,  # below 1 it is a share
        seed=options.seed,
        data_seed=options.seed,
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        use_cpu=not torch.accelerator.is_available(),  # or processes without accelerators would not find each other
        eval_strategy="epoch" if options.evaluate_every_epoch else "no",
        logging_strategy="epoch",
        save_strategy="no",  # `_CheckpointSaver` says when
        label_names=["labels"],  # Trainer cannot see through PeftModel what the backbone takes
        remove_unused_columns=False,
        disable_tqdm=not options.progress,
        report_to="none",
    )
    check(
        options.batch_size % arguments.world_size == 0,
        f"batch_size is that of all processes together, and {options.batch_size} cannot be divided among "
        f"{arguments.world_size}.",
    )
    arguments.per_device_train_batch_size = options.batch_size // arguments.world_size
    return arguments


class _Trainer(Trainer):
    """Trainer with one more term of the loss while training."""

    diversity: float | int = 0

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.diversity and model.training:
            loss = loss + self.diversity * cluster_overlap(model)
        return (loss, outputs) if return_outputs else loss


class _CheckpointSaver(TrainerCallback):
    """Save at the ends of epochs; mark a checkpoint as complete, then delete the older ones.

    Only there is a continued run exact: inside an epoch accelerate reads one batch ahead, so the random numbers of the
    next batch would be drawn before the checkpoint and not be drawn again after it.
    """

    def __init__(self, folder: Path, options: FinetuneOptions) -> None:
        self.folder, self.options, self.started = folder, options, time.monotonic()
        complete = _complete(folder)
        self.latest = str(complete[-1]) if complete else None
        self.seconds_before = json.loads((complete[-1] / COMPLETE).read_text())["seconds"] if complete else 0.0

    def seconds(self) -> float:
        """Return the time of training, without what was lost when the run was killed."""
        return self.seconds_before + time.monotonic() - self.started

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        epoch = round(state.epoch or 0)
        control.should_save = epoch % self.options.save_every_epochs == 0 or epoch == self.options.epochs

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        PartialState().wait_for_everyone()  # every process has written its random numbers
        if args.process_index:
            return
        checkpoint = self.folder / f"checkpoint-{state.global_step}"
        _sync(checkpoint)
        _write(checkpoint / COMPLETE, json.dumps({"seconds": self.seconds()}))
        _sync(self.folder)
        _delete_checkpoints(self.folder, [checkpoint])


def _complete(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoints, the latest last."""
    found = [marker.parent for marker in checkpoints.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]))


def _delete_checkpoints(folder: Path, kept: list[Path]) -> None:
    for checkpoint in set(folder.glob("checkpoint-*")) - set(kept):
        (checkpoint / COMPLETE).unlink(missing_ok=True)  # first: what is half deleted must not look complete
        shutil.rmtree(checkpoint)


def _delete_unneeded(checkpoints: Path, options: FinetuneOptions) -> None:
    if checkpoints.exists() and not options.keep_checkpoints:
        _delete_checkpoints(checkpoints, [])
        checkpoints.rmdir()


def _prepare_folder_once(folder: Path, run: dict[str, Any], options: FinetuneOptions) -> None:
    """Prepare the folder in one process; whatever is wrong with it is raised in all of them."""
    problem: list[str | None] = [None]
    if PartialState().is_main_process:
        try:
            _prepare_folder(folder, run, options)
        except ValueError as error:
            problem = [str(error)]
    message = broadcast_object_list(problem)[0]
    check(message is None, str(message))


def _prepare_folder(folder: Path, run: dict[str, Any], options: FinetuneOptions) -> None:
    """Leave in the folder a complete run, or what an unfinished one goes on from, or a new one; of these options."""
    checkpoints, metrics_file, run_file = folder / "checkpoints", folder / "metrics.json", folder / "run.json"
    _check_own_folder(folder)
    if not options.resume:
        _delete_run(folder)
    if metrics_file.exists() or _complete(checkpoints):
        _check_same_run(run_file, run)
    if metrics_file.exists():
        _delete_unneeded(checkpoints, options)
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write(run_file, json.dumps(run, indent=2))
    _delete_checkpoints(checkpoints, _complete(checkpoints)[-1:])


def _delete_run(folder: Path) -> None:
    (folder / "metrics.json").unlink(missing_ok=True)  # first, as above
    _delete_checkpoints(folder / "checkpoints", [])
    shutil.rmtree(folder / "adapter", ignore_errors=True)


def _check_own_folder(folder: Path) -> None:
    """Raise ValueError if a folder holds anything but a run: what a run deletes must be its own."""
    is_taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    check(
        not is_taken or list(folder.glob("run.json*")),
        f"{folder} exists and holds no run of finetune (run.json). Choose another output_dir.",
    )


def _describe_run(
    backbone: PreTrainedModel,
    config: PeftConfig,
    train: CheckedItems,
    evaluation: CheckedItems | None,
    options: FinetuneOptions,
) -> dict[str, Any]:
    """Return everything that decides the result, by name, as JSON gives it back; of images their number and labels."""
    described = {f"options.{name}": value for name, value in asdict(options).items() if name not in FREE_OPTIONS}
    described |= {f"config.{name}": value for name, value in config.to_dict().items()}
    described |= {"train": len(train), "evaluation": len(evaluation or ())}
    labels = json.dumps([items.first_labels for items in (train, evaluation) if items is not None])
    described["labels"] = hashlib.sha256(labels.encode()).hexdigest()
    # A head may be new, and its values are in every checkpoint.
    heads = tuple(f"{head}." for head in classification_heads(backbone))
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        if not name.startswith(heads):
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    described["frozen weights"] = digest.hexdigest()
    return json.loads(json.dumps(described, default=lambda it: sorted(it) if isinstance(it, set) else str(it)))


def _check_same_run(run_file: Path, run: dict[str, Any]) -> None:
    stored = json.loads(run_file.read_text())
    names = [name for name in sorted(stored.keys() | run.keys()) if stored.get(name) != run.get(name)]
    differences = "; ".join(f"{name} was {stored.get(name)!r}, now {run.get(name)!r}" for name in names)
    check(
        not names,
        f"{run_file.parent} holds a run of other options: {differences}. "
        "Choose another output_dir, or delete that run with resume=False.",
    )


def _describe_result(
    model: PeftModel, scores: dict[str, float], seconds: float, options: FinetuneOptions
) -> dict[str, Any]:
    trained = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    config = model.active_peft_config
    is_probe = getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES
    return {
        "method": "linear probe" if is_probe else str(config.peft_type.value),  # type: ignore[union-attr]
        "accuracy": scores.get("eval_accuracy"),
        "loss": scores.get("eval_loss"),
        "trained_parameters": sum(trained.values()),
        "trained_parameters_without_head": sum(count for name, count in trained.items() if HEAD not in name),
        "seconds": round(seconds, 3),
        "seed": options.seed,
        "options": asdict(options) | {"output_dir": str(options.output_dir)},
        "versions": {package: version(package) for package in PACKAGES},
    }


def _accuracy(predicted: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(predicted.predictions == predicted.label_ids))}


def _save_adapter(model: PeftModel, folder: Path) -> None:
    partial = folder.with_name("adapter.partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(str(partial))
    _sync(partial)
    partial.rename(folder)


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Bring a file, or a folder and the files in it, to the disk."""
    for entry in [*path.glob("*"), path]:
        handle = os.open(entry, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
