"""What is wrong with labelled images, all of it at once, before anything is trained on them."""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset
from jaxtyping import UInt8

from gift.data.decoding import KINDS, encoded_image, open_upright, read_header
from gift.data.duplicates import Looks, equal_groups, look, near_groups
from gift.data.listing import Finding, Listing, labels_of, several
from gift.data.splits import LACKING, SplitOptions, list_splits
from gift.tuner.options import check_number

# Of 255. Saved as JPEG of quality 40 or at half the size, 99 % of photographs stay below 7; chance pairs that agree in
# 58 of the 64 bits are mostly above 12 (CIFAR-10, Tiny-ImageNet, Caltech-101).
_THUMBNAIL_DIFFERENCE = 10
_SMALLEST_PX = 64  # of an image that is read at a fraction of its size, to see how it looks
_ALWAYS_SHOWN = ("damaged image",)
_SHOWN = 10  # findings of any other kind
_HARMS = (" with another label", " in another split")  # of duplicates, the worst first


@dataclass(frozen=True)
class SplitReport:
    """What a split holds.

    Attributes:
        counts: Images of every class, by name.
        shorter_px: Smallest, median and largest of the shorter sides in pixels. As all below of what can be read.
        longer_px: The same of the longer sides.
        aspect: The same of the longer side by the shorter.
        modes: Images by how their colours are stored.
    """

    counts: Mapping[str, int]
    shorter_px: tuple[float, float, float]
    longer_px: tuple[float, float, float]
    aspect: tuple[float, float, float]
    modes: Mapping[str, int]


@dataclass(frozen=True)
class DataReport:
    """What a source holds, and what is wrong with it.

    Attributes:
        source: As it was given.
        form: What was recognised, in words; empty if nothing was.
        splits: By name.
        findings: What is wrong.
        notes: What a user should know.
    """

    source: str
    form: str
    splits: Mapping[str, SplitReport]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Scan:
    """An image as it was found; without `look` it cannot be read, for the reason `problem`."""

    split: str
    name: str
    class_name: str
    digest: bytes = b""
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    look: tuple[int, UInt8[np.ndarray, "8 8 3"]] | None = None
    problem: str = ""

    @property
    def short(self) -> str:
        """The end of the path, or the name of the row."""
        return self.name if self.name.startswith("row ") else "/".join(Path(self.name).parts[-3:])


def check_data(source: str, options: SplitOptions, near: int = 6) -> DataReport:
    """Return what a source holds and all that is wrong with it, also where `read_splits` would refuse it.

    Args:
        source: As of `gift.data.splits.read_splits`.
        options: Which images are for what; no validation split is made.
        near: Near duplicates may differ in so many of the 64 bits of a hash of how they look; -1 looks for none.

    Raises:
        ValueError: If `near` makes no sense.
    """
    check_number("near", near, smallest=-1, whole=True)
    try:
        listing = list_splits(source, options)
    except ValueError as error:
        return DataReport(source, "", {}, (Finding("unreadable source", str(error)),), ())
    scans = [scan for split, rows in listing.splits.items() for scan in _scan_all(split, rows)]
    reports = {
        split: _report([scan for scan in scans if scan.split == split], listing.class_names) for split in listing.splits
    }
    damaged = [Finding("damaged image", scan.problem, (scan.name,)) for scan in scans if scan.problem]
    findings = (*listing.findings, *damaged, *_class_findings(listing, scans), *_duplicates(scans, near))
    return DataReport(source, listing.form, reports, findings, listing.notes)


def describe(report: DataReport) -> str:
    """Return a report as text: what each split holds, then the findings by kind, all damaged images among them."""
    lines = [f"{report.source}: {report.form or 'of no form that can be read'}"]
    for split, of_split in report.splits.items():
        lines += [f"{split}: {_numbers(of_split)}"]
    lines += [f"note: {note}" for note in report.notes]
    kinds = dict.fromkeys(finding.kind for finding in report.findings)
    for kind in kinds:
        found = [finding.message for finding in report.findings if finding.kind == kind]
        shown = found if kind in _ALWAYS_SHOWN else found[:_SHOWN]
        lines += [f"{kind} ({len(found)})", *(f"  {message}" for message in shown)]
        lines += [f"  and {len(found) - len(shown)} more"] if len(shown) < len(found) else []
    return "\n".join(lines if kinds else [*lines, "Nothing is wrong."])


def _numbers(report: SplitReport) -> str:
    counts = sorted(report.counts.values())
    if not sum(counts):
        return "no images"
    sides = [" / ".join(f"{value:g}" for value in values) for values in (report.shorter_px, report.longer_px)]
    modes = ", ".join(f"{count} {KINDS.get(mode, mode)}" for mode, count in report.modes.items())
    return (
        f"{sum(counts)} images of {sum(count > 0 for count in counts)} classes, {counts[0]} to {counts[-1]} of each "
        f"(median {np.median(counts):g}); shorter side {sides[0]} px, longer side {sides[1]} px (smallest / median / "
        f"largest), at most {report.aspect[2]:.2g} times as long as wide; {modes}"
    )


