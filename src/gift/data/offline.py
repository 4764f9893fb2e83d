"""Two small tasks that need no download: real handwritten digits, and drawn flowers whose parts are known."""

import numpy as np
import torch
from jaxtyping import Float
from sklearn.datasets import load_digits
from torch.nn import functional

from gift.data.images import LabelledImages
from gift.data.rendered import SPECIES, RenderedFlower, RenderedFlowers


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
