"""Labelled images from a folder or a parquet file."""

import glob
import io
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from jaxtyping import Float, Int, Shaped
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize

from gift.data.decoding import open_upright
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
    crop = square_crop(image_size_px)
    with tempfile.TemporaryDirectory() as cache:  # what is decoded is kept in memory, so no copy need stay on disk
        class_names, images = _list_folder(path) if path.is_dir() else _list_parquet(path, cache)
        decoded = [(np.asarray(crop(open_upright(name, file).convert("RGB"))), label) for name, file, label in images]
    if not decoded:
        raise ValueError(f"{path} holds no images.")
    pixels, labels = zip(*decoded, strict=True)
    return LabelledImages(np.stack(pixels), np.array(labels), class_names)


def square_crop(image_size_px: int) -> Compose:
    """Return what every image goes through: the shorter side resized (bicubic), the middle cut out."""
    return Compose([Resize(image_size_px, InterpolationMode.BICUBIC), CenterCrop(image_size_px)])


def area_crop(
    covered: Shaped[np.ndarray, "rows columns"],
    edges: tuple[Int[np.ndarray, " row_edges"], Int[np.ndarray, " column_edges"]],
    size: tuple[int, int],
    image_size_px: int,
) -> Float[np.ndarray, "image_size_px image_size_px"]:
    """Return which share of every pixel is covered once `square_crop` has resized and cut the image, from 0 to 1.

    Args:
        covered: Of what lies between neighbouring edges, 1 or True if it is covered and 0 or False if not.
        edges: The edges between rows and between columns, in pixels of the image before it is resized.
        size: Width and height of that image in pixels.
        image_size_px: Side of the square images in pixels.
    """
    rows, columns = (
        _overlaps(between, side, min(size), image_size_px) for between, side in zip(edges, reversed(size), strict=True)
    )
    return rows @ covered.astype(np.float64) @ columns.T


def _overlaps(
    edges: Int[np.ndarray, " edges"], side_px: int, shorter_px: int, image_size_px: int
) -> Float[np.ndarray, "image_size_px intervals"]:
    """Return the share of every pixel of a side that lies between neighbouring edges, rounded as torchvision does."""
    resized = int(image_size_px * side_px / shorter_px)
    first = round((resized - image_size_px) / 2)
    ticks = (first + np.arange(image_size_px + 1)) * (side_px / resized)
    overlaps = np.minimum(ticks[1:, None], edges[1:]) - np.maximum(ticks[:-1, None], edges[:-1])
    return np.maximum(overlaps, 0) * (resized / side_px)


def _list_folder(path: Path) -> tuple[tuple[str, ...], Iterable[Encoded]]:
    try:
        folder = ImageFolder(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} must hold one subfolder of images for every class: {error}") from error
    return tuple(folder.classes), ((file, Path(file), label) for file, label in folder.samples)


def _list_parquet(path: Path, cache: str) -> tuple[tuple[str, ...], Iterable[Encoded]]:
    rows = open_parquet(path, cache)
    return tuple(rows.features["label"].names), encoded_rows(path, rows, range(len(rows)))


def open_parquet(path: Path, cache: str) -> Dataset:
    """Return the rows of a parquet file with a column `image` (left encoded) and a column `label` of class labels.

    Args:
        path: The file.
        cache: Folder for the copy that the rows are read from; it has to last as long as they do.

    Raises:
        ValueError: If it cannot be read or does not have these columns.
    """
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
    return rows.cast_column("image", ImageFeature(decode=False))


def encoded_rows(path: Path, rows: Dataset, chosen: Sequence[int]) -> Iterable[Encoded]:
    """Yield the images of the `chosen` rows of what `open_parquet` returned for `path`.

    Raises:
        ValueError: If one of them has no image or no known label.
    """
    classes = len(rows.features["label"].names)
    for index, row in zip(chosen, rows.select(chosen), strict=True):
        name, encoded, label = f"row {index} of {path}", row["image"], row["label"]  # type: ignore[index, call-overload]
        if encoded is None or encoded["bytes"] is None:
            raise ValueError(f"The {name} has no image.")
        if label is None or not 0 <= label < classes:
            raise ValueError(f"The {name} has the label {label}, and there are {classes} classes.")
        yield name, io.BytesIO(encoded["bytes"]), label
