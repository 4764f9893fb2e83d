"""How good cluster maps are, beside controls: every row of the table has maps of the same images and as many of them.

Maps are chosen on one half of the images and scored on the other, with one threshold per map for all images.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr
from torch import Tensor, nn

from gift.backbones import patch_grid
from gift.data.parts import PartImages
from gift.explain.removal import logit_drops, logits_without, patch_of_grid, removal_curves
from gift.explain.rows import CHOSEN_ON, LayerMaps, Row, ScoreOptions, StoredTokens, random_assignments, rows_of
from gift.explain.scores import (
    BestMaps,
    best_maps,
    effective_number,
    energy_inside,
    maps_of_classes,
    overlap_sums,
    pointing_hits,
)

RESAMPLES = 1000
IMAGES_TO_CHOOSE_ON, STEPS_TO_CHOOSE_ON = 10, 5  # the map in whose order patches are removed


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

    def orders(self, predicted: Int[np.ndarray, " batch"]) -> list[Float[np.ndarray, "batch rows columns"]]:
        """Return the maps in whose order patches may be removed."""
        of_class = self.of_classes[np.arange(len(predicted)), predicted]
        return [*np.moveaxis(self.of_parts, 1, 0), of_class]


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
                adapted: StoredTokens(self.model, self.images, adapted, Path(folder), self.options.readings)
                for adapted in (True, False)
            }
            coverage = self.coverage(tokens[True].grid)
            chance = self._chance(tokens[True], coverage)
            rows = [
                self._score(row, tokens[True].logits, coverage, chance)
                for row in rows_of(self.model, self.images, tokens, self.options)
            ]
        return [*rows, self._without_maps(coverage)] if self.options.whole else rows

    @property
    def chosen_on(self) -> Bool[np.ndarray, " batch"]:
        """The images that maps are chosen on; they are scored on the others."""
        chosen = np.zeros(len(self.truth), bool)
        chosen[CHOSEN_ON] = True
        return chosen

    def coverage(self, grid: tuple[int, int]) -> Float[np.ndarray, "batch parts rows columns"]:
        """Return the share of every patch that each part covers."""
        return self.truth.coverage(patch_of_grid(self.model, self.images, grid), grid)

    # ---- scores --------------------------------------------------------------------------------------------------

    def _score(self, row: Row, logits: np.ndarray, coverage: np.ndarray, chance: dict[str, list[float]]) -> MethodScore:
        found = self._find(row, logits, coverage)
        limits = chance.get(row.reading)
        scored = ~self.chosen_on
        rng = np.random.default_rng(self.options.seed)
        parts = []
        for index, part in enumerate(self.truth.part_names):
            maps, of_part = found.of_parts[scored, index], coverage[scored, index]
            sums = overlap_sums(maps >= found.best.thresholds[index], of_part)
            drawn = sums[rng.integers(0, len(sums), (RESAMPLES, len(sums)))].sum(axis=1)
            low, high = np.quantile(_overlap(drawn), (0.025, 0.975))
            strength = np.maximum(maps - np.median(found.of_parts[self.chosen_on, index]), 0)
            parts.append(
                PartScore(
                    part,
                    f"L{found.layers[index]}/C{found.best.candidates[index]}",
                    float(_overlap(sums.sum(axis=0, keepdims=True))[0]),
                    float(low),
                    float(high),
                    _mean(pointing_hits(maps, of_part)),
                    energy_inside(strength, of_part),
                    None if limits is None else limits[index],
                )
            )
        removal = self._removal(found) if self.options.whole else {}
        return MethodScore(row.maps, row.reading, found.candidates, found.effective_numbers, parts, **removal)

    def _find(self, row: Row, logits: np.ndarray, coverage: np.ndarray) -> _Found:
        """Choose the best map of every part, and of every class the one that goes with its logit, layer by layer."""
        found: _Found | None = None
        for layer, maps_of in enumerate(row.of_layers):
            maps = maps_of()
            best = best_maps(maps[self.chosen_on], coverage[self.chosen_on])
            correlation, of_class = maps_of_classes(maps[self.chosen_on], logits[self.chosen_on])
            here = _Found(
                best, np.full(len(best.candidates), layer), maps[:, best.candidates], maps[:, of_class], correlation
            )
            found = here if found is None else _better(found, here)
            found.effective_numbers.append(effective_number(maps[~self.chosen_on]))
            found.candidates += maps.shape[1]
        assert found is not None
        return found

    def _removal(self, found: _Found) -> dict[str, float | None]:
        """Remove patches in the order of the map that does this best on images that maps are chosen on.

        It is one of those chosen for parts, or that which goes with the predicted class.
        """
        chosen, scored = (
            np.flatnonzero(half)[: self.options.images_removed] for half in (self.chosen_on, ~self.chosen_on)
        )
        some = chosen[:IMAGES_TO_CHOOSE_ON]
        orders = found.orders(self._logits.argmax(axis=1))
        areas = [self._areas(maps, some, STEPS_TO_CHOOSE_ON) for maps in orders]
        best = int(np.argmax([insertion - deletion for deletion, insertion in areas]))
        deletion, insertion = self._areas(orders[best], scored)
        return {"deletion": deletion, "insertion": insertion, "importance": self._importance(found, scored)}

    def _areas(
        self, maps: Float[np.ndarray, "batch rows columns"], some: Int[np.ndarray, " some"], steps: int = 10
    ) -> tuple[float, float]:
        deletion, insertion = removal_curves(self.model, self.images[torch.from_numpy(some)], maps[some], steps)
        return float(deletion.mean()), float(insertion.mean())

    @cached_property
    def _logits(self) -> Float[np.ndarray, "batch classes"]:
        return self._logits_of(self.images)

    def _logits_of(self, images: Tensor) -> Float[np.ndarray, "batch classes"]:
        rows, columns = patch_grid(self.model, images.shape[2], images.shape[3])
        return logits_without(self.model, images, np.zeros((len(images), 1, rows, columns), bool))[:, 0]

    @cached_property
    def _true_importance(self) -> dict[str, Float[np.ndarray, " scored"]]:
        """By part how far the predicted logit falls when it is not drawn, in images that patches are removed of."""
        some = np.flatnonzero(~self.chosen_on)[: self.options.images_removed]
        whole, places = self._logits[some], np.arange(len(some))
        predicted = whole.argmax(axis=1)
        drawn = {part: self._logits_of(self.normalise(pixels[some])) for part, pixels in self.truth.without.items()}
        return {part: (whole - logits)[places, predicted] for part, logits in drawn.items()}

    def _importance(self, found: _Found, some: Int[np.ndarray, " scored"]) -> float | None:
        true = self._true_importance
        places = [index for index, part in enumerate(self.truth.part_names) if part in true]
        if not places:
            return None
        regions = found.of_parts[some][:, places] >= found.best.thresholds[places][None, :, None, None]
        net = logit_drops(self.model, self.images[torch.from_numpy(some)], regions, seed=self.options.seed).net
        shown = self.truth.masks[some][:, places].sum(axis=(2, 3)) > 0
        pairs = np.stack([true[self.truth.part_names[place]] for place in places], axis=1)[shown], net[shown]
        if any(np.ptp(values) == 0 for values in pairs):
            return 0.0
        correlation: Any = spearmanr(*pairs)
        return float(correlation.statistic)

    # ---- chance --------------------------------------------------------------------------------------------------

    def _chance(self, tokens: StoredTokens, coverage: np.ndarray) -> dict[str, list[float]]:
        """Return by reading the overlap with every part that 95 % of sets of random maps do not exceed."""
        rng = np.random.default_rng(self.options.seed + 1)
        limits = {}
        for kind in self.options.readings:
            overlaps = []
            for _ in range(self.options.random_draws):
                drawn = random_assignments(self.model, self.options, rng)
                overlaps.append(self._overlaps(tokens.readers(kind, drawn), coverage))
            if overlaps:
                limits[kind] = np.quantile(overlaps, 0.95, axis=0).tolist()
        return limits

    def _overlaps(self, of_layers: list[LayerMaps], coverage: np.ndarray) -> Float[np.ndarray, " parts"]:
        chosen, scored = self.chosen_on, ~self.chosen_on
        best, answer = np.full(coverage.shape[1], -1.0), np.zeros(coverage.shape[1])
        for maps_of in of_layers:
            maps = maps_of()
            here = best_maps(maps[chosen], coverage[chosen])
            for part in np.flatnonzero(here.overlaps > best):
                region = maps[scored, here.candidates[part]] >= here.thresholds[part]
                overlap = _overlap(overlap_sums(region, coverage[scored, part]).sum(axis=0, keepdims=True))
                best[part], answer[part] = here.overlaps[part], overlap[0]
        return answer

    def _without_maps(self, coverage: np.ndarray) -> MethodScore:
        """Return the row of no map at all: every patch counts alike, and patches are removed in random order."""
        scored = ~self.chosen_on
        parts = []
        for index, part in enumerate(self.truth.part_names):
            of_part = coverage[scored, index]
            share = float(of_part.mean())
            shown = of_part[of_part.sum(axis=(1, 2)) > 0]
            parts.append(PartScore(part, "", share, share, share, _mean(shown), share))
        some = np.flatnonzero(scored)[: self.options.images_removed]
        order = np.random.default_rng(self.options.seed).random((len(some), *coverage.shape[2:]))
        deletion, insertion = removal_curves(self.model, self.images[torch.from_numpy(some)], order)
        return MethodScore("no map", "", 0, [], parts, float(deletion.mean()), float(insertion.mean()))


def _overlap(sums: Float[np.ndarray, "samples 2"]) -> Float[np.ndarray, " samples"]:
    """Return intersection over union; 0 where both are empty."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-12)


def _mean(values: np.ndarray) -> float:
    """Return the mean; 0 of nothing, where no image shows a part."""
    return float(values.mean()) if values.size else 0.0


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
