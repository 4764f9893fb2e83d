"""Labelled images from lists: the text files of VTAB-1k and the JSON files of the FGVC tasks.

Both name files relative to the folder, or to its folder `images`, `Images` or `jpg`.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gift.data.catalog import TASKS
from gift.data.listing import SHOWN, Finding, Listing, listed

VTAB_FORM, FGVC_FORM = "VTAB-1k lists", "FGVC lists"
VTAB_FILES = {  # by split
    "train": "train800.txt",
    "trainval": "train800val200.txt",
    "validation": "val200.txt",
    "test": "test.txt",
}
FGVC_FILES = {"train": "train.json", "trainval": "trainval.json", "validation": "val.json", "test": "test.json"}
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"(\s*:)?')  # of JSON; with a colon it is a key
MAX_CLASSES = 25_000  # ImageNet-21k has 21,841
_IMAGE_FOLDERS = ("", "images", "Images", "jpg")


@dataclass(frozen=True)
class _Entry:
    """What a list says of one image: where it says so, the image and the number of its class as they came."""

    where: str
    image: str
    number: Any


@dataclass(frozen=True)
class _List:
    """The images and numbers of classes that are right in a list, and what is wrong with the others."""

    images: list[str]
    numbers: list[int]
    findings: list[Finding]


def vtab_files(folder: Path) -> dict[str, Path]:
    """Return by split the text files that a folder of VTAB-1k has; none unless there is one to train on."""
    files = {split: folder / name for split, name in VTAB_FILES.items() if (folder / name).is_file()}
    return files if files.keys() & {"train", "trainval"} else {}


def fgvc_files(folder: Path) -> dict[str, Path]:
    """Return by split the JSON files of a folder: train.json or NAME.train.json in it, or FOLDER.train.json beside it.

    Raises:
        ValueError: If there are several for one split.
    """
    files = {}
    for split, name in FGVC_FILES.items():
        beside = folder.resolve().with_name(f"{folder.resolve().name}.{name}")
        found = [*sorted(folder.glob(f"*.{name}")), *(path for path in (folder / name, beside) if path.is_file())]
        if len(found) > 1:
            raise ValueError(f"{folder} has several lists of one split, {', '.join(map(str, found))}: keep one.")
        if found:
            files[split] = found[0]
    return files


def list_vtab(folder: Path) -> Listing:
    """Return the images that the text files of a folder of VTAB-1k list; see `vtab_files`."""
    count = _class_count(folder)
    lists = {split: _check(folder, path, _read_text, count) for split, path in vtab_files(folder).items()}
    seen = [number for entries in lists.values() for number in entries.numbers]
    numbers = range(count if count is not None else max(seen, default=-1) + 1)
    return _listing(VTAB_FORM, lists, numbers)


def list_fgvc(folder: Path) -> Listing:
    """Return the images that the JSON files of a folder list; see `fgvc_files`.

    The numbers of classes may begin anywhere and have gaps: classes are numbered in the order of the sorted numbers
    of all files.
    """
    lists = {split: _check(folder, path, _read_json, None) for split, path in fgvc_files(folder).items()}
    numbers = sorted({number for entries in lists.values() for number in entries.numbers})
    listing, count = _listing(FGVC_FORM, lists, numbers), _class_count(folder)
    if count is None or len(numbers) <= count:
        return listing
    message = f"The lists of {folder} have {len(numbers)} classes, and the task {folder.resolve().name} has {count}."
    return Listing(FGVC_FORM, listing.class_names, listing.splits, (*listing.findings, Finding("classes", message)))


def _listing(form: str, lists: dict[str, _List], numbers: Sequence[int]) -> Listing:
    names = tuple(str(number) for number in numbers)
    index = {number: position for position, number in enumerate(numbers)}
    rows = {
        split: listed(entries.images, [index[number] for number in entries.numbers], names)
        for split, entries in lists.items()
    }
    findings = tuple(finding for entries in lists.values() for finding in entries.findings)
    # The 800 images of VTAB-1k are drawn without regard to classes: Sun397 has classes that only the test images show.
    return Listing(form, names, rows, findings, may_lack_training_images=form == VTAB_FORM)


def _class_count(folder: Path) -> int | None:
    """Return the number of classes of the task after which the folder is called, or None if there is no such task."""
    task = TASKS.get(folder.resolve().name)
    return None if task is None else task.classes


def _check(folder: Path, path: Path, read: Callable[[str], tuple[list[_Entry], list[str]]], count: int | None) -> _List:
    """Return what is right in a list and, in one finding, all that is wrong."""
    try:
        entries, problems = read(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # no UTF-8, or no JSON
        return _List([], [], [Finding("list", f"{path} cannot be read: {error}", (str(path),))])
    roots = [folder / name for name in _IMAGE_FOLDERS if (folder / name).is_dir()]
    images, numbers, places = [], [], list(problems)
    for entry in entries:
        problem = _number_problem(entry.number, count) or _path_problem(entry.image)
        file = None if problem else next((it for it in _candidates(roots, entry.image) if os.path.isfile(it)), None)
        if problem or file is None:
            places.append(f"{entry.where}: {problem or f'there is no image {entry.image!r} in {folder}'}")
        else:
            images.append(file)
            numbers.append(int(entry.number))
    return _List(images, numbers, [_wrong(path, places)] if places else [])


def _wrong(path: Path, places: list[str]) -> Finding:
    shown = "".join(f"\n  {place}" for place in places[:SHOWN])
    more = f"\n  and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    message = f"{path} has {len(places)} wrong {'entry' if len(places) == 1 else 'entries'}:{shown}{more}"
    return Finding("list", message, tuple(f"{path}, {place}" for place in places))


def _candidates(roots: Sequence[Path], image: str) -> list[str]:
    return [os.path.join(root, image) for root in roots]


def _path_problem(image: str) -> str | None:
    parts = PurePosixPath(image).parts
    if not parts or "\0" in image:
        return f"{image!r} is no path of an image"
    if parts[0] == "/" or ".." in parts:
        return f"the path {image!r} leads out of the folder"
    return None


def _number_problem(number: Any, count: int | None) -> str | None:
    if isinstance(number, str) and number.isascii() and number.isdigit() and len(number) < 10:
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        return f"the class must be a whole number from 0, got {number!r}"
    if number >= MAX_CLASSES:
        return f"the class must be less than {MAX_CLASSES}, got {number}"
    if count is not None and number >= count:
        return f"the class must be from 0 to {count - 1}, as the task has {count} classes, got {number}"
    return None


def _read_text(text: str) -> tuple[list[_Entry], list[str]]:
    """Return the entries of lines `path number`; a path may hold blanks."""
    entries, problems = [], []
    for index, line in enumerate(text.split("\n"), 1):
        fields = line.strip().rsplit(None, 1)
        if len(fields) == 2:
            entries.append(_Entry(f"line {index}", *fields))
        elif fields:
            problems.append(f"line {index}: must be a path, a blank and the number of a class, got {line!r}")
    return entries, problems


def _read_json(text: str) -> tuple[list[_Entry], list[str]]:
    """Return the entries of an object {path: number}; a path that stands there twice is a problem."""
    pairs = json.loads(text, object_pairs_hook=list)
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise ValueError(f"must be an object of paths and numbers of classes, begins with {text.strip()[:40]!r}")
    keys = [token.start() for token in _STRING.finditer(text) if token[1]]
    if len(keys) != len(pairs):
        raise ValueError("must be one object of paths and numbers of classes, has objects inside")
    entries, problems, line = {}, [], 1
    for (image, number), before, place in zip(pairs, [0, *keys], keys, strict=False):
        line += text.count("\n", before, place)
        where = f"line {line} (key {image!r})"
        if image in entries:
            problems.append(f"{where}: stands there twice")
        entries[image] = _Entry(where, image, number)
    return list(entries.values()), problems
