"""Labelled images from tables: parquet files, and datasets of the Hugging Face hub."""

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Value, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from jaxtyping import Int

from gift.data.listing import SPLIT_OF, SPLITS, Finding, Listing, relabelled, several

PARQUET_FORM, HUB_FORM = "parquet", "dataset of the hub"
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
_UNREADABLE = (DatasetGenerationError, ValueError, OSError, RuntimeError)


def parquet_files(folder: Path) -> list[Path]:
    """Return the parquet files of a folder, or of its folder `data`, where the hub has them."""
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))


def list_parquet(path: Path) -> Listing:
    """Return the images of one parquet file, as `train`, or of a folder's files, whose names say the split.

    Raises:
        ValueError: If a file cannot be read, its name says no split, or its columns are not images and labels.
    """
    files = {"train": [path]} if path.is_file() else _by_split(path)
    tables = {}
    for split, of_split in files.items():
        names = [glob.escape(str(file)) for file in of_split]
        try:
            table = load_dataset("parquet", data_files=names, split="train")
        except _UNREADABLE as error:
            reason = error.__cause__ or error
            raise ValueError(f"{several(of_split)} cannot be read as parquet: {reason}") from error
        assert isinstance(table, Dataset)
        tables[split] = (of_split[0].name if len(of_split) == 1 else f"{path.name} ({split})", table)
    return _listing(PARQUET_FORM, tables, ())


def list_hub(name: str) -> Listing:
    """Return the images of a dataset of the hub, downloaded the first time; no code of the dataset is run.

    Raises:
        ValueError: If there is no such dataset, no network, or its columns are not images and labels.
    """
    try:
        loaded = load_dataset(name)
    except _UNREADABLE as error:
        raise ValueError(
            f"There is no file or folder {name}, and it cannot be loaded from the hub ({type(error).__name__}: "
            f"{error}). Is the name right, and is there a network?"
        ) from error
    assert isinstance(loaded, DatasetDict)
    known = {SPLIT_OF[str(split).lower()]: str(split) for split in loaded if str(split).lower() in SPLIT_OF}
    names = {split: known[split] for split in SPLITS if split in known}
    others = [split for split in loaded if split not in names.values()]
    notes = [f"The splits {several(others)} of {name} are left out."] if others else []
    if not names:
        raise ValueError(f"{name} has the splits {several(others)}: one must be called train.")
    return _listing(HUB_FORM, {key: (f"{name} ({split})", loaded[split]) for key, split in names.items()}, notes)


def _by_split(folder: Path) -> dict[str, list[Path]]:
    files = parquet_files(folder)
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = [word for word in re.split(r"[-_.\s]+", file.stem.lower()) if word in SPLIT_OF]
        splits.setdefault(SPLIT_OF[words[0]] if words else "", []).append(file)
    if list(splits) == [""]:
        return {"train": files}
    if unnamed := splits.get(""):
        raise ValueError(f"{several(unnamed)}: the name of a file must say train, validation or test, as others do.")
    return {split: splits[split] for split in SPLITS if split in splits}  # classes are numbered as in training


def _listing(form: str, tables: Mapping[str, tuple[str, Dataset]], notes: Sequence[str]) -> Listing:
    """Return the images of tables, given with what to call each."""
    notes, findings, splits = list(notes), [], {}
    for split, (name, table) in tables.items():
        column, numbers = _labels(name, table)
        names = (
            column.names if isinstance(column, ClassLabel) else [str(it) for it in range(numbers.max(initial=-1) + 1)]
        )
        if len(numbers) and split != "train" and np.all(numbers == -1):
            notes.append(f"{name} has no labels (all are -1) and is left out.")
            continue
        splits[split], problems = _rows(name, table, numbers, names, has_files=form == HUB_FORM)
        if problems:
            message = f"{name} has {len(problems)} wrong rows: {several(problems)}"
            findings.append(Finding("rows", message, tuple(problems)))
    class_names = tuple(dict.fromkeys(name for rows in splits.values() for name in rows.features["label"].names))
    splits = {split: relabelled(rows, class_names) for split, rows in splits.items()}
    return Listing(form, class_names, splits, tuple(findings), tuple(notes))


def _column(name: str, table: Dataset, candidates: Sequence[str]) -> str:
    found = [column for column in candidates if column in table.features]
    if len(found) != 1:
        raise ValueError(
            f"{name} must have one column called {' or '.join(candidates)}, it has {', '.join(table.features)}."
        )
    return found[0]


def _labels(name: str, table: Dataset) -> tuple[ClassLabel | Value, Int[np.ndarray, " rows"]]:
    """Return the kind of the labels and the labels, -2 where there is none."""
    column = _column(name, table, _LABEL_COLUMNS)
    feature = table.features[column]
    is_whole = isinstance(feature, Value) and re.fullmatch(r"u?int(8|16|32|64)", feature.dtype)
    if not isinstance(feature, ClassLabel) and not is_whole:
        raise ValueError(f"The column {column} of {name} must be class labels or whole numbers, got {feature}.")
    return feature, table.data.column(column).cast(pa.int64()).fill_null(-2).to_numpy()


def _rows(
    name: str, table: Dataset, labels: Int[np.ndarray, " rows"], class_names: Sequence[str], has_files: bool
) -> tuple[Dataset, list[str]]:
    """Return the rows as `gift.data.listing.listed` does, each image with a name for messages, and what is wrong.

    A parquet file of a user must hold its images; only datasets of the hub may name files, in the cache of `datasets`.
    """
    column = _column(name, table, _IMAGE_COLUMNS)
    kind = table.features[column]
    is_bytes = isinstance(kind, Value) and kind.dtype in ("binary", "large_binary")
    if not (isinstance(kind, ImageFeature) or is_bytes or (isinstance(kind, dict) and {"bytes", "path"} == set(kind))):
        raise ValueError(f"The column {column} of {name} must be images, got {kind}.")
    images = table.cast_column(column, ImageFeature(decode=False)).data.column(column)
    chunks, problems, start = [], {}, 0
    for chunk in images.chunks:
        encoded, paths = chunk.flatten()
        titles = []
        for row, has_bytes, path in zip(range(start, start + len(chunk)), encoded.is_valid(), paths, strict=True):
            file, title = path.as_py(), f"row {row} of {name}"
            titles.append(file if not has_bytes.as_py() else f"{title} ({file})" if file else title)
            if not has_bytes.as_py() and not (has_files and file):
                problems[row] = f"{title} has no image"
        chunks.append(pa.StructArray.from_arrays([encoded, pa.array(titles, pa.string())], names=["bytes", "path"]))
        start += len(chunk)
    for row in np.flatnonzero((labels < 0) | (labels >= len(class_names))).tolist():
        got = "no label" if labels[row] == -2 else f"the label {labels[row]}"
        problems[row] = f"row {row} of {name} has {got}, and there are {len(class_names)} classes"
    features = Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=list(class_names))})
    columns = {"image": pa.chunked_array(chunks, images.type), "label": pa.array(labels, pa.int64())}
    rows = Dataset(pa.table(columns), info=DatasetInfo(features=features))  # type: ignore[arg-type]
    if problems:
        rows = rows.select([row for row in range(len(rows)) if row not in problems])
    return rows, [problems[row] for row in sorted(problems)]
