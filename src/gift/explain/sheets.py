"""Sheets of cluster maps as PNG: the best of all layers, of every layer, and of every class; and single overlays."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gift.explain.names import ClusterNames
from gift.explain.ranking import ClusterScales, RankedCluster, rank_for_dataset, rank_for_image
from gift.explain.render import Look, Sheet, draw_sheets, label_overlay, overlay
from gift.explain.viewer import Seen

COLUMNS, ROWS, CLASS_ROWS, OVERLAYS = 6, 8, 12, 5
SHEET_PX = 128  # a picture in a sheet has no more pixels than this when it is drawn
LONGEST_LABEL, MOST_LETTERS = 22, 60
QUALITY = 90  # of JPEG files: as PNG the overlays of 50 pictures have 70 MB


class Sheets:
    """Draws the maps of some pictures, each cluster on one scale for all of them.

    Args:
        seen: What the adapter makes of the pictures.
        scales: What is weak and strong for every cluster.
        names: What people call the clusters.
        look: How maps are laid over pictures.
    """

    def __init__(self, seen: Seen, scales: ClusterScales, names: ClusterNames, look: Look) -> None:
        self.seen, self.scales, self.names, self.look = seen, scales, names, look
        self.maps = seen.maps

    def write(self, folder: Path) -> None:
        """Write all sheets and overlays.

        `overview.png`; `layers/L0.png` and so on; `classes/<class>.png`; for every picture
        `overlays/<number>-<layer>-<cluster>.jpg` of its five best clusters; `labels/L0/` and so on.
        """
        for name in ("layers", "classes", "overlays", "labels"):
            (folder / name).mkdir()
        labels = np.unique(self.seen.labels, return_inverse=True)[1]
        some = _spread(labels, ROWS)
        best = rank_for_dataset(self.maps, labels, count=COLUMNS)
        self._draw("clusters that are most worth looking at", some, best, folder / "overview.png")
        for place, (number, name) in enumerate(zip(self.maps.layer_numbers, self.maps.layer_names, strict=True)):
            best = rank_for_dataset(self.maps, labels, count=COLUMNS, layer=place)
            self._draw(f"L{number}: {name}", some, best, folder / "layers" / f"L{number}.png")
            self._write_labels(place, folder / "labels" / f"L{number}")
        classes = self._classes()
        for (label, images), file in zip(classes.items(), _file_names(classes), strict=True):
            path = folder / "classes" / f"{file}.png"
            self._draw(f"{label}", images[:CLASS_ROWS], self._best_of_class(images), path)
        for image in range(len(self.seen.pictures)):
            for one in rank_for_image(self.maps, image, self.scales, OVERLAYS):
                drawn = Image.fromarray(self.overlay(image, one.layer, one.cluster))
                file = f"{image:05d}-{str(one.ref).replace('/', '-')}.jpg"
                drawn.save(folder / "overlays" / file, quality=QUALITY)

    def overlay(self, image: int, layer: int, cluster: int) -> np.ndarray:
        """Return a picture with the map of one cluster laid over it."""
        strength = self.scales.strength(np.asarray(self.maps.maps[image : image + 1]))[0, layer, cluster]
        return overlay(self.seen.pictures[image].shown, strength, self.look)

    def _classes(self) -> dict[str, list[int]]:
        """Return the pictures of every class: of their folder where they lie in one, else of the predicted one."""
        found: dict[str, list[int]] = {}
        for image, label in enumerate(self.seen.labels):
            found.setdefault(label, []).append(image)
        return dict(sorted(found.items()))

    def _best_of_class(self, images: list[int]) -> list[RankedCluster]:
        """Return the clusters that stand highest in the lists of a class's pictures."""
        points: dict[tuple[int, int], float] = {}
        ranked = {}
        for image in images:
            for rank, one in enumerate(rank_for_image(self.maps, image, self.scales, 2 * COLUMNS)):
                place = (one.layer, one.cluster)
                points[place] = points.get(place, 0) + 1 / (1 + rank)
                ranked[place] = one
        return [ranked[place] for place in sorted(points, key=lambda place: -points[place])[:COLUMNS]]

    def _draw(self, title: str, images: Sequence[int], clusters: Sequence[RankedCluster], path: Path) -> None:
        layers, columns = [one.layer for one in clusters], [one.cluster for one in clusters]
        sheet = Sheet(
            title,
            np.stack([self._small(image) for image in images]),
            np.stack([np.asarray(self.maps.maps[image])[layers, columns] for image in images]),
            np.stack([self.scales.low[layers, columns], self.scales.high[layers, columns]], axis=1),
            tuple(self.names.label(one.ref).replace(" (", "\n(") for one in clusters),
            tuple(self._row(image) for image in images),
        )
        draw_sheets([sheet], path, self.look)

    def _row(self, image: int) -> str:
        return (self.seen.pictures[image].group or self.seen.pictures[image].name)[:LONGEST_LABEL]

    def _small(self, image: int) -> np.ndarray:
        return np.asarray(Image.fromarray(self.seen.pictures[image].shown).resize((SHEET_PX, SHEET_PX)))

    def _write_labels(self, place: int, folder: Path) -> None:
        """Write the label maps of a layer, and pictures under their colours."""
        labels = self.maps.segment(place)
        labels.save(folder)
        (folder / "laid over").mkdir()
        for image, picture in enumerate(self.seen.pictures):
            drawn = label_overlay(picture.shown, labels.of_pixels(image), labels.palette)
            Image.fromarray(drawn).save(folder / "laid over" / f"{image:05d}.jpg", quality=QUALITY)


def _spread(labels: np.ndarray, count: int) -> list[int]:
    """Return a few images of as many classes as there are, in their order."""
    seen: dict[int, int] = {}
    turns = []
    for image, label in enumerate(labels.tolist()):
        turns.append((seen.get(label, 0), image))
        seen[label] = seen.get(label, 0) + 1
    return sorted(image for _, image in sorted(turns)[:count])


def _file_names(labels: Iterable[str]) -> list[str]:
    """Return a name of a file for every label, no two alike, also where upper and lower case are one."""
    names: list[str] = []
    for label in labels:
        plain = "".join(sign if sign.isalnum() or sign in "-_. " else "_" for sign in label)[:MOST_LETTERS].strip(". ")
        taken, name, number = {name.casefold() for name in names}, plain or "_", 2
        while name.casefold() in taken:
            name, number = f"{plain}-{number}", number + 1
        names.append(name)
    return names
