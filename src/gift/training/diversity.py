"""A term of the loss that keeps the clusters of a layer apart; off by default."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gift.tuner.model import GiftModel


def cluster_overlap(model: nn.Module) -> Float[Tensor, ""]:
    """Return how alike the clusters of the active adapter are, from 0 to 1.

    It is the mean squared correlation of two columns of a layer's assignment (of the last block with clusters) over the
    output channels. Add it, times a weight, to the loss of one's own loop; `FinetuneOptions.diversity` does so.

    Raises:
        ValueError: If the model has no GIFT adapter, or the adapter fewer than two clusters.
    """
    tuner = next((module for module in model.modules() if isinstance(module, GiftModel)), None)
    if tuner is None:
        raise ValueError(f"{type(model).__name__} has no GIFT adapter, so there are no clusters to keep apart.")
    source, overlaps = tuner.gift_source, []
    for adapter in tuner.active_adapters:
        targets = [target for group in source.groups[adapter].values() for target in group]
        for _, _, factors in source.generate_targets(adapter, targets):
            overlaps += [_overlap(of_blocks[-1]) for of_blocks in factors.assignments if of_blocks]
    if not overlaps:
        raise ValueError("This generator has no clusters to keep apart: only `paca` and `linear` have some.")
    return torch.stack(overlaps).mean()


def _overlap(assignment: Float[Tensor, "channels clusters"]) -> Float[Tensor, ""]:
    count = assignment.shape[1]
    if count < 2:
        raise ValueError("There is one cluster only: nothing is to be kept apart.")
    columns = nn.functional.normalize(assignment - assignment.mean(dim=0), dim=0)
    return ((columns.T @ columns).square().sum() - count) / (count * (count - 1))