def _scan_all(split: str, rows: Dataset) -> list[_Scan]:
    names = [rows.features["label"].names[label] for label in labels_of(rows)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(
            pool.map(lambda row: _scan(_Scan(split, f"row {row} of {split}", names[row]), rows, row), range(len(rows)))
        )


def _scan(scan: _Scan, rows: Dataset, row: int) -> _Scan:
    """Return the scan with all that can be said of the image."""
    try:
        name, file = encoded_image(rows, row)
        scan = replace(scan, name=name)
        data = file.read_bytes() if isinstance(file, Path) else file.getvalue()
        scan = replace(scan, digest=hashlib.blake2b(data, digest_size=16).digest())
        size, mode = read_header(name, io.BytesIO(data))
        image = open_upright(name, io.BytesIO(data), _SMALLEST_PX)
        return replace(scan, size=size, mode=mode, look=look(image))
    except ValueError as error:
        return replace(scan, problem=str(error))
    except OSError as error:  # of reading the file
        return replace(scan, problem=f"{scan.name} cannot be read: {error.strerror or error}.")


def _report(scans: Sequence[_Scan], class_names: Sequence[str]) -> SplitReport:
    counts = Counter(scan.class_name for scan in scans)
    readable = [scan for scan in scans if not scan.problem]
    sides = np.sort(np.array([scan.size for scan in readable], dtype=float).reshape(-1, 2), axis=1)
    shorter, longer = sides.T
    return SplitReport(
        {name: counts[name] for name in class_names},
        _extent(shorter),
        _extent(longer),
        _extent(longer / shorter),
        dict(Counter(scan.mode for scan in readable).most_common()),
    )


def _extent(values: np.ndarray) -> tuple[float, float, float]:
    if not len(values):
        return 0.0, 0.0, 0.0
    return float(values.min()), float(np.median(values)), float(values.max())


def _class_findings(listing: Listing, scans: Sequence[_Scan]) -> list[Finding]:
    """Return classes with few images to train on that `list_splits` does not refuse."""
    if "train" not in listing.splits:
        return []
    listed = Counter(scan.class_name for scan in scans if scan.split == "train")
    readable = Counter(scan.class_name for scan in scans if scan.split == "train" and not scan.problem)
    refused = {name for finding in listing.findings if finding.kind == LACKING for name in finding.paths}
    gaps = [name for name in listing.class_names if not listed[name] and name not in refused]
    findings = [Finding("label gap", f"Classes without training images: {several(gaps)}.", tuple(gaps))] if gaps else []
    for name, count in listed.items():
        if not readable[name]:
            findings.append(Finding("damaged class", f"All training images of the class {name} are damaged.", (name,)))
        elif count == 1:
            findings.append(Finding("class of one image", f"The class {name} has one training image.", (name,)))
    return findings


def _duplicates(scans: Sequence[_Scan], near: int) -> list[Finding]:
    """Return the groups of images that are the same or look alike, those that do most harm first."""
    found = [scan for scan in scans if scan.digest]
    equal = [[found[index] for index in group] for group in equal_groups([scan.digest for scan in found])]
    findings = [_same(group, "duplicate", "are the same file") for group in equal]
    if near >= 0:
        findings += [_same(group, "near duplicate", "look alike") for group in _alike(found, near)]
    return sorted(findings, key=lambda finding: [finding.kind.endswith(harm) for harm in _HARMS], reverse=True)


def _alike(scans: Sequence[_Scan], near: int) -> list[list[_Scan]]:
    """Return groups of images that look alike and are not all the same file."""
    by_digest: dict[bytes, list[_Scan]] = {}
    for scan in scans:
        by_digest.setdefault(scan.digest, []).append(scan)
    looks = [(digest, group[0].look) for digest, group in by_digest.items() if group[0].look is not None]
    if not looks:
        return []
    hashes = np.array([seen[0] for _, seen in looks], dtype=np.uint64)
    groups = near_groups(Looks(hashes, np.stack([seen[1] for _, seen in looks])), near, _THUMBNAIL_DIFFERENCE)
    return [[scan for index in group for scan in by_digest[looks[index][0]]] for group in groups]


def _same(group: Sequence[_Scan], kind: str, are: str) -> Finding:
    """Return the finding that images are the same; the worst of it is in its kind."""
    splits, classes = ({getattr(scan, name): None for scan in group} for name in ("split", "class_name"))
    if len(classes) > 1:
        kind += _HARMS[0]
    elif len(splits) > 1:
        kind += _HARMS[1]
    names = several([scan.short for scan in group])
    message = f"{names} {are} ({', '.join(splits)}; {'classes' if len(classes) > 1 else 'class'} {', '.join(classes)})."
    return Finding(kind, message, tuple(scan.name for scan in group))
