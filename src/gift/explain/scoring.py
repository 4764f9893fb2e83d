"""How good cluster maps are, beside controls: every row of the table has maps of the same images and as many of them.

Maps are chosen on one half of the images and scored on the other, with one threshold per map for all images.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr
from torch import Tensor, nn

from gift.backbones import find_family
from gift.data.parts import PartImages
from gift.explain.assignments import explained_model, find_tuner
from gift.explain.controls import k_means, principal_components, random_assignment, untrained_assignments
from gift.explain.readings import KINDS, Reading, TokenStatistics
from gift.explain.recording import tokens_of
from gift.explain.removal import logit_drops, logits_without, patch_of_grid, removal_curves
from gift.explain.saliency import attention_rollout, grad_cam
from gift.explain.scores import (
    BestMaps,
    best_maps,
    effective_number,
    energy_inside,
    overlap_sums,
    pointing_hits,
    standardised,
)

RESAMPLES = 1000
LEARNED, BEFORE, UNTRAINED, RANDOM = "learned", "before adaptation", "untrained", "random"


@dataclass(frozen=True)
class ScoreOptions:
    """How cluster maps are scored.

    Args:
        readings: Those that are rows of the table.
        images_removed: Of how many images patches are removed, for deletion, insertion and importance.
        random_draws: How many sets of random maps say what chance can do.
        seed: Of everything that is drawn.
        block: Which of the generator's blocks gives the assignment.
        whole: Whether to score more than the overlap: pointing, energy, deletion, insertion, importance; and the
            controls that are no clusters.
    """

    readings: tuple[str, ...] = KINDS
    images_removed: int = 100
    random_draws: int = 20
    seed: int = 0
    block: int = -1
    whole: bool = True


@dataclass(frozen=True)
class PartScore:
    """How well the best map of a part does on images it was not chosen on.

    Attributes:
        part: Name of the part.
        map: Which map was chosen, such as L3/C12.
        iou: Intersection over union with the part, with one threshold for all images.
        low: Lower end of its 95 % interval over images.
        high: Upper end.
        pointing: Share of the part in the patch of the highest response, the mean over the images that show it.
        energy: Share of the map's strength above its median that lies on the part.
        chance: For clusters, the 95 % quantile of the overlap that random maps read alike reach.
    """

    part: str
    map: str
    iou: float
    low: float
    high: float
    pointing: float
    energy: float
    chance: float | None = None


@dataclass(frozen=True)
class MethodScore:
    """One row of the table.

    Attributes:
        maps: Where the maps come from.
        reading: How they are read from tokens; empty where they are not.
        candidates: How many maps there were to choose from.
        effective_numbers: How many different maps every layer has.
        parts: The best map of every part.
        deletion: Area under the deletion curve, the mean over images; small is good.
        insertion: Area under the insertion curve; large is good.
        importance: Rank correlation, over images and parts, of how far the predicted logit falls when a part is not
            drawn with how far it falls without the region of the part's map, less random patches. None where parts
            cannot be left out.
    """

    maps: str
    reading: str
    candidates: int
    effective_numbers: list[float]
    parts: list[PartScore]
    deletion: float | None = None
    insertion: float | None = None
    importance: float | None = None


@dataclass(frozen=True)
class _Row:
    """Where a row's maps come from: per layer a function from all images to (batch, candidates, rows, columns)."""

    maps: str
    reading: str
    of_layers: list[Callable[[], Float[np.ndarray, "batch candidates rows columns"]]]


@dataclass
class _Found:
    """What is kept of a row's maps: the best of every part, and that of every class."""

    best: BestMaps
    layers: Int[np.ndarray, " parts"]
    of_parts: Float[np.ndarray, "batch parts rows columns"]
    of_classes: Float[np.ndarray, "batch classes rows columns"]
    correlation: Float[np.ndarray, " classes"]
    effective_numbers: list[float] = field(default_factory=list)
    candidates: int = 0


