"""Pictures of cluster maps; what they show was computed elsewhere."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.nn import functional

from gift.tuner.options import check_choice

# The first two are readable by colour-blind people and in greyscale; `jet` is not, but is what the paper shows.
COLOURS = ("viridis", "cividis", "jet")
OPACITY = 0.9  # of the strongest response; where there is none, the image is seen in grey


@dataclass(frozen=True)
class Look:
    """How maps are laid over pictures.

    Attributes:
        colours: `viridis` or `cividis`, readable by colour-blind people and in greyscale, or `jet`, as in the paper.
        opacity: Of the strongest response, from 0 to 1; weaker ones are laid over in proportion.
        threshold: Strength, from 0 to 1, below which nothing is laid over.

    Raises:
        ValueError: If there are no such colours, or a number lies elsewhere.
    """

    colours: str = COLOURS[0]
    opacity: float | int = OPACITY
    threshold: float | int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        check_choice("colours", self.colours, COLOURS)
        for name in ("opacity", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} lies between 0 and 1, got {getattr(self, name)}.")


@dataclass(frozen=True, eq=False)
class Sheet:
    """Images, one per row, and beside each the maps of some clusters, one per column.

    Attributes:
        title: What stands above.
        images: The images, before normalisation.
        maps: Every image's map of every column.
        ranges: Responses that are drawn dark and light, per column: one scale for all images.
        columns: What stands above each column of maps.
        rows: What stands beside each image; nothing by default.
    """

    title: str
    images: UInt8[np.ndarray, "batch height width 3"]
    maps: Float[np.ndarray, "batch columns rows map_columns"]
    ranges: Float[np.ndarray, "columns 2"]
    columns: tuple[str, ...]
    rows: tuple[str, ...] = ()


def overlay(
    image: UInt8[np.ndarray, "height width 3"], strength: Float[np.ndarray, "rows columns"], look: Look | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """Return an image in grey with a map laid over it.

    Args:
        image: The image.
        strength: Of the response in every patch: 0 is drawn dark, 1 and more light.
        look: How it is drawn.
    """
    look = look or Look()
    enlarged = _enlarged(np.clip(strength, 0, 1).astype(np.float64), image.shape[:2])
    colours = 255 * colormaps[look.colours](enlarged)[..., :3]
    opacity = (look.opacity * enlarged * (enlarged >= look.threshold))[..., None]
    return np.rint((1 - opacity) * image.mean(axis=2, keepdims=True) + opacity * colours).astype(np.uint8)


def label_overlay(
    image: UInt8[np.ndarray, "height width 3"],
    labels: UInt8[np.ndarray, "height_px width_px"],
    palette: UInt8[np.ndarray, "labels 3"],
    opacity: float | int = 0.6,
) -> UInt8[np.ndarray, "height width 3"]:
    """Return an image in grey under the colours of its labels; those may be given for fewer pixels."""
    rows, columns = (
        np.arange(length) * own // length for length, own in zip(image.shape[:2], labels.shape, strict=True)
    )
    colours = palette[labels[np.ix_(rows, columns)]]
    return np.rint((1 - opacity) * image.mean(axis=2, keepdims=True) + opacity * colours).astype(np.uint8)


def draw_sheets(sheets: list[Sheet], path: Path, look: Look | None = None) -> None:
    """Write sheets side by side into one PNG."""
    widths = [1 + len(sheet.columns) for sheet in sheets]
    height = max(len(sheet.images) for sheet in sheets)
    figure = Figure(figsize=(1.15 * sum(widths), 1.15 * height + 0.8), layout="constrained")
    parts = figure.subplots(1, len(sheets), squeeze=False, width_ratios=widths)
    for axes, sheet in zip(parts[0], sheets, strict=True):
        _draw(axes, sheet, look)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # it shows a box
        figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.05)


def _draw(axes: Axes, sheet: Sheet, look: Look | None) -> None:
    """Draw a sheet as one picture of tiles, which takes a tenth of the time of one picture per tile."""
    height, width = sheet.images.shape[1:3]
    gap = max(1, width // 24)
    mosaic = np.full((len(sheet.images), 1 + len(sheet.columns), height + gap, width + gap, 3), 255, np.uint8)
    for tiles, image, maps in zip(mosaic, sheet.images, sheet.maps, strict=True):
        tiles[0, :height, :width] = image
        for tile, values, (dark, light) in zip(tiles[1:], maps, sheet.ranges, strict=True):
            tile[:height, :width] = overlay(image, (values - dark) / max(light - dark, 1e-12), look)
    rows, columns = mosaic.shape[:2]
    joined = mosaic.swapaxes(1, 2).reshape(rows * (height + gap), columns * (width + gap), 3)
    axes.imshow(joined[:-gap, :-gap])
    words: dict[str, Any] = {"parse_math": False}  # a dollar is a dollar
    axes.set_title(sheet.title, fontsize="medium", **words)
    axes.xaxis.tick_top()
    across, down = (np.arange(count) * (side + gap) + side / 2 for count, side in ((columns, width), (rows, height)))
    axes.set_xticks(across, ("image", *sheet.columns), fontsize="x-small", **words)
    axes.set_yticks(down, sheet.rows or [""] * rows, fontsize="x-small", **words)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _enlarged(values: Float[np.ndarray, "rows columns"], size: tuple[int, int]) -> Float[np.ndarray, "height width"]:
    tensor = torch.from_numpy(values)[None, None]
    return functional.interpolate(tensor, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
