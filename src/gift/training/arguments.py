"""What a training run is given and what it returns; `gift.training.finetune.finetune` is the run itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from gift.tuner.options import check_choice, check_number

SCHEDULES = ("cosine", "linear", "constant_with_warmup")
OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("float32", "bf16", "fp16")
# Options that do not decide the result: they may change when a run is continued.
FREE_OPTIONS = ("output_dir", "save_every_epochs", "keep_checkpoints", "resume", "progress", "tensorboard")
# Options that came after runs had been made: those runs have the defaults.
LATER_OPTIONS = (
    *("optimizer", "accumulation", "precision", "label_smoothing", "mixup", "cutmix", "ema", "reconstruction"),
    *("select_best", "patience"),
)


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
        weight_decay: Decoupled weight decay of matrices; biases, scales and other vectors have none.
        warmup_ratio: Share of all steps in which the learning rates rise from zero.
        schedule: How the learning rates go on: `cosine` or `linear` to zero, or `constant_with_warmup`.
        optimizer: `adamw`, or `sgd` with momentum 0.9.
        accumulation: Parts that a batch is computed in, one after the other, to save memory; must divide it.
        precision: `float32`, or mixed precision in `bf16` or `fp16`; weights and optimizer stay in float32.
        label_smoothing: Share of the target that is spread over all classes.
        mixup: Alpha of mixup (images blended in pairs); 0 leaves it out.
        cutmix: Alpha of CutMix (boxes pasted between images); 0 leaves it out. With both, each batch draws one.
        ema: Decay per step of an exponential moving average of what is trained, which is then evaluated and kept;
            0 leaves it out.
        diversity: Weight of a term of the loss that keeps the clusters of GIFT's generator apart; see
            `gift.training.diversity.cluster_overlap`.
        reconstruction: Weight of a term of the loss that lets TOAST's feedback invert the blocks; see
            `gift.baselines.toast.feedback_reconstruction`. The paper pre-trains with 0.1.
        seed: Of the adapter's start, the order of the images, augmentation and dropout.
        workers: Processes that read images; 0 reads them in this one.
        evaluate_every_epoch: Whether to evaluate after every epoch, not only at the end.
        select_best: Whether the result is the epoch with the best accuracy on the evaluation images (the first of
            several), not the last epoch. Its accuracy there is then no honest estimate: test on other images.
        patience: Epochs without a better accuracy after which training stops; by default it never stops early.
        tensorboard: Whether to write losses, rates and evaluations into `tensorboard/`.
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
    optimizer: str = "adamw"
    accumulation: int = 1
    precision: str = "float32"
    label_smoothing: float | int = 0
    mixup: float | int = 0
    cutmix: float | int = 0
    ema: float | int = 0
    diversity: float | int = 0
    reconstruction: float | int = 0
    seed: int = 0
    workers: int = 0
    evaluate_every_epoch: bool = False
    select_best: bool = False
    patience: int | None = None
    tensorboard: bool = False
    save_every_epochs: int = 1
    keep_checkpoints: bool = False
    resume: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        """Check every option."""
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("precision", self.precision, PRECISIONS)
        for name in ("epochs", "batch_size", "save_every_epochs", "accumulation"):
            check_number(name, getattr(self, name), smallest=1, whole=True)
        for name in ("seed", "workers"):
            check_number(name, getattr(self, name), smallest=0, whole=True)
        if self.patience is not None:
            check_number("patience", self.patience, smallest=1, whole=True)
        shares = ("warmup_ratio", "label_smoothing", "ema")
        rates = ("learning_rate", "head_learning_rate", "weight_decay")
        for name in (*shares, *rates, "mixup", "cutmix", "diversity", "reconstruction"):
            check_number(name, 0 if getattr(self, name) is None else getattr(self, name), smallest=0)
        for name in shares:
            check(getattr(self, name) < 1, f"{name} must be less than 1, got {getattr(self, name)}.")

    @property
    def evaluates_every_epoch(self) -> bool:
        """Whether every epoch ends with an evaluation, asked for or needed."""
        return self.evaluate_every_epoch or self.select_best or self.patience is not None


@dataclass(frozen=True)
class Surroundings:
    """What belongs to a run beside its backbone, adapter, images and options.

    Attributes:
        about: What else decides the result, by name: a run is continued only if all of it is the same.
        write_beside: Writes further files into the folder of the adapter, before it counts as complete.
        after_epoch: Called after the evaluation of an epoch with its number, from 1, and the accuracy; or None.
    """

    about: Mapping[str, Any] = field(default_factory=dict)
    write_beside: Callable[[Path], None] = lambda folder: None
    after_epoch: Callable[[int, float], None] | None = None


@dataclass(frozen=True)
class FinetuneResult:
    """A complete run.

    Attributes:
        model: In eval mode, with the adapter; after full fine-tuning the model itself.
        metrics: What metrics.json holds.
        adapter_dir: Folder of the adapter; after full fine-tuning of the whole model.
    """

    model: PeftModel | PreTrainedModel
    metrics: dict[str, Any]
    adapter_dir: Path


def check(holds: object, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not holds:
        raise ValueError(message)
