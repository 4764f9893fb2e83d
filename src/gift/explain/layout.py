"""Where the output tokens of a layer lie in the image."""

import re
from collections.abc import Iterable
from typing import Any

from jaxtyping import Shaped
from torch import Tensor, nn

from gift.backbones import find_family, patch_grid, prefix_tokens

# A layer of a hierarchical model: the stage, the block, and what the layer is called in it.
_PLACE = re.compile(r"^(?P<block>(?:.*\.)?layers\.(?P<stage>\d+)\.blocks\.\d+)\.(?P<layer>.+)$")


class TokenLayout:
    """Lay the output tokens of named layers of one model out on the patch grid, for images of one size.

    In hierarchical models (Swin) the grid halves from stage to stage. Tokens of later stages are brought to the finest
    grid among the layers: each is repeated over the patches it was merged from.

    Args:
        model: A model that holds one known image backbone.
        layers: Dotted names of the layers in `model`.
        height: Of the images, in pixels.
        width: Of the images, in pixels.

    Attributes:
        grid: Rows and columns of the finest grid.

    Raises:
        ValueError: If the model is not a known backbone of image patches.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str], height: int, width: int) -> None:
        self._model = model
        self._prefix = prefix_tokens(model)
        self._first_grid = patch_grid(model, height, width)
        found = find_family(model)
        assert found is not None  # or there would be no grid
        self._family = found[1]
        self._stages = {name: self._stage(name) for name in layers}
        self._finest = min(self._stages.values())
        self.grid = self._grid_of(self._finest)

    def _stage(self, name: str) -> int:
        place = _PLACE.match(name) if self._family.hierarchical else None
        return 0 if place is None else int(place["stage"])

    def _grid_of(self, stage: int) -> tuple[int, int]:
        rows, columns = (-(-size // 2**stage) for size in self._first_grid)
        return rows, columns

    def lay_out(
        self, name: str, output: Shaped[Tensor, "*tokens channels"], batch: int
    ) -> Shaped[Tensor, "batch rows columns channels"]:
        """Return the tokens of a layer's output at their places in the images, without prefix tokens.

        Raises:
            ValueError: If the output does not hold one token per patch.
        """
        rows, columns = grid = self._grid_of(self._stages[name])
        place = _PLACE.match(name) if self._family.hierarchical else None
        if place is not None and place["layer"].startswith(("attn.", "attention.")):
            tokens = self._from_windows(output, self._model.get_submodule(place["block"]), batch, grid)
        elif output.ndim == 4 and output.shape[:3] == (batch, rows, columns):
            tokens = output
        elif output.ndim == 3 and output.shape[:2] == (batch, self._prefix + rows * columns):
            tokens = output[:, self._prefix :].unflatten(1, grid)
        else:
            raise ValueError(
                f"{name} gave an output of shape {tuple(output.shape)} for {batch} images of {rows} x {columns} "
                f"patches after {self._prefix} prefix tokens: it does not see every patch once, so it has no maps."
            )
        factor = 2 ** (self._stages[name] - self._finest)
        return _enlarged(tokens, factor)[:, : self.grid[0], : self.grid[1]]

    def _from_windows(
        self, output: Shaped[Tensor, "windows tokens channels"], block: Any, batch: int, grid: tuple[int, int]
    ) -> Shaped[Tensor, "batch rows columns channels"]:
        """Return the grid whose windows, row by row and image by image, the attention of a block sees."""
        (rows, columns), (height, width), shifts = grid, _pair(block.window_size), _pair(block.shift_size)
        down, across = -(-rows // height), -(-columns // width)
        windows = output.reshape(batch, down, across, height, width, output.shape[-1])
        tokens = windows.transpose(2, 3).reshape(batch, down * height, across * width, output.shape[-1])
        if self._family.pads_before_shift:
            return tokens.roll(shifts, dims=(1, 2))[:, :rows, :columns]
        return tokens[:, :rows, :columns].roll(shifts, dims=(1, 2))


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _enlarged(tokens: Tensor, factor: int) -> Tensor:
    return tokens if factor == 1 else tokens.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
