"""TOAST: what a frozen ViT saw in a first pass tells its attention, in a second pass, where to look (arXiv 2305.15542).

The published numbers need a feedback path that was pre-trained on ImageNet: see `ToastConfig.feedback`. Numbers from a
random one are not those of the published method.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftConfig
from peft.utils import PeftType
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn
from torch.nn import functional

from gift.backbones import PlainViT, classification_heads, plain_vit
from gift.baselines.feedback import LORA_SCALE, MAPS, FeedbackPath, FirstPassEnds, Passes, SteeredValue
from gift.baselines.single_adapter import SingleAdapterTuner, check_flags
from gift.tuner.saving import WEIGHTS_FILES

HEAD_BIAS = -math.log(99)  # every class starts at a probability of one in a hundred


@dataclass
class ToastConfig(PeftConfig):
    """Configuration of TOAST for `peft.get_peft_model`, on the plain ViTs of `gift.backbones.plain_vit`.

    Args:
        lite: Whether the feedback path stays frozen but for LoRA (rank 4, scale 1/4), with T trained: TOAST-lite.
        feedback: Folder of the adapter of an earlier TOAST run, whose feedback path is taken over; by default a random
            one, which is not the published method.
        init_head: Whether the head starts anew: weights kaiming normal by fan-out, bias -log(99).
        reconstruct: Whether training keeps what `feedback_reconstruction` needs: to pre-train a feedback path.
        modules_to_save: Further modules to train and to store; by default the classification head, `[]` for none. Only
            the second pass passes gradients to them.
    """

    lite: bool = False
    feedback: Path | str | None = None
    init_head: bool = False
    reconstruct: bool = False
    modules_to_save: list[str] | None = None

    target_modules = None  # not an option: the places are known; PEFT asks for the attribute

    def __post_init__(self) -> None:
        """Check the options, and write the folder as a string, as JSON needs it."""
        super().__post_init__()
        self.peft_type = PeftType("TOAST")
        check_flags(self, "lite", "init_head", "reconstruct")
        self.feedback = None if self.feedback is None else str(self.feedback)
        self._is_stored = self._is_loading = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Notice that PEFT sets `inference_mode` of a stored configuration exactly when it is about to load weights."""
        super().__setattr__(name, value)
        if name == "inference_mode" and self.__dict__.get("_is_stored"):
            self._is_loading = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "ToastConfig":  # type: ignore[override]
        """Return the configuration stored in a folder or hub repository, as PEFT does."""
        config: Any = super().from_pretrained(*args, **kwargs)
        config._is_stored = True
        return config

    def feedback_to_read(self) -> Path | None:
        """Return the folder of the feedback path to take over; None if the weights of this adapter will be loaded."""
        is_loading, self._is_loading, self._is_stored = self._is_loading, False, False
        return None if is_loading or self.feedback is None else Path(self.feedback)


