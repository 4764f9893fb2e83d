"""Cluster maps as a segmentation head: the cluster that responds most, for every patch of an image.

Files are palette PNGs and annotations as COCO has them (https://cocodataset.org/#format-data), run-length encoded.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer, UInt8
from PIL import Image
from pycocotools import mask

from gift.explain.names import LABEL
from gift.explain.scores import standardised

RECORD = "segments.json"
PARTIAL = "segments.partial"  # a folder: what is being written before it takes the place of an earlier save
INFO = {"description": "Cluster maps of a GIFT adapter: for every patch the cluster that responds most"}
MOST_LABELS = 256  # what a palette PNG can hold

# M. Okabe and K. Ito, Color Universal Design (2008); black comes last, for it hides the image it is laid over.
OKABE_ITO = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (0, 0, 0),
)
DARKEST = 102  # of the largest of red, green and blue: what is darker passes for black
# What linear RGB looks like to everybody, without the red and without the green receptors: G. M. Machado et al.,
# A Physiologically-based Model for Simulation of Color Vision Deficiency (2009), severity 1.
VISIONS = np.array(
    [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ]
)
# B. Ottosson, A perceptual color space for image processing (2020): linear RGB to receptors, and their cube roots to
# lightness and two axes of hue.
RECEPTORS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
LIGHTNESS_AND_HUE = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


@dataclass(frozen=True, eq=False)
class LabelMaps:
    """One label for every patch of some images.

    Attributes:
        labels: Index into `names` of every patch.
        names: What the labels stand for, all different: "L8/C28", or "L8/C28+C31" for clusters that were merged, or the
            names that a person gave.
        sizes: Height and width of every image in pixels.

    Raises:
        ValueError: If there are no patches, more than 256 names or two alike, a label has no name, or an image no size.
    """

    labels: Int[np.ndarray, "batch rows columns"]
    names: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if self.labels.size == 0:
            raise ValueError(f"There must be an image and a patch at least, got labels of shape {self.labels.shape}.")
        if len(self.names) > MOST_LABELS:
            raise ValueError(f"There can be {MOST_LABELS} labels at most, got {len(self.names)}: leave some out.")
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"Labels must have different names, got {', '.join(repeated)} more than once: rename them."
            )
        lowest, highest = self.labels.min(), self.labels.max()
        if lowest < 0 or highest >= len(self.names):
            raise ValueError(f"{len(self.names)} names are of labels from 0, got labels from {lowest} to {highest}.")
        if len(self.sizes) != len(self.labels):
            raise ValueError(f"Give one size for each of the {len(self.labels)} images, got {len(self.sizes)}.")
        if min(map(min, self.sizes)) < 1:
            raise ValueError(f"Images are at least one pixel high and wide, got sizes {self.sizes}.")

    @property
    def palette(self) -> UInt8[np.ndarray, "labels 3"]:
        """A colour (RGB) for every label: Okabe and Ito's eight, then others, told apart without red or green too."""
        return _distinct_colours()[: len(self.names)].copy()

    def of_pixels(self, image: int) -> UInt8[np.ndarray, "height width"]:
        """Return the label of every pixel of an image: that of the patch in which the middle of the pixel lies."""
        labels, (height, width) = self.labels[image], self.sizes[image]
        rows, columns = (
            (2 * np.arange(pixels) + 1) * patches // (2 * pixels)
            for pixels, patches in zip((height, width), labels.shape, strict=True)
        )
        return labels[np.ix_(rows, columns)].astype(np.uint8)

    def save(self, folder: Path | str) -> None:
        """Write the label maps as `00000.png` and so on, and as annotations in COCO's form in `segments.json`.

        The PNGs have the sizes of the images, and the label is the index into their palette. Everything is written
        beside an earlier save before it takes its place, and `segments.json` comes last: while it is missing, the
        folder does not hold a whole set.

        Args:
            folder: A new or an empty folder, or that of an earlier save, which is replaced.

        Raises:
            ValueError: If the folder is a file, or holds anything else.
        """
        folder = Path(folder)
        earlier = _files_to_replace(folder)
        partial = folder / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            written = [*self._write_pictures(partial), self._write_record(partial)]
        except BaseException:
            shutil.rmtree(partial)
            raise
        (folder / RECORD).unlink(missing_ok=True)
        for file in earlier:
            file.unlink(missing_ok=True)
        for file in written:
            file.rename(folder / file.name)
        partial.rmdir()

    def _write_pictures(self, folder: Path) -> list[Path]:
        paths = [folder / _file_name(image) for image in range(len(self.labels))]
        for image, path in enumerate(paths):
            picture = Image.fromarray(self.of_pixels(image))
            picture.putpalette(self.palette.tobytes())
            picture.save(path)
        return paths

    def _write_record(self, folder: Path) -> Path:
        images = [
            {"id": image, "file_name": _file_name(image), "height": height, "width": width}
            for image, (height, width) in enumerate(self.sizes)
        ]
        found = [annotation for image in range(len(self.labels)) for annotation in self._annotations(image)]
        record = {
            "info": INFO,
            "images": images,
            "categories": [{"id": index, "name": name} for index, name in enumerate(self.names, start=1)],
            # From 1, for pycocotools takes an annotation of number 0 for none when it scores detections.
            "annotations": [{"id": index} | annotation for index, annotation in enumerate(found, start=1)],
        }
        path = folder / RECORD
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return path

    def _annotations(self, image: int) -> list[dict[str, Any]]:
        """Return where each label is that the image has; one region may lie in several pieces, hence `iscrowd`."""
        pixels, annotations = self.of_pixels(image), []
        for label in np.unique(pixels):
            encoded: Any = mask.encode(np.asfortranarray(pixels == label, dtype=np.uint8))
            annotations.append(
                {
                    "image_id": image,
                    "category_id": int(label) + 1,
                    "segmentation": {"size": list(pixels.shape), "counts": encoded["counts"].decode("ascii")},
                    "area": int(mask.area(encoded)),
                    "bbox": [int(value) for value in mask.toBbox(encoded)],
                    "iscrowd": 1,
                }
            )
        return annotations


