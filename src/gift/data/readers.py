"""Labelled images from a folder or a parquet file."""

import glob
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize

from gift.data.images import LabelledImages

Encoded = tuple[str, Path | io.BytesIO, int]  # what to call an image in messages, its file, its class


def read_images(path: Path | str, image_size_px: int) -> LabelledImages:
    """Return all images of a folder or parquet file: the shorter side resized (bicubic), the middle cut out, as RGB.

    The classes are numbered in the order of their names in a folder, and as the file says in a parquet file. Images are
    turned upright as their EXIF data say; transparency is dropped.

    Args:
        path: A folder with one subfolder of images per class, or a parquet file with columns `image` and `label` as the
            hub's datasets have them.
        image_size_px: Side of the square images in pixels.

    Raises:
        ValueError: If there is no such file or folder, it holds no labelled images, a class is empty, or an image is
            damaged or has more than 8 bits a channel.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"There is no file or folder {path}: give a folder of class folders, or a parquet file.")
    crop = Compose([Resize(image_size_px, InterpolationMode.BICUBIC), CenterCrop(image_size_px)])
    with tempfile.TemporaryDirectory() as cache:  # what is decoded is kept in memory, so no copy need stay on disk
        class_names, images = _list_folder(path) if path.is_dir() else _list_parquet(path, cache)
        decoded = [(_decode(name, file, crop), label) for name, file, label in images]
    if not decoded:
        raise ValueError(f"{path} holds no images.")
    pixels, labels = zip(*decoded, strict=True)
    return LabelledImages(np.stack(pixels), np.array(labels), class_names)


def _list_folder(path: Path) -> tuple[tuple[str, ...], Iterable[Encoded]]:
    try:
        folder = ImageFolder(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} must hold one subfolder of images for every class: {error}") from error
    return tuple(folder.classes), ((file, Path(file), label) for file, label in folder.samples)


def _list_parquet(path: Path, cache: str) -> tuple[tuple[str, ...], Iterable[Encoded]]:
    try:
        rows = load_dataset("parquet", data_files=glob.escape(str(path)), split="train", cache_dir=cache)
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a parquet file: {error}") from error
    assert isinstance(rows, Dataset)
    image, label = rows.features.get("image"), rows.features.get("label")
    if not (isinstance(image, ImageFeature) and isinstance(label, ClassLabel)):
        raise ValueError(
            f"{path} must have a column image of images and a column label of class labels, got {rows.features}."
        )
    return tuple(label.names), _encoded_rows(path, rows.cast_column("image", ImageFeature(decode=False)))


def _encoded_rows(path: Path, rows: Dataset) -> Iterable[Encoded]:
    classes = len(rows.features["label"].names)
    for index, row in enumerate(rows):
        name, encoded, label = f"row {index} of {path}", row["image"], row["label"]  # type: ignore[index, call-overload]
        if encoded is None or encoded["bytes"] is None:
            raise ValueError(f"The {name} has no image.")
        if label is None or not 0 <= label < classes:
            raise ValueError(f"The {name} has the label {label}, and there are {classes} classes.")
        yield name, io.BytesIO(encoded["bytes"]), label


def _decode(name: str, file: Path | io.BytesIO, crop: Compose) -> UInt8[np.ndarray, "rows columns 3"]:
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{name} has more than 8 bits a channel ({image.mode}): convert it to 8 bits.")
            return np.asarray(crop(ImageOps.exif_transpose(image).convert("RGB")))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} cannot be decoded: {error}") from error
