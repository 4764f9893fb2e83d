"""Clusters that look away from the object and yet decide: what a model may have learned instead of the object.

Most of a cluster's strength may lie beside the object and its removal still take the object away. So only patches
without object are removed, and compared with as many others without object.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import t as student
from torch import Tensor, nn

from gift.data.parts import PartImages
from gift.explain.clusters import explain_images
from gift.explain.names import ClusterRef
from gift.explain.ranking import ClusterScales
from gift.explain.readings import Reading
from gift.explain.removal import logit_drops, patch_of_grid, regions
from gift.explain.scores import choose_distinct

STRONG = 0.5  # on a cluster's scale: where a patch belongs to its region
FREE = 0.02  # share of a patch that the object may cover where it counts as outside


@dataclass(frozen=True)
class ShortcutOptions:
    """How shortcuts are looked for.

    Args:
        reading: How maps are read.
        outside: Share of a cluster's strength, in images of the class, that must lie outside the object.
        images_per_class: Of how many images of a class regions are removed.
        largest_correlation: From which correlation on one of two maps is passed over.
        smallest_drop: From which net drop on a shortcut is listed, in standard deviations of the logit.
        seed: Of the random patches.
    """

    reading: str = "own"
    outside: float = 0.5
    images_per_class: int = 16
    largest_correlation: float = 0.9
    smallest_drop: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Shortcut:
    """A cluster outside the object whose region there speaks for a class.

    Attributes:
        ref: Its layer and number.
        label: Index of the class.
        outside: Share of the cluster's strength, in images of the class, that lies outside the object.
        net_drop: How much more the logit of the class falls without the patches of the cluster's region that show no
            object than without as many other patches that show none: the mean over images of the class, in standard
            deviations of that logit over all images.
        low: Lower end of its 95 % interval over images. Thousands of clusters and classes are tried, so one in forty of
            those without any effect has an interval above 0; what is listed is a place to look, not a proof.
        region: Mean share of the image that was removed.
        lifts: By part that is not of the object, how many times more of it the removed patches show than all patches
            without object do.
    """

    ref: ClusterRef
    label: int
    outside: float
    net_drop: float
    low: float
    region: float
    lifts: dict[str, float]


def find_shortcuts(
    model: nn.Module,
    truth: PartImages,
    normalise: Callable[[np.ndarray], Tensor],
    options: ShortcutOptions | None = None,
) -> list[Shortcut]:
    """Return the clusters whose strength lies outside the object and whose removal moves a logit, the strongest first.

    Args:
        model: An image classifier with clusters; it is left as it was.
        truth: Images with parts and labels.
        normalise: From pixels (batch, height, width, 3) to what the model takes.
        options: How to look.

    Raises:
        ValueError: If the images have no labels, the object no parts, or the model other classes.
    """
    options = options or ShortcutOptions()
    check_truth(truth)
    labels, images = truth.images.labels, normalise(truth.images.pixels)
    maps = explain_images(model, images, reading=Reading(options.reading))
    check_truth(truth, maps.logits.shape[1])
    scales = ClusterScales.of(maps)
    strength = scales.strength(maps.maps)
    chosen = choose_distinct(
        np.ones(maps.maps.shape[1:3]), maps.maps[:64], maps.maps[0, :, :, 0, 0].size, options.largest_correlation
    )
    layers, clusters = (np.array(numbers) for numbers in zip(*chosen, strict=True))
    strength = strength[:, layers, clusters]
    grid = strength.shape[2:]
    coverage = truth.coverage(patch_of_grid(model, images, grid), grid)
    parts = [truth.part_names.index(part) for part in truth.object_parts]
    free = coverage[:, parts].sum(axis=1) <= FREE
    found = []
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        outside = _share_outside(strength[of_class], coverage[of_class][:, parts].sum(axis=1))
        candidates = np.flatnonzero(outside >= options.outside)
        if not candidates.size:
            continue
        some = of_class[: options.images_per_class]
        removed = regions(strength[some][:, candidates], np.full(len(candidates), STRONG)) & free[some][:, None]
        classes = np.full(len(some), int(label))
        drops = logit_drops(model, images[torch.from_numpy(some)], removed, classes, options.seed, free[some])
        means, lows = _mean_and_low(drops.net / max(float(maps.logits[:, label].std()), 1e-12))
        for place in np.flatnonzero((lows > 0) & (means >= options.smallest_drop)):
            cluster = candidates[place]
            found.append(
                Shortcut(
                    maps.ref(int(layers[cluster]), int(clusters[cluster])),
                    int(label),
                    float(outside[cluster]),
                    float(means[place]),
                    float(lows[place]),
                    float(removed[:, place].mean()),
                    _lifts(truth, coverage[some], removed[:, place], free[some]),
                )
            )
    return sorted(found, key=lambda shortcut: -shortcut.net_drop)


def check_truth(truth: PartImages, classes: int | None = None) -> None:
    """Raise ValueError unless shortcuts of a model with so many classes can be looked for in these images."""
    labels = truth.images.labels
    if labels.min() < 0 or not set(truth.object_parts) & set(truth.part_names):
        raise ValueError(
            "Shortcuts are looked for in images whose classes and object are known; these lack one of them."
        )
    if classes is not None and labels.max() >= classes:
        raise ValueError(
            f"The images have labels up to {labels.max()}, and the model {classes} classes: these are not the classes "
            "it was trained on, so there are no shortcuts to look for."
        )


def _share_outside(
    strength: Float[np.ndarray, "batch clusters rows columns"], on_object: Float[np.ndarray, "batch rows columns"]
) -> Float[np.ndarray, " clusters"]:
    """Return which share of each cluster's strength lies outside the object."""
    inside = np.einsum("bcij,bij->c", strength, on_object)
    return 1 - inside / np.maximum(strength.sum(axis=(0, 2, 3)), 1e-12)


def _lifts(
    truth: PartImages,
    coverage: Float[np.ndarray, "batch parts rows columns"],
    removed: Bool[np.ndarray, "batch rows columns"],
    free: Bool[np.ndarray, "batch rows columns"],
) -> dict[str, float]:
    """Return by part how many times more of it the removed patches show than all patches without object."""
    lifts = {}
    for index, part in enumerate(truth.part_names):
        usual = float(coverage[:, index][free].mean()) if free.any() else 0.0
        if part not in truth.object_parts:
            lifts[part] = float(coverage[:, index][removed].mean()) / usual if usual and removed.any() else 0.0
    return lifts


def _mean_and_low(
    values: Float[np.ndarray, "batch clusters"],
) -> tuple[Float[np.ndarray, " clusters"], Float[np.ndarray, " clusters"]]:
    """Return the mean over images and the lower end of its 95 % interval (Student's t)."""
    count, means = len(values), values.mean(axis=0)
    if count < 2:
        return means, np.full(len(means), -np.inf)
    return means, means - student.ppf(0.975, count - 1) * values.std(axis=0, ddof=1) / np.sqrt(count)
