"""Labelled images of a user in any form, as the splits that a run trains, chooses and tests on."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets

from gift.data.folders import list_folder
from gift.data.listing import Finding, Listing, labels_of, relabelled, several
from gift.data.lists import fgvc_files, list_fgvc, list_vtab, vtab_files
from gift.data.tabular import list_hub, list_parquet, parquet_files
from gift.data.torchvision_sets import PREFIX, list_torchvision
from gift.data.zipped import unpacked
from gift.tuner.options import check_number

LACKING = "class without training images"  # the kind of a finding


@dataclass(frozen=True)
class SplitOptions:
    """Which images are for what.

    Args:
        validation: Another source to validate on.
        test: Another source to test on.
        root: Folder of torchvision's sets.
        validation_share: Share of the training images of each class that become the validation split where there is
            none; 0 makes none.
        train_on_validation: Whether to train on the validation images too, as the last step of a search does; no
            validation split is left then.
        seed: Of the validation split that is made.

    Raises:
        ValueError: If an option does not make sense.
    """

    validation: str | None = None
    test: str | None = None
    root: Path | str = "data"
    validation_share: float | int = 0.1
    train_on_validation: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("validation_share", self.validation_share, smallest=0)
        check_number("seed", self.seed, smallest=0, whole=True)
        if self.validation_share >= 1:
            raise ValueError(f"validation_share must be less than 1, or nothing is left, got {self.validation_share}.")


@dataclass(frozen=True, eq=False)
class Splits:
    """Labelled images, still encoded.

    Attributes:
        class_names: In the order of their numbers.
        train: Rows with the columns `image` (`datasets.Image(decode=False)`: `path` and `bytes`; where there are
            bytes, the path is a name for messages) and `label` (`datasets.ClassLabel`).
        validation: The same, or None.
        test: The same, or None.
        form: What was recognised, in words.
        notes: What a user should know, such as that a validation split was made.
    """

    class_names: tuple[str, ...]
    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    form: str
    notes: tuple[str, ...]


def read_splits(source: str, options: SplitOptions) -> Splits:
    """Return the labelled images of a source.

    Args:
        source: A folder of class folders, or of such folders under train, val and test; a zip archive of one; a parquet
            file, or a folder of them; a folder with the lists of VTAB-1k or of an FGVC task; `torchvision:NAME`; or the
            name of a dataset of the Hugging Face hub.
        options: Which images are for what.

    Raises:
        ValueError: If it is none of these or cannot be read, a class has no images to train on, there is only one
            class, or a list is wrong. All that is wrong is counted, the first problems are shown.
    """
    listing = list_splits(source, options)
    if listing.findings:
        raise ValueError("\n".join(finding.message for finding in listing.findings))
    splits, notes = dict(listing.splits), [*listing.notes, *_gaps(listing)]
    if "validation" not in splits and options.validation_share and not options.train_on_validation:
        splits["train"], splits["validation"] = _divide(splits["train"], options)
        notes.append(
            f"{len(splits['validation'])} of the training images, {options.validation_share:.3g} of each class, were "
            f"made the validation split (seed {options.seed}); {len(splits['train'])} are left."
        )
        if not len(splits["validation"]):
            raise ValueError(f"{source} has one image per class, too few to make a validation split: give one, or 0.")
    validation, test = splits.get("validation"), splits.get("test")
    return Splits(listing.class_names, splits["train"], validation, test, listing.form, tuple(notes))


def list_splits(source: str, options: SplitOptions) -> Listing:
    """Return what `read_splits` reads, without a validation split that is made, and with all that is wrong.

    Raises:
        ValueError: If the source is of no known form, or cannot be read at all.
    """
    listing = list_source(source, options)
    for split, other in (("validation", options.validation), ("test", options.test)):
        if other is not None:
            listing = _with_split(listing, split, _pick(other, split, list_source(other, options)))
    listing = _with_training_images(listing, options)
    return replace(listing, findings=(*listing.findings, *_class_findings(source, listing)))


def list_source(source: str, options: SplitOptions) -> Listing:
    """Return what one source holds; `read_splits` says of which forms it may be.

    Raises:
        ValueError: If it is of no known form, or cannot be read at all.
    """
    if source.startswith(PREFIX):
        return list_torchvision(source.removeprefix(PREFIX), options.root)
    path = Path(source).expanduser()
    if path.is_dir():
        return _list_directory(path)
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return list_parquet(path)
        if path.suffix.lower() == ".zip":
            listing = _list_directory(unpacked(path))
            return replace(listing, form=f"zip archive, {listing.form}")
        raise ValueError(f"{source} is of no known form: give a folder, a .zip archive or a .parquet file.")
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        return list_hub(source)
    raise ValueError(
        f"There is no file or folder {source}: give a folder of class folders, a .zip archive, a .parquet file, "
        f"{PREFIX}NAME, or the name of a dataset of the hub (OWNER/NAME)."
    )


def _list_directory(folder: Path) -> Listing:
    if vtab_files(folder):
        return list_vtab(folder)
    if fgvc_files(folder):
        return list_fgvc(folder)
    if parquet_files(folder):
        return list_parquet(folder)
    return list_folder(folder)


def _pick(source: str, split: str, other: Listing) -> Listing:
    """Return the listing with nothing but the one split that is meant, under the name `split`."""
    found = [split] if split in other.splits else list(other.splits)
    if len(found) != 1:
        raise ValueError(f"{source} has the splits {', '.join(found) or '(none)'}: give a source with one, or {split}.")
    return replace(other, splits={split: other.splits[found[0]]})


def _with_split(listing: Listing, split: str, other: Listing) -> Listing:
    """Return a listing with the one split of another, whose classes are matched by their names."""
    names = (*listing.class_names, *(name for name in other.class_names if name not in listing.class_names))
    splits = {key: relabelled(rows, names) for key, rows in {**listing.splits, **other.splits}.items()}
    findings, notes = (*listing.findings, *other.findings), (*listing.notes, *other.notes)
    return replace(listing, class_names=names, splits=splits, findings=findings, notes=notes)


def _with_training_images(listing: Listing, options: SplitOptions) -> Listing:
    """Return a listing without `trainval`: the images to train on are under `train`."""
    splits, notes = dict(listing.splits), list(listing.notes)
    both = splits.pop("trainval", None)
    if both is not None and "train" not in splits:
        splits["train"] = both
        if "validation" in splits and options.validation is None:
            del splits["validation"]
            notes.append("The validation images are part of the training images: the split is left out.")
    if options.train_on_validation:
        validation = splits.pop("validation", None)
        if both is not None and options.validation is None:
            splits["train"] = both
        elif validation is not None and "train" in splits:
            splits["train"] = concatenate_datasets([splits["train"], validation])
    return replace(listing, splits=splits, notes=tuple(notes))


def _class_findings(source: str, listing: Listing) -> list[Finding]:
    counts, findings = _class_counts(listing), []
    if "train" not in counts or not counts["train"].any():
        splits = ", ".join(split for split in counts if counts[split].any())
        return [
            Finding(
                "no training images",
                f"{source} has no images to train on, {f'only {splits}' if splits else 'nor any others'}.",
            )
        ]
    if np.count_nonzero(counts["train"]) < 2:
        only = listing.class_names[int(counts["train"].argmax())]
        message = (
            f"{source} has only one class, {only!r}: there must be two at least. Is it the folder that holds them?"
        )
        findings.append(Finding("one class", message))
    for split in [it for it in counts if it != "train"]:
        if not counts[split].any():
            findings.append(Finding("empty split", f"{source}: the {split} split holds no images.", (split,)))
        lacking = _names(listing, (counts["train"] == 0) & (counts[split] > 0))
        if lacking and not listing.may_lack_training_images:
            message = f"{source}: classes of the {split} images have no training images: {several(lacking)}."
            findings.append(Finding(LACKING, message, tuple(lacking)))
    return findings


def _gaps(listing: Listing) -> list[str]:
    gaps = _names(listing, _class_counts(listing)["train"] == 0)
    return [f"{len(gaps)} classes have no training images: {several(gaps)}."] if gaps else []


def _class_counts(listing: Listing) -> Mapping[str, np.ndarray]:
    """Return by split the number of images of every class."""
    return {
        split: np.bincount(labels_of(rows), minlength=len(listing.class_names))
        for split, rows in listing.splits.items()
    }


def _names(listing: Listing, chosen: np.ndarray) -> list[str]:
    return [listing.class_names[number] for number in np.flatnonzero(chosen)]


def _divide(rows: Dataset, options: SplitOptions) -> tuple[Dataset, Dataset]:
    """Return what is left to train on, and of each class the share to validate on, one image at least if it has two."""
    labels, rng = labels_of(rows), np.random.default_rng(options.seed)
    chosen: list[int] = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        count = min(max(1, round(options.validation_share * len(own))), len(own) - 1)
        chosen += rng.permutation(own)[:count].tolist()
    return rows.select(np.setdiff1d(np.arange(len(rows)), chosen)), rows.select(sorted(chosen))
