"""Frozen weights as a generator reads them: plain, quantised, or sharded over processes.

All that a generator needs of a weight is its product with a small matrix. A quantised weight is dequantised for that
product and forgotten; the rows of a sharded weight are reduced where they lie, and only the products are gathered.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from gift.tuner.generator import reduce_weight

PARTS = ("q", "k", "v")  # the parts of a fused layer, one after the other along the output


class Stored(NamedTuple):
    """What a layer holds of its weight: the parameter, and the scales that bitsandbytes' 8-bit layers keep apart."""

    weight: Tensor
    scales: Tensor | None = None


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight of bitsandbytes (8 and 4 bit) or torchao, or one part of its rows; dequantised as PEFT does it.

    Attributes:
        stored: What the layer holds.
        shape: Rows and columns of the weight, or of the part.
        part: Which third of the rows this is; None for all.
    """

    stored: Stored
    shape: torch.Size
    part: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.stored.weight.device

    def dense(self) -> Float[Tensor, "out_features in_features"]:
        """Return the weight dequantised.

        Raises:
            NotImplementedError: If torchao cannot dequantise this kind of weight.
        """
        weight: Any = self.stored.weight
        if get_bnb_param_type(weight):
            dense = dequantize_bnb_weight(weight, state=SimpleNamespace(SCB=self.stored.scales))
        else:
            dense = weight.dequantize()
        return rows_of_part(dense.detach(), self.part)

    def times(self, matrix: Float[Tensor, "rank in_features"]) -> Float[Tensor, "out_features rank"]:
        """Return weight @ matrix^T in the matrix's dtype; no dense weight is kept for the backward pass."""
        return _QuantisedProduct.apply(self, matrix)  # type: ignore[return-value]

    def raw(self) -> list[Tensor]:
        """Return the tensors that make up the weight, as bytes where it has several, to see whether it was changed."""
        weight: Any = self.stored.weight
        if get_bnb_param_type(weight) == "4bit":
            parts = [weight.detach(), weight.quant_state.absmax]
        elif self.stored.scales is not None:
            parts = [weight.detach(), self.stored.scales]
        else:
            parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
        plain = [part for part in parts if part is not None and type(part) in (Tensor, nn.Parameter)]
        return [part.detach().contiguous().view(torch.uint8) for part in plain]


