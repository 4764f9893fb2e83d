"""Labelled images from class folders: all in one pool, or under folders called train, val and test."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from gift.data.listing import SPLIT_OF, SPLITS, Finding, Listing, listed, several

FORM = "image folder"
_SYSTEM_FILES = {"__macosx", "thumbs.db", "desktop.ini"}
# What lies beside images in data sets; any other file in a class folder has to be an image.
_NO_IMAGES = {".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".html", ".pdf", ".mat", ".npy", ".log"}


def list_folder(folder: Path) -> Listing:
    """Return the images of a folder of class folders, or of folders train, val and test with class folders.

    All files in a class folder are its images, however deep they lie; hidden ones and those of the system are not.

    Raises:
        ValueError: If there are no class folders, or two folders for one split.
    """
    splits, notes = split_folders(folder)
    classes = {split: subfolders(path) for split, path in splits.items()}
    if not any(classes.values()):
        raise ValueError(
            f"{folder} must hold one subfolder of images for every class, or such folders under train, val and test; "
            f"it holds {several([entry.name for entry in _visible(folder)]) or 'nothing'}."
        )
    notes += [f"{splits[split]} has no class folders and is left out." for split in splits if not classes[split]]
    names = sorted({path.name for paths in classes.values() for path in paths})
    findings, rows = [], {}
    for split in (split for split in SPLITS if classes.get(split)):
        images, more_findings, more_notes = _class_images(splits[split], classes[split], split)
        labels = [names.index(name) for name, files in images.items() for _ in files]
        rows[split] = listed([file for files in images.values() for file in files], labels, names)
        findings += more_findings
        notes += more_notes
    return Listing(FORM, tuple(names), rows, tuple(findings), tuple(notes))


def split_folders(folder: Path) -> tuple[Mapping[str, Path], list[str]]:
    """Return the folder of every split, or the folder itself as `train` if it holds class folders; and what was left.

    Classes may be called train or test: folders of splits are those that hold folders themselves.

    Raises:
        ValueError: If two folders are for one split.
    """
    paths = subfolders(folder)
    named = [(SPLIT_OF[path.name.lower()], path) for path in paths if path.name.lower() in SPLIT_OF]
    splits = dict(named)
    nested = [split for split, path in splits.items() if subfolders(path)]
    has_train = "train" in nested or "trainval" in nested
    if not nested or not (len(named) == len(paths) or (has_train and len(splits) > 1)):
        return {"train": folder}, []
    if not has_train and len(nested) < len(splits):
        return {"train": folder}, []
    if len(splits) < len(named):
        raise ValueError(f"{folder} has several folders for one split: {several([path.name for _, path in named])}.")
    others = [path.name for path in paths if path not in splits.values()]
    return splits, [f"{folder}: the folders {several(others)} are no splits and are left out."] if others else []


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without hidden ones and those of the system."""
    return [Path(entry.path) for entry in _visible(folder) if entry.is_dir()]


def _visible(folder: Path | str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        visible = [it for it in entries if not it.name.startswith(".") and it.name.lower() not in _SYSTEM_FILES]
    return sorted(visible, key=lambda entry: entry.name)


def _files(folder: Path | str) -> Iterator[str]:
    """Yield the files below a folder; links to folders are not followed, as they may lead back up."""
    for entry in _visible(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _files(entry.path)
        elif entry.is_file() or (entry.is_symlink() and not entry.is_dir()):  # a broken link is an unreadable image
            yield entry.path


def _class_images(
    folder: Path, classes: Sequence[Path], split: str
) -> tuple[dict[str, list[str]], list[Finding], list[str]]:
    """Return the files of every class, the classes that have none, and notes on what was left out."""
    images: dict[str, list[str]] = {}
    others = [entry.path for entry in _visible(folder) if _suffix(entry.name) in IMG_EXTENSIONS and entry.is_file()]
    notes = [f"{folder} holds {len(others)} images that are in no class folder; they are left out."] if others else []
    beside: list[str] = []
    for path in classes:
        files = list(_files(path))
        images[path.name] = [file for file in files if _suffix(file) not in _NO_IMAGES]
        beside += [file for file in files if _suffix(file) in _NO_IMAGES]
    if beside:
        notes.append(f"{len(beside)} files in {folder} are no images and are left out: {several(beside)}.")
    empty = [str(path) for path in classes if not images[path.name]] if split != "test" else []
    message = "The class folder {} holds no images: put images of the class there, or delete the folder."
    return images, [Finding("empty class", message.format(path), (path,)) for path in empty], notes


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
