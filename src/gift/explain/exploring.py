"""What somebody does who looks through adapters at pictures: open one, pick and name clusters, scan a folder.

The page of `gift explore` asks here and draws the answers. Several people may do so at once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import yaml
from jaxtyping import Float, UInt8

from gift.data.decoding import read_header
from gift.data.pictures import Picture, PictureFile, picture_files, read_picture, read_pictures, some_of_every_group
from gift.explain.names import ClusterNames, ClusterRef, Combination, combined_map
from gift.explain.ranking import ClusterScales, RankedCluster, rank_for_image
from gift.explain.render import Look, label_overlay, overlay
from gift.explain.segments import label_maps
from gift.explain.viewer import Seen, Viewer

REFERENCE_PICTURES = 200  # that clusters are scaled by
CARDS, EXAMPLES, SCANNED_AT_ONCE = 12, 24, 32
MAX_PIXELS = 40_000_000  # of a picture from outside


@dataclass(frozen=True, eq=False)
class Side:
    """An adapter, and pictures that say what is weak and strong for its clusters.

    Attributes:
        viewer: The adapter.
        reference: What it makes of these pictures; None without any: then every picture is its own scale.
    """

    viewer: Viewer
    reference: Seen | None

    def see(self, file: PictureFile) -> Seen:
        """Return what the adapter makes of a picture."""
        return self.viewer.see([read_picture(file, self.viewer.geometry)])


@dataclass(frozen=True, eq=False)
class Opened:
    """A picture that somebody looks at, as every side sees it."""

    seen: tuple[Seen, ...]

    @property
    def picture(self) -> Picture:
        """The picture."""
        return self.seen[0].pictures[0]


@dataclass(frozen=True, eq=False)
class Card:
    """A picture under a map.

    Attributes:
        ref: The cluster; None for a combination or a picture of a scan.
        drawn: The picture.
        caption: What stands below.
    """

    ref: ClusterRef | None
    drawn: UInt8[np.ndarray, "height width 3"]
    caption: str


@dataclass(frozen=True, eq=False)
class Segmented:
    """A picture under its label map.

    Attributes:
        drawn: The picture.
        layer: Place of the layer.
        legend: Every label that appears, its colour, and the share of the patches that it has, the largest first.
    """

    drawn: UInt8[np.ndarray, "height width 3"]
    layer: int
    legend: list[tuple[str, str, float]]


@dataclass(frozen=True, eq=False)
class Scan:
    """How far a scan is; `cards` is None until it is over.

    Attributes:
        read: How many pictures were read.
        all: How many there are.
        problems: Why some could not be read, by their names.
        cards: The pictures in which the response is strongest.
    """

    read: int
    all: int
    problems: dict[str, str]
    cards: list[Card] | None = None


class Explorer:
    """Answers what the page asks.

    Args:
        sides: The adapter, and perhaps another one to compare it with.
        folders: Pictures of every folder that may be scanned, by what to call it. Nothing else is read.
    """

    def __init__(self, sides: Sequence[Side], folders: dict[str, list[PictureFile]]) -> None:
        self.sides, self.folders = tuple(sides), folders
        self._names_lock = Lock()
        self._scales = [None if side.reference is None else side.reference.scales() for side in sides]
        shown = {picture.name for side in sides if side.reference is not None for picture in side.reference.pictures}
        self.examples = [file for files in folders.values() for file in files if file.name in shown][:EXAMPLES]

    @property
    def viewer(self) -> Viewer:
        """The adapter."""
        return self.sides[0].viewer

    # ---- one picture ---------------------------------------------------------------------------------------------

    def open(self, path: Path, name: str) -> Opened:
        """Return a picture from outside.

        Args:
            path: Where it was put.
            name: What to call it.

        Raises:
            ValueError: If it is no picture, or has too many pixels; the message says what is wrong.
        """
        (width, height), _ = read_header(name, path)
        if width * height > MAX_PIXELS:
            raise ValueError(
                f"{name} is too large: {width} x {height} pixels, and {MAX_PIXELS} are allowed in all. Make it smaller."
            )
        return Opened(tuple(side.see(PictureFile(name, path)) for side in self.sides))

    def open_example(self, index: int) -> Opened:
        """Return one of the pictures that clusters are scaled by."""
        if not 0 <= index < len(self.examples):
            raise ValueError(f"There is no example {index}, only {len(self.examples)}.")
        return Opened(tuple(side.see(self.examples[index]) for side in self.sides))

    def cards(self, opened: Opened, layer: int | None, look: Look, side: int = 0) -> list[Card]:
        """Return the clusters that are most worth looking at in a picture, of one layer or of all."""
        seen, scales, names = opened.seen[side], self._scales_of(opened, side), self.sides[side].viewer.names()
        if layer is not None:  # another adapter may have it elsewhere, or not at all
            name = self.viewer.layer_names[layer]
            if name not in seen.maps.layer_names:
                return []
            layer = seen.maps.layer_names.index(name)
        ranked = rank_for_image(seen.maps, 0, scales, CARDS, layer)
        strength = scales.strength(np.asarray(seen.maps.maps))[0]
        return [self._card(seen, one, strength[one.layer, one.cluster], names, look) for one in ranked]

    def _card(self, seen: Seen, one: RankedCluster, strength: np.ndarray, names: ClusterNames, look: Look) -> Card:
        drawn = overlay(seen.pictures[0].shown, strength, look)
        return Card(one.ref, drawn, f"{names.label(one.ref)}: {one.score:.2f}")

    def draw(self, opened: Opened, what: str, look: Look) -> Card:
        """Return a picture under the map of a cluster (`L8/C28`) or of a combination, by its name.

        Raises:
            ValueError: If there is no such cluster or combination.
        """
        picture, names = opened.picture, self.viewer.names()
        members, how = self._members(what, names)
        reference = self.sides[0].reference
        if how is None:
            (layer, cluster) = members[0]
            strength = self._scales_of(opened, 0).strength(np.asarray(opened.seen[0].maps.maps))[0, layer, cluster]
            ref = ClusterRef(layer, cluster)
            return Card(ref, overlay(picture.shown, strength, look), names.label(ref))
        seen = [*([] if reference is None else [reference]), opened.seen[0]]
        combined = combined_map(np.concatenate([_of_members(each.maps.maps, members) for each in seen]), how)
        return Card(None, overlay(picture.shown, _strength(combined)[-1], look), f"{what}: {how} of {len(members)}")

    def draw_labels(self, opened: Opened, layer: int | None, opacity: float | int) -> Segmented:
        """Return a picture under the label map of a layer, by default that of the best cluster."""
        maps = opened.seen[0].maps
        if layer is None:
            best = rank_for_image(maps, 0, self._scales_of(opened, 0), 1)
            layer = best[0].layer if best else len(maps.layer_names) - 1
        reference = self.sides[0].reference  # what is much for a cluster cannot be told from one picture
        of_layer = [
            np.asarray(each.maps[:, layer]) for each in (maps, *([] if reference is None else [reference.maps]))
        ]
        names = [str(maps.ref(layer, cluster)) for cluster in range(self.viewer.clusters)]
        joined = np.concatenate(of_layer)
        labels = label_maps(joined, names, [tuple(maps.image_sizes[0].tolist())] * len(joined))
        counts = np.bincount(labels.labels[0].ravel(), minlength=len(labels.names)) / labels.labels[0].size
        legend = [
            (labels.names[label], f"#{bytes(labels.palette[label]).hex()}", float(counts[label]))
            for label in np.argsort(-counts, kind="stable").tolist()
            if counts[label]
        ]
        drawn = label_overlay(opened.picture.shown, labels.of_pixels(0), labels.palette, opacity)
        return Segmented(drawn, layer, legend)

    def _scales_of(self, opened: Opened, side: int) -> ClusterScales:
        known = self._scales[side]
        return known if known is not None else opened.seen[side].scales()

    # ---- names ---------------------------------------------------------------------------------------------------

    def name(self, ref: str, name: str) -> ClusterNames:
        """Name a cluster, or with an empty name take its name away; return all names.

        Raises:
            ValueError: If there is no such cluster, or it is no name, or is taken.
        """
        self._check(ClusterRef.parse(ref))

        def changed(names: ClusterNames) -> ClusterNames:
            known = names.clusters.get(ref)
            if name.strip():
                return names.with_name(ClusterRef.parse(ref), name)
            return names if known is None else names.without(known)

        return self._change(changed)

    def combine(self, name: str, how: str, members: Sequence[str]) -> ClusterNames:
        """Name a combination of clusters; return all names.

        Raises:
            ValueError: If it cannot be combined so, or the name is none, or is taken.
        """
        refs = tuple(map(ClusterRef.parse, members))
        for ref in refs:
            self._check(ref)
        return self._change(lambda names: names.with_combination(name, Combination(how, refs)))

    def forget(self, name: str) -> ClusterNames:
        """Remove the name of a cluster or a combination; return all names.

        Raises:
            ValueError: If there is no such name.
        """
        return self._change(lambda names: names.without(name))

    def _change(self, change: Callable[[ClusterNames], ClusterNames]) -> ClusterNames:
        with self._names_lock:
            names = change(self.viewer.names())
            names.save(self.viewer.folder)
        return names

    def _check(self, ref: ClusterRef) -> None:
        layers, clusters = len(self.viewer.layer_names), self.viewer.clusters
        if ref.layer >= layers or ref.cluster >= clusters:
            raise ValueError(f"There is no cluster {ref}: the last one is L{layers - 1}/C{clusters - 1}.")

    def _members(self, what: str, names: ClusterNames) -> tuple[list[tuple[int, int]], str | None]:
        """Return layers and clusters that a label or a name stands for, and how they combine."""
        what = {name: label for label, name in names.clusters.items()}.get(what, what)
        combination = names.combinations.get(what)
        refs = combination.members if combination is not None else (ClusterRef.parse(what),)
        for ref in refs:
            self._check(ref)
        return [(ref.layer, ref.cluster) for ref in refs], None if combination is None else combination.how

    # ---- folders -------------------------------------------------------------------------------------------------

    def scan(self, folder: str, what: str, count: int, look: Look) -> Iterator[Scan]:
        """Look where in a folder a cluster or a combination responds most, some pictures at a time; stop at any time.

        Strength is on the scale of this folder: 0 is the median response in it, 1 what 2 % of its patches exceed.

        Args:
            folder: One of `folders`.
            what: A cluster (`L8/C28`), its name, or that of a combination.
            count: How many pictures to return.
            look: How they are drawn.

        Raises:
            ValueError: If there is no such folder, cluster or combination, or no picture can be read.
        """
        if folder not in self.folders:
            raise ValueError(f"There is no folder {folder!r} to scan; there are: {', '.join(self.folders) or 'none'}.")
        files, (members, how) = self.folders[folder], self._members(what, self.viewer.names())
        read: list[PictureFile] = []
        maps, problems = [], {}
        for start in range(0, len(files), SCANNED_AT_ONCE):
            batch = files[start : start + SCANNED_AT_ONCE]
            pictures, unread = read_pictures(batch, self.viewer.geometry)
            problems |= unread
            if pictures:
                maps.append(_of_members(np.asarray(self.viewer.see(pictures).maps.maps), members))
                read += [file for file in batch if file.name not in unread]
            yield Scan(start + len(batch), len(files), problems)
        if not maps:
            raise ValueError(f"No picture of {folder} can be read: {'; '.join([*problems.values()][:3])}")
        joined = np.concatenate(maps)
        strength = _strength(joined[:, 0] if how is None else combined_map(joined, how))
        best = np.argsort(-strength.max(axis=(1, 2)), kind="stable")[:count].tolist()
        shown = {image: read_pictures([read[image]], self.viewer.geometry)[0] for image in best}
        cards = [
            Card(None, overlay(picture.shown, strength[image], look), f"{picture.name}: {strength[image].max():.2f}")
            for image, pictures in shown.items()
            for picture in pictures  # none if it was deleted meanwhile
        ]
        yield Scan(len(files), len(files), problems, cards)


def _of_members(
    maps: Float[np.ndarray, "batch layers clusters rows columns"], members: Sequence[tuple[int, int]]
) -> Float[np.ndarray, "batch members rows columns"]:
    return np.stack([np.asarray(maps[:, layer, cluster]) for layer, cluster in members], axis=1)


def _strength(maps: Float[np.ndarray, "batch rows columns"]) -> Float[np.ndarray, "batch rows columns"]:
    """Return how strong responses are among all: 0 at the median and below, 1 at what 2 % exceed."""
    low, high = np.quantile(maps, (0.5, 0.98))
    return np.maximum(maps - low, 0) / max(high - low, 1e-12)


def open_explorer(
    adapter: Path, images: Sequence[Path] = (), compare: Path | None = None, backbone: str | None = None
) -> Explorer:
    """Return an explorer of an adapter.

    Args:
        adapter: Folder of a run or of an adapter.
        images: Folders of pictures to scale clusters by, to start from and to scan; by default those that the run was
            trained on, if they lie as files in a folder that is still there.
        compare: Folder of another adapter.
        backbone: Name or folder of the backbone of both; by default what the adapters say.

    Raises:
        ValueError: If an adapter or the pictures cannot be read.
    """
    folders = {str(path): picture_files([path]) for path in images} if images else _trained_on(adapter)
    files = some_of_every_group([file for of_folder in folders.values() for file in of_folder], REFERENCE_PICTURES)
    sides = [_side(each, files, backbone) for each in (adapter, compare) if each is not None]
    return Explorer(sides, folders)


def _side(adapter: Path, files: Sequence[PictureFile], backbone: str | None) -> Side:
    viewer = Viewer.load(adapter, backbone)
    pictures, _ = read_pictures(files, viewer.geometry)
    return Side(viewer, viewer.see(pictures) if pictures else None)


def _trained_on(adapter: Path) -> dict[str, list[PictureFile]]:
    """Return the folder of pictures that a run was trained on, if it says so and it still holds pictures."""
    for folder in (adapter, adapter.parent):
        if (config := folder / "config.yaml").is_file():
            try:
                data = Path(yaml.safe_load(config.read_text())["data"])
                return {str(data): picture_files([data])} if data.is_dir() else {}
            except (yaml.YAMLError, KeyError, TypeError, ValueError):  # ValueError: a folder of tables, for example
                return {}
    return {}
