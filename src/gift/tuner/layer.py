"""A frozen linear layer plus its generated residual; merge and unmerge."""

import warnings
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from gift.tuner.products import LayerFactors, adapted_linear, dense_is_faster
from gift.tuner.weights import (
    PARTS,
    QuantisedWeight,
    ShardedWeight,
    Stored,
    is_quantised,
    requantise,
    restore_weight,
    rows_of_part,
    stored_weight,
    weight_shape,
)


@runtime_checkable
class SuppliesFactors(Protocol):
    """What a layer needs of `gift.tuner.scope.FactorSource`."""

    generators: nn.ModuleDict
    torchao_config: Any

    def sharded_parameter(self, layer: "GiftLinear") -> Any:
        """Return FSDP2's record of the layer's weight, or None."""
        ...

    def factors(self, layer: "GiftLinear") -> LayerFactors:
        """Return the factors for one call of the layer."""
        ...

    def generate(
        self, layers: Sequence["GiftLinear"], adapters: Sequence[str] | None = None
    ) -> dict[str, LayerFactors]:
        """Return freshly generated factors by layer name."""
        ...

    def input_residual(self, layer: "GiftLinear", x: Tensor) -> Tensor:
        """Return what to add to the input of a layer that takes its residual there."""
        ...

    def move_generators(self, adapter: str, device: torch.device) -> None:
        """Bring the generators of an adapter to a device."""
        ...


class GiftLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer to whose weight the residual of the active adapters is added.

    The layer owns no adapter weights: the factors of its residual come from generators that live once on the
    `GiftModel` and are reached through a plain object, so that nothing is registered or stored twice.

    Args:
        base_layer: The frozen `nn.Linear`, also one that bitsandbytes or torchao quantised, or transformers `Conv1D`
            (whose stored weight is transposed).
        name: Dotted name of the layer in the wrapped model.
        source: Where the factors come from.
    """

    adapter_layer_names: tuple[str, ...] = ("gift_generators",)
    other_param_names: tuple[str, ...] = ("gift_parts", "gift_scaling", "gift_default_scaling", "gift_apply")

    def __init__(self, base_layer: nn.Module, name: str, source: SuppliesFactors) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.gift_name = name
        self.gift_source = source
        self.gift_parts: dict[str, tuple[str | None, ...]] = {}
        self.gift_scaling: dict[str, float | int] = {}
        self.gift_default_scaling: dict[str, float | int] = {}
        self.gift_apply: dict[str, str] = {}
        self.cast_input_dtype_enabled = True  # PEFT's helper switches it; the input is never cast here
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.gift_original_weight: Tensor | None
        self.register_buffer("gift_original_weight", None, persistent=False)
        self.gift_original_stored: Stored | None = None  # of a quantised layer that is merged
        self.is_transposed = isinstance(base_layer, Conv1D)
        self.is_quantised = is_quantised(base_layer)
        self.out_features, self.in_features = weight_shape(base_layer)

    def add_adapter(self, adapter_name: str, parts: tuple[str | None, ...], scaling: float | int, apply: str) -> None:
        """Let the adapter change this layer, or only the given parts of a fused layer."""
        self.gift_parts[adapter_name] = parts
        self.gift_scaling[adapter_name] = self.gift_default_scaling[adapter_name] = scaling
        self.gift_apply[adapter_name] = apply

    @property
    def gift_generators(self) -> nn.ModuleDict:
        """The generators of all adapters, which PEFT switches, trains and deletes through any layer; not registered."""
        return self.gift_source.generators

    def _get_available_adapters(self) -> set[str]:
        return set(self.gift_parts)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        self.gift_source.move_generators(adapter_name, device or self.weight.device)

    @property
    def adapters_in_effect(self) -> list[str]:
        """The active adapters that change this layer's output now; none while disabled or merged."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.gift_parts]

    def set_scale(self, adapter_name: str, scale: float | int) -> None:
        """Multiply the configured scaling of an adapter by `scale`; calling it again starts from the configured one."""
        if adapter_name in self.gift_scaling:
            self.gift_scaling[adapter_name] = scale * self.gift_default_scaling[adapter_name]

    def frozen_weight(
        self, part: str | None = None
    ) -> Float[Tensor, "rows in_features"] | QuantisedWeight | ShardedWeight:
        """Return the original weight, or its rows for one part of a fused layer, as a view; also while merged.

        Raises:
            RuntimeError: If the weight is not there, because it was flattened, gathered elsewhere or offloaded.
        """
        record = self.gift_source.sharded_parameter(self)
        if self.is_quantised:
            self._check_still_quantised(record is not None)
            rows = self.out_features if part is None else self.out_features // len(PARTS)
            stored = self.gift_original_stored or stored_weight(self.base_layer)
            return QuantisedWeight(stored, torch.Size((rows, self.in_features)), part)
        original = self.gift_original_weight
        # The gathered weight of a sharded block is freed before the generator's backward pass reads it again.
        current = self.weight if record is None else record.sharded_param
        weight = (current if original is None else original).detach()
        if weight.is_meta and hasattr(self.base_layer, "_hf_hook"):
            raise RuntimeError(
                f"The weight of {self.gift_name} is offloaded (by cpu_offload, or a device_map with 'cpu' or 'disk'): "
                "between calls it lies where a generator cannot read it. Load the model without, or quantise it."
            )
        weight = weight.T if self.is_transposed else weight
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise RuntimeError(
                f"The weight of {self.gift_name} has shape {tuple(weight.shape)} instead of "
                f"{(self.out_features, self.in_features)}: FSDP1 and DeepSpeed ZeRO-3 keep frozen weights where a "
                "generator cannot read them. Use FSDP2 (fully_shard, or fsdp_version 2 in accelerate) or DDP."
            )
        if isinstance(weight, DTensor):
            return ShardedWeight(weight, part)
        return rows_of_part(weight, part)

    def _check_still_quantised(self, is_sharded: bool) -> None:
        if is_sharded or isinstance(self.base_layer.weight, DTensor):
            raise RuntimeError(
                f"{self.gift_name} is quantised and sharded over processes, which GIFT cannot read. Use DDP for "
                "quantised backbones."
            )
        if self.gift_original_stored is None and not is_quantised(self.base_layer):
            raise RuntimeError(
                f"The weight of {self.gift_name} is not quantised any more, as after pickling or torch.load of a whole "
                "model. Load the backbone, then the adapter with PeftModel.from_pretrained."
            )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the scaled residual of one adapter in the layout of the stored weight and the generator's dtype.

        Raises:
            ValueError: If the adapter does not change this layer.
        """
        if adapter not in self.gift_parts:
            raise ValueError(
                f"Adapter {adapter!r} does not adapt {self.gift_name}; there is {sorted(self.gift_parts)}."
            )
        factors = self.gift_source.generate([self], [adapter])[self.gift_name]
        residual = factors.left @ factors.right
        return residual.T if self.is_transposed else residual

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether PEFT can convert the residual, a matrix of low rank; it knows no parts of fused layers."""
        return all(part is None for parts in self.gift_parts.values() for part in parts)

    # ---- forward -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output for `x` (..., in_features), with the residuals of the adapters in effect."""
        if self.disable_adapters and self.merged:
            self._refuse_to_unmerge_while_exported()
            self.unmerge()
        adapters = self.adapters_in_effect
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        if self.acts_on_input:
            return self.base_layer(x + self.gift_source.input_residual(self, x), *args, **kwargs)
        factors = self.gift_source.factors(self)
        left = factors.left.to(device=x.device, dtype=x.dtype)
        right = factors.right.to(device=x.device, dtype=x.dtype)
        if args or kwargs or not self._is_plain(x):
            return self.base_layer(x, *args, **kwargs) + functional.linear(functional.linear(x, right), left)
        weight = self.weight.T if self.is_transposed else self.weight
        if self._may_be_dense(adapters) and factors.reusable and not torch.is_grad_enabled():
            return functional.linear(x, self._dense_weight(factors, weight), self.bias)
        dense = self._may_be_dense(adapters) and self._is_dense(adapters, x.numel() // x.shape[-1])
        return adapted_linear(x, weight, self.bias, left, right, dense)

    @property
    def acts_on_input(self) -> bool:
        """Whether x W^T + x dW^T is computed as (x + x psi^T phi^T) W^T, for which W need not be dequantised."""
        return self.is_quantised and all(
            self.gift_parts[name] == (None,) and all(one.is_input_map for one in self._generators_of(name))
            for name in self.adapters_in_effect
        )

    def _generators_of(self, adapter: str) -> list[Any]:
        return list(self.gift_generators[adapter].children())

    def _is_plain(self, x: Tensor) -> bool:
        """Return whether the frozen product can be computed here, without calling the base layer.

        Not under autocast (which casts per operation), not when somebody hooked or replaced the base layer's forward,
        not for sharded or otherwise special weights, and not when the weight itself is trained.
        """
        base = self.base_layer
        return (
            type(base) in (nn.Linear, Conv1D)
            and type(base.weight) in (nn.Parameter, Tensor)
            and not base.weight.requires_grad
            and base.weight.dtype == x.dtype
            and not (x.is_meta or torch.is_autocast_enabled(x.device.type))
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
            and not (base._backward_pre_hooks or _has_any_global_hook() or "forward" in base.__dict__)
        )

    def _may_be_dense(self, adapters: list[str]) -> bool:
        """Return whether W + dW may be formed: never in half precision, which would round small residuals away."""
        factored = any(self.gift_apply[name] == "factored" for name in adapters)
        return not factored and self.weight.dtype in (torch.float32, torch.float64)

    def _is_dense(self, adapters: list[str], tokens: int) -> bool:
        if any(self.gift_apply[name] == "dense" for name in adapters):
            return True
        # An exported program serves batches of any size, and must not hold the choice for one of them.
        return not torch.compiler.is_exporting() and dense_is_faster(tokens, self.out_features)

    def _refuse_to_unmerge_while_exported(self) -> None:
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "The adapters are merged and disabled, so the original weights would have to be restored while the "
                "model is being exported. Call unmerge_adapter() first."
            )

    def _dense_weight(self, factors: LayerFactors, weight: Tensor) -> Tensor:
        """Return W + dW, formed once for factors that are kept."""
        if factors.dense is None:
            with torch.inference_mode(False), torch.no_grad():
                factors.dense = _add_residual(weight.detach(), factors)
        return factors.dense

    # ---- merging -------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the residuals of the adapters to the stored weight; the original is kept for `unmerge`.

        Every residual is generated from the original weight, also when adapters are merged in separate calls.

        Args:
            safe_merge: Whether to refuse a result with NaN or infinite entries.
            adapter_names: Adapters to merge; by default the active ones.

        Raises:
            ValueError: If the weight is computed from others, or, with `safe_merge`, the merged one would not be
                finite; this layer stays as it was.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.gift_parts]
        if not new:
            return
        if "weight" not in self.base_layer._parameters:
            raise ValueError(
                f"The weight of {self.gift_name} is computed from others (weight_norm, spectral_norm or the like), so "
                "nothing can be merged into it. Make it a plain weight first: unload the adapter, call "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), and load the adapter again."
            )
        merged = self._merged_weight([*self.merged_adapters, *new])
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"Merging {new} into {self.gift_name} gives NaN or infinite weights: not merged.")
        if self.is_quantised:
            self._merge_quantised(merged)
            self.merged_adapters.extend(new)
            return
        stored = self.weight.data
        if self.gift_original_weight is None:
            self.gift_original_weight = stored.clone()
        stored.copy_(merged.T if self.is_transposed else merged)
        self.merged_adapters.extend(new)

    @torch.no_grad()
    def _merged_weight(self, adapters: list[str]) -> Float[Tensor, "out_features in_features"]:
        weight = self.frozen_weight()
        if isinstance(weight, ShardedWeight):
            raise RuntimeError(
                f"The weight of {self.gift_name} is sharded over processes, so nothing was merged. Save the adapter, "
                "load it onto the backbone in one process, and merge there."
            )
        factors = self.gift_source.generate([self], adapters)[self.gift_name]
        return _add_residual(weight.dense() if isinstance(weight, QuantisedWeight) else weight, factors)

    def _merge_quantised(self, merged: Float[Tensor, "out_features in_features"]) -> None:
        original = self.gift_original_stored or stored_weight(self.base_layer)
        warnings.warn(
            "Merging quantises the merged weights again, which rounds the residual: outputs differ from those of the "
            "unmerged adapter.",
            stacklevel=2,
        )
        requantise(self.base_layer, merged, self.gift_source.torchao_config)
        self.gift_original_stored = original

    def unmerge(self) -> None:
        """Restore the original weight bit for bit, whatever was merged."""
        if self.gift_original_stored is not None:
            restore_weight(self.base_layer, self.gift_original_stored)
            self.gift_original_stored = None
            self.merged_adapters.clear()
        if self.gift_original_weight is None:
            return
        stored = self.weight.data
        if isinstance(stored, DTensor) and not isinstance(self.gift_original_weight, DTensor):
            raise RuntimeError(
                f"{self.gift_name} was merged before it was sharded, so its original weight cannot be restored. Load "
                "the backbone and the adapter again, or unmerge before fully_shard."
            )
        stored.copy_(self.gift_original_weight)
        self.gift_original_weight = None
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "gift." + super().__repr__()


def _add_residual(
    weight: Float[Tensor, "out_features in_features"], factors: LayerFactors
) -> Float[Tensor, "out_features in_features"]:
    """Return W + dW in the dtype of W, added in at least float32."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    left, right = (factor.to(device=weight.device, dtype=dtype) for factor in (factors.left, factors.right))
    return torch.addmm(weight.to(dtype), left, right).to(weight.dtype)