@dataclass(frozen=True, eq=False)
class Scorer:
    """Everything that scoring the maps of one model on one set of images needs.

    Attributes:
        model: The model, with one active adapter.
        truth: Images with their parts, of the size that the model takes.
        normalise: From pixels (batch, height, width, 3) to what the model takes (batch, 3, height, width).
        options: How to score.
    """

    model: nn.Module
    truth: PartImages
    normalise: Callable[[np.ndarray], Tensor]
    options: ScoreOptions

    @cached_property
    def images(self) -> Float[Tensor, "batch 3 height width"]:
        """The images as the model takes them."""
        return self.normalise(self.truth.images.pixels)

    def score(self) -> list[MethodScore]:
        """Return all rows of the table; the model is left as it was.

        Raises:
            ValueError: As for `explain_images`, or if there are fewer than 8 images.
        """
        if len(self.truth) < 8:
            raise ValueError(f"Scores need at least 8 images, half to choose maps on, got {len(self.truth)}.")
        with tempfile.TemporaryDirectory() as folder:
            tokens = {
                adapted: _Tokens(self.model, self.images, adapted, Path(folder), self.options)
                for adapted in (True, False)
            }
            coverage = self.coverage(tokens[True].grid)
            chance = self._chance(tokens[True], coverage)
            rows = [self._score(row, tokens[True], coverage, chance) for row in self._rows(tokens)]
        return [*rows, self._without_maps(coverage)] if self.options.whole else rows

    @property
    def chosen_on(self) -> Bool[np.ndarray, " batch"]:
        """Every other image: those that maps are chosen on; they are scored on the rest."""
        return np.arange(len(self.images)) % 2 == 0

    def coverage(self, grid: tuple[int, int]) -> Float[np.ndarray, "batch parts rows columns"]:
        """Return the share of every patch that each part covers."""
        return self.truth.coverage(patch_of_grid(self.model, self.images, grid[0]), grid)

    # ---- rows ----------------------------------------------------------------------------------------------------

    def _rows(self, tokens: dict[bool, "_Tokens"]) -> Iterator[_Row]:
        learned = explained_model(self.model, self.options.block).assignments.matrices
        tuner = find_tuner(self.model)
        assert tuner is not None
        untrained = untrained_assignments(tuner, self.options.block, self.options.seed)
        rng = np.random.default_rng(self.options.seed)
        drawn = {name: random_assignment(matrix, rng) for name, matrix in learned.items()}
        sources = (
            (LEARNED, learned, True),
            (BEFORE, learned, False),
            (UNTRAINED, untrained, False),
            (RANDOM, drawn, True),
        )
        for name, matrices, adapted in sources:
            for kind in self.options.readings:
                yield _Row(name, kind, tokens[adapted].readers(kind, matrices))
        if self.options.whole:
            yield from self._other_rows(tokens[True], next(iter(learned.values())).shape[1])

    def _other_rows(self, tokens: "_Tokens", count: int) -> Iterator[_Row]:
        seed = self.options.seed

        def fitted(fit: Callable[[Tensor, int, int], Any], name: str) -> Callable[[], np.ndarray]:
            def maps() -> np.ndarray:
                of_layer = tokens.of(name)
                return fit(of_layer[torch.from_numpy(self.chosen_on)], count, seed)(of_layer).numpy()

            return maps

        yield _Row("k-means", "", [fitted(k_means, name) for name in tokens.names])
        yield _Row("PCA", "", [fitted(principal_components, name) for name in tokens.names])
        found = find_family(explained_model(self.model, self.options.block).inner)
        if found is None or found[1].hierarchical:
            return  # attention there is of windows, and gradients of several grids
        rollout = attention_rollout(self.model, self.images)
        yield _Row(
            "attention rollout", "", [lambda block=block: rollout[:, [block]] for block in range(rollout.shape[1])]
        )
        modules = {module: name for name, module in self.model.named_modules()}
        names = [modules[module] for module in explained_model(self.model, self.options.block).modules.values()]
        cams = grad_cam(self.model, self.images, names)
        yield _Row("Grad-CAM", "", [lambda layer=layer: cams[:, layer] for layer in range(cams.shape[1])])

    # ---- scores --------------------------------------------------------------------------------------------------

    def _score(self, row: _Row, tokens: "_Tokens", coverage: np.ndarray, chance: dict[str, list[float]]) -> MethodScore:
        found = self._find(row, tokens.logits, coverage)
        limits = chance.get(row.reading, [None] * coverage.shape[1])
        scored = ~self.chosen_on
        rng = np.random.default_rng(self.options.seed)
        parts = []
        for index, part in enumerate(self.truth.part_names):
            maps, of_part = found.of_parts[scored, index], coverage[scored, index]
            sums = overlap_sums(maps >= found.best.thresholds[index], of_part)
            drawn = sums[rng.integers(0, len(sums), (RESAMPLES, len(sums)))].sum(axis=1)
            low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
            strength = np.maximum(maps - np.median(found.of_parts[self.chosen_on, index]), 0)
            parts.append(
                PartScore(
                    part,
                    f"L{found.layers[index]}/C{found.best.candidates[index]}",
                    float(sums[:, 0].sum() / sums[:, 1].sum()),
                    float(low),
                    float(high),
                    float(pointing_hits(maps, of_part).mean()),
                    energy_inside(strength, of_part),
                    limits[index],
                )
            )
        removal = self._removal(found) if self.options.whole else {}
        return MethodScore(row.maps, row.reading, found.candidates, found.effective_numbers, parts, **removal)

    def _find(self, row: _Row, logits: np.ndarray, coverage: np.ndarray) -> _Found:
        """Choose the best map of every part, and of every class the one that goes with its logit, layer by layer."""
        found: _Found | None = None
        for layer, maps_of in enumerate(row.of_layers):
            maps = maps_of()
            best = best_maps(maps[self.chosen_on], coverage[self.chosen_on])
            correlation, of_class = _going_with(maps[self.chosen_on], logits[self.chosen_on])
            here = _Found(
                best, np.full(len(best.candidates), layer), maps[:, best.candidates], maps[:, of_class], correlation
            )
            found = here if found is None else _better(found, here)
            found.effective_numbers.append(effective_number(maps[~self.chosen_on]))
            found.candidates += maps.shape[1]
        assert found is not None
        return found

    def _removal(self, found: _Found) -> dict[str, float | None]:
        some = np.flatnonzero(~self.chosen_on)[: self.options.images_removed]
        images = self.images[torch.from_numpy(some)]
        whole = logits_without(self.model, images, np.zeros((len(some), 1, *found.of_parts.shape[2:]), bool))[:, 0]
        predicted = whole.argmax(axis=1)
        deletion, insertion = removal_curves(self.model, images, found.of_classes[some, predicted])
        return {
            "deletion": float(deletion.mean()),
            "insertion": float(insertion.mean()),
            "importance": self._importance(found, some, whole, predicted),
        }

    def _importance(
        self, found: _Found, some: Int[np.ndarray, " some"], whole: np.ndarray, predicted: np.ndarray
    ) -> float | None:
        names = [part for part in self.truth.part_names if part in self.truth.without]
        if not names:
            return None
        places = [self.truth.part_names.index(part) for part in names]
        regions = found.of_parts[some][:, places] >= found.best.thresholds[places][None, :, None, None]
        net = logit_drops(self.model, self.images[torch.from_numpy(some)], regions, predicted, self.options.seed).net
        nothing = np.zeros((len(some), 1, *regions.shape[2:]), bool)
        true, shown = [], []
        for part in names:
            images = self.normalise(self.truth.without[part][some])
            logits = logits_without(self.model, images, nothing)[:, 0]
            true.append((whole - logits)[np.arange(len(some)), predicted])
            shown.append(self.truth.masks[some, self.truth.part_names.index(part)].sum(axis=(1, 2)) > 0)
        kept = np.stack(shown, axis=1)
        pairs = np.stack(true, axis=1)[kept], net[kept]
        return 0.0 if any(np.ptp(values) == 0 for values in pairs) else float(spearmanr(*pairs).statistic)

    # ---- chance --------------------------------------------------------------------------------------------------

    def _chance(self, tokens: "_Tokens", coverage: np.ndarray) -> dict[str, list[float]]:
        """Return by reading the overlap with every part that 95 % of sets of random maps do not exceed."""
        learned = explained_model(self.model, self.options.block).assignments.matrices
        rng = np.random.default_rng(self.options.seed + 1)
        limits = {}
        for kind in self.options.readings:
            overlaps = []
            for _ in range(self.options.random_draws):
                drawn = {name: random_assignment(matrix, rng) for name, matrix in learned.items()}
                overlaps.append(self._overlaps(tokens.readers(kind, drawn), coverage))
            if overlaps:
                limits[kind] = np.quantile(overlaps, 0.95, axis=0).tolist()
        return limits

    def _overlaps(self, of_layers: list[Callable[[], np.ndarray]], coverage: np.ndarray) -> Float[np.ndarray, " parts"]:
        chosen, scored = self.chosen_on, ~self.chosen_on
        best, answer = np.full(coverage.shape[1], -1.0), np.zeros(coverage.shape[1])
        for maps_of in of_layers:
            maps = maps_of()
            here = best_maps(maps[chosen], coverage[chosen])
            for part in np.flatnonzero(here.overlaps > best):
                region = maps[scored, here.candidates[part]] >= here.thresholds[part]
                intersection, union = overlap_sums(region, coverage[scored, part]).sum(axis=0)
                best[part], answer[part] = here.overlaps[part], intersection / union
        return answer

    def _without_maps(self, coverage: np.ndarray) -> MethodScore:
        """Return the row of no map at all: every patch counts alike, and patches are removed in random order."""
        scored = ~self.chosen_on
        parts = []
        for index, part in enumerate(self.truth.part_names):
            of_part = coverage[scored, index]
            share = float(of_part.mean())
            shown = of_part[of_part.sum(axis=(1, 2)) > 0]
            parts.append(PartScore(part, "", share, share, share, float(shown.mean()), share))
        some = np.flatnonzero(scored)[: self.options.images_removed]
        order = np.random.default_rng(self.options.seed).random((len(some), *coverage.shape[2:]))
        deletion, insertion = removal_curves(self.model, self.images[torch.from_numpy(some)], order)
        return MethodScore("no map", "", 0, [], parts, float(deletion.mean()), float(insertion.mean()))


