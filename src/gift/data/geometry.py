"""How an image becomes what a backbone takes: resized, cropped, flipped, normalised."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from gift.data.decoding import MAX_PIXELS, as_rgb
from gift.tuner.options import check_choice, check_number

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
RESIZES = ("crop", "squash")
AUGMENTATIONS = ("none", "flip", "crop-flip", "resized-crop-flip")
_ATTEMPTS = 10  # to find a crop that lies in the image, as RandomResizedCrop of torchvision has it

Pixels = UInt8[Tensor, "3 rows columns"]
Square = UInt8[Tensor, "3 side side"]


@dataclass(frozen=True)
class Geometry:
    """How an image becomes what a backbone takes.

    Args:
        size_px: Side of the square images in pixels.
        mean: Of every channel, of pixels from 0 to 1.
        std: Of every channel.
        interpolation: `bicubic` or `bilinear`.
        resize: `crop`: the shorter side is resized to 8/7 of `size_px` (256 for 224) and the middle cut out. `squash`:
            both sides are resized to `size_px`.
        augment: Of training images. `none`; `flip`: half of them are mirrored; `crop-flip`: and cut out anywhere, for
            which `squash` resizes to 8/7 too; `resized-crop-flip`: and of 8 to 100 % of the area of the resized image
            with sides from 3:4 to 4:3.

    Raises:
        ValueError: If there is no such choice, or a number makes no sense.
    """

    size_px: int
    mean: tuple[float | int, ...]
    std: tuple[float | int, ...]
    interpolation: str = "bicubic"
    resize: str = "crop"
    augment: str = "crop-flip"

    def __post_init__(self) -> None:
        check_number("size_px", self.size_px, smallest=1, whole=True)
        check_choice("interpolation", self.interpolation, tuple(FILTERS))
        check_choice("resize", self.resize, RESIZES)
        check_choice("augment", self.augment, AUGMENTATIONS)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not np.all(np.isfinite(values)) or min(self.std, default=0) <= 0:
                raise ValueError(f"{name} must be three numbers, those of std above 0, got {values}.")

    @property
    def resized_px(self) -> int:
        """The shorter side of an image before the crop."""
        return round(self.size_px * 8 / 7)


class Preparation:
    """The steps from a decoded image to what a backbone takes; all that is random comes after `kept`.

    Args:
        geometry: What to do.
        train: Whether the images are augmented.
    """

    def __init__(self, geometry: Geometry, train: bool) -> None:
        self.geometry, self.augment = geometry, geometry.augment if train else "none"
        self.crops = self.augment in ("crop-flip", "resized-crop-flip")
        scale = torch.tensor(geometry.std, dtype=torch.float64).reciprocal()[:, None, None]
        self.factor = (scale / 255).float()
        self.offset = (torch.tensor(geometry.mean, dtype=torch.float64)[:, None, None] * scale).float()

    def resized_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the width and height to which an image of a width and height is resized."""
        if self.geometry.resize == "squash":
            side = self.geometry.resized_px if self.crops else self.geometry.size_px
            return side, side
        side, shorter = self.geometry.resized_px, min(size)
        # As torchvision rounds.
        return int(side * size[0] / shorter), int(side * size[1] / shorter)

    def kept_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the width and height of what `kept` returns of an image of a width and height.

        Raises:
            ValueError: If resizing it would take too much memory, as it is far longer than wide.
        """
        width, height = self.resized_size(size)
        if width * height > MAX_PIXELS:
            raise ValueError(f"is too long: {size[0]} x {size[1]} pixels would be resized to {width} x {height}.")
        return (width, height) if self.crops else (self.geometry.size_px, self.geometry.size_px)

    def kept(self, image: Image.Image) -> Pixels:
        """Return all of an image that its random crops may show, resized.

        Raises:
            ValueError: If that would take too much memory.
        """
        self.kept_size(image.size)
        resized = as_rgb(image).resize(self.resized_size(image.size), FILTERS[self.geometry.interpolation])
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        if not self.crops:
            side = self.geometry.size_px
            top, left = (round((length - side) / 2) for length in pixels.shape[1:])  # as torchvision's CenterCrop
            pixels = pixels[:, top : top + side, left : left + side]
        return pixels.contiguous()

    def augmented(self, pixels: Pixels) -> Square:
        """Return one random version of what `kept` returned; randomness comes from torch's global generator."""
        if self.augment == "none":
            return pixels
        flip, *place = torch.rand(3 if self.augment == "crop-flip" else 1).tolist()
        if self.augment == "crop-flip":
            side = self.geometry.size_px
            top, left = (int(share * (it - side + 1)) for share, it in zip(place, pixels.shape[1:], strict=True))
            pixels = pixels[:, top : top + side, left : left + side]
        elif self.augment == "resized-crop-flip":
            pixels = self._resized_crop(pixels)
        return pixels.flip(-1) if flip < 0.5 else pixels

    def normalised(self, pixels: Shaped[Tensor, "*batch 3 rows columns"]) -> Float[Tensor, "*batch 3 rows columns"]:
        """Return pixels from 0 to 255 scaled to 0..1, less the mean, by the standard deviation."""
        return pixels.float().mul_(self.factor).sub_(self.offset)

    def _resized_crop(self, pixels: Pixels) -> Square:
        """Return a square resized from a random part of the image."""
        size, interpolation = [self.geometry.size_px] * 2, functional.InterpolationMode(self.geometry.interpolation)
        top, left, height, width = _random_part(*pixels.shape[1:])
        return functional.resized_crop(pixels, top, left, height, width, size, interpolation, antialias=True)


def _random_part(rows: int, columns: int) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random part; the middle square, if ten random ones do not fit."""
    for area, shape, down, right in torch.rand(_ATTEMPTS, 4).tolist():
        covered, ratio = rows * columns * (0.08 + 0.92 * area), (4 / 3) ** (2 * shape - 1)
        height, width = round((covered / ratio) ** 0.5), round((covered * ratio) ** 0.5)
        if 0 < height <= rows and 0 < width <= columns:
            return int(down * (rows - height + 1)), int(right * (columns - width + 1)), height, width
    side = min(rows, columns)
    return (rows - side) // 2, (columns - side) // 2, side, side
