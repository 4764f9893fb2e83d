"""Which images are the same, or nearly: by content, and by a hash of how they look."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8, UInt64
from PIL import Image

from gift.data.decoding import as_rgb

HASH_BITS = 64
_ROWS_AT_ONCE = 64  # of a table of distances
_COMMON = 4096  # images that agree in a piece of their hashes


@dataclass(frozen=True, eq=False)
class Looks:
    """How images look, whatever their size and quality.

    Attributes:
        hashes: A bit for each of 8 x 8 places: whether it is brighter there than to the right (a difference hash).
        thumbnails: Colours at these places.
    """

    hashes: UInt64[np.ndarray, " images"]
    thumbnails: UInt8[np.ndarray, "images 8 8 3"]


def look(image: Image.Image) -> tuple[int, UInt8[np.ndarray, "8 8 3"]]:
    """Return the hash and the thumbnail of an image, for `Looks`."""
    colours = as_rgb(image).resize((9, 8), Image.Resampling.BOX)
    grey = np.asarray(colours.convert("L"), dtype=np.int16)
    bits = np.packbits(grey[:, :-1] > grey[:, 1:])
    return int.from_bytes(bits.tobytes(), "big"), np.asarray(colours)[:, :8]


def equal_groups(digests: Sequence[bytes]) -> list[list[int]]:
    """Return the indices of equal digests, where there are several."""
    groups: dict[bytes, list[int]] = {}
    for index, digest in enumerate(digests):
        groups.setdefault(digest, []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def near_groups(looks: Looks, near: int, difference: float | int) -> list[list[int]]:
    """Return the indices of images that look alike, in groups linked by pairs.

    Hashes that differ in at most `near` of their bits agree in one of `near + 1` pieces, so only those that agree in a
    piece are compared, unless thousands do: then the piece says nothing, as the black margin of drawings. Images that
    show little have few bits to differ in: their thumbnails have to agree too.

    Args:
        looks: Of the images.
        near: Bits of the hash in which a pair may differ.
        difference: Mean absolute difference of the thumbnails of a pair that is allowed, of 255.
    """
    parents = np.arange(len(looks.hashes))
    for pairs in _near_pairs(looks.hashes, near):
        apart = _roots(parents, pairs[0]) != _roots(parents, pairs[1])
        first, second = pairs[0][apart], pairs[1][apart]
        one, other = looks.thumbnails[first], looks.thumbnails[second]
        differences = np.maximum(one, other) - np.minimum(one, other)  # without a sign, as the bytes are
        alike = differences.mean(axis=(1, 2, 3)) <= difference
        for pair in zip(first[alike], second[alike], strict=True):
            root, other_root = _roots(parents, np.array(pair))
            parents[root] = other_root
    groups: dict[int, list[int]] = {}
    for index, root in enumerate(_roots(parents, parents).tolist()):
        groups.setdefault(root, []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def _roots(parents: Int[np.ndarray, " images"], indices: Int[np.ndarray, " some"]) -> Int[np.ndarray, " some"]:
    """Return which image stands for the group of each."""
    roots = parents[indices]
    while np.any(roots != (above := parents[roots])):
        roots = above
    parents[indices] = roots  # so that the next time is short
    return roots


def _near_pairs(
    hashes: UInt64[np.ndarray, " images"], near: int
) -> Iterator[tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]]:
    """Yield the indices of pairs whose hashes differ in at most `near` bits, some of them several times."""
    edges = np.linspace(0, HASH_BITS, near + 2).astype(int)
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        pieces = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(pieces, kind="stable")
        runs = np.split(order, np.flatnonzero(np.diff(pieces[order])) + 1)
        for run in (run for run in runs if 1 < len(run) <= _COMMON):
            for begin in range(0, len(run) - 1, _ROWS_AT_ONCE):
                rows, columns = run[begin : begin + _ROWS_AT_ONCE], run[begin:]
                bits = np.bitwise_count(hashes[rows, None] ^ hashes[columns])
                one, other = np.nonzero(bits <= near)
                later = other > one
                yield rows[one[later]], columns[other[later]]
