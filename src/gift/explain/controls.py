"""What cluster maps are compared with: as many maps, of the same tokens, that training did not make.

Without controls a score says nothing: of hundreds of maps of a pretrained backbone some agree with any part.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from torch import Tensor

from gift.explain.readings import Readout
from gift.tuner.generator import WeightGenerator
from gift.tuner.model import GiftModel

Tokens = Float[Tensor, "batch rows columns channels"]
Maps = Float[Tensor, "batch maps rows columns"]


@torch.no_grad()
def untrained_assignments(tuner: GiftModel, block: int = -1, seed: int = 0) -> dict[str, Float[Tensor, "_ clusters"]]:
    """Return what the clusters of the active adapter would be if its generators had just been made.

    Args:
        tuner: The tuner with one active adapter.
        block: Which of the generator's blocks gives the assignment.
        seed: Of the new generators.
    """
    (adapter,) = tuner.active_adapters
    source, found = tuner.gift_source, {}
    weights_of = {
        group: [source.layers[target.layer].frozen_weight(target.part) for target in targets]
        for group, targets in source.groups[adapter].items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh_of = {
            group: WeightGenerator(weights[0].shape[1], weights[0].shape[0], source.generators[adapter][group].options)  # type: ignore[index]
            for group, weights in weights_of.items()
        }
    for group, targets in source.groups[adapter].items():
        fresh, weights = fresh_of[group], weights_of[group]
        fresh.to(source.generators[adapter][group].recover)  # type: ignore[index]
        fresh.calibrate(weights)
        for target, of_blocks in zip(targets, fresh(weights).assignments, strict=True):
            found[str(target)] = of_blocks[block]
    return found


def random_assignment(
    assignment: Float[Tensor, "channels clusters"], rng: np.random.Generator
) -> Float[Tensor, "channels clusters"]:
    """Return independent normal numbers of the mean and variance that the entries of an assignment have."""
    numbers = torch.from_numpy(rng.standard_normal(tuple(assignment.shape))).to(assignment)
    return assignment.mean() + assignment.std() * numbers


def k_means(tokens: Tokens, count: int, seed: int) -> Callable[[Tokens], Maps]:
    """Return a function to maps of nearness, the negative squared distance, to each of `count` means of tokens."""
    fitted: Any = MiniBatchKMeans(count, random_state=seed, n_init=3, batch_size=2048)  # type: ignore[arg-type]
    fitted.fit(tokens.flatten(0, 2).numpy())
    means = torch.from_numpy(fitted.cluster_centers_).to(tokens)

    def nearness(values: Tokens) -> Maps:
        squares = values.square().sum(dim=-1, keepdim=True) - 2 * values @ means.T + means.square().sum(dim=1)
        return -squares.permute(0, 3, 1, 2)

    return nearness


def principal_components(tokens: Tokens, count: int, seed: int) -> Readout:
    """Return the read-out of the first `count` / 2 principal components of tokens and of their negatives."""
    half = max(1, min(count // 2, tokens.shape[-1]))
    fitted: Any = PCA(half, random_state=seed).fit(tokens.flatten(0, 2).numpy())
    matrix = torch.from_numpy(np.concatenate([fitted.components_, -fitted.components_]).T).to(tokens)
    return Readout(matrix, -torch.from_numpy(fitted.mean_).to(tokens) @ matrix)
