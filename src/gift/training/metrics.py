"""How well a classifier predicts: accuracy, classes, confusions, calibration."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from gift.training.folder import write
from gift.training.items import Items
from gift.training.loop import TrainingDivergedError

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class ClassScore:
    """How one class is predicted: how many images it has, and the share of them that is predicted right."""

    name: str
    images: int
    accuracy: float | None


@dataclass(frozen=True)
class Evaluation:
    """How well a classifier predicts some images.

    Attributes:
        images: How many there are.
        accuracy: Share of images whose class is predicted.
        interval: Its 95 % interval (Wilson's), from the number of images alone.
        top5: Share of images whose class is among the five likeliest; None for five classes or fewer.
        mean_class_accuracy: Mean of the classes' accuracies.
        loss: Mean cross-entropy.
        calibration_error: Expected calibration error, in 15 bins of equal width (Guo et al. 2017): how far the
            probability of the predicted class is from the accuracy, on average.
        per_class: One entry for each class, in the order of the logits.
        confusion: Images by class (rows) and predicted class (columns).
        milliseconds_per_image: Of the whole evaluation, with reading the images.
    """

    images: int
    accuracy: float
    interval: tuple[float, float]
    top5: float | None
    mean_class_accuracy: float
    loss: float
    calibration_error: float
    per_class: tuple[ClassScore, ...]
    confusion: list[list[int]]
    milliseconds_per_image: float

    def write(self, path: Path) -> None:
        """Write all figures as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(asdict(self), indent=2) + "\n")


def evaluate_model(
    model: nn.Module, items: Items, class_names: tuple[str, ...], batch_size: int = 64, workers: int = 0
) -> Evaluation:
    """Return how well a model predicts some images.

    Args:
        model: In evaluation mode.
        items: As `gift.finetune` takes them.
        class_names: Names of the classes, in the order of the logits.
        batch_size: Images at once.
        workers: Processes that read images; 0 reads them in this one.

    Raises:
        TrainingDivergedError: If a logit is not finite.
    """
    started = time.perf_counter()
    logits, labels = predict_logits(model, items, batch_size, workers)
    wrong = int((~torch.isfinite(logits)).any(dim=1).sum())
    if wrong:
        raise TrainingDivergedError(
            f"The logits of {wrong} of {len(labels)} images are not finite: the model overflows. Train it with a lower "
            "learning_rate, in another output_dir."
        )
    milliseconds = 1000 * (time.perf_counter() - started) / len(labels)
    return score_logits(logits.double(), labels, class_names, milliseconds)


@torch.no_grad()
def predict_logits(
    model: nn.Module, items: Items, batch_size: int = 64, workers: int = 0
) -> tuple[Float[Tensor, "images classes"], Int[Tensor, " images"]]:
    """Return the logits of a model in evaluation mode, and the labels, in the order of the images."""
    device = next(model.parameters()).device
    logits, labels = [], []
    for batch in DataLoader(items, batch_size, num_workers=workers):  # type: ignore[arg-type]
        logits.append(model(pixel_values=batch["pixel_values"].to(device)).logits.float().cpu())
        labels.append(batch["labels"])
    return torch.cat(logits), torch.cat(labels)


def score_logits(
    logits: Float[Tensor, "images classes"],
    labels: Int[Tensor, " images"],
    class_names: tuple[str, ...],
    milliseconds_per_image: float,
) -> Evaluation:
    """Return how well logits predict labels."""
    count, classes = logits.shape
    probabilities, predicted = logits.softmax(dim=1).numpy(), logits.argmax(dim=1).numpy()
    truth = labels.numpy()
    confusion = confusion_matrix(truth, predicted, labels=np.arange(classes))
    totals = confusion.sum(axis=1)
    shares = [float(confusion[c, c] / totals[c]) if totals[c] else None for c in range(classes)]
    right = int((predicted == truth).sum())
    interval = binomtest(right, count).proportion_ci(method="wilson")
    top5 = top_k_accuracy_score(truth, probabilities, k=5, labels=np.arange(classes)) if classes > 5 else None
    return Evaluation(
        images=count,
        accuracy=right / count,
        interval=(float(interval.low), float(interval.high)),
        top5=None if top5 is None else float(top5),
        mean_class_accuracy=float(np.mean([share for share in shares if share is not None])),
        loss=float(cross_entropy(logits, labels)),
        calibration_error=calibration_error(probabilities, truth),
        per_class=tuple(map(ClassScore, class_names, totals.tolist(), shares)),
        confusion=confusion.tolist(),
        milliseconds_per_image=milliseconds_per_image,
    )


def calibration_error(probabilities: Float[np.ndarray, "images classes"], labels: Int[np.ndarray, " images"]) -> float:
    """Return the expected calibration error: |accuracy - confidence|, the mean over bins by their images."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = (np.bincount(bins, right.astype(float)) - np.bincount(bins, confidence)) / len(labels)
    return float(np.abs(gaps).sum())
