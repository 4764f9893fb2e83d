"""How well cluster maps agree with known parts or tell classes apart, over a whole set of images."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int


def part_agreement(
    maps: Float[np.ndarray, "batch layers clusters rows columns"],
    coverage: Float[np.ndarray, "batch parts rows columns"],
) -> Float[np.ndarray, "layers clusters parts"]:
    """Return the correlation of each cluster's map with the share of a patch that each part covers, from -1 to 1.

    Over all patches of all images at once: a cluster that lights up where a part is absent is not forgiven. 0 where a
    map or a part is constant.
    """
    responses = standardised(np.moveaxis(maps, 0, 2).reshape(*maps.shape[1:3], -1))
    parts = standardised(np.moveaxis(coverage, 0, 1).reshape(coverage.shape[1], -1))
    return responses @ parts.T / parts.shape[1]


@dataclass(frozen=True, eq=False)
class BestMaps:
    """For every part the candidate map that covers it best, and from which response on it counts as covered."""

    candidates: Int[np.ndarray, " parts"]
    thresholds: Float[np.ndarray, " parts"]
    overlaps: Float[np.ndarray, " parts"]


def best_maps(
    maps: Float[np.ndarray, "batch candidates rows columns"], coverage: Float[np.ndarray, "batch parts rows columns"]
) -> BestMaps:
    """Return for every part the candidate and the threshold with the largest overlap (intersection over union).

    One threshold holds for all images. A patch counts with the share of it that the part covers, so that this is
    the overlap in pixels of a map that is constant within each patch.
    """
    parts = np.moveaxis(coverage, 1, 0).reshape(coverage.shape[1], -1).astype(np.float64)  # [parts, patches]
    total = parts.sum(axis=1, keepdims=True) + np.arange(1, parts.shape[1] + 1)
    best = np.full((3, coverage.shape[1]), -1.0)
    for candidate in range(maps.shape[1]):
        responses = maps[:, candidate].reshape(-1)
        order = np.argsort(responses)[::-1]
        responses = responses[order]
        covered = parts[:, order].cumsum(axis=1)
        overlaps = covered / (total - covered)
        overlaps[:, :-1][:, responses[1:] == responses[:-1]] = -1  # equal responses are taken together
        place = overlaps.argmax(axis=1)
        found = np.stack([np.full(len(place), candidate), responses[place], overlaps.max(axis=1)])
        best = np.where(found[2] > best[2], found, best)
    return BestMaps(best[0].astype(int), best[1], best[2])


def overlap_sums(
    chosen: Bool[np.ndarray, "batch rows columns"], coverage: Float[np.ndarray, "batch rows columns"]
) -> Float[np.ndarray, "batch 2"]:
    """Return intersection and union, in patches, of the chosen patches of every image with a part."""
    intersection = (chosen * coverage).sum(axis=(1, 2))
    return np.stack([intersection, chosen.sum(axis=(1, 2)) + coverage.sum(axis=(1, 2)) - intersection], axis=1)


def pointing_hits(
    maps: Float[np.ndarray, "batch rows columns"], coverage: Float[np.ndarray, "batch rows columns"]
) -> Float[np.ndarray, " images"]:
    """Return for every image that shows the part the share of it in the patch of the highest response."""
    shows = coverage.sum(axis=(1, 2)) > 0
    patches = maps.shape[1] * maps.shape[2]
    peaks = maps[shows].reshape(-1, patches).argmax(axis=1)
    return coverage[shows].reshape(-1, patches)[np.arange(len(peaks)), peaks]


def mean_strength(
    maps: Float[np.ndarray, "batch candidates rows columns"],
) -> Float[np.ndarray, "batch candidates"]:
    """Return how strong each map is in an image: the mean over its patches of what exceeds the map's overall median.

    The mean response would say nothing of maps whose mean is zero in every image, such as those read as `own`.
    """
    return np.maximum(maps - np.median(maps, axis=(0, 2, 3), keepdims=True), 0).mean(axis=(2, 3))


def maps_of_classes(
    maps: Float[np.ndarray, "batch candidates rows columns"], logits: Float[np.ndarray, "batch classes"]
) -> tuple[Float[np.ndarray, " classes"], Int[np.ndarray, " classes"]]:
    """Return for every class the largest correlation of a map's strength with the logit, and the map's number."""
    together = standardised(mean_strength(maps).T) @ standardised(logits.T).T / len(maps)  # [candidates, classes]
    return together.max(axis=0), together.argmax(axis=0)


def energy_inside(
    strength: Float[np.ndarray, "batch rows columns"], coverage: Float[np.ndarray, "batch rows columns"]
) -> float:
    """Return the share of a map's strength, over all images, that lies on the part; 0 if there is no strength."""
    total = float(strength.sum())
    return float((strength * coverage).sum()) / total if total > 0 else 0.0


