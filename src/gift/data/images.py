"""Labelled images in memory, and what a model is fed with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images of one size in RGB, their classes, and the names of the classes."""

    pixels: UInt8[np.ndarray, "images rows columns 3"]
    labels: Int[np.ndarray, " images"]
    class_names: tuple[str, ...]

    def __getitem__(self, chosen: slice) -> "LabelledImages":
        return LabelledImages(self.pixels[chosen], self.labels[chosen], self.class_names)


class NormalisedImages(Dataset[dict[str, Any]]):
    """What `gift.finetune` trains on: pixels scaled to 0..1, less the mean, by the standard deviation of a channel.

    Args:
        images: The images.
        mean: Of every channel.
        std: Of every channel.
    """

    def __init__(self, images: LabelledImages, mean: Sequence[float], std: Sequence[float]) -> None:
        scaled = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).float() / 255
        offset, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self.pixel_values: Float[Tensor, "images 3 rows columns"] = (scaled - offset) / scale
        self.labels = images.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}
