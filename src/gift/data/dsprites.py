"""Sprites drawn from the factors of dSprites: the tasks dsprites_loc and dsprites_ori without a download.

The factors and labels are those of dSprites and VTAB; the pixels are our own, not those of DeepMind's file: grey edges,
other proportions of the shapes. Accuracies on them can be compared with one another, not with published ones.

Shapes: square, ellipse, heart. 6 scales from 0.5 to 1, 40 orientations from 0 to 2 pi, 32 positions along each axis;
both ends are included, so that the first and the last orientation look alike, and a square repeats after a quarter.
"""

import math

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy.random import PCG64, Generator

from gift.data.images import LabelledImages

SIDE_PX = 64
FACTORS = (3, 6, 40, 32, 32)  # shapes, scales, orientations, x, y
BINS = 16

_SHAPE, _SCALE, _ORIENTATION, _X, _Y = range(5)
_SAMPLES = 3  # per axis of a pixel
_FACTOR_OF = {"dsprites_loc": _X, "dsprites_ori": _ORIENTATION}

Plane = Float[np.ndarray, "rows columns"]


def choose_sprites(count: int, seed: int) -> Int[np.ndarray, "count 5"]:
    """Return different combinations of factors in random order: shape, scale, orientation, x and y of each.

    More sprites of the same seed begin with the same ones.

    Raises:
        ValueError: If there are not so many combinations.
    """
    total = math.prod(FACTORS)
    if not 1 <= count <= total:
        raise ValueError(f"Cannot choose {count} sprites: there are {total} different ones.")
    order = Generator(PCG64(seed)).random(total).argsort(kind="stable")[:count]
    return np.stack(np.unravel_index(order, FACTORS), axis=1)


def sprite_labels(task: str, factors: Int[np.ndarray, "count 5"]) -> Int[np.ndarray, " count"]:
    """Return the label of each sprite: its x position or its orientation in 16 bins, as VTAB makes them.

    Raises:
        ValueError: If the task is neither dsprites_loc nor dsprites_ori.
    """
    if task not in _FACTOR_OF:
        raise ValueError(f"Only {' and '.join(_FACTOR_OF)} are drawn, got {task!r}.")
    return factors[:, _FACTOR_OF[task]] * BINS // FACTORS[_FACTOR_OF[task]]


def draw_sprite(factors: Int[np.ndarray, "5"]) -> UInt8[np.ndarray, "64 64"]:
    """Return a white sprite on black; a pixel at its edge is as bright as much of it is covered (9 samples)."""
    centre = [SIDE_PX / 4 + SIDE_PX / 2 * factors[axis] / (FACTORS[axis] - 1) for axis in (_X, _Y)]
    angle = 2 * math.pi * factors[_ORIENTATION] / (FACTORS[_ORIENTATION] - 1)
    size_px = SIDE_PX / 4 * (0.5 + 0.5 * factors[_SCALE] / (FACTORS[_SCALE] - 1))
    ticks = (np.arange(SIDE_PX * _SAMPLES) + 0.5) / _SAMPLES
    right, down = (ticks[None, :] - centre[0]) / size_px, (ticks[:, None] - centre[1]) / size_px
    along, across = right * math.cos(angle) + down * math.sin(angle), down * math.cos(angle) - right * math.sin(angle)
    covered = _covered(int(factors[_SHAPE]), along, across)
    samples = covered.reshape(SIDE_PX, _SAMPLES, SIDE_PX, _SAMPLES).sum(axis=(1, 3))
    return np.round(samples * (255 / _SAMPLES**2)).astype(np.uint8)


def _covered(shape: int, along: Plane, across: Plane) -> Bool[np.ndarray, "rows columns"]:
    """Return which points lie in a shape that fits into a circle of radius 1 around its middle."""
    if shape == 0:
        return np.maximum(abs(along), abs(across)) <= 0.7
    if shape == 1:
        return along**2 + (across / 0.6) ** 2 <= 1
    right, up = along / 0.73, 0.1 - across / 0.73
    return (right**2 + up**2 - 1) ** 3 <= right**2 * up**3


def draw_sprites(task: str, count: int, seed: int) -> LabelledImages:
    """Return drawn sprites as images of 64 x 64 pixels with the labels of dsprites_loc or dsprites_ori.

    No two are alike in all factors, and more of the same seed begin with the same ones: cut training, validation and
    test from one call.

    Raises:
        ValueError: If there is no such task, or there are not so many sprites.
    """
    factors = choose_sprites(count, seed)
    labels = sprite_labels(task, factors)
    pixels = np.stack([draw_sprite(one) for one in factors])[..., None].repeat(3, axis=3)
    return LabelledImages(pixels, labels, tuple(map(str, range(BINS))))
