"""The feedback path of TOAST: tokens of the first pass in, a signal for the values of every block out.

Glossary (symbol: word): xi: selection, T: channels, A_l: top-down maps, B_l: value maps, z: feedback, t_l: signal.
Source: TOAST (arXiv 2305.15542), section 3.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

INITIAL_STD = 0.02  # of the top-down and value maps before they are pre-trained
LORA_RANK = 4
LORA_SCALE = 1 / 4
MAPS = ("toast_top_down", "toast_value")
PARTS = ("lora_in", "lora_out")


class Passes:
    """What the layers of one model share during a call: which pass it is, and the signals for the second one."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []  # of every block, then the output of the last, where a loss needs them
        self.leave()

    def leave(self) -> None:
        """Forget the call, except what was recorded for `feedback_reconstruction`."""
        self.is_first = False
        self.tokens: Tensor | None = None
        self.signals: list[Tensor] | None = None


class FirstPassEnds(Exception):
    """No error: it leaves the first pass behind the final norm, since the head is not needed."""


class FeedbackPath(nn.Module, BaseTunerLayer):
    """The final norm of a frozen ViT, and the path that leads from its tokens back to every block.

    Args:
        base_layer: The norm.
        passes: What it shares with the value layers.
    """

    adapter_layer_names = (
        "toast_selection",
        "toast_channels",
        *MAPS,
        *(f"{name}_{part}" for name in MAPS for part in PARTS),
    )

    def __init__(self, base_layer: nn.Module, passes: Passes) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.toast_passes = passes
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.merged_adapters = []

    def make_weights(self, adapter: str, blocks: int, lite: bool, like: Tensor) -> None:
        """Make the weights of an adapter: selection from N(0, 1), maps truncated normal, and if `lite` T = 1 and LoRA.

        Args:
            adapter: Name of the adapter.
            blocks: Number of blocks.
            lite: Whether the maps stay frozen, with LoRA on each, and T is trained.
            like: A frozen weight (rows, channels), for width, dtype and device.
        """
        width = like.shape[1]

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, device=like.device, dtype=like.dtype)

        weights = {"toast_selection": nn.init.normal_(empty(width))}
        for name in MAPS:
            weights[name] = nn.init.trunc_normal_(empty(blocks, width, width), std=INITIAL_STD)
        if lite:
            weights["toast_channels"] = nn.init.eye_(empty(width, width))
            for name in MAPS:
                # As torch's own linear layers: uniform within 1 / sqrt(width).
                bound = 1 / math.sqrt(width)
                weights[f"{name}_lora_in"] = nn.init.uniform_(empty(blocks, LORA_RANK, width), -bound, bound)
                weights[f"{name}_lora_out"] = nn.init.zeros_(empty(blocks, width, LORA_RANK))
            self.frozen_peft_weight_names = {adapter: MAPS}
        for name, weight in weights.items():
            getattr(self, name)[adapter] = nn.Parameter(weight, requires_grad=not (lite and name in MAPS))

    @torch.no_grad()
    def take_maps(self, adapter: str, maps: Mapping[str, Float[Tensor, "blocks channels channels"]]) -> None:
        """Take over top-down and value maps, by name."""
        for name in MAPS:
            getattr(self, name)[adapter].copy_(maps[name])

    def forward(self, tokens: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
        """Return the normed tokens; in the first pass they are kept and `FirstPassEnds` is raised.

        Raises:
            ValueError: If this is no part of a call of the whole model.
        """
        tokens = self.base_layer(tokens)
        if self.toast_passes.is_first:
            self.toast_passes.tokens = tokens
            raise FirstPassEnds
        if self.is_active:
            _check_inside_call(self.toast_passes)
        return tokens

    @property
    def is_active(self) -> bool:
        """Whether there is an adapter in effect."""
        return not self.disable_adapters and bool(self.active_adapters)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the feedback is computed."""
        weight = self._weight("toast_selection")
        assert weight is not None
        return weight.dtype

    def signals(self, tokens: Float[Tensor, "batch tokens channels"]) -> list[Float[Tensor, "batch tokens channels"]]:
        """Return the signal for every block, the first block's first.

        s_n = clamp(cos(x_n, xi), 0, 1), z_L = s x T; z_l = A_l z_{l+1} and t_l = B_l z_l from the last block down.
        """
        selection = self._weight("toast_selection")
        assert selection is not None
        tokens = tokens.to(self.dtype)
        feedback = tokens * functional.cosine_similarity(tokens, selection, dim=-1).clamp(0, 1)[..., None]
        channels = self._weight("toast_channels")
        if channels is not None:
            feedback = feedback @ channels
        signals = []
        for block in reversed(range(len(self.toast_top_down[self.active_adapters[0]]))):  # type: ignore[arg-type]
            feedback = self.map("toast_top_down", block, feedback)
            signals.append(self.map("toast_value", block, feedback))
        return signals[::-1]

    def map(
        self, name: str, block: int, tokens: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch tokens channels"]:
        """Return the tokens mapped by one of the `MAPS` of a block, with its LoRA where there is one."""
        weight, down, up = (self._weight(part) for part in (name, f"{name}_lora_in", f"{name}_lora_out"))
        assert weight is not None
        mapped = functional.linear(tokens, weight[block])
        if down is None or up is None:
            return mapped
        return mapped + LORA_SCALE * functional.linear(functional.linear(tokens, down[block]), up[block])

    def _weight(self, name: str) -> Tensor | None:
        return getattr(self, name).get(self.active_adapters[0])


class SteeredValue(nn.Module, BaseTunerLayer):
    """A frozen layer that yields values, to which it adds, in the second pass, what it makes of the block's signal.

    Args:
        base_layer: Linear layer whose output ends with the values.
        block: Index of its block.
        width: Number of outputs that are values.
        passes: What it shares with the feedback path.
    """

    def __init__(self, base_layer: nn.Linear, block: int, width: int, passes: Passes) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.toast_block, self.toast_width, self.toast_passes = block, width, passes
        self.merged_adapters = []

    def forward(self, tokens: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens out_features"]:
        """Return the layer's output, its values v as v + W_v t + b_v: the signal t has no layer norm.

        Raises:
            ValueError: If this is no part of a call of the whole model.
        """
        output = self.base_layer(tokens)
        if self.disable_adapters or not self.active_adapters or self.toast_passes.is_first:
            return output
        signal = _check_inside_call(self.toast_passes)[self.toast_block].to(tokens.dtype)
        weight, bias = self.base_layer.weight, self.base_layer.bias
        values = functional.linear(
            signal, weight[-self.toast_width :], None if bias is None else bias[-self.toast_width :]
        )
        return output + functional.pad(values, (output.shape[-1] - self.toast_width, 0))


def _check_inside_call(passes: Passes) -> list[Tensor]:
    if passes.signals is None:
        raise ValueError(
            "A part of a model with TOAST was called by itself, so there was no first pass. Call the whole model, or "
            "use disable_adapter()."
        )
    return passes.signals
