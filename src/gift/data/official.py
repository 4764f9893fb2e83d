"""Who is in which part of the five FGVC tasks, from the files that the data sets are published with.

Two sources, in this order:

* `train.json`, `val.json` and `test.json` of the VPT authors ({path: class}), which published numbers use;
* else the official lists. Where these have no validation part, a tenth of every class of the training part is drawn,
  so that sizes are those of the catalogue, but the images are others than in published work.

In both, classes are numbered from 1 without gaps, in the order of the numbers in the source.
"""

import io
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import PCG64, Generator
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from gift.data.archives import Source, is_inside
from gift.data.catalog import Task

# What scipy raises for files that are cut off or of another form; the file itself has been read by then.
_DAMAGED = (OSError, ValueError, TypeError, NotImplementedError, MatReadError, EOFError, IndexError, zlib.error)

Labels = dict[str, int]  # class number, from 1, by path
Splits = dict[str, Labels]  # by `train`, `val` and `test`


@dataclass(frozen=True)
class FgvcImages:
    """The parts of a task, where its images lie, and who made the parts.

    Attributes:
        splits: Class numbers of the images of `train`, `val` and `test`.
        files: Where each image lies now.
        note: Who chose the validation part.
    """

    splits: Splits
    files: dict[str, Path]
    note: str


@dataclass(frozen=True)
class _Form:
    """The form that a data set is published in: its folders of images with their archives, and its lists."""

    folders: Mapping[str, tuple[str, ...]]
    read_lists: Callable[[Source], Splits]


def read_official(task: Task, source: Source, seed: int) -> FgvcImages:
    """Return the parts of an FGVC task and where its images lie.

    Args:
        task: One of the suite `fgvc`.
        source: Its archives, packed or not.
        seed: Of the validation part, where one has to be drawn.

    Raises:
        ValueError: If a file is missing or damaged, or the lists do not fit one another.
    """
    form = _FORMS[task.name]
    places = {wanted: source.find(wanted, archives) for wanted, archives in form.folders.items()}
    folders = {wanted.rsplit("/", 1)[-1]: place for wanted, place in places.items()}
    splits = _read_json([source.path, *(place.parent for place in places.values())], tuple(folders))
    note = "Parts as in the train.json, val.json and test.json that lay there."
    if splits is None:
        splits, note = form.read_lists(source), "Parts as in the official lists."
    splits = _number_classes(splits, task.classes)
    if "val" not in splits:
        splits = _split_validation(splits, task.validation, seed)
        note = (
            f"Train and test as in the official lists; validation drawn from train with seed {seed}, a tenth of every "
            "class: not the validation part of published numbers."
        )
    paths = [path for labels in splits.values() for path in labels]
    return FgvcImages(splits, {path: _locate(path, folders) for path in paths}, note)


def _locate(path: str, folders: Mapping[str, Path]) -> Path:
    head, _, rest = path.partition("/")
    file = folders[head] / rest if head in folders else None
    if file is None or not is_inside(path) or not file.is_file():
        raise ValueError(f"The lists name the image {path}, which is not in {', '.join(map(str, folders.values()))}.")
    return file


def _read_json(places: list[Path], folders: tuple[str, ...]) -> Splits | None:
    """Return the parts in the JSON files of the first place that has some, or None."""
    names = {"train": "train.json", "val": "val.json", "test": "test.json"}
    for place in places:
        there = [name for name in names.values() if (place / name).is_file()]
        if there and len(there) < len(names):
            raise ValueError(f"{place} has {', '.join(there)}; give train.json, val.json and test.json, or none.")
        if there:
            return {split: _labels_of(place / name, folders) for split, name in names.items()}
    return None


def _labels_of(file: Path, folders: tuple[str, ...]) -> Labels:
    try:
        labels = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}.") from error
    if not isinstance(labels, dict) or not labels:
        raise ValueError(f"{file} must be an object with a class number for every path.")
    for path, number in labels.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"{file} gives {path} the class {number!r}; class numbers are whole.")
    # Some lists name images from the folder of the data set, others from its folder of images.
    return {path if path.partition("/")[0] in folders else f"{folders[0]}/{path}": labels[path] for path in labels}


def _number_classes(splits: Splits, classes: int) -> Splits:
    """Return class numbers from 1 without gaps; NABirds numbers its 555 classes up to 1010."""
    found = sorted({number for labels in splits.values() for number in labels.values()})
    if len(found) != classes:
        raise ValueError(f"The lists have {len(found)} classes, and there should be {classes}.")
    numbers = {number: index for index, number in enumerate(found, start=1)}
    return {split: {path: numbers[number] for path, number in labels.items()} for split, labels in splits.items()}


