"""Small tasks that need no download: real handwritten digits, drawn flowers whose parts are known, drawn sprites."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from sklearn.datasets import load_digits
from torch.nn import functional

from gift.data.dsprites import FACTORS, SIDE_PX, choose_sprites, draw_sprite, sprite_labels
from gift.data.images import LabelledImages
from gift.data.rendered import SPECIES, RenderedFlower, RenderedFlowers, draw_flower

Example = tuple[np.ndarray, int]  # an image of bytes, grey or RGB, and its label


@dataclass(frozen=True)
class OfflineTask:
    """Where the images of a benchmark task come from that needs no source.

    Attributes:
        examples: Gives so many images of 64 x 64 pixels for a seed; more of the same seed begin with the same ones.
        available: How many there are, for training, validation and testing together.
        note: What a user should know of them.
    """

    examples: Callable[[int, int], Iterator[Example]]
    available: int
    note: str


def read_digits(image_size_px: int) -> LabelledImages:
    """Return scikit-learn's 1797 handwritten digits (8 x 8 pixels, 17 greys), enlarged bilinearly, in its order.

    They were written by 13 people (UCI, "Optical recognition of handwritten digits", its test set).
    """
    values, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(np.asarray(values)).reshape(-1, 1, 8, 8) * (255 / 16)
    large = functional.interpolate(small, size=image_size_px, mode="bilinear", align_corners=False)
    pixels = large.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    return LabelledImages(pixels.contiguous().numpy(), np.asarray(labels), tuple("0123456789"))


def draw_flowers(count: int, seed: int, image_size_px: int) -> tuple[LabelledImages, list[RenderedFlower]]:
    """Return drawn flowers of all species, as images and as they were drawn; sets of different seeds share no scene."""
    flowers = list(map(RenderedFlowers(count, seed, image_size_px).__getitem__, range(count)))
    pixels, labels = np.stack([flower.image for flower in flowers]), np.array([flower.label for flower in flowers])
    return LabelledImages(pixels, labels, tuple(species.name for species in SPECIES)), flowers


def part_coverage(
    flowers: list[RenderedFlower], grid: tuple[int, int]
) -> Float[np.ndarray, "flowers parts rows columns"]:
    """Return the share of every patch that each of `gift.data.rendered.PARTS` covers, from 0 to 1.

    Args:
        flowers: Drawn flowers of one size, a multiple of the grid.
        grid: Rows and columns of patches.
    """
    coverage = np.stack([flower.coverage for flower in flowers]).astype(np.float64)
    batch, parts, height, width = coverage.shape
    patches = coverage.reshape(batch, parts, grid[0], height // grid[0], grid[1], width // grid[1])
    return patches.mean(axis=(3, 5)) / coverage.sum(axis=1).max()


def _take_digits(count: int, seed: int) -> Iterator[Example]:
    """Return the first digits of the source, whatever the seed."""
    digits = read_digits(SIDE_PX)
    return zip(digits.pixels[:count, :, :, 0], digits.labels[:count].tolist(), strict=True)


def _take_flowers(count: int, seed: int) -> Iterator[Example]:
    """Yield flowers in the scenes of `RenderedFlowers`, the species in turn: there they depend on the count."""
    for index in range(count):
        flower = draw_flower(index % len(SPECIES), (seed << 32) + index, SIDE_PX)
        yield flower.image, flower.label


def _take_sprites(task: str, count: int, seed: int) -> Iterator[Example]:
    factors = choose_sprites(count, seed)
    return zip(map(draw_sprite, factors), sprite_labels(task, factors).tolist(), strict=True)


# 59 % of the digits have the nearest one of their class within 140 places, as many as a writer wrote; by chance 15 %.
_DIGITS_NOTE = (
    "The parts follow one another in the order of the source, whatever the seed. The digits of a writer seem to lie "
    "together in it: most of those for testing are then by other people than those for training."
)
_FLOWERS_NOTE = (
    "Drawn by gift.data.rendered: no scene twice, the species in turn. Species: "
    f"{', '.join(f'{number} {species.name}' for number, species in enumerate(SPECIES))}."
)
_SPRITES_NOTE = "Our own sprites, not DeepMind's file; see gift.data.dsprites."

OFFLINE_TASKS: dict[str, OfflineTask] = {
    "dsprites_loc": OfflineTask(partial(_take_sprites, "dsprites_loc"), math.prod(FACTORS), _SPRITES_NOTE),
    "dsprites_ori": OfflineTask(partial(_take_sprites, "dsprites_ori"), math.prod(FACTORS), _SPRITES_NOTE),
    "digits": OfflineTask(_take_digits, 1797, _DIGITS_NOTE),
    "rendered_flowers": OfflineTask(_take_flowers, 1 << 32, _FLOWERS_NOTE),
}
