"""A term of the loss that keeps the clusters of a layer apart; off by default."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gift.tuner.model import GiftModel


def cluster_overlap(model: nn.Module) -> Float[Tensor, ""]:
    """Return how alike the clusters of the active adapter are, from 0 to nearly 1, the mean over the layers.

    It is 1 - (sum e)^2 / (M sum e^2), with e the M eigenvalues of the covariance, over output channels, of the columns
    of a layer's assignment (of the last block with clusters): 0 if no two clusters are correlated and all vary alike,
    1 - 1/M if they are copies of one another. A cluster that hardly varies counts as missing, so the term does not
    reward it. Add it, times a weight, to the loss of one's own loop; `FinetuneOptions.diversity` does so.

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
    columns = assignment - assignment.mean(dim=0)
    covariance = columns.T @ columns
    squares = covariance.square().sum()
    return 1 - covariance.trace().square() / (count * squares.clamp_min(torch.finfo(squares.dtype).tiny))