def class_separation(
    maps: Float[np.ndarray, "batch layers clusters rows columns"], labels: Int[np.ndarray, " batch"]
) -> Float[np.ndarray, "layers clusters"]:
    """Return the share of each map's variance over the images that the class explains, from 0 to 1.

    Variances are summed over the patches before the ratio is formed, so patches that hardly vary count for little.
    0 for a map that does not vary.
    """
    maps = maps.astype(np.float64)
    deviations = maps - maps.mean(axis=0)
    between = np.zeros(maps.shape[1:3])
    for label in np.unique(labels):
        of_class = deviations[labels == label]
        between += len(of_class) * np.square(of_class.mean(axis=0)).sum(axis=(2, 3))
    total = np.square(deviations).sum(axis=(0, 3, 4))
    varies = total > 1e-20 * np.square(maps).sum(axis=(0, 3, 4))  # else it is the rounding of a constant
    return np.divide(between, total, out=np.zeros_like(between), where=varies)


def choose_distinct(
    scores: Float[np.ndarray, "layers clusters"],
    maps: Float[np.ndarray, "batch layers clusters rows columns"],
    count: int,
    largest_correlation: float | int = 0.8,
) -> list[tuple[int, int]]:
    """Return (layer, cluster) of the best scores, the best first, without maps that look like a better one's.

    Fewer than `count` if there are not so many different maps; maps that do not vary are passed over.
    """
    chosen: list[tuple[int, int]] = []
    responses = standardised(np.moveaxis(maps, 0, 2).reshape(*maps.shape[1:3], -1))
    for flat in np.argsort(-scores, axis=None, kind="stable"):
        if len(chosen) >= count:
            break
        layer, cluster = (int(index) for index in np.unravel_index(flat, scores.shape))
        here = responses[layer, cluster]
        if np.any(here) and all(abs(responses[other] @ here) / here.size <= largest_correlation for other in chosen):
            chosen.append((layer, cluster))
    return chosen


def correlations(
    maps: Float[np.ndarray, "batch clusters rows columns"],
) -> Float[np.ndarray, "clusters clusters"]:
    """Return the correlation of every two maps of one layer over all patches of all images; 0 with a constant map."""
    responses = standardised(np.moveaxis(maps, 0, 1).reshape(maps.shape[1], -1))
    return responses @ responses.T / responses.shape[1]


def effective_number(maps: Float[np.ndarray, "batch clusters rows columns"]) -> float:
    """Return how many different maps a layer has: 1 if all look alike, the number of clusters if none resemble.

    It is the participation ratio of the eigenvalues of the maps' correlations, (sum e)^2 / sum e^2; 0 if all maps are
    constant.
    """
    matrix = correlations(maps)
    squares = float(np.square(matrix).sum())
    return float(np.trace(matrix)) ** 2 / squares if squares > 0 else 0.0


def standardised(values: Float[np.ndarray, "*axes samples"]) -> Float[np.ndarray, "*axes samples"]:
    """Return the values with mean 0 and standard deviation 1 along the last axis, or 0 where they do not vary."""
    values = values.astype(np.float64)
    centred = values - values.mean(axis=-1, keepdims=True)
    spread = centred.std(axis=-1, keepdims=True)
    varies = spread > 1e-10 * np.abs(values).max(axis=-1, keepdims=True)  # else it is the rounding of a constant
    return np.divide(centred, spread, out=np.zeros_like(centred), where=varies)
