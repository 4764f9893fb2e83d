"""An adapter that people look at pictures through: what its clusters see there, what it predicts and would without it.

Reports and the explorer draw what is computed here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import softmax

from gift.adapters import LoadedAdapter, load_adapter
from gift.data.geometry import Geometry
from gift.data.pictures import Picture
from gift.explain.assignments import explained_model
from gift.explain.clusters import ClusterMaps, explain_images
from gift.explain.names import ClusterNames
from gift.explain.ranking import ClusterScales
from gift.explain.readings import Reading

READING = "own"  # of all readings the one whose maps differ and find parts best, see docs/reading-cluster-maps.md


@dataclass(frozen=True, eq=False)
class Seen:
    """What an adapter makes of some pictures.

    Attributes:
        pictures: The pictures.
        maps: Their cluster maps.
        without: Logits of the trained head when the layers are as they were before adaptation; None where the adapter
            was merged.
        class_names: What the logits stand for.
    """

    pictures: tuple[Picture, ...]
    maps: ClusterMaps
    without: Float[np.ndarray, "batch classes"] | None
    class_names: tuple[str, ...]

    def predictions(self, image: int, count: int = 3) -> list[tuple[str, float]]:
        """Return the likeliest classes of a picture and their probabilities."""
        return _likeliest(self.maps.logits[image], self.class_names, count)

    def predictions_without(self, image: int, count: int = 3) -> list[tuple[str, float]] | None:
        """Return the same without the adapter, with the trained head; None where that is not known."""
        return None if self.without is None else _likeliest(self.without[image], self.class_names, count)

    @property
    def labels(self) -> tuple[str, ...]:
        """What every picture is sorted by: the folder that it lies in, else the class that is predicted for it."""
        predicted = (self.class_names[number] for number in self.maps.predictions)
        return tuple(picture.group or name for picture, name in zip(self.pictures, predicted, strict=True))

    def scales(self) -> ClusterScales:
        """Return what is weak and strong for every cluster in these pictures."""
        return ClusterScales.of(self.maps)


def _likeliest(logits: Float[np.ndarray, " classes"], names: Sequence[str], count: int) -> list[tuple[str, float]]:
    shares = softmax(logits.astype(np.float64))
    order: list[int] = np.argsort(-shares, kind="stable")[:count].tolist()
    return [(names[number], float(shares[number])) for number in order]


class Viewer:
    """An adapter with its backbone in memory; several threads may use it, one after the other.

    Args:
        loaded: The adapter.
        reading: How the tokens are read; see `gift.explain.readings`.

    Raises:
        ValueError: If the adapter has no clusters, or the backbone no patch grid.
    """

    def __init__(self, loaded: LoadedAdapter, reading: str = READING) -> None:
        self.loaded, self.reading = loaded, reading
        self._lock = Lock()  # maps are read by hooks on the one model
        side = self.geometry.size_px
        method = loaded.classifier.method
        try:
            explained = explained_model(loaded.model)
        except ValueError as error:
            why = (
                str(error)
                if method.startswith("gift")
                else f"it was trained with {method}, and only GIFT has clusters."
            )
            raise ValueError(f"{loaded.folder} has no clusters to look at: {why}") from error
        self.is_before_adaptation_known = explained.is_before_adaptation_known
        self.layer_names = tuple(explained.assignments.matrices)
        self.clusters = explained.assignments.clusters
        explain_images(loaded.model, torch.zeros(1, 3, side, side), [0], [0])  # raises if there is no patch grid

    @classmethod
    def load(cls, adapter: Path | str, backbone: str | None = None, reading: str = READING) -> "Viewer":
        """Return the viewer of a folder; arguments and errors are those of `gift.adapters.load_adapter`."""
        return cls(load_adapter(adapter, backbone), reading)

    @property
    def geometry(self) -> Geometry:
        """How pictures become what the backbone takes."""
        return self.loaded.classifier.geometry

    @property
    def class_names(self) -> tuple[str, ...]:
        """What it tells apart."""
        return self.loaded.classifier.class_names

    @property
    def folder(self) -> Path:
        """Where the adapter lies, and the names that people gave to its clusters."""
        return self.loaded.folder

    @property
    def title(self) -> str:
        """What to call the adapter: the folder of its run, or its own."""
        return self.folder.parent.name if self.folder.name in ("adapter", "model") else self.folder.name

    def names(self) -> ClusterNames:
        """Return the names that people gave to its clusters until now.

        Raises:
            ValueError: If their file is damaged.
        """
        return ClusterNames.load(self.folder)

    def see(self, pictures: Sequence[Picture]) -> Seen:
        """Return what the adapter makes of some pictures, at least one."""
        pixels = torch.stack([picture.pixels for picture in pictures])
        with self._lock:
            maps = explain_images(self.loaded.model, pixels, reading=self.reading)
            without = None
            if self.is_before_adaptation_known:
                unadapted = Reading(self.reading, adapted=False)
                without = explain_images(self.loaded.model, pixels, [0], [0], reading=unadapted).logits
        return Seen(tuple(pictures), maps, without, self.class_names)
