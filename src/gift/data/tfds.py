"""The examples of a prepared TFDS export, read without TensorFlow.

An export is a folder `<name>/<version>` or `<name>/<config>/<version>` with `dataset_info.json` and, for every split,
files `<name>-<split>.tfrecord-00000-of-00002`. Examples count in the order of these files, as TFDS slices them.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gift.data.tfrecord import Value, count_records, parse_example, read_records


@dataclass(frozen=True)
class TfdsExport:
    """The files of a prepared export, and how many examples each holds, by name of the split."""

    folder: Path
    shards: dict[str, tuple[tuple[Path, int], ...]]

    def count(self, split: str) -> int:
        """Return the number of examples of a split.

        Raises:
            ValueError: If there is no such split.
        """
        if split not in self.shards:
            raise ValueError(f"{self.folder} has no split {split!r}, only {sorted(self.shards)}.")
        return sum(records for _, records in self.shards[split])

    def examples(self, split: str, chosen: range) -> Iterator[tuple[str, dict[str, Value]]]:
        """Yield what to call an example in messages, and its features; images are encoded as they were stored.

        Args:
            split: Name of the split.
            chosen: Their numbers in it, in steps of 1.

        Raises:
            ValueError: If the split does not have so many examples, or a file is damaged.
        """
        if chosen.start < 0 or chosen.stop > self.count(split):
            raise ValueError(
                f"The split {split} of {self.folder} has {self.count(split)} examples, too few for number "
                f"{chosen.start} to {chosen.stop - 1}."
            )
        first = 0
        for file, records in self.shards[split]:
            inside = range(max(chosen.start - first, 0), min(chosen.stop - first, records))
            first += records
            if inside:
                yield from _file_examples(file, records, inside)


def _file_examples(file: Path, records: int, inside: range) -> Iterator[tuple[str, dict[str, Value]]]:
    total = 0
    for number, data in enumerate(read_records(file, inside)):
        total += 1
        if data is not None:
            yield f"record {number} of {file}", _parse(data, f"record {number} of {file}")
        if number == inside.stop - 1 < records - 1:
            return
    if total != records:
        raise ValueError(f"{file} has {total} records, and dataset_info.json says {records}. Was the export cut off?")


def _parse(data: bytes, name: str) -> dict[str, Value]:
    try:
        return parse_example(data)
    except ValueError as error:
        raise ValueError(f"The {name} cannot be read. {error}") from error


def open_export(source: Path, wanted: str) -> TfdsExport:
    """Return an export that lies in a folder.

    Args:
        source: The folder with `dataset_info.json`, or one above it: of the data set, or of all of them.
        wanted: `name/version` or `name/config/version`; only the first number of the version has to agree.

    Raises:
        ValueError: If there is none or more than one, or files are missing.
    """
    name, *config, version = wanted.split("/")
    path, major = "/".join((name, *config)), version.partition(".")[0]
    pattern = f"{major}.*/dataset_info.json"
    places = (source / "dataset_info.json", *source.glob(pattern), *source.glob("/".join((*config, pattern))))
    found = {place.parent.resolve() for place in (*places, *source.glob(f"{path}/{pattern}")) if place.is_file()}
    if len(found) != 1:
        raise ValueError(
            f"{source} must hold one export {path}/{major}.*.* of TFDS with its dataset_info.json, "
            f"found {sorted(map(str, found)) or 'none'}."
        )
    folder = found.pop()
    info = _read_info(folder / "dataset_info.json")
    actual = "/".join(filter(None, (str(info.get("name")), str(info.get("configName") or ""))))
    given = str(info.get("version") or folder.name)
    if actual not in (path, name) or not given.startswith(f"{major}."):
        raise ValueError(f"{folder} is an export of {actual}/{given}, and {wanted} is needed.")
    splits = {str(split["name"]): split for split in info["splits"]}
    return TfdsExport(folder, {split: _shards(folder, name, split, entry) for split, entry in splits.items()})


def _read_info(file: Path) -> dict:
    try:
        info = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}.") from error
    splits = info.get("splits") if isinstance(info, dict) else None
    if not isinstance(splits, list) or not all(isinstance(split, dict) and "name" in split for split in splits):
        raise ValueError(f"{file} must be an object with a list of splits that have names.")
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        raise ValueError(f"{file} says fileFormat {info['fileFormat']}: export the data set as tfrecord.")
    return info


def _shards(folder: Path, name: str, split: str, entry: dict) -> tuple[tuple[Path, int], ...]:
    """Return the files of a split with their numbers of records, as told by `dataset_info.json` or else counted."""
    form = re.compile(rf"{re.escape(name)}-{re.escape(split)}\.tfrecord-(\d+)-of-(\d+)")
    matches = [match for file in folder.iterdir() if (match := form.fullmatch(file.name))]
    indices, totals = sorted(int(match[1]) for match in matches), {int(match[2]) for match in matches}
    lengths = [int(length) for length in entry.get("shardLengths", [])]
    expected = len(lengths) or next(iter(totals), 1)
    if indices != list(range(expected)) or totals != {expected}:
        raise ValueError(
            f"The split {split} of {folder} must have {expected} files {name}-{split}.tfrecord-*-of-{expected:05}, "
            f"found {sorted(match.string for match in matches)}. Was the export interrupted?"
        )
    files = [folder / match.string for match in sorted(matches, key=lambda match: int(match[1]))]
    return tuple(zip(files, lengths or map(count_records, files), strict=True))
