"""Which maps are worth looking at: for one image, for a data set, and the images a cluster responds to most."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from gift.explain.assignments import Chosen
from gift.explain.clusters import ClusterMaps, explain_images
from gift.explain.names import ClusterRef
from gift.explain.readings import Reading
from gift.explain.scores import choose_distinct, class_separation, mean_strength, standardised

STRONGEST_SHARE = 0.1  # of the patches of an image, in which a concentrated map has its strength
DIMMED = 0.8  # contrast of the images whose maps should not differ from the originals'


@dataclass(frozen=True, eq=False)
class ClusterScales:
    """One scale per cluster, from a data set: what is weak, strong and usual for it.

    A map that is scaled by itself lights up where there is nothing; on the cluster's own scale it stays dark.

    Attributes:
        low: The median response over all patches of all images, drawn dark.
        high: The response that 2 % of all patches exceed, drawn light.
        deviation: Standard deviation of the responses.
        class_means: Mean of `scores.mean_strength` in the images of a predicted class, in its standard deviations over
            all images, from its mean over all; 0 for a class that was never predicted.
    """

    low: Float[np.ndarray, "layers clusters"]
    high: Float[np.ndarray, "layers clusters"]
    deviation: Float[np.ndarray, "layers clusters"]
    class_means: Float[np.ndarray, "layers clusters classes"]

    @classmethod
    def of(cls, maps: ClusterMaps) -> "ClusterScales":
        """Return the scales of the clusters over all images of `maps`, read layer by layer."""
        numbers = [_scales_of_layer(np.asarray(maps.maps[:, layer]), maps) for layer in range(maps.maps.shape[1])]
        return cls(*(np.stack(each) for each in zip(*numbers, strict=True)))

    def strength(
        self, maps: Float[np.ndarray, "batch layers clusters rows columns"]
    ) -> Float[np.ndarray, "batch layers clusters rows columns"]:
        """Return how strong responses are on the cluster's scale: 0 at `low` and below, 1 at `high`, and beyond."""
        low, high = self.low[None, :, :, None, None], self.high[None, :, :, None, None]
        return np.maximum(maps - low, 0) / np.maximum(high - low, 1e-12)


def _scales_of_layer(responses: Float[np.ndarray, "batch clusters rows columns"], maps: ClusterMaps) -> tuple:
    low, high = np.quantile(responses, (0.5, 0.98), axis=(0, 2, 3))
    of_images = standardised(mean_strength(responses).T)  # [clusters, batch]
    class_means = np.zeros((responses.shape[1], maps.logits.shape[1]))
    for label in np.unique(maps.predictions):
        class_means[:, label] = of_images[:, maps.predictions == label].mean(axis=1)
    return low, high, responses.std(axis=(0, 2, 3)), class_means


@dataclass(frozen=True)
class RankedCluster:
    """A cluster that is worth looking at, and why.

    Attributes:
        ref: Its layer and number.
        layer: Place of its layer in the maps.
        cluster: Its place in the maps.
        score: What it was ranked by, from 0 to 1: the mean over the criteria of the share of maps it surpasses.
        criteria: Value of each criterion by its name.
    """

    ref: ClusterRef
    layer: int
    cluster: int
    score: float
    criteria: dict[str, float]


def rank_for_image(
    maps: ClusterMaps, image: int, scales: ClusterScales | None = None, count: int = 5, layer: int | None = None
) -> list[RankedCluster]:
    """Return the clusters whose maps of an image are most worth looking at, the best first, without near-duplicates.

    Criteria: `concentration`, the share of the map's strength in the strongest tenth of the patches; `contrast`, how
    far its highest response lies above its mean, in standard deviations of the cluster; `agreement`, how much more than
    usual the cluster responds to images of the class that is predicted for this one.

    Args:
        maps: Maps of this image and, if there are no `scales`, of others to compare it with.
        image: Number of the image in `maps`.
        scales: Of a data set; by default of `maps`.
        count: How many at most.
        layer: Place of the only layer to list clusters of; all by default.
    """
    scales = ClusterScales.of(maps) if scales is None else scales
    here = np.asarray(maps.maps[image])
    criteria = {
        "concentration": concentration(scales.strength(here[None]))[0],
        "contrast": (here.max(axis=(2, 3)) - here.mean(axis=(2, 3))) / np.maximum(scales.deviation, 1e-12),
        "agreement": scales.class_means[..., maps.predictions[image]],
    }
    return _ranked(maps, criteria, here[None], count, layer)


