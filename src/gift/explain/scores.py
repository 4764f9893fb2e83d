"""How well cluster maps agree with known parts or tell classes apart, over a whole set of images."""

import numpy as np
from jaxtyping import Float, Int


def part_agreement(
    maps: Float[np.ndarray, "batch layers clusters rows columns"],
    coverage: Float[np.ndarray, "batch parts rows columns"],
) -> Float[np.ndarray, "layers clusters parts"]:
    """Return the correlation of each cluster's map with the share of a patch that each part covers, from -1 to 1.

    Over all patches of all images at once: a cluster that lights up where a part is absent is not forgiven. 0 where a
    map or a part is constant.
    """
    responses = _standardised(np.moveaxis(maps, 0, 2).reshape(*maps.shape[1:3], -1))
    parts = _standardised(np.moveaxis(coverage, 0, 1).reshape(coverage.shape[1], -1))
    return responses @ parts.T / parts.shape[1]


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
    largest_correlation: float = 0.8,
) -> list[tuple[int, int]]:
    """Return (layer, cluster) of the best scores, the best first, without maps that look like a better one's.

    Fewer than `count` if there are not so many different maps; maps that do not vary are passed over.
    """
    chosen: list[tuple[int, int]] = []
    responses = _standardised(np.moveaxis(maps, 0, 2).reshape(*maps.shape[1:3], -1))
    for flat in np.argsort(-scores, axis=None, kind="stable"):
        layer, cluster = (int(index) for index in np.unravel_index(flat, scores.shape))
        here = responses[layer, cluster]
        if np.any(here) and all(abs(responses[other] @ here) / here.size <= largest_correlation for other in chosen):
            chosen.append((layer, cluster))
        if len(chosen) == count:
            break
    return chosen


def _standardised(values: Float[np.ndarray, "*axes samples"]) -> Float[np.ndarray, "*axes samples"]:
    """Return the values with mean 0 and standard deviation 1 along the last axis, or 0 where they do not vary."""
    values = values.astype(np.float64)
    centred = values - values.mean(axis=-1, keepdims=True)
    spread = centred.std(axis=-1, keepdims=True)
    varies = spread > 1e-10 * np.abs(values).max(axis=-1, keepdims=True)  # else it is the rounding of a constant
    return np.divide(centred, spread, out=np.zeros_like(centred), where=varies)