class _Tokens:
    """The output tokens of all layers for all images, on disk, and how maps are read from them."""

    def __init__(self, model: nn.Module, images: Tensor, adapted: bool, folder: Path, options: ScoreOptions) -> None:
        self.folder, self.adapted = folder, adapted
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
            if "whitened" in options.readings
            else None
        )

    def of(self, name: str) -> Float[Tensor, "batch rows columns channels"]:
        return torch.from_numpy(np.asarray(self._on_disk[name]))

    def readers(self, kind: str, matrices: dict[str, Tensor]) -> list[Callable[[], np.ndarray]]:
        """Return for every layer a function to the maps that a reading of assignments gives."""
        reading = Reading(kind, statistics=self._statistics if kind == "whitened" else None)

        def reader(name: str) -> Callable[[], np.ndarray]:
            readout = reading.readout(name, matrices[name].float().cpu())
            return lambda: readout(self.of(name)).numpy()

        return [reader(name) for name in self.names]


def _going_with(
    maps: Float[np.ndarray, "batch candidates rows columns"], logits: Float[np.ndarray, "batch classes"]
) -> tuple[Float[np.ndarray, " classes"], Int[np.ndarray, " classes"]]:
    """Return for every class the largest correlation of a map's mean with the logit, and the map's number."""
    together = standardised(maps.mean(axis=(2, 3)).T) @ standardised(logits.T).T / len(maps)  # [candidates, classes]
    return together.max(axis=0), together.argmax(axis=0)


def _better(found: _Found, here: _Found) -> _Found:
    """Put what is better in a further layer into what was found before."""
    parts = here.best.overlaps > found.best.overlaps
    for array, new in (
        (found.best.candidates, here.best.candidates),
        (found.best.thresholds, here.best.thresholds),
        (found.best.overlaps, here.best.overlaps),
        (found.layers, here.layers),
    ):
        array[parts] = new[parts]
    found.of_parts[:, parts] = here.of_parts[:, parts]
    classes = here.correlation > found.correlation
    found.of_classes[:, classes], found.correlation[classes] = here.of_classes[:, classes], here.correlation[classes]
    return found
