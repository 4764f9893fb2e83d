"""A stored classifier on images: how well it predicts labelled ones, and what it predicts for others."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from gift.adapters import LoadedAdapter, load_adapter
from gift.data.decoding import open_upright
from gift.data.feeding import FeedingOptions, ImageItems
from gift.data.geometry import Preparation
from gift.data.pictures import picture_files
from gift.data.splits import SplitOptions, Splits, read_splits
from gift.training.metrics import Evaluation, evaluate_model
from gift.training.train import digests
from gift.tuner.options import check_number

SPLITS = ("test", "validation", "train")
CONFUSIONS_SHOWN = 5


def evaluate_adapter(
    adapter: Path | str,
    data: str | None = None,
    split: str | None = None,
    backbone: str | None = None,
    root: Path | str = "data",
    skip_damaged: bool = False,
) -> tuple[str, Evaluation]:
    """Return which split was measured, and how well a stored classifier predicts it.

    Args:
        adapter: Folder of a run, an adapter or a model.
        data: Labelled images in any form of `gift.data.splits.read_splits`; by default those of the run, split as in
            training.
        split: `test`, `validation` or `train`; by default the first of these that there is.
        backbone: Name or folder of the backbone; by default what the adapter says.
        root: Folder where torchvision's sets are.
        skip_damaged: Whether to leave out images that cannot be read, and say which; those of the run are left out
            anyway if it was trained so.

    Raises:
        ValueError: If there is no such split, the data have a class that the classifier does not know, or an image is
            damaged and not left out.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}: choose one of {', '.join(SPLITS)}.")
    loaded = _load(adapter, backbone)
    options = SplitOptions(validation_share=0, root=root)
    own = data is None
    if data is None:
        data, options, skipped_then = _data_of_run(loaded.folder.parent)
        skip_damaged = skip_damaged or skipped_then
    splits = read_splits(data, options)
    if own:
        _check_unchanged(loaded.folder.parent, splits)
    there = {name: rows for name in SPLITS if (rows := getattr(splits, name)) is not None}
    name = split or next(iter(there))
    if name not in there:
        raise ValueError(f"{data} has no {name} images, only {', '.join(there)}.")
    labels = loaded.classifier.numbers_of(splits.class_names, data)
    geometry = replace(loaded.classifier.geometry, augment="none")
    feeding = FeedingOptions(skip_damaged=skip_damaged)
    items = _Relabelled(ImageItems(there[name], geometry, False, feeding), labels)
    return name, evaluate_model(loaded.model, items, loaded.classifier.class_names)


def _load(adapter: Path | str, backbone: str | None) -> LoadedAdapter:
    """Return a stored classifier, on the accelerator if there is one."""
    loaded = load_adapter(adapter, backbone)
    if torch.accelerator.is_available():
        loaded.model.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    return loaded


def _data_of_run(run: Path) -> tuple[str, SplitOptions, bool]:
    """Return the images of a run, how they were split, and whether damaged ones were left out."""
    path = run / "config.yaml"
    if not path.exists():
        raise ValueError(
            "This is no folder of `gift train`, which would say which images it is about: name them (--data)."
        )
    config = yaml.safe_load(path.read_text())
    names = ("validation", "test", "root", "validation_share", "train_on_validation", "seed")
    return config["data"], SplitOptions(**{name: config[name] for name in names}), config.get("skip_damaged", False)


def _check_unchanged(run: Path, splits: Splits) -> None:
    """Raise ValueError if the data of a run have changed: other images might then be set aside for validation."""
    if json.loads((run / "run_of.json").read_text()).get("digests") != digests(splits):
        raise ValueError(
            f"The images of {run} have changed since it was trained, so that trained ones might be measured. Name the "
            "images to evaluate on (--data)."
        )


class _Relabelled(torch.utils.data.Dataset):
    """Images whose classes are numbered as the head has them."""

    def __init__(self, items: ImageItems, labels: Sequence[int]) -> None:
        self.items, self.labels = items, labels

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        return item | {"labels": self.labels[item["labels"]]}


