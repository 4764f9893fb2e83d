"""What a training run is given and what it returns; `gift.training.finetune.finetune` is the run itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset

from gift.tuner.options import check_choice, check_number

SCHEDULES = ("cosine", "linear", "constant_with_warmup")
# Options that do not decide the result: they may change when a run is continued.
FREE_OPTIONS = ("output_dir", "save_every_epochs", "keep_checkpoints", "resume", "progress")
ITEMS_CHECKED_FIRST = 256  # of each dataset, before training starts


@runtime_checkable
class Items(Protocol):
    """A dataset with a length whose items are `{"pixel_values": float tensor, "labels": int}`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class FinetuneOptions:
    """How to train; what to train is said by the adapter's configuration.

    Args:
        output_dir: Folder of this run and of nothing else.
        epochs: Passes over the training images.
        batch_size: Images per step, of all processes together; in evaluation, of each.
        learning_rate: Peak learning rate of the adapter.
        head_learning_rate: Peak learning rate of what is trained in full, that is, of the head and of whatever else
            `modules_to_save` names; by default that of the adapter.
        weight_decay: Decoupled weight decay (AdamW) of matrices; biases, scales and other vectors have none.
        warmup_ratio: Share of all steps in which the learning rates rise from zero.
        schedule: How the learning rates go on: `cosine` or `linear` to zero, or `constant_with_warmup`.
        diversity: Weight of a term of the loss that keeps the clusters of GIFT's generator apart; see
            `gift.training.diversity.cluster_overlap`.
        seed: Of the adapter's start, the order of the images, augmentation and dropout.
        workers: Processes that read images; 0 reads them in this one.
        evaluate_every_epoch: Whether to evaluate after every epoch, not only at the end.
        save_every_epochs: Epochs from checkpoint to checkpoint; the last epoch always ends with one.
        keep_checkpoints: Whether to keep the last checkpoint once the run is complete.
        resume: Whether to go on with the run in `output_dir`; False deletes that run first.
        progress: Whether to show progress bars and losses.

    Raises:
        ValueError: If an option does not make sense.
    """

    output_dir: Path | str
    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-3
    head_learning_rate: float | None = None
    weight_decay: float = 1e-4
    warmup_ratio: float = 0.1
    schedule: str = "cosine"
    diversity: float | int = 0
    seed: int = 0
    workers: int = 0
    evaluate_every_epoch: bool = False
    save_every_epochs: int = 1
    keep_checkpoints: bool = False
    resume: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        """Check every option."""
        check_choice("schedule", self.schedule, SCHEDULES)
        for name in ("epochs", "batch_size", "save_every_epochs"):
            check_number(name, getattr(self, name), smallest=1, whole=True)
        for name in ("seed", "workers"):
            check_number(name, getattr(self, name), smallest=0, whole=True)
        for name in ("learning_rate", "head_learning_rate", "weight_decay", "warmup_ratio", "diversity"):
            check_number(name, 0 if getattr(self, name) is None else getattr(self, name), smallest=0)
        check(self.warmup_ratio < 1, f"warmup_ratio must be less than 1, got {self.warmup_ratio}.")


@dataclass(frozen=True)
class FinetuneResult:
    """A complete run: the model in eval mode, the contents of metrics.json, the folder of the adapter."""

    model: PeftModel
    metrics: dict[str, Any]
    adapter_dir: Path


class CheckedItems(Dataset):
    """The items of a dataset, each checked when it is read; some of them at once.

    Args:
        name: What to call the dataset in messages.
        items: The dataset.
        classes: Number of classes that the backbone's head knows.

    Raises:
        ValueError: If an item is not what the backbone needs.
    """

    def __init__(self, name: str, items: Items, classes: int) -> None:
        self.name, self.items, self.classes = name, items, classes
        check(len(items), f"The dataset {name} is empty.")
        self.shape = None
        self.first_labels: list[int] = []  # of the items that are checked now
        for index in np.unique(np.linspace(0, len(items) - 1, ITEMS_CHECKED_FIRST, dtype=int)):
            item = self[int(index)]
            self.shape = item["pixel_values"].shape
            self.first_labels.append(item["labels"])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, where = self.items[index], f"Item {index} of the dataset {self.name}"
        check(
            isinstance(item, Mapping) and {"pixel_values", "labels"} <= set(item),
            f"{where} must be a mapping with the keys pixel_values and labels, got "
            f"{list(item) if isinstance(item, Mapping) else type(item)}.",
        )
        pixels, label = item["pixel_values"], item["labels"]
        is_image = isinstance(pixels, Tensor) and pixels.ndim == 3 and pixels.is_floating_point()
        got = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels)
        check(is_image, f"{where}: pixel_values must be a float tensor (channels, rows, columns), got {got}.")
        check(self.shape in (None, pixels.shape), f"{where} is {got}, others are {self.shape}: resize the images.")
        is_class = isinstance(label, (int, np.integer)) and 0 <= label < self.classes
        check(
            is_class,
            f"{where}: labels must be an int from 0 to {self.classes - 1}, as the backbone has {self.classes} classes, "
            f"got {label!r}. Load the backbone with num_labels set to the number of classes.",
        )
        return {"pixel_values": pixels, "labels": int(label)}


def check(holds: object, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not holds:
        raise ValueError(message)