def label_maps(
    maps: Float[np.ndarray, "batch clusters rows columns"],
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    largest_correlation: float | int = 0.9,
) -> LabelMaps:
    """Return for every patch the cluster of a layer that responds most, as a segmentation head does.

    Clusters respond in ranges of their own, so every map is standardised over all patches of all images first. Clusters
    with almost the same map would share its patches at random: they are merged, and the mean of their standardised
    maps, standardised again, stands for them. A map that does not vary wins nowhere, unless none varies; of equal
    responses the first wins. Of more groups than a palette has colours, the 256 that win most patches stay, and the
    patches of the others go to whichever of them responds most.

    Args:
        maps: The maps of one layer, in any unit.
        names: One for every cluster, all different.
        sizes: Height and width of every image in pixels.
        largest_correlation: Clusters whose maps correlate more are merged, see `group_duplicates`.

    Raises:
        ValueError: If maps, names and sizes do not fit one another, or the maps are none or not finite.
    """
    if len(names) != maps.shape[1]:
        raise ValueError(f"Give one name for each of the {maps.shape[1]} clusters, got {len(names)}.")
    responses = _responses(maps, names)
    groups = _groups(responses, largest_correlation)
    members = [np.flatnonzero(groups == group).tolist() for group in range(groups.max() + 1)]
    of_groups = standardised(np.stack([responses[each].mean(axis=0) for each in members]))
    varies = of_groups.any(axis=1, keepdims=True)
    contending = np.where(varies, of_groups, -np.inf)
    winners = contending.argmax(axis=0)
    if len(members) > MOST_LABELS:
        wins = np.bincount(winners, minlength=len(members))
        kept = np.sort(np.argsort(-wins, kind="stable")[:MOST_LABELS])
        winners, members = contending[kept].argmax(axis=0), [members[group] for group in kept]
    batch, _, rows, columns = maps.shape
    merged = tuple(_group_name([names[cluster] for cluster in each]) for each in members)
    return LabelMaps(winners.reshape(batch, rows, columns), merged, tuple(sizes))


def group_duplicates(
    maps: Float[np.ndarray, "batch clusters rows columns"], largest_correlation: float | int
) -> Int[np.ndarray, " clusters"]:
    """Return the number of every cluster's group; those of a group have almost the same map.

    Groups are merged, the closest first, as long as the mean correlation between their members, over all patches of all
    images, exceeds a limit (average linkage). Connected components would chain maps each of which resembles the next
    until the ends have nothing in common; here no group holds two halves that disagree on average.

    Args:
        maps: The maps of one layer, in any unit.
        largest_correlation: The limit, from 0 to 1; with 1, nothing is merged.

    Returns:
        Numbers from 0, in the order of the groups' first clusters. A map that does not vary has a group of its own.

    Raises:
        ValueError: If the limit is none, or the maps are none or not finite.
    """
    return _groups(_responses(maps, [str(cluster) for cluster in range(maps.shape[1])]), largest_correlation)


