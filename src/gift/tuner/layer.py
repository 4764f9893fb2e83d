"""A frozen linear layer plus its generated residual; merge and unmerge."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from gift.tuner.products import LayerFactors, adapted_linear, dense_is_faster

PARTS = ("q", "k", "v")  # the parts of a fused layer, one after the other along the output


@runtime_checkable
class SuppliesFactors(Protocol):
    """What a layer needs of `gift.tuner.scope.FactorSource`."""

    generators: nn.ModuleDict

    def factors(self, layer: "GiftLinear") -> LayerFactors:
        """Return the factors for one call of the layer."""
        ...

    def generate(
        self, layers: Sequence["GiftLinear"], adapters: Sequence[str] | None = None
    ) -> dict[str, LayerFactors]:
        """Return freshly generated factors by layer name."""
        ...

    def move_generators(self, adapter: str, device: torch.device) -> None:
        """Bring the generators of an adapter to a device."""
        ...


class GiftLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer to whose weight the residual of the active adapters is added.

    The layer owns no adapter weights: the factors of its residual come from generators that live once on the
    `GiftModel` and are reached through a plain object, so that nothing is registered or stored twice.

    Args:
        base_layer: The frozen `nn.Linear` or transformers `Conv1D` (whose stored weight is transposed).
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
        self.is_transposed = isinstance(base_layer, Conv1D)
        rows = base_layer.weight.shape[1 if self.is_transposed else 0]  # type: ignore[union-attr]
        self.out_features, self.in_features = int(rows), int(base_layer.weight.numel() // rows)  # type: ignore

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

    def frozen_weight(self, part: str | None = None) -> Float[Tensor, "rows in_features"]:
        """Return the original weight, or its rows for one part of a fused layer, as a view; also while merged."""
        original = self.gift_original_weight
        weight = (self.weight if original is None else original).detach()
        weight = weight.T if self.is_transposed else weight
        return weight if part is None else weight.chunk(len(PARTS))[PARTS.index(part)]

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
            self.unmerge()
        adapters = self.adapters_in_effect
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
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
            and not torch.is_autocast_enabled(x.device.type)
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
        return dense_is_faster(tokens, self.out_features)

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
            ValueError: With `safe_merge`, if the merged weight would not be finite; this layer stays as it was.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.gift_parts]
        if not new:
            return
        merged = self._merged_weight([*self.merged_adapters, *new])
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"Merging {new} into {self.gift_name} gives NaN or infinite weights: not merged.")
        stored = self.weight.data
        if self.gift_original_weight is None:
            self.gift_original_weight = stored.clone()
        stored.copy_(merged.T if self.is_transposed else merged)
        self.merged_adapters.extend(new)

    @torch.no_grad()
    def _merged_weight(self, adapters: list[str]) -> Float[Tensor, "out_features in_features"]:
        factors = self.gift_source.generate([self], adapters)[self.gift_name]
        return _add_residual(self.frozen_weight(), factors)

    def unmerge(self) -> None:
        """Restore the original weight bit for bit, whatever was merged."""
        if self.gift_original_weight is None:
            return
        stored = self.weight.data
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
