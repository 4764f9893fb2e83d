"""Pictures of cluster maps; what they show was computed elsewhere."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure, SubFigure
from torch.nn import functional

COLOURS = "viridis"  # readable by colour-blind people and in greyscale
OPACITY = 0.9  # of the strongest response; where there is none, the image is seen in grey


@dataclass(frozen=True, eq=False)
class Sheet:
    """Images, one per row, and beside each the maps of some clusters, one per column.

    Attributes:
        title: What stands above.
        images: The images, before normalisation.
        maps: Every image's map of every column.
        ranges: Responses that are drawn dark and light, per column: one scale for all images.
        columns: What stands above each column of maps.
    """

    title: str
    images: UInt8[np.ndarray, "batch height width 3"]
    maps: Float[np.ndarray, "batch columns rows map_columns"]
    ranges: Float[np.ndarray, "columns 2"]
    columns: tuple[str, ...]


def draw_sheets(sheets: list[Sheet], path: Path) -> None:
    """Write sheets side by side into one PNG."""
    widths = [1 + len(sheet.columns) for sheet in sheets]
    height = max(len(sheet.images) for sheet in sheets)
    figure = Figure(figsize=(1.15 * sum(widths), 1.15 * height + 0.8), layout="constrained")
    parts = figure.subfigures(1, len(sheets), squeeze=False, width_ratios=widths, wspace=0.04)
    for part, sheet in zip(parts[0], sheets, strict=True):
        _draw(part, sheet)
    figure.savefig(path, dpi=130)


def _draw(figure: SubFigure, sheet: Sheet) -> None:
    figure.suptitle(sheet.title, fontsize="medium")
    rows = figure.subplots(
        len(sheet.images), 1 + len(sheet.columns), squeeze=False, subplot_kw={"xticks": [], "yticks": []}
    )
    for axes, image, maps in zip(rows, sheet.images, sheet.maps, strict=True):
        axes[0].imshow(image)
        for axis, values, (dark, light) in zip(axes[1:], maps, sheet.ranges, strict=True):
            strength = _enlarged(np.clip((values - dark) / max(light - dark, 1e-12), 0, 1), image.shape[:2])
            axis.imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=255)
            axis.imshow(strength, cmap=COLOURS, vmin=0, vmax=1, alpha=OPACITY * strength)
    for axis, name in zip(rows[0], ("image", *sheet.columns), strict=True):
        axis.set_title(name, fontsize="x-small")


def _enlarged(values: Float[np.ndarray, "rows columns"], size: tuple[int, int]) -> Float[np.ndarray, "height width"]:
    tensor = torch.from_numpy(values)[None, None]
    return functional.interpolate(tensor, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
