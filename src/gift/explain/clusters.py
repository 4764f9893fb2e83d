"""Cluster maps: which patches of an image the clusters of an adapter respond to, from one forward pass.

The generator assigns every row of a frozen weight W, hence every output channel of its layer, to the clusters: C of
shape (out_features, clusters). With f the output tokens of the adapted layer, laid out on the patch grid without prefix
tokens, f C has one map per cluster (GIFT, arXiv 2312.00700, first version: clusters as a segmentation head).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gift.backbones import patch_grid, prefix_tokens
from gift.explain.capture import evaluating, recorded_outputs
from gift.tuner.layer import GiftLinear
from gift.tuner.model import GiftModel
from gift.tuner.targets import Target

IMAGES_PER_PASS = 64


@dataclass(frozen=True, eq=False)
class ClusterMaps:
    """The maps of some images, for every adapted layer and cluster.

    Attributes:
        maps: Response of every cluster in every patch, in units of the layer's output.
        layer_names: Dotted names of the layers in the backbone.
        assignments: How much every output channel of a layer belongs to every cluster.
        predictions: Index of the predicted class of every image.
    """

    maps: Float[np.ndarray, "batch layers clusters rows columns"]
    layer_names: tuple[str, ...]
    assignments: Float[np.ndarray, "layers out_features clusters"]
    predictions: Int[np.ndarray, " batch"]


def without_common_part(
    maps: Float[np.ndarray, "batch layers clusters rows columns"],
) -> Float[np.ndarray, "batch layers clusters rows columns"]:
    """Return the maps less what the clusters of a layer share, and less the mean of each map over the image.

    PaCa's assignments are positive, so every map holds the sum of the layer's channels, and training can make that the
    larger part of all of them. What is left says where a cluster responds more than the others do.
    """
    own = maps - maps.mean(axis=2, keepdims=True)
    return own - own.mean(axis=(3, 4), keepdims=True)


@torch.no_grad()
def explain_images(model: nn.Module, images: Float[Tensor, "batch 3 height width"], block: int = -1) -> ClusterMaps:
    """Return the cluster maps of images for the active adapter; the model is left as it was.

    Args:
        model: A `PeftModel`, which is an image classifier of timm or transformers with one active GIFT adapter, of
            whole layers of one width.
        images: What the model takes: normalised pixels, on any device.
        block: Which of the generator's blocks gives the assignment.

    Raises:
        ValueError: If the model has no such adapter in effect, the adapter no clusters, or the model no patch grid or
            logits for such images.
    """
    layers, assignments = _assignments(model, block)
    prefix, grid = prefix_tokens(model), patch_grid(model, images.shape[2], images.shape[3])
    device = next(model.parameters()).device
    maps, predictions = [], []
    with evaluating(model), recorded_outputs(layers) as outputs:
        for batch in images.split(IMAGES_PER_PASS):
            answer = model(batch.to(device))
            stacked = [_maps(outputs[name], assignments[name], prefix, grid) for name in layers]
            maps.append(torch.stack(stacked, dim=1))
            predictions.append(_logits(answer).argmax(dim=-1))
    return ClusterMaps(
        torch.cat(maps).float().cpu().numpy(),
        tuple(layers),
        torch.stack(list(assignments.values())).float().cpu().numpy(),
        torch.cat(predictions).cpu().numpy(),
    )


def _assignments(
    model: nn.Module, block: int
) -> tuple[dict[str, GiftLinear], dict[str, Float[Tensor, "out_features clusters"]]]:
    """Return the adapted layers, in the order of the model, and the assignment of each."""
    tuner = getattr(model, "base_model", model)
    if not isinstance(tuner, GiftModel):
        raise ValueError(f"Cluster maps need a PeftModel with a GIFT adapter, got {type(tuner).__name__}.")
    if len(tuner.active_adapters) != 1:
        raise ValueError(f"Cluster maps are of one adapter, but {tuner.active_adapters} are active: use set_adapter.")
    source, (adapter,) = tuner.gift_source, tuner.active_adapters
    layers = {name: layer for name, layer in source.layers.items() if adapter in layer.adapters_in_effect}
    if not layers:
        raise ValueError(f"The adapter {adapter!r} is disabled or merged: enable or unmerge it first.")
    assignments: dict[str, Tensor] = {}
    targets = [Target(name, part) for name, layer in layers.items() for part in layer.gift_parts[adapter]]
    for _, served, factors in source.generate_targets(adapter, targets):
        for target, of_blocks in zip(served, factors.assignments, strict=True):
            assignments[str(target)] = _of_block(target, of_blocks, block)
    widths = {name: len(assignment) for name, assignment in assignments.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"The adapted layers must have one output width for their maps, got {widths}.")
    return layers, {name: assignments[name] for name in layers}


def _of_block(target: Target, of_blocks: tuple[Tensor, ...], block: int) -> Tensor:
    if target.part is not None:
        raise ValueError(f"{target} is a part of a fused layer; there are maps of whole layers only.")
    if not -len(of_blocks) <= block < len(of_blocks):
        raise ValueError(f"There is no block {block} with clusters: this generator has {len(of_blocks)} of them.")
    return of_blocks[block]


def _logits(answer: Any) -> Float[Tensor, "batch classes"]:
    logits = answer if isinstance(answer, Tensor) else getattr(answer, "logits", None)
    if logits is None or logits.ndim != 2:
        raise ValueError(f"The model must be an image classifier, which gives logits; it gave {type(answer).__name__}.")
    return logits


def _maps(
    output: Tensor, assignment: Float[Tensor, "out_features clusters"], prefix: int, grid: tuple[int, int]
) -> Float[Tensor, "batch clusters rows columns"]:
    tokens = output[:, prefix:]
    if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"Expected {prefix} prefix and {grid[0]} x {grid[1]} patch tokens, got an output of {tuple(output.shape)}: "
            "this layer does not see the whole grid of patches at once."
        )
    return (tokens.to(assignment) @ assignment).transpose(1, 2).unflatten(2, grid)