class ToastModel(SingleAdapterTuner):
    """PEFT's tuner for TOAST, made by `peft.get_peft_model(model, ToastConfig())`.

    Every call of the model runs it twice, the first time without gradients and only up to the final norm, also under
    Trainer and if the wrapped model is called itself. Drop path is active in both passes.
    """

    prefix: str = "toast_"
    tuner_layer_cls = (FeedbackPath, SteeredValue)  # type: ignore[assignment]
    no_merging = "it needs a second pass over every image, which costs twice the time at inference too"

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.toast_passes = Passes()

    def places(self, model: nn.Module, config: ToastConfig) -> tuple[str, ...]:
        """Return the value layers and the final norm; the feedback path to take over is read, too."""
        self.toast_vit = vit = plain_vit(model)
        _check_value_layers(model, vit)
        _check_patches_stay(model, vit)
        if config.init_head and not _linear_heads(model, config):
            raise ValueError(f"init_head needs a linear head that is trained; {type(model).__name__} has none.")
        folder = config.feedback_to_read()
        self._taken_maps = None if folder is None else read_maps(folder, len(vit.blocks), vit.width)
        return (*vit.values, vit.norm)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: ToastConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        vit = self.toast_vit
        if current_key != vit.norm:
            assert isinstance(target, nn.Linear)
            width = target.out_features // 3 if vit.is_fused else target.out_features
            block = vit.values.index(current_key)
            self._replace_module(parent, target_name, SteeredValue(target, block, width, self.toast_passes), target)
            return
        path = FeedbackPath(target, self.toast_passes)
        path.make_weights(
            adapter_name, len(vit.blocks), peft_config.lite, self.model.get_submodule(vit.values[0]).weight
        )  # type: ignore[arg-type]
        if self._taken_maps is not None:
            path.take_maps(adapter_name, self._taken_maps)
        self._taken_maps = None
        self._replace_module(parent, target_name, path, target)

    def _post_injection_hook(self, model: nn.Module, config: ToastConfig, adapter_name: str) -> None:  # type: ignore[override]
        if config.init_head:
            for wrapped in _linear_heads(model, config):
                head: Any = wrapped.modules_to_save[adapter_name]  # type: ignore[union-attr, index]
                nn.init.kaiming_normal_(head.weight, mode="fan_out")
                nn.init.constant_(head.bias, HEAD_BIAS)
        self._toast_hooks = [
            model.register_forward_pre_hook(self._run_first_pass, with_kwargs=True),
            model.register_forward_hook(self._end_call, always_call=True),
        ]

    def feedback_path(self) -> FeedbackPath:
        """Return the layer with the feedback path."""
        return self.model.get_submodule(self.toast_vit.norm)  # type: ignore[return-value]

    def _run_first_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passes, path = self.toast_passes, self.feedback_path()
        passes.leave()
        passes.inputs = []
        if not path.is_active:
            return
        _refuse_checkpointing(model)
        try:
            passes.is_first = True
            with torch.no_grad(), self._recorded_inputs():
                model.forward(*args, **kwargs)
        except FirstPassEnds:
            pass
        finally:
            passes.is_first = False
        if passes.tokens is None:
            raise ValueError(
                f"{type(model).__name__} was called but did not reach its final norm, {self.toast_vit.norm}."
            )
        passes.signals = path.signals(passes.tokens)
        passes.tokens = None

    def _end_call(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.toast_passes.leave()

    @contextmanager
    def _recorded_inputs(self) -> Iterator[None]:
        config: Any = self.peft_config[self.active_adapters[0]]
        blocks = self.toast_vit.blocks if config.reconstruct and self.training else ()
        inputs = self.toast_passes.inputs

        def record(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            inputs.extend([args[0], output] if not inputs else [output])

        handles = [self.model.get_submodule(block).register_forward_hook(record) for block in blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        while self._toast_hooks:
            self._toast_hooks.pop().remove()
        return model  # type: ignore[return-value]


def feedback_reconstruction(model: nn.Module) -> Float[Tensor, ""]:
    """Return how badly the top-down maps rebuild, from the output of every block, its input; sum of MSE over blocks.

    sum_l MSE(A_l stop(out_l), stop(in_l)), of the first pass of the last call. Add it, times 0.1, to the loss while a
    feedback path is pre-trained, after a call in training mode with `ToastConfig.reconstruct`. The tokens that were
    kept for it are freed, so it is to be had once per call.

    Raises:
        ValueError: If the model has no TOAST adapter, or nothing was kept.
    """
    tuner = next((module for module in model.modules() if isinstance(module, ToastModel)), None)
    if tuner is None:
        raise ValueError(f"{type(model).__name__} has no TOAST adapter, so there is no feedback path.")
    inputs, tuner.toast_passes.inputs = tuner.toast_passes.inputs, []
    if not inputs:
        raise ValueError(
            "No tokens were kept for the reconstruction term. Set reconstruct=True in ToastConfig, and ask once after "
            "every call in training mode."
        )
    path = tuner.feedback_path()
    inputs = [tokens.to(path.dtype) for tokens in inputs]
    terms = [
        functional.mse_loss(path.map("toast_top_down", block, after), before)
        for block, (before, after) in enumerate(pairwise(inputs))
    ]
    return torch.stack(terms).sum()


def read_maps(folder: Path, blocks: int, width: int) -> dict[str, Tensor]:
    """Return the top-down and value maps (blocks, channels, channels) of a stored TOAST adapter, with their LoRA added.

    Raises:
        ValueError: If the folder holds no such adapter, or one for another backbone.
    """
    if not any((folder / name).is_file() for name in WEIGHTS_FILES):
        raise ValueError(f"feedback must be the folder of a TOAST adapter, with {WEIGHTS_FILES[0]}; got {folder}.")
    stored = {name.rpartition(".")[2]: tensor for name, tensor in load_peft_weights(str(folder), device="cpu").items()}
    maps = {name: _with_lora(stored, name) for name in MAPS if name in stored}
    shapes = {name: tuple(tensor.shape) for name, tensor in maps.items()}
    if shapes != dict.fromkeys(MAPS, (blocks, width, width)):
        raise ValueError(
            f"{folder} holds the feedback maps {shapes or 'of no TOAST adapter'}; this backbone needs two of shape "
            f"({blocks}, {width}, {width})."
        )
    return maps


def _with_lora(stored: Mapping[str, Tensor], name: str) -> Tensor:
    if f"{name}_lora_in" not in stored:
        return stored[name]
    return stored[name] + LORA_SCALE * stored[f"{name}_lora_out"] @ stored[f"{name}_lora_in"]


def _linear_heads(model: nn.Module, config: ToastConfig) -> list[nn.Module]:
    """Return the known heads that are linear, with a bias, and trained; before and after PEFT wraps them."""
    names = [name for name in classification_heads(model) if name.endswith(tuple(config.modules_to_save or ()))]
    heads = [model.get_submodule(name) for name in names]
    return [
        head
        for head in heads
        if isinstance(getattr(head, "original_module", head), nn.Linear) and head.bias is not None
    ]


def _check_value_layers(model: nn.Module, vit: PlainViT) -> None:
    modules = dict(model.named_modules())
    for name in vit.values:
        layer = modules.get(name)
        if type(layer) is not nn.Linear:  # a quantised one is read in other ways
            found = "is not there" if layer is None else f"is {type(layer).__name__}"
            raise ValueError(
                f"TOAST adds to the values, and {name} {found}, not a plain linear layer that yields them."
            )


def _check_patches_stay(model: nn.Module, vit: PlainViT) -> None:
    dropout = getattr(model.get_submodule(vit.encoder), "patch_drop", None)
    if dropout is not None and not isinstance(dropout, nn.Identity):
        raise ValueError("Patch dropout keeps other patches in each pass of TOAST. Build the model without it.")


def _refuse_checkpointing(model: nn.Module) -> None:
    in_timm = any(getattr(module, "grad_checkpointing", False) for module in model.modules())
    in_transformers = any(
        getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules()
    )
    if torch.is_grad_enabled() and (in_timm or in_transformers):
        raise ValueError(
            "TOAST does not work with gradient checkpointing: blocks that are run again in the backward pass would not "
            "know their signals. Turn it off, and use a smaller batch."
        )
