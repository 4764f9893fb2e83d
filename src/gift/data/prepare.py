"""Benchmark tasks in the form of folders that `gift.data.splits` reads, made from what their sources publish.

* VTAB-1k: from a TFDS export, or from the `vtab-1k` archive or folder that is passed around, which is checked:
  `images/`, `train800.txt`, `val200.txt`, `train800val200.txt`, `test.txt`, lines `path label` with labels from 0.
* FGVC: from the official archives, packed or not: images, `train.json`, `val.json`, `test.json`, {path: class from 1}.
* digits, rendered_flowers, dsprites_loc and dsprites_ori are made without a source, in the form of VTAB-1k.

A `README.md` says what was made from what, `sha256.txt` can be checked with `sha256sum -c`. One source makes the same
bytes every time. The folder is built under another name and renamed when everything has been checked.
"""

import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from gift.data.archives import ARCHIVES, Source, is_inside, unpack
from gift.data.catalog import Task, find_task
from gift.data.official import read_official
from gift.data.offline import OFFLINE_TASKS, OfflineTask
from gift.data.tfds import open_export
from gift.data.vtab import SLICINGS, labelled_examples
from gift.tuner.options import check_number

logger = logging.getLogger(__name__)

Example = tuple[str, bytes, int]  # what to call it in messages, its encoded image, its label
Listing = list[tuple[str, int]]  # paths and labels
VTAB_LISTS = ("train800", "val200", "train800val200", "test")


@dataclass(frozen=True)
class _Built:
    """What was put into a folder: the listing of each part, the number of the first class, a sentence about it."""

    parts: Mapping[str, Listing]
    first_class: int
    note: str


def prepare_task(task: str, source: Path | None, out: Path, count: int | None = None, seed: int = 0) -> Path:
    """Make the folder of a task and return it.

    Args:
        task: Its name in `gift.data.catalog.TASKS`.
        source: A folder of archives, of what was in them, or of TFDS exports; or an archive. None for a task of
            `gift.data.offline.OFFLINE_TASKS`.
        out: The folder to make, which may not exist yet.
        count: Number of images for testing if there is no source; as many as the catalogue says if it is None.
        seed: Of what is drawn, and of a validation part where the source has none.

    Raises:
        ValueError: If there is no such task, the source lacks something, is damaged or does not fit the catalogue, or
            `out` exists.
        OSError: If `out` cannot be written.
    """
    row, out = find_task(task), Path(out)
    _check_request(source, out, count, seed)
    if count is not None:
        row = replace(row, test=count)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch, "made")
        folder.mkdir()
        built = _build(row, None if source is None else Path(source), folder, seed)
        _check(row, folder, built)
        (folder / "README.md").write_text(_describe(row, built), "utf-8")
        (folder / "sha256.txt").write_text(_hash_files(folder), "utf-8")
        folder.rename(out)
    logger.info("%s: %s %s", out, {part: len(listing) for part, listing in built.parts.items()}, built.note)
    return out


def _check_request(source: Path | None, out: Path, count: int | None, seed: int) -> None:
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists: remove it, or choose another folder.")
    if source is not None and not Path(source).exists():
        raise ValueError(f"There is no file or folder {source}.")
    if count is not None and (source is not None or count < 1):
        wanted = "A count is of test images that are made without a source, at least 1"
        raise ValueError(f"{wanted}; got {count} with the source {source}.")
    check_number("seed", seed, smallest=0, whole=True)


def _build(task: Task, source: Path | None, folder: Path, seed: int) -> _Built:
    scratch = folder.parent / "unpacked"
    if task.suite == "imagenet":
        raise ValueError(f"{task.name} needs no preparing: unpack it, and read its folders of classes.")
    if source is None:
        return _build_offline(task, folder, seed)
    if task.suite == "fgvc":
        return _build_fgvc(task, Source(source, scratch, task.hashes), folder, seed)
    if task.suite == "offline":
        raise ValueError(f"{task.name} is made without a source: leave it out, got {source}.")
    if (found := _vtab_folder(task, source, scratch)) is not None:
        return _take_over(found, folder)
    export = open_export(source, task.tfds)
    parts = SLICINGS[task.name].parts(export, task).items()
    examples = {name: labelled_examples(export, task, part) for name, part in parts}
    return _write_vtab(folder, examples, f"From TFDS {'/'.join((task.tfds.rsplit('/', 1)[0], export.folder.name))}.")


def _build_offline(task: Task, folder: Path, seed: int) -> _Built:
    if task.name not in OFFLINE_TASKS:
        raise ValueError(f"{task.name} needs a source: only {', '.join(OFFLINE_TASKS)} are made without one.")
    offline, count = OFFLINE_TASKS[task.name], task.train + task.validation + task.test
    if count > offline.available:
        most = offline.available - task.train - task.validation
        raise ValueError(f"{task.name} has at most {most} images for testing, got a count of {task.test}.")
    return _write_vtab(folder, _cut(task, offline, count, seed), offline.note)


def _cut(task: Task, offline: OfflineTask, count: int, seed: int) -> dict[str, Iterator[Example]]:
    """Return the parts, which follow one another in one iterator and have to be read in this order."""
    examples = (
        (f"image {index} of {task.name}", _as_png(pixels), label)
        for index, (pixels, label) in enumerate(offline.examples(count, seed))
    )
    sizes = {"train800": task.train, "val200": task.validation, "test": task.test}
    return {part: islice(examples, size) for part, size in sizes.items()}