def _split_validation(splits: Splits, validation: int, seed: int) -> Splits:
    """Return parts with `validation` images taken out of train, as equal a share of every class as possible."""
    train, random = splits["train"], Generator(PCG64(seed))
    paths, labels = np.array(list(train)), np.array(list(train.values()))
    if not 0 <= validation < len(paths):
        raise ValueError(f"Cannot take {validation} images for validation out of {len(paths)}.")
    keys, position = random.random(len(paths)), np.empty(len(paths))
    for number in np.unique(labels):
        mine = np.flatnonzero(labels == number)
        position[mine[keys[mine].argsort(kind="stable")]] = (np.arange(len(mine)) + 0.5) / len(mine)
    chosen = set(paths[np.lexsort((keys, position))[:validation]].tolist())
    parts = {"train": {path: train[path] for path in train if path not in chosen}}
    return parts | {"val": {path: train[path] for path in train if path in chosen}, "test": splits["test"]}


def _read_columns(file: Path) -> dict[str, str]:
    """Return the second word of each line by its first."""
    columns: dict[str, str] = {}
    for number, line in enumerate(file.read_text("utf-8", "replace").splitlines(), start=1):
        words = line.split()
        if len(words) != 2 or words[0] in columns:
            raise ValueError(f"Line {number} of {file} must be a new name and one word, got {line!r}.")
        columns[words[0]] = words[1]
    return columns


def _read_birds(name: str, archive: str) -> Callable[[Source], Splits]:
    """Return what reads the lists of CUB-200-2011 and of NABirds: images, classes, whether they are for training."""

    def read(source: Source) -> Splits:
        files = [source.find(f"{name}/{part}", (archive,)) for part in ("images.txt", "image_class_labels.txt")]
        files.append(source.find(f"{name}/train_test_split.txt", (archive,)))
        paths, classes, training = map(_read_columns, files)
        if not paths.keys() == classes.keys() == training.keys():
            raise ValueError(f"{', '.join(map(str, files))} must name the same images.")
        if wrong := {*training.values()} - {"0", "1"} or [
            number for number in classes.values() if not number.isdigit()
        ]:
            raise ValueError(f"{files[1]} must hold class numbers and {files[2]} 0 or 1, got {sorted(wrong)[:3]}.")
        parts = {"train": "1", "test": "0"}
        return {
            split: {f"images/{paths[key]}": int(classes[key]) for key in paths if training[key] == flag}
            for split, flag in parts.items()
        }

    return read


def _read_mat(file: Path, *names: str) -> list[Any]:
    """Return variables of a MATLAB file, arrays without axes of length 1."""
    encoded = io.BytesIO(file.read_bytes())
    try:
        content = loadmat(encoded, squeeze_me=True)
        return [np.atleast_1d(content[name]) for name in names]
    except KeyError as error:
        raise ValueError(f"{file} has no variable {error}.") from error
    except _DAMAGED as error:
        raise ValueError(f"{file} cannot be read as a MATLAB file: {error}. Was the download complete?") from error


def _read_flowers(source: Source) -> Splits:
    labels = _read_mat(source.find("imagelabels.mat", ()), "labels")[0].tolist()
    file = source.find("setid.mat", ())
    parts = dict(zip(("train", "val", "test"), _read_mat(file, "trnid", "valid", "tstid"), strict=True))
    numbers = {split: [int(number) for number in ids] for split, ids in parts.items()}
    if wrong := [number for ids in numbers.values() for number in ids if not 1 <= number <= len(labels)]:
        raise ValueError(f"{file} names the image {wrong[0]}, and imagelabels.mat has {len(labels)}.")
    return {split: {f"jpg/image_{n:05}.jpg": int(labels[n - 1]) for n in ids} for split, ids in numbers.items()}


def _read_dogs(source: Source) -> Splits:
    splits: Splits = {}
    for split in ("train", "test"):
        file = source.find(f"{split}_list.mat", ("lists.tar",))
        paths, labels = _read_mat(file, "file_list", "labels")
        if len(paths) != len(labels):
            raise ValueError(f"{file} has {len(paths)} files and {len(labels)} labels.")
        splits[split] = {f"Images/{path}": int(label) for path, label in zip(paths, labels, strict=True)}
    return splits


def _read_cars(source: Source) -> Splits:
    splits: Splits = {}
    for split, name in {"train": "cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}.items():
        file = source.find(name, ("car_devkit.tgz",))
        annotations = _read_mat(file, "annotations")[0]
        if not {"class", "fname"} <= set(annotations.dtype.names or ()):
            raise ValueError(f"The annotations of {file} must have fields class and fname, got {annotations.dtype}.")
        splits[split] = {f"cars_{split}/{row['fname']}": int(row["class"]) for row in annotations}
    return splits


_FORMS: dict[str, _Form] = {
    "cub": _Form(
        {"CUB_200_2011/images": ("CUB_200_2011.tgz",)},
        _read_birds("CUB_200_2011", "CUB_200_2011.tgz"),
    ),
    "nabirds": _Form({"nabirds/images": ("nabirds.tar.gz",)}, _read_birds("nabirds", "nabirds.tar.gz")),
    "oxford_flowers": _Form({"jpg": ("102flowers.tgz",)}, _read_flowers),
    "stanford_dogs": _Form({"Images": ("images.tar",)}, _read_dogs),
    "stanford_cars": _Form({"cars_train": ("cars_train.tgz",), "cars_test": ("cars_test.tgz",)}, _read_cars),
}
