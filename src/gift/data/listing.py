"""Which labelled images a source holds, before anything is decoded: what every reader of a form of data returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from jaxtyping import Int

from gift.data.pictures import printable

SPLITS = ("train", "trainval", "validation", "test")  # `trainval` is both at once, where a source lists it by itself
SPLIT_OF = {  # by what files and folders are called
    **dict.fromkeys(("train", "training", "train-standard"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "eval"), "test"),
    "trainval": "trainval",
}
SHOWN = 5  # problems of one kind in a message


@dataclass(frozen=True)
class Finding:
    """Something wrong with a source.

    Attributes:
        kind: In a few words, the same for all findings of a kind.
        message: What is wrong, what came, what to do.
        paths: The files, lines or rows that it is about.
    """

    kind: str
    message: str
    paths: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Listing:
    """What a source holds.

    Attributes:
        form: What was recognised, in words.
        class_names: In the order of their numbers.
        splits: Those of `SPLITS` that there are, with the columns of `listed`.
        findings: What keeps it from being trained on; images that are part of it are not in `splits`.
        notes: What a user should know.
        may_lack_training_images: Whether a class of the test images may have no training images.
    """

    form: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Dataset]
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    may_lack_training_images: bool = False


def listed(
    images: Sequence[Path | str] | Sequence[dict[str, object]], labels: Sequence[int], class_names: Sequence[str]
) -> Dataset:
    """Return rows with the columns `image` (left encoded: a path, or bytes and perhaps a path) and `label`.

    Args:
        images: Files, or images as the column holds them. Where there are bytes, the path is a name for messages.
        labels: Number of the class of each.
        class_names: In the order of their numbers.

    Raises:
        ValueError: If a path is not UTF-8.
    """
    column = [image if isinstance(image, dict) else {"path": str(image), "bytes": None} for image in images]
    features = Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=list(class_names))})
    try:
        return Dataset.from_dict({"image": column, "label": list(labels)}, features=features)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The name of {printable(error.object)} is not UTF-8: rename the file, or its folder."
        ) from error


def labels_of(rows: Dataset) -> Int[np.ndarray, " rows"]:
    """Return the number of the class of every row."""
    return np.asarray(rows["label"][:], dtype=np.int64)


def relabelled(rows: Dataset, class_names: Sequence[str]) -> Dataset:
    """Return the rows with their classes numbered as in `class_names`, which has to hold all that they have."""
    own = rows.features["label"].names
    if own == list(class_names):
        return rows
    numbers = {name: number for number, name in enumerate(class_names)}
    renumbered = np.array([numbers.get(name, -1) for name in own], dtype=np.int64)[labels_of(rows)]
    feature = ClassLabel(names=list(class_names))
    return rows.remove_columns("label").add_column("label", renumbered, feature=feature)  # type: ignore[arg-type]


def several(things: Sequence[object]) -> str:
    """Return the first few things and how many there are beyond, for a message."""
    shown = ", ".join(str(thing) for thing in things[:SHOWN])
    return shown if len(things) <= SHOWN else f"{shown} and {len(things) - SHOWN} more"