def rank_for_dataset(
    maps: ClusterMaps,
    labels: Int[np.ndarray, " batch"],
    stability: Float[np.ndarray, "layers clusters"] | None = None,
    count: int = 20,
    layer: int | None = None,
) -> list[RankedCluster]:
    """Return the clusters that are most worth looking at over a data set, the best first, without near-duplicates.

    Criteria: `separation`, the share of the map's variance that the class explains; `concentration` as for an image,
    its mean; `stability` under augmentation, if it was measured.

    Args:
        maps: Maps of all images.
        labels: Class of every image.
        stability: From `stability_under_augmentation`.
        count: How many at most.
        layer: Place of the only layer to list clusters of; all by default.
    """
    scales = ClusterScales.of(maps)
    of_layers = []
    for place in range(maps.maps.shape[1]):
        part = ClusterScales(*(values[[place]] for values in vars(scales).values()))
        responses = np.asarray(maps.maps[:, [place]])
        of_layers.append(
            (class_separation(responses, labels)[0], concentration(part.strength(responses)).mean(axis=0)[0])
        )
    separation, concentrated = map(np.stack, zip(*of_layers, strict=True))
    criteria = {"separation": separation, "concentration": concentrated}
    if stability is not None:
        criteria["stability"] = stability
    some = np.asarray(maps.maps[:64])  # enough to see which maps look alike
    return _ranked(maps, criteria, some, count, layer)


def _ranked(
    maps: ClusterMaps,
    criteria: dict[str, Float[np.ndarray, "layers clusters"]],
    looks: Float[np.ndarray, "batch layers clusters rows columns"],
    count: int,
    layer: int | None,
) -> list[RankedCluster]:
    score = np.mean([_share_surpassed(values) for values in criteria.values()], axis=0)
    layers = list(range(len(score))) if layer is None else [layer]
    chosen = [(layers[place], cluster) for place, cluster in choose_distinct(score[layers], looks[:, layers], count)]
    return [
        RankedCluster(
            maps.ref(*place), *place, float(score[place]), {name: float(each[place]) for name, each in criteria.items()}
        )
        for place in chosen
    ]


def _share_surpassed(values: Float[np.ndarray, "layers clusters"]) -> Float[np.ndarray, "layers clusters"]:
    """Return for every value the share of all others that are smaller; equal ones count half."""
    ordered = np.sort(values, axis=None)
    below = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") - 1
    return below / 2 / max(values.size - 1, 1)


def concentration(
    strength: Float[np.ndarray, "batch layers clusters rows columns"],
) -> Float[np.ndarray, "batch layers clusters"]:
    """Return the share of each map's strength in the strongest tenth of its patches; 0 where there is no strength."""
    patches = np.sort(strength.reshape(*strength.shape[:3], -1), axis=-1)
    total, strongest = patches.sum(axis=-1), max(1, round(STRONGEST_SHARE * patches.shape[-1]))
    return np.divide(patches[..., -strongest:].sum(axis=-1), total, out=np.zeros_like(total), where=total > 0)


def stability_under_augmentation(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    layers: Chosen = None,
    clusters: Chosen = None,
    reading: Reading | str = "plain",
) -> Float[np.ndarray, "layers clusters"]:
    """Return how alike each cluster's maps stay when images are mirrored or dimmed, from -1 to 1.

    It is the mean of two correlations over all patches of all images: with the maps of the mirrored images, mirrored
    back, and with those of images of four fifths of the contrast. 0 for a constant map.

    Args:
        model: As for `explain_images`, and so are the others.
        images: Normalised pixels.
        layers: Numbers or names of the layers.
        clusters: Numbers of the clusters.
        reading: How the tokens are read.
    """
    mean = images.mean(dim=(2, 3), keepdim=True)
    variants = (images, images.flip(3), mean + DIMMED * (images - mean))
    original, mirrored, dimmed = (
        explain_images(model, each, layers, clusters, reading=reading).maps for each in variants
    )
    flat = [
        standardised(np.moveaxis(maps, 0, 2).reshape(*maps.shape[1:3], -1))
        for maps in (original, mirrored[..., ::-1], dimmed)
    ]
    return ((flat[0] * flat[1]).mean(axis=-1) + (flat[0] * flat[2]).mean(axis=-1)) / 2


@dataclass(frozen=True)
class Response:
    """Where a cluster responds: number of the image, row and column of the patch, and how strongly."""

    image: int
    row: int
    column: int
    response: float


def strongest_responses(maps: ClusterMaps, layer: int, cluster: int, count: int = 9) -> list[Response]:
    """Return where a cluster responds most, one patch per image, the strongest first.

    Args:
        maps: Maps of all images.
        layer: Place of the layer in the maps.
        cluster: Place of the cluster in the maps.
        count: How many images at most.
    """
    responses = np.asarray(maps.maps[:, layer, cluster])
    flat = responses.reshape(len(responses), -1)
    order = np.argsort(-flat.max(axis=1), kind="stable")[:count]
    places = [(int(image), *divmod(int(flat[image].argmax()), responses.shape[2])) for image in order]
    return [Response(image, row, column, float(responses[image, row, column])) for image, row, column in places]
