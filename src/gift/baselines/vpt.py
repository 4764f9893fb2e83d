"""VPT, visual prompt tuning: learned tokens beside the patches of a frozen ViT (arXiv 2203.12119).

Shallow prompts enter before the first block and leave behind the last one; deep prompts are new in every block, and
what a block makes of them is dropped. Head, pooling and final norm never see them.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, PeftType
from timm.layers.config import use_reentrant_ckpt
from torch import Tensor, nn

from gift.backbones import patch_size, plain_vit, prefix_tokens
from gift.baselines.single_adapter import SingleAdapterTuner, check_flags
from gift.tuner.options import check_number


@dataclass
class VptConfig(PeftConfig):
    """Configuration of VPT for `peft.get_peft_model`, on the plain ViTs of `gift.backbones.plain_vit`.

    Args:
        num_prompts: Prompt tokens p (per block if `deep`); they stand behind the class token and its like.
        deep: Whether every block has prompts of its own (L p C weights) or only the first (p C).
        modules_to_save: Further modules to train and to store; by default the classification head, `[]` for none.

    Raises:
        ValueError: If an option does not make sense.
    """

    num_prompts: int = 5
    deep: bool = True
    modules_to_save: list[str] | None = None

    target_modules = None  # not an option: the places are known; PEFT asks for the attribute

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.peft_type = PeftType("VPT")
        check_number("num_prompts", self.num_prompts, smallest=1, whole=True)
        check_flags(self, "deep")


class VptBlock(nn.Module, BaseTunerLayer):
    """A frozen block that may be given prompts, and behind which they may be dropped.

    Args:
        base_layer: The block, from tokens (batch, tokens, channels) to tokens.
        place: Number of tokens before the prompts.
        inserted: Prompt tokens that it is given.
        dropped: Prompt tokens that leave behind it.
    """

    adapter_layer_names = ("vpt_prompts",)

    def __init__(self, base_layer: nn.Module, place: int, inserted: int, dropped: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.vpt_place, self.vpt_inserted, self.vpt_dropped = place, inserted, dropped
        self.vpt_prompts = nn.ParameterDict()
        self.merged_adapters = []

    def make_prompts(self, adapter_name: str, width: int, bound: float) -> None:
        """Give the block prompts of this many channels, uniform between plus and minus `bound`."""
        like = next(self.base_layer.parameters())
        prompts = torch.empty(self.vpt_inserted, width, device=like.device, dtype=like.dtype)
        self.vpt_prompts[adapter_name] = nn.Parameter(nn.init.uniform_(prompts, -bound, bound))

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        like = next(base_layer.parameters())  # a block has no weight of its own, by which PEFT would tell
        return like.device, like.dtype

    def forward(
        self, tokens: Float[Tensor, "batch tokens channels"], *args: Any, **kwargs: Any
    ) -> Float[Tensor, "batch all_tokens channels"]:
        """Return what the block makes of the tokens and its prompts.

        Raises:
            ValueError: If there is an attention mask, which was made for the tokens without prompts.
        """
        if self.disable_adapters or not self.active_adapters:
            return self.base_layer(tokens, *args, **kwargs)
        # Not every keyword is for the block: Trainer's `num_items_in_batch` comes here, too.
        masks = [*args, kwargs.get("attention_mask"), kwargs.get("attn_mask")]
        if any(isinstance(mask, Tensor) for mask in masks):
            raise ValueError("VPT adds tokens, so an attention mask does not fit them. Call the model without a mask.")
        place = self.vpt_place
        if self.vpt_inserted:
            prompts = self.vpt_prompts[self.active_adapters[0]].to(tokens.dtype).expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens[:, :place], prompts, tokens[:, place:]], dim=1)
        tokens = self.base_layer(tokens, *args, **kwargs)
        if self.vpt_dropped:
            tokens = torch.cat([tokens[:, :place], tokens[:, place + self.vpt_dropped :]], dim=1)
        return tokens


class VptModel(SingleAdapterTuner):
    """PEFT's tuner for VPT, made by `peft.get_peft_model(model, VptConfig())`.

    While training, the encoder stays in eval mode (no dropout, no drop path), as in the original. Hidden states
    that are asked for hold the prompts (timm cannot lay out those of shallow ones). Gradient checkpointing works, but
    for timm's reentrant form, which is refused.
    """

    prefix: str = "vpt_"
    tuner_layer_cls = VptBlock
    no_merging = "prompts are tokens of their own, which cost their share of time at inference too"

    def places(self, model: nn.Module, config: VptConfig) -> tuple[str, ...]:
        """Return the blocks that are given prompts or behind which prompts leave."""
        self.vpt_vit = plain_vit(model)
        blocks = self.vpt_vit.blocks
        return blocks if config.deep else (blocks[0], blocks[-1])

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: VptConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        blocks, count = self.vpt_vit.blocks, peft_config.num_prompts
        inserted = count if peft_config.deep or current_key == blocks[0] else 0
        dropped = count if peft_config.deep or current_key == blocks[-1] else 0
        wrapped = VptBlock(target, prefix_tokens(self.model), inserted, dropped)
        if inserted:
            rows, columns = patch_size(self.model)
            wrapped.make_prompts(
                adapter_name, self.vpt_vit.width, math.sqrt(6 / (3 * rows * columns + self.vpt_vit.width))
            )
        self._replace_module(parent, target_name, wrapped, target)

    def train(self, mode: bool = True) -> "VptModel":
        """Set the mode of the head and of the blocks themselves; everything inside the encoder stays in eval mode.

        Raises:
            ValueError: If reentrant checkpointing would lose the gradients of the prompts.
        """
        super().train(mode)
        encoder = self.model.get_submodule(self.vpt_vit.encoder)
        if mode and getattr(encoder, "grad_checkpointing", False) and use_reentrant_ckpt():
            raise ValueError(
                "Reentrant checkpointing would pass no gradients to the prompts, since the tokens that enter the "
                "checkpointed blocks need none. Call timm.layers.set_reentrant_ckpt(False)."
            )
        wrappers = [module for module in encoder.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        trained = {module for wrapper in wrappers for module in wrapper.modules()}
        # A block of transformers checkpoints only if it is itself in training mode; its dropout is in its children.
        blocks = {
            module for block in encoder.modules() if isinstance(block, VptBlock) for module in (block, block.base_layer)
        }
        for module in set(encoder.modules()) - trained - blocks - {encoder}:
            module.training = False
        return self
