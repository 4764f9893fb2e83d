"""Labelled images from the sets that torchvision knows by name."""

import inspect
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torchvision.datasets
from PIL import Image
from torchvision.datasets import VisionDataset

from gift.data.listing import SPLIT_OF, SPLITS, Listing, listed

PREFIX = "torchvision:"
_ROOT_IS_THE_SET = {"FakeData", "ImageFolder", "DatasetFolder", "VisionDataset"}  # drawn, or of any folder


def list_torchvision(name: str, root: Path | str) -> Listing:
    """Return the images of a set of torchvision that lies in a folder, downloaded if it is not there and can be.

    Images stay the files that they are; those that torchvision reads from arrays become PNG.

    Args:
        name: Of a class in `torchvision.datasets` whose items are an image and a number.
        root: What the class is given as its root.

    Raises:
        ValueError: If there is no such set, it cannot be read or downloaded, or its items are something else.
    """
    kind = getattr(torchvision.datasets, name, None)
    is_set = isinstance(kind, type) and issubclass(kind, VisionDataset) and name not in _ROOT_IS_THE_SET
    if not is_set:
        raise ValueError(f"torchvision has no set {name!r} of labelled images: try {PREFIX}CIFAR10 or {PREFIX}DTD.")
    assert kind is not None
    splits = _splits(kind)
    if not splits.keys() & {"train", "trainval"}:
        raise ValueError(f"torchvision's {name} has no split to train on, only {', '.join(splits) or 'others'}.")
    images = {split: _open(kind, Path(root), arguments) for split, arguments in splits.items()}
    items = {split: _items(name, split, opened) for split, opened in images.items()}
    highest = max((label for _, labels in items.values() for label in labels), default=-1)
    class_names = _class_names(next(iter(images.values())), highest + 1)
    rows = {split: listed(files, labels, class_names) for split, (files, labels) in items.items()}
    return Listing(f"torchvision's {name}", class_names, rows)


def _splits(kind: Callable[..., VisionDataset]) -> dict[str, dict[str, Any]]:
    """Return by split the arguments that a class takes for it."""
    parameters = inspect.signature(kind).parameters
    if "train" in parameters:
        return {"train": {"train": True}, "test": {"train": False}}
    if "split" not in parameters:
        return {"train": {}}
    try:
        kind("", split="?")
    except ValueError as error:  # the one place where a class says which splits it has
        names = re.findall("'([^']+)'", str(error).partition("Valid values")[2])
        splits = {SPLIT_OF[it]: {"split": it} for it in names if it in SPLIT_OF}
        both = "train" in splits and "validation" in splits
        return {split: splits[split] for split in SPLITS if split in splits and not (both and split == "trainval")}
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"torchvision cannot read this set: {error}") from error
    return {}


def _open(kind: Callable[..., VisionDataset], root: Path, arguments: dict[str, Any]) -> VisionDataset:
    parameters = inspect.signature(kind).parameters
    if "loader" in parameters:
        arguments = arguments | {"loader": str}  # the path itself in place of the image
    can_download = "download" in parameters
    try:
        try:
            return kind(root, **arguments, **({"download": False} if can_download else {}))
        except (RuntimeError, FileNotFoundError):
            if not can_download:
                raise
        return kind(root, **arguments, download=True)
    except (RuntimeError, OSError, ValueError) as error:
        name = getattr(kind, "__name__", str(kind))
        raise ValueError(f"torchvision's {name} is not in {root}, or cannot be read there: {error}") from error


def _items(name: str, split: str, images: Any) -> tuple[Sequence[str] | list[dict[str, object]], list[int]]:
    """Return the images, as files if the set has them, and their labels."""
    samples = getattr(images, "_samples", None)  # as of GTSRB
    if samples and isinstance(samples[0][0], (str, Path)):
        return [str(path) for path, _ in samples], [int(label) for _, label in samples]
    if isinstance(getattr(images, "_images", None), list):  # as of OxfordIIITPet
        return [str(path) for path in images._images], [int(label) for label in images._labels]
    files, labels = [], []
    for index in range(len(images)):
        item = images[index]
        image, label = item if isinstance(item, tuple) and len(item) == 2 else (None, None)
        if not isinstance(image, (str, Image.Image)) or isinstance(label, bool) or not hasattr(label, "__index__"):
            raise ValueError(f"Items of torchvision's {name} must be an image and a number, got {item!r:.200}.")
        files.append(_encoded(image, f"image {index} of {name} ({split})"))
        labels.append(int(label))  # type: ignore[arg-type]
    return files, labels


def _encoded(image: str | Image.Image, name: str) -> dict[str, object]:
    path = image if isinstance(image, str) else getattr(image, "filename", "")
    if path:
        if isinstance(image, Image.Image):
            image.close()
        return {"path": str(path), "bytes": None}
    file = io.BytesIO()
    assert isinstance(image, Image.Image)
    image.save(file, "PNG", compress_level=1)
    return {"path": name, "bytes": file.getvalue()}


def _class_names(images: Any, count: int) -> tuple[str, ...]:
    """Return the names that a set has for its classes, or their numbers."""
    known = getattr(images, "classes", None) or getattr(images, "categories", None) or ()
    names = [it if isinstance(it, str) else ", ".join(map(str, it)) for it in known]
    if len(names) < count:
        return tuple(str(number) for number in range(count))
    repeated = {name for name in names if names.count(name) > 1}  # ImageNet has two kinds of crane
    return tuple(f"{name} ({number})" if name in repeated else name for number, name in enumerate(names))