class _QuantisedProduct(torch.autograd.Function):
    """The product of a quantised weight with a matrix; the weight is dequantised again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: QuantisedWeight, matrix: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.dense().to(matrix.dtype) @ matrix.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0].T @ ctx.weight.dense().to(gradients[0].dtype)


@dataclass(frozen=True)
class ShardedWeight:
    """A weight whose rows, or for Conv1D columns, are distributed over processes (FSDP2), or one part of its rows.

    Attributes:
        weight: The distributed weight.
        part: Which third of the rows this is; None for all.
    """

    weight: DTensor
    part: str | None = None

    @property
    def shape(self) -> torch.Size:
        """Rows and columns of the whole weight, or of the part."""
        rows, columns = self.weight.shape
        return torch.Size((rows if self.part is None else rows // len(PARTS), columns))

    @property
    def device(self) -> torch.device:
        """Where this process holds its rows."""
        return self.weight.device

    def times(self, matrix: Float[Tensor, "rank in_features"]) -> Float[Tensor, "out_features rank"]:
        """Return weight @ matrix^T of all rows, in the matrix's dtype.

        Every process reduces what it holds, and (rows, rank) numbers are exchanged instead of (rows, in_features). In
        the backward pass the gradients of the products are summed over the processes, each of which then adds what its
        shard contributes. So the gradients of `matrix` differ between the processes, but their *mean*, which data
        parallelism takes anyway, is that of the whole weight.

        Raises:
            RuntimeError: If the weight is distributed along both axes.
        """
        weight, mesh = self.weight, self.weight.device_mesh
        sharded = [axis for axis, placement in enumerate(weight.placements) if placement != Replicate()]
        if len(sharded) > 1 or not all(weight.placements[axis] in (Shard(0), Shard(1)) for axis in sharded):
            raise RuntimeError(
                f"A frozen weight is distributed as {weight.placements}. GIFT reads weights that are sharded once, as "
                "by fully_shard (FSDP2): use no tensor parallelism on adapted layers."
            )
        local = weight.to_local()
        by_columns = [axis for axis in sharded if weight.placements[axis] == Shard(1)]
        for axis in by_columns:
            start = mesh.get_local_rank(axis) * -(-weight.shape[1] // mesh.size(axis))  # as torch.chunk divides
            matrix = matrix[:, start : start + local.shape[1]]
        products = reduce_weight(local, matrix).to(mesh.device_type)  # offloaded weights are on the CPU
        shape = torch.Size((weight.shape[0], matrix.shape[0]))
        placements = [Partial() if axis in by_columns else place for axis, place in enumerate(weight.placements)]
        gathered = DTensor.from_local(products, mesh, placements, run_check=False, shape=shape, stride=(shape[1], 1))
        summed = [Partial() if axis in sharded else Replicate() for axis in range(mesh.ndim)]
        return rows_of_part(gathered.full_tensor(grad_placements=summed), self.part)


def rows_of_part(rows: Float[Tensor, "out_features columns"], part: str | None) -> Float[Tensor, "_ columns"]:
    """Return the rows of one part of a fused layer as a view; all rows if `part` is None."""
    return rows if part is None else rows.chunk(len(PARTS))[PARTS.index(part)]


def join_parts(parts: Mapping[str | None, Tensor]) -> Tensor:
    """Return the rows of a whole fused layer from those of some of its parts; the others are zero."""
    zeros = torch.zeros_like(next(iter(parts.values())))
    return torch.cat([parts.get(part, zeros) for part in PARTS])


def probe_weight(weight: Float[Tensor, "out_features in_features"] | QuantisedWeight | ShardedWeight) -> Tensor | None:
    """Return one number per row of a frozen weight, which changes when an entry does (also through `.data`).

    None for a sharded weight. Of a quantised weight the stored bytes are probed, and those of their scales.
    """
    if isinstance(weight, ShardedWeight):
        return None
    if isinstance(weight, QuantisedWeight):
        return torch.cat([_probe_rows(_as_rows(part)) for part in weight.raw()])
    return _probe_rows(weight)


def _as_rows(tensor: Tensor) -> Tensor:
    """Return a tensor of any shape as rows of at most 1024 numbers, the last one filled up with zeros."""
    flat = tensor.flatten()
    return functional.pad(flat, (0, -len(flat) % min(len(flat), 1024))).view(-1, min(len(flat), 1024))


def _probe_rows(weight: Shaped[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
    """Every entry counts with a factor between 0.5 and 2.5, in float32 at least.

    A change that the probe's rounding hides is below the rounding of the layer's own product.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    phases = torch.arange(weight.shape[1], device=weight.device, dtype=torch.float32) * 12.9898
    return weight.to(dtype) @ (1.5 + phases.sin()).to(dtype)


# ---- what layers hold ------------------------------------------------------------------------------------------------


def is_quantised(layer: nn.Module) -> bool:
    """Return whether the weight of a linear layer is one of bitsandbytes or torchao."""
    weight = getattr(layer, "weight", None)
    if weight is None:
        return False
    return bool(get_bnb_param_type(weight)) or type(weight).__module__.startswith("torchao.")


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """Return out_features and in_features of a linear layer, also where its weight is stored in another shape."""
    if is_quantised(layer):
        return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
    rows, columns = layer.weight.shape  # type: ignore[union-attr, misc]
    return (int(columns), int(rows)) if isinstance(layer, Conv1D) else (int(rows), int(columns))


