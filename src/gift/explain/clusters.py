"""Cluster maps: which patches of an image the clusters of an adapter respond to, from one forward pass.

The generator assigns every row of a frozen weight W, hence every output channel of its layer, to the clusters: C of
shape (out_features, clusters). With f the output tokens of the adapted layer, laid out on the patch grid without prefix
tokens, f C has one map per cluster (GIFT, arXiv 2312.00700, first version: clusters as a segmentation head).
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gift.explain.assignments import Chosen, choose
from gift.explain.capture import evaluating
from gift.explain.files import MapsWriter, read_arrays, read_manifest
from gift.explain.names import ClusterRef
from gift.explain.readings import Reading
from gift.explain.recording import IMAGES_PER_PASS, Images, batches_of, logits_of, plan_recording
from gift.explain.segments import LabelMaps, label_maps

PACKAGES = ("gift-peft", "torch", "transformers", "timm", "peft")


@dataclass(frozen=True, eq=False)
class ClusterMaps:
    """The maps of some images, for adapted layers and their clusters.

    Attributes:
        maps: Response of every cluster in every patch, in units of the layer's output (of its standard deviations where
            they are whitened); in memory, or on disk where they were streamed or loaded from.
        layer_names: Dotted names of the layers in the backbone, with the part of a fused layer: `blocks.0.attn.qkv[v]`.
        assignments: How much every output channel of a layer belongs to every cluster; where layers differ in width,
            the rows that a narrower one lacks are zero.
        predictions: Index of the predicted class of every image.
        logits: What the model gave for every image.
        image_sizes: Height and width of every image in pixels, as the model was given it.
        layer_numbers: Of the layers, among all that are adapted.
        cluster_numbers: Of the clusters, among all there are.
        reading: How the tokens were read; see `gift.explain.readings`.
        adapted: Whether the layers were adapted, or as they had been before.
        block: Which of the generator's blocks gave the assignments.
        versions: Of the packages that made the maps.
    """

    maps: Float[np.ndarray, "batch layers clusters rows columns"]
    layer_names: tuple[str, ...]
    assignments: Float[np.ndarray, "layers out_features clusters"]
    predictions: Int[np.ndarray, " batch"]
    logits: Float[np.ndarray, "batch classes"]
    image_sizes: Int[np.ndarray, "batch 2"]
    layer_numbers: tuple[int, ...]
    cluster_numbers: tuple[int, ...]
    reading: str
    adapted: bool
    block: int
    versions: dict[str, str]

    def ref(self, layer: int, cluster: int) -> ClusterRef:
        """Return the name, as in `L8/C28`, of what lies at these places of `maps`."""
        return ClusterRef(self.layer_numbers[layer], self.cluster_numbers[cluster])

    def of_clusters(self, places: list[int]) -> "ClusterMaps":
        """Return the maps of some clusters only, by their places."""
        return replace(
            self,
            maps=np.asarray(self.maps)[:, :, places],
            assignments=self.assignments[..., places],
            cluster_numbers=tuple(self.cluster_numbers[place] for place in places),
        )

    def segment(self, layer: int | str, clusters: Chosen = None) -> LabelMaps:
        """Return one label map per image: the cluster whose standardised map is highest in a patch.

        Near-duplicates (correlation over 0.9) are merged first.

        Args:
            layer: Place of the layer in `layer_names`, or its name.
            clusters: Places of the clusters that may win; all by default.
        """
        (here,) = choose(self.layer_names, [layer], "layer")
        places = choose([str(number) for number in range(len(self.cluster_numbers))], clusters, "cluster")
        names = [str(self.ref(here, place)) for place in places]
        sizes = tuple((int(height), int(width)) for height, width in self.image_sizes)
        return label_maps(np.asarray(self.maps[:, here])[:, places], names, sizes)

    def _repr_html_(self) -> str:
        """Return what Jupyter shows."""
        from gift.explain.notebook import maps_as_html  # noqa: PLC0415 - it ranks and draws maps, which needs this file

        return maps_as_html(self)

    def save(self, folder: Path | str) -> None:
        """Write the maps into a folder: safetensors and, last, `manifest.json`.

        Raises:
            ValueError: If the folder holds anything but cluster maps.
        """
        with MapsWriter(Path(folder)) as writer:
            for start in range(0, len(self.maps), IMAGES_PER_PASS):
                writer.add(np.asarray(self.maps[start : start + IMAGES_PER_PASS], np.float32))
            _write(writer, self)

    @classmethod
    def load(cls, folder: Path | str) -> "ClusterMaps":
        """Return the maps of a folder; `maps` stays on disk until it is read.

        Raises:
            ValueError: If the folder holds no complete maps.
        """
        manifest, (maps, arrays) = read_manifest(Path(folder)), read_arrays(Path(folder))
        try:
            manifest |= {name: tuple(manifest[name]) for name in ("layer_names", "layer_numbers", "cluster_numbers")}
            loaded = cls(maps=maps, **arrays, **manifest)
            lengths = [len(loaded.layer_names), len(loaded.layer_numbers), len(loaded.assignments)]
            lengths += [
                len(loaded.cluster_numbers),
                loaded.assignments.shape[2],
                len(loaded.logits),
                len(loaded.image_sizes),
            ]
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{folder} holds no complete cluster maps: {error}.") from error
        batch, layers, clusters = maps.shape[:3]
        if lengths != [layers, layers, layers, clusters, clusters, batch, batch]:
            raise ValueError(f"{folder} holds no complete cluster maps: its parts do not belong together.")
        return loaded


@cache
def _versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}  # read from files, which takes milliseconds


def _write(writer: MapsWriter, maps: ClusterMaps) -> None:
    kept_apart = ("maps", "assignments", "predictions", "logits", "image_sizes")
    writer.finish(
        {name: getattr(maps, name) for name in kept_apart[1:]},
        {name: value for name, value in vars(maps).items() if name not in kept_apart},
    )


@torch.no_grad()
def explain_images(
    model: nn.Module,
    images: Images,
    layers: Chosen = None,
    clusters: Chosen = None,
    block: int = -1,
    reading: Reading | str = "plain",
    out: Path | str | None = None,
) -> ClusterMaps:
    """Return the cluster maps of images for the active adapter, from one forward pass; the model is left as it was.

    Args:
        model: An image classifier of timm or transformers with one active GIFT adapter, merged or not; or one whose
            adapter was merged and dropped, and whose clusters were stored (`gift.explain.merged`).
        images: What the model takes, normalised pixels (batch, 3, height, width) on any device; or batches of them, as
            a DataLoader gives, which may be dicts with `pixel_values` and must be of one size.
        layers: Numbers or names (`blocks.0.attn.qkv[v]` for a part) of adapted layers; all by default.
        clusters: Numbers of clusters; all by default.
        block: Which of the generator's blocks gives the assignment.
        reading: How the tokens are read: `plain` (the paper's), `centred`, `own`, or a `Reading`.
        out: Folder to which the maps are streamed, so that they need not fit into memory; as `save` would leave it.

    Raises:
        ValueError: If the model has no such adapter in effect, the adapter no clusters, the model no patch grid or
            logits for such images, a layer or cluster is not there, or `out` holds anything but cluster maps.
    """
    plan = plan_recording(model, layers, clusters, block, reading)
    first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    maps: list[np.ndarray] = []
    logits: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    with MapsWriter(Path(out)) if out is not None else nullcontext() as writer:
        with evaluating(model), plan.recording() as recorded:
            for pixels in batches_of(images):
                logits.append(logits_of(model(pixels.to(first))).float().cpu())
                sizes += [(pixels.shape[2], pixels.shape[3])] * len(pixels)
                of_batch = recorded.maps.float().cpu().numpy()
                maps.append(of_batch) if writer is None else writer.add(of_batch)
        if not logits:
            raise ValueError("There are no images to explain.")
        all_logits = torch.cat(logits).numpy()
        found = ClusterMaps(
            maps=np.concatenate(maps) if writer is None else writer.maps,
            layer_names=tuple(plan.readouts),
            assignments=plan.stacked_assignments(),
            predictions=all_logits.argmax(axis=1),
            logits=all_logits,
            image_sizes=np.array(sizes),
            layer_numbers=plan.layer_numbers,
            cluster_numbers=plan.cluster_numbers,
            reading=plan.reading.kind,
            adapted=plan.reading.adapted,
            block=block,
            versions=dict(_versions()),
        )
        if writer is not None:
            _write(writer, found)
    return found if out is None else ClusterMaps.load(out)