def _responses(
    maps: Float[np.ndarray, "batch clusters rows columns"], names: Sequence[str]
) -> Float[np.ndarray, "clusters patches"]:
    """Return every cluster's standardised responses in all patches of all images."""
    if maps.size == 0:
        raise ValueError(f"There must be an image, a cluster and a patch at least, got maps of shape {maps.shape}.")
    broken = np.flatnonzero(~np.isfinite(maps).all(axis=(0, 2, 3)))
    if broken.size:
        listed = ", ".join(names[cluster] for cluster in broken.tolist())
        raise ValueError(
            f"Maps have NaN or infinite values, those of cluster {listed}: leave it out or find the cause."
        )
    return standardised(np.moveaxis(maps, 1, 0).reshape(maps.shape[1], -1))


def _groups(
    responses: Float[np.ndarray, "clusters patches"], largest_correlation: float | int
) -> Int[np.ndarray, " clusters"]:
    """Merge the two groups that correlate most, over and over; a group has the row of its first cluster."""
    if not 0 <= largest_correlation <= 1:
        raise ValueError(f"The largest correlation lies between 0 and 1, got {largest_correlation}.")
    varies = responses.any(axis=1)
    correlations = np.minimum(responses @ responses.T / responses.shape[1], 1)
    correlations[~varies], correlations[:, ~varies] = -np.inf, -np.inf
    np.fill_diagonal(correlations, -np.inf)
    first = np.arange(len(responses))  # the first cluster of every cluster's group
    sizes = np.ones(len(responses))
    while correlations.max() > largest_correlation:
        kept, gone = sorted(divmod(int(correlations.argmax()), len(correlations)))
        share = sizes[kept] / (sizes[kept] + sizes[gone])
        merged = share * correlations[kept] + (1 - share) * correlations[gone]
        correlations[kept], correlations[:, kept] = merged, merged
        correlations[gone], correlations[:, gone] = -np.inf, -np.inf
        first[first == gone], sizes[kept] = kept, sizes[kept] + sizes[gone]
    return np.unique(first, return_inverse=True)[1]


def _group_name(names: Sequence[str]) -> str:
    layers = {name.partition("/")[0] for name in names}
    if len(layers) > 1 or not all(map(LABEL.fullmatch, names)):
        return "+".join(names)
    return "+".join([names[0], *(name.partition("/")[2] for name in names[1:])])


@cache
def _distinct_colours() -> UInt8[np.ndarray, "labels 3"]:
    """Return Okabe and Ito's colours, then each time the colour that is farthest from all before it."""
    levels = np.arange(0, 256, 17)
    others = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    colours = np.concatenate([OKABE_ITO, others[others.max(axis=1) >= DARKEST]])
    seen = _as_seen(colours)
    chosen: list[int] = []
    nearest = np.full(len(colours), np.inf)
    for place in range(MOST_LABELS):
        chosen.append(place if place < len(OKABE_ITO) else int(nearest.argmax()))
        distances = np.linalg.norm(seen - seen[:, chosen[-1], None], axis=-1)  # [visions, colours]
        nearest = np.minimum(nearest, distances.min(axis=0))
    return colours[chosen].astype(np.uint8)


def _as_seen(colours: Integer[np.ndarray, "colours 3"]) -> Float[np.ndarray, "visions colours 3"]:
    """Return colours (sRGB) in a space whose distances are those that people see, for every kind of vision."""
    values = colours / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    shown = np.clip(linear @ VISIONS.swapaxes(1, 2), 0, 1)
    return np.cbrt(shown @ RECEPTORS.T) @ LIGHTNESS_AND_HUE.T


def _file_name(image: int) -> str:
    return f"{image:05d}.png"


def _files_to_replace(folder: Path) -> list[Path]:
    """Return the files of an earlier save, complete or not; raise ValueError if the folder holds anything else."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder to write label maps into.")
    stopped = (folder / PARTIAL).is_dir()  # a save was, here, after it had looked at the folder
    found = [entry for entry in sorted(folder.iterdir()) if not (stopped and entry.name == PARTIAL)]
    if stopped:
        known = {entry.name for entry in found if re.fullmatch(r"[0-9]{5,}\.png", entry.name)} | {RECORD}
    else:
        known = _recorded_files(folder / RECORD)
    foreign = [entry.name for entry in found if entry.name not in known or not entry.is_file()]
    if foreign:
        more = ", ..." if len(foreign) > 3 else ""
        listed = ", ".join(foreign[:3])
        raise ValueError(f"{folder} holds files of others ({listed}{more}): give a new, an empty or our own folder.")
    return found


def _recorded_files(path: Path) -> set[str]:
    """Return the names of the files of the save that wrote this record; none if it is missing or somebody else's."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["info"] != INFO:
            return set()
        return {RECORD, *(image["file_name"] for image in record["images"])}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