def _as_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _write_vtab(folder: Path, parts: Mapping[str, Iterable[Example]], note: str) -> _Built:
    """Write images and lists; images are numbered in their parts."""
    listings: dict[str, Listing] = {}
    for part, examples in parts.items():
        (folder / "images" / part).mkdir(parents=True)
        listings[part] = []
        for number, (name, encoded, label) in enumerate(examples):
            path = f"images/{part}/{number:06}{_suffix(name, encoded)}"
            (folder / path).write_bytes(encoded)
            listings[part].append((path, label))
    return _write_lists(folder, listings, note)


def _suffix(name: str, encoded: bytes) -> str:
    for start, suffix in {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg"}.items():
        if encoded.startswith(start):
            return suffix
    raise ValueError(f"The image of the {name} is neither PNG nor JPEG: it begins with {encoded[:8]!r}.")


def _write_lists(folder: Path, listings: Mapping[str, Listing], note: str) -> _Built:
    both = {"train800val200": listings["train800"] + listings["val200"]}
    for part, listing in {**listings, **both}.items():
        (folder / f"{part}.txt").write_text("".join(f"{path} {label}\n" for path, label in listing), "utf-8")
    return _Built(listings, 0, note)


def _vtab_folder(task: Task, source: Path, scratch: Path) -> Path | None:
    """Return the folder of a task in the usual form if it lies in `source`, or in an archive that `source` is."""
    if source.is_file():
        if not source.name.lower().endswith(ARCHIVES):
            raise ValueError(f"{source} must be a folder or an archive ({', '.join(ARCHIVES)}).")
        unpack(source, scratch, lambda name: task.name in name.split("/")[:-1])
        found = sorted(file.parent for file in scratch.rglob("train800.txt") if file.parent.name == task.name)
        if len(found) != 1:
            raise ValueError(f"{source} must hold one {task.name}/train800.txt, found {len(found)}.")
        return found[0]
    places = (source, source / task.name, source / "vtab-1k" / task.name)
    return next((place for place in places if (place / "train800.txt").is_file()), None)


def _take_over(source: Path, folder: Path) -> _Built:
    listings = {part: _read_list(source / f"{part}.txt") for part in VTAB_LISTS}
    if sorted(listings.pop("train800val200")) != sorted(listings["train800"] + listings["val200"]):
        raise ValueError(f"{source / 'train800val200.txt'} must hold what train800.txt and val200.txt hold together.")
    for path, _ in (entry for listing in listings.values() for entry in listing):
        _copy(source / path, folder / path)
    return _write_lists(folder, listings, "Taken over from a folder in this form.")


def _read_list(file: Path) -> Listing:
    if not file.is_file():
        raise ValueError(f"There is no {file}.")
    listing: Listing = []
    for number, line in enumerate(file.read_text("utf-8-sig", "replace").split("\n"), start=1):
        path, *label = line.strip().rsplit(None, 1) or [""]
        if not path:
            continue
        if not label or not label[0].isdecimal() or not is_inside(path):
            raise ValueError(f"Line {number} of {file} must be a path in its folder and a label, got {line!r}.")
        listing.append((path, int(label[0])))
    return listing


def _build_fgvc(task: Task, source: Source, folder: Path, seed: int) -> _Built:
    images = read_official(task, source, seed)
    for path, file in images.files.items():
        _copy(file, folder / path)
    for split, labels in images.splits.items():
        (folder / f"{split}.json").write_text(json.dumps(labels, indent=0) + "\n")
    return _Built({split: list(labels.items()) for split, labels in images.splits.items()}, 1, images.note)


def _copy(file: Path, target: Path) -> None:
    if not file.is_file():
        raise ValueError(f"There is no image {file}, which a list names.")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _check(task: Task, folder: Path, built: _Built) -> None:
    """Compare what was made with the catalogue: sizes, labels, classes, every image once and with a readable header."""
    sizes = {part: len(listing) for part, listing in built.parts.items()}
    if tuple(sizes.values()) != (task.train, task.validation, task.test):
        raise ValueError(
            f"{task.name} has {task.train} images for training, {task.validation} for validation and {task.test} for "
            f"testing, and the source gives {sizes}. Is it another version, or incomplete?"
        )
    seen: set[str] = set()
    for part, listing in built.parts.items():
        for path, label in listing:
            if not built.first_class <= label < built.first_class + task.classes:
                raise ValueError(f"{path} in {part} has the label {label}, and there are {task.classes} classes.")
            if path in seen:
                raise ValueError(f"{path} is listed twice, the second time in {part}.")
            seen.add(path)
            _check_header(folder / path, path)
        if task.suite == "fgvc" and part != "val" and len({label for _, label in listing}) != task.classes:
            raise ValueError(f"Not all of the {task.classes} classes of {task.name} are in {part}.")


def _check_header(file: Path, name: str) -> None:
    try:
        Image.open(file).close()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"The image {name} cannot be read: {error}.") from error


def _describe(task: Task, built: _Built) -> str:
    suite = f"{task.suite} {task.group}".strip()
    sizes = ", ".join(f"{part} {len(listing)}" for part, listing in built.parts.items())
    return f"""# {task.title} (`{task.name}`, {suite})
{task.classes} classes, numbered from {built.first_class}: {task.labels}. Images: {sizes}.

{built.note}

Home: {task.home}. Licence: {task.licence}. Published numbers: {task.preprocessing}.
"""


def _hash_files(folder: Path) -> str:
    """Return one line for each file, as sha256sum writes them."""
    lines = []
    for path in sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()):
        with open(os.path.join(folder, path), "rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {path}\n")
    return "".join(lines)
