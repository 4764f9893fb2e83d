"""Labelled images as a model takes them: kept resized in memory if they fit, else decoded whenever they are read."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import datasets
import torch
from torch.utils.data import Dataset

from gift.data.decoding import KINDS, encoded_image, open_upright, read_header
from gift.data.geometry import Geometry, Pixels, Preparation
from gift.data.listing import SHOWN, labels_of, several
from gift.tuner.options import check_number

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class FeedingOptions:
    """How images are read.

    Args:
        memory_bytes: Images are kept in memory, resized, if all of a split need no more.
        skip_damaged: Whether damaged images are left out instead of refused; all images are decoded first then.
        threads: Threads that read images before training.

    Raises:
        ValueError: If a number makes no sense.
    """

    memory_bytes: int = 2**31
    skip_damaged: bool = False
    threads: int = 2

    def __post_init__(self) -> None:
        check_number("memory_bytes", self.memory_bytes, smallest=0, whole=True)
        check_number("threads", self.threads, smallest=1, whole=True)


class ImageItems(Dataset[dict[str, Any]]):
    """Items `{"pixel_values": float32 (3, size, size), "labels": int}`, as `gift.finetune` takes them.

    Whether images are kept in memory changes no bit of an item. Randomness comes from torch's global generator.

    Args:
        split: Rows as `gift.data.splits.read_splits` returns them.
        geometry: What an image goes through.
        train: Whether images are augmented, anew whenever they are read.
        feeding: How they are read.

    Attributes:
        labels: Number of the class of every item.
        skipped: Name and reason of the images that were left out.

    Raises:
        ValueError: If an image is damaged, animated, too large, or has more than 8 bits a channel, and damaged ones are
            not skipped; or if a class is left without images while `train`, or all are. Of images that are not kept
            only the headers are read at once: one that is cut off is refused when it is read.
    """

    def __init__(self, split: datasets.Dataset, geometry: Geometry, train: bool, feeding: FeedingOptions) -> None:
        self.preparation, self.rows = Preparation(geometry, train), split
        self.skipped: list[tuple[str, str]] = []
        headers = self._read_all(self._read_header, range(len(split)), feeding)
        areas = {index: 3 * size[0] * size[1] for index, (size, _) in headers.items()}
        self.kept = _KeptImages(areas) if sum(areas.values()) <= feeding.memory_bytes else None
        chosen = list(headers)
        if self.kept is not None or feeding.skip_damaged:
            chosen = list(self._read_all(self._read_image, chosen, feeding))
        labels = labels_of(split).tolist()
        self.chosen = chosen  # the row of every item
        self.labels: list[int] = [labels[index] for index in chosen]
        _report_kinds(Counter(headers[index][1] for index in chosen))
        self._report_skipped(split.features["label"].names, set(labels) - set(self.labels), train)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.chosen[index]
        pixels = self._decoded(row) if self.kept is None else self.kept[row]
        return {
            "pixel_values": self.preparation.normalised(self.preparation.augmented(pixels)),
            "labels": self.labels[index],
        }

    def _decoded(self, row: int) -> Pixels:
        name, file = encoded_image(self.rows, row)
        image = open_upright(name, file)
        try:
            return self.preparation.kept(image)
        except (ValueError, OSError) as error:
            raise ValueError(f"{name} cannot be converted to RGB: {error}") from error

    def _read_header(self, row: int) -> tuple[tuple[int, int], str]:
        """Return the size of what would be kept of an image, and the mode of its file."""
        name, file = encoded_image(self.rows, row)
        size, mode = read_header(name, file)
        try:
            return self.preparation.kept_size(size), mode
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error

    def _read_image(self, row: int) -> None:
        pixels = self._decoded(row)
        if self.kept is not None:
            self.kept[row] = pixels

    def _read_all(
        self, read: Callable[[int], Result], rows: Iterable[int], feeding: FeedingOptions
    ) -> dict[int, Result]:
        """Return what can be read, by row; the other images are skipped.

        Raises:
            ValueError: If there are others and they must not be skipped.
        """

        def attempt(row: int) -> Result | ValueError:
            try:
                return read(row)
            except ValueError as error:
                return error

        with ThreadPoolExecutor(feeding.threads) as pool:
            results = dict(zip(rows, pool.map(attempt, rows), strict=True))
        problems = {row: result for row, result in results.items() if isinstance(result, ValueError)}
        if problems and not feeding.skip_damaged:
            message = "\n".join(str(problem) for problem in list(problems.values())[:SHOWN])
            more = f"\nand {len(problems) - SHOWN} more." if len(problems) > SHOWN else ""
            raise ValueError(f"{message}{more}\nMend them, or leave them out with skip_damaged (--skip_damaged true).")
        for row, problem in problems.items():
            name = (self.rows[row]["image"] or {}).get("path") or f"image {row}"
            self.skipped.append((name, str(problem)))
        return {row: result for row, result in results.items() if not isinstance(result, ValueError)}

    def _report_skipped(self, class_names: Sequence[str], lost: set[int], train: bool) -> None:
        for name, reason in self.skipped:
            logger.warning("%s is left out: %s", name, reason)
        if not lost:
            return
        names = several([class_names[label] for label in sorted(lost)])
        if train:
            raise ValueError(f"All training images of the classes {names} are damaged: {self.skipped[0][1]}")
        if not self.labels:
            raise ValueError(f"All images to measure on are damaged: {self.skipped[0][1]}")
        logger.warning("No image of the classes %s is left to measure on.", names)


class _KeptImages:
    """Images in one piece of memory, which processes can share.

    Args:
        sizes_bytes: By row.
    """

    def __init__(self, sizes_bytes: Mapping[int, int]) -> None:
        ends = list(accumulate(sizes_bytes.values()))
        self.memory = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8)
        starts = [0, *ends][: len(ends)]
        self.places = dict(zip(sizes_bytes, zip(starts, ends, strict=True), strict=True))
        self.shapes: dict[int, torch.Size] = {}

    def __setitem__(self, row: int, pixels: Pixels) -> None:
        start, end = self.places[row]
        self.shapes[row] = pixels.shape
        self.memory[start:end].view(pixels.shape).copy_(pixels)

    def __getitem__(self, row: int) -> Pixels:
        start, end = self.places[row]
        return self.memory[start:end].view(self.shapes[row])


def _report_kinds(modes: Counter[str]) -> None:
    for mode, count in modes.items():
        if mode != "RGB":
            logger.info("%d images are %s (%s) and become RGB.", count, KINDS.get(mode, "of another kind"), mode)