def refuse_layers_without_gradients(model: nn.Module) -> None:
    """Raise ValueError if a layer quantised by torchao gives no gradient to its input, which nothing else would tell.

    So do those that quantise their inputs, too (torchao 0.18). One layer of each kind is tried.
    """
    kinds: dict[str, tuple[str, Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and type(layer.weight).__module__.startswith("torchao."):
            weight: Any = layer.weight
            kinds.setdefault(f"{type(weight)} {weight.__tensor_flatten__()[1]}", (name, layer))
    for name, layer in kinds.values():
        bias_dtype = layer.weight.dtype if layer.bias is None else layer.bias.dtype
        with torch.enable_grad():
            x = torch.zeros(1, layer.in_features, device=layer.weight.device, dtype=bias_dtype, requires_grad=True)
            passes = layer(x).requires_grad
        if not passes:
            raise ValueError(
                f"{name} ({type(layer.weight).__name__}) gives no gradients to its input, so nothing before it could "
                "be trained. Quantise weights only, as Int8WeightOnlyConfig does."
            )


def stored_weight(layer: Any) -> Stored:
    """Return what a linear layer holds of its weight."""
    if get_bnb_param_type(layer.weight) != "8bit":
        return Stored(layer.weight)
    scales = layer.state.SCB  # since the layer was first called; before, its parameter has them
    return Stored(layer.weight, layer.weight.SCB if scales is None else scales)


def restore_weight(layer: Any, stored: Stored) -> None:
    """Give a quantised linear layer back what it held, bit for bit."""
    weight: Any = stored.weight.to(layer.weight.device)
    layer.weight = weight
    if stored.scales is not None:
        weight.CB, weight.SCB = weight.data, stored.scales.to(weight.device)
        layer.state.reset_grads()
        layer.state.CB = layer.state.SCB = None  # read from the parameter at the next call


def requantise(layer: Any, dense: Float[Tensor, "out_features in_features"], torchao_config: Any) -> None:
    """Quantise a weight as the layer's own is, and put it in its place, as PEFT does for LoRA.

    Args:
        layer: Linear layer of bitsandbytes or torchao.
        dense: The new weight.
        torchao_config: What transformers quantised with, for torchao.

    Raises:
        ValueError: If that is not known for a layer of torchao.
    """
    old = layer.weight
    kind = get_bnb_param_type(old)
    if not kind:
        _requantise_torchao(layer, dense, torchao_config)
        return
    bitsandbytes: Any = importlib.import_module("bitsandbytes")  # installed where there are such layers
    parameter = bitsandbytes.nn.Int8Params if kind == "8bit" else bitsandbytes.nn.Params4bit
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "module")
    options = {"has_fp16_weights": False} if kind == "8bit" else {name: getattr(old, name) for name in names}
    layer.weight = parameter(dense.to("cpu"), requires_grad=False, **options).to(old.device)
    if kind == "8bit":
        restore_weight(layer, Stored(layer.weight, layer.weight.SCB))


def stop_repacking(model: nn.Module) -> list[Any]:
    """Keep bitsandbytes from repacking 4-bit weights in the first evaluation on a CPU; return the layers concerned.

    Repacked weights (bitsandbytes 0.50, CPUs with AVX512-BF16) give no gradients to their input any more, without
    saying so, and cannot be dequantised.

    Raises:
        ValueError: If some were repacked already.
    """
    layers: list[Any] = [layer for layer in model.modules() if getattr(layer, "support_avx512bf16_for_cpu", False)]
    for layer in layers:
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                "The model was evaluated on the CPU before it was adapted, for which bitsandbytes repacked its 4-bit "
                "weights: they give no gradients any more. Load it again, and adapt it before you evaluate it."
            )
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return layers


def torchao_config(model: nn.Module) -> Any:
    """Return what transformers quantised a model with through torchao, or None."""
    config: Any = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return config.get_apply_tensor_subclass() if hasattr(config, "get_apply_tensor_subclass") else None


def _requantise_torchao(layer: nn.Module, dense: Tensor, torchao_config: Any) -> None:
    if torchao_config is None:
        raise ValueError(
            "The weights were quantised by torchao without transformers' TorchAoConfig, so it is not known how to "
            "quantise merged ones. Load the model with quantization_config=TorchAoConfig(...), or do not merge."
        )
    torchao: Any = importlib.import_module("torchao")
    layer.weight = nn.Parameter(dense, requires_grad=False)
    torchao.quantize_(layer, torchao_config)
