"""The rows of a table of scores: where maps come from, learned ones and controls, and how they are read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gift.backbones import find_family
from gift.explain.assignments import explained_model, find_tuner
from gift.explain.controls import k_means, principal_components, random_assignment, untrained_assignments
from gift.explain.readings import KINDS, Reading, TokenStatistics
from gift.explain.recording import tokens_of
from gift.explain.saliency import attention_rollout, grad_cam

LEARNED, BEFORE, UNTRAINED, RANDOM = "learned", "before adaptation", "untrained", "random"
CHOSEN_ON = slice(0, None, 2)  # every other image: those that maps are chosen on; they are scored on the rest

LayerMaps = Callable[[], Float[np.ndarray, "batch candidates rows columns"]]


@dataclass(frozen=True)
class ScoreOptions:
    """How cluster maps are scored.

    Args:
        readings: Those that are rows of the table.
        images_removed: Of how many images patches are removed, for deletion, insertion and importance.
        random_draws: How many sets of random maps say what chance can do: of 40, one in 14 exceeds the limit.
        seed: Of everything that is drawn.
        block: Which of the generator's blocks gives the assignment.
        whole: Whether to score more than the overlap: pointing, energy, deletion, insertion, importance; and the
            controls that are no clusters.
    """

    readings: tuple[str, ...] = KINDS
    images_removed: int = 40
    random_draws: int = 40
    seed: int = 0
    block: int = -1
    whole: bool = True


@dataclass(frozen=True)
class Row:
    """Where a row's maps come from, how they are read, and for every layer a function to the maps of all images."""

    maps: str
    reading: str
    of_layers: list[LayerMaps]


class StoredTokens:
    """The output tokens of all layers for all images, on disk, and how maps are read from them.

    Args:
        model: A model with clusters.
        images: What it takes.
        adapted: Whether its layers are adapted, or as they were before.
        folder: Where to keep the tokens.
        readings: The readings that will be asked for.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, adapted: bool, folder: Path, readings: tuple[str, ...]
    ) -> None:
        self.names: list[str] = []
        self._on_disk: dict[str, np.memmap] = {}
        done, logits = 0, []
        for answer, tokens in tokens_of(model, images, adapted):
            for name, of_layer in tokens.items():
                if name not in self._on_disk:
                    path, shape = folder / f"{adapted}-{len(self.names)}", (len(images), *of_layer.shape[1:])
                    self._on_disk[name] = np.memmap(path, np.float32, "w+", shape=shape)
                    self.names.append(name)
                self._on_disk[name][done : done + len(of_layer)] = of_layer.float().cpu().numpy()
            done += len(answer)
            logits.append(answer.float().cpu())
        self.logits = torch.cat(logits).numpy()
        self.grid = next(iter(self._on_disk.values())).shape[1:3]
        chosen = slice(0, None, 2)  # those that maps are chosen on
        self._statistics = (
            TokenStatistics.of(
                [{name: torch.from_numpy(tokens[chosen]).flatten(0, 2) for name, tokens in self._on_disk.items()}]
            )
            if "whitened" in readings
            else None
        )

    def of(self, name: str) -> Float[Tensor, "batch rows columns channels"]:
        """Return the tokens of a target."""
        return torch.from_numpy(np.asarray(self._on_disk[name]))

    def readers(self, kind: str, matrices: dict[str, Tensor]) -> list[LayerMaps]:
        """Return for every layer a function to the maps that a reading of assignments gives."""
        reading = Reading(kind, statistics=self._statistics if kind == "whitened" else None)

        def reader(name: str) -> LayerMaps:
            readout = reading.readout(name, matrices[name].detach().float().cpu())
            return lambda: readout(self.of(name)).numpy()

        return [reader(name) for name in self.names]


def rows_of(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    tokens: dict[bool, StoredTokens],
    options: ScoreOptions,
) -> Iterator[Row]:
    """Yield every row: the learned clusters, those on the layers before adaptation, untrained and random ones, others.

    Args:
        model: A model with one active adapter.
        images: What it takes.
        tokens: Of the adapted layers (True) and of them before adaptation (False).
        options: How maps are scored.
    """
    learned, tuner = explained_model(model, options.block).assignments.matrices, find_tuner(model)
    assert tuner is not None
    untrained = untrained_assignments(tuner, options.block, options.seed)
    drawn = random_assignments(model, options, np.random.default_rng(options.seed))
    sources = ((LEARNED, learned, True), (BEFORE, learned, False), (UNTRAINED, untrained, False), (RANDOM, drawn, True))
    for name, matrices, adapted in sources:
        for kind in options.readings:
            yield Row(name, kind, tokens[adapted].readers(kind, matrices))
    if options.whole:
        yield from _other_rows(model, images, tokens[True], options)


def random_assignments(model: nn.Module, options: ScoreOptions, rng: np.random.Generator) -> dict[str, Tensor]:
    """Return random assignments of the mean and variance of the learned ones."""
    learned = explained_model(model, options.block).assignments.matrices
    return {name: random_assignment(matrix, rng) for name, matrix in learned.items()}


def _other_rows(model: nn.Module, images: Tensor, tokens: StoredTokens, options: ScoreOptions) -> Iterator[Row]:
    explained = explained_model(model, options.block)
    count = explained.assignments.clusters

    def fitted(fit: Callable[[Tensor, int, int], Any], name: str) -> LayerMaps:
        def maps() -> np.ndarray:
            of_layer = tokens.of(name)
            return fit(of_layer[CHOSEN_ON], count, options.seed)(of_layer).numpy()

        return maps

    yield Row("k-means", "", [fitted(k_means, name) for name in tokens.names])
    yield Row("PCA", "", [fitted(principal_components, name) for name in tokens.names])
    found = find_family(explained.inner)
    if found is None or found[1].hierarchical:
        return  # attention there is of windows, and gradients are of several grids
    rollout = attention_rollout(model, images)
    yield Row("attention rollout", "", [lambda block=block: rollout[:, [block]] for block in range(rollout.shape[1])])
    names = {module: name for name, module in model.named_modules()}
    cams = grad_cam(model, images, [names[layer] for layer in explained.modules.values()])
    yield Row("Grad-CAM", "", [lambda layer=layer: cams[:, layer] for layer in range(cams.shape[1])])