def describe_evaluation(split: str, evaluation: Evaluation) -> str:
    """Return accuracy, calibration, the classes that are predicted worst and the likeliest confusions."""
    low, high = (100 * bound for bound in evaluation.interval)
    top5 = "" if evaluation.top5 is None else f", top-5 {100 * evaluation.top5:.2f} %"
    names = [score.name for score in evaluation.per_class]
    confused = sorted(
        (
            (count, names[row], names[column])
            for row, counts in enumerate(evaluation.confusion)
            for column, count in enumerate(counts)
            if count and row != column
        ),
        reverse=True,
    )
    lines = [
        f"{split}: {100 * evaluation.accuracy:.2f} % [{low:.1f}, {high:.1f}] of {evaluation.images:,} images{top5}",
        f"mean over classes {100 * evaluation.mean_class_accuracy:.2f} %, loss {evaluation.loss:.4f}, "
        f"calibration error {evaluation.calibration_error:.3f}, "
        f"{evaluation.milliseconds_per_image:.2f} ms an image with reading",
        "",
        "| class | images | accuracy |",
        "|---|---|---|",
        *(
            f"| {score.name} | {score.images} | {'' if score.accuracy is None else f'{100 * score.accuracy:.1f} %'} |"
            for score in evaluation.per_class
        ),
    ]
    if confused:
        lines += ["", "Most often confused:"]
        lines += [f"  {count} x {truth} taken for {other}" for count, truth, other in confused[:CONFUSIONS_SHOWN]]
    return "\n".join(lines)


@dataclass(frozen=True)
class Prediction:
    """What is predicted for one image: its file, the likeliest classes with probabilities, or why it was not read."""

    image: str
    classes: tuple[tuple[str, float], ...]
    problem: str | None = None


def predict_images(
    adapter: Path | str, images: Path, top: int = 1, backbone: str | None = None, batch_size: int = 64
) -> list[Prediction]:
    """Return what a stored classifier predicts for an image or for all images below a folder, in order of their paths.

    Args:
        adapter: Folder of a run, an adapter or a model.
        images: An image, or a folder.
        top: How many of the likeliest classes.
        backbone: Name or folder of the backbone; by default what the adapter says.
        batch_size: Images at once.

    Raises:
        ValueError: If there are no images, or no classifier. An image that cannot be read is an entry like any other.
    """
    check_number("top", top, smallest=1, whole=True)
    files = [file.path for file in picture_files([images])]
    loaded = _load(adapter, backbone)
    predictions = []
    for start in range(0, len(files), batch_size):
        predictions += _predict(loaded, files[start : start + batch_size], images, top)
    return predictions


def _predict(loaded: LoadedAdapter, files: list[Path], root: Path, top: int) -> list[Prediction]:
    preparation = Preparation(loaded.classifier.geometry, train=False)
    read: dict[Path, Tensor] = {}
    problems: dict[Path, str] = {}
    for file in files:
        try:
            read[file] = preparation.normalised(preparation.kept(open_upright(str(file), file)))
        except (ValueError, OSError) as error:
            problems[file] = str(error)
    device = next(loaded.model.parameters()).device
    likeliest: dict[Path, tuple[tuple[str, float], ...]] = {}
    if read:
        with torch.no_grad():
            logits = loaded.model(pixel_values=torch.stack(list(read.values())).to(device)).logits
        names = loaded.classifier.class_names
        shares, classes = logits.float().softmax(dim=1).topk(min(top, len(names)))
        for file, of_image, of_share in zip(read, classes.tolist(), shares.tolist(), strict=True):
            likeliest[file] = tuple((names[number], share) for number, share in zip(of_image, of_share, strict=True))
    shown = {file: str(file if file == root else file.relative_to(root)) for file in files}
    return [Prediction(shown[file], likeliest.get(file, ()), problems.get(file)) for file in files]


def write_predictions(predictions: Sequence[Prediction], top: int, out: Path) -> None:
    """Write predictions as a CSV, whole or not at all: image, class and probability by rank, problem."""
    ranks = [
        f"{name}{'' if rank == 1 else f'_{rank}'}" for rank in range(1, top + 1) for name in ("class", "probability")
    ]
    partial = out.with_name(f"{out.name}.partial")
    with partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *ranks, "problem"])
        for prediction in predictions:
            values = [value for name, share in prediction.classes for value in (name, f"{share:.6f}")]
            padding = [""] * (len(ranks) - len(values))
            writer.writerow([prediction.image, *values, *padding, prediction.problem or ""])
    partial.replace(out)
