"""Linear layers quantised by bitsandbytes and torchao, which are imported where they are used: only some have them."""

from collections.abc import Callable

import torch
from torch import nn


def to_bitsandbytes(layer: nn.Linear, bits: int) -> nn.Module:
    import bitsandbytes  # noqa: PLC0415 - only some have it

    sizes = (layer.in_features, layer.out_features)
    if bits == 8:
        new = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    else:
        new = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
    new.load_state_dict(layer.state_dict())
    return new.to("cpu").requires_grad_(False)


def to_torchao(layer: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # noqa: PLC0415 - only some have it

    quantize_(layer.requires_grad_(False), Int8WeightOnlyConfig())
    return layer


QUANTISE: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bitsandbytes, 8 bit": lambda layer: to_bitsandbytes(layer, 8),
    "bitsandbytes, 4 bit": lambda layer: to_bitsandbytes(layer, 4),
    "torchao, int8 weights": to_torchao,
}
