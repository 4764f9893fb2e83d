"""Tiny models and adapters that several tests use."""

from itertools import pairwise

import timm
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from gift import GiftConfig


def make_vit(seed=0, **changes):
    """Return a plain timm ViT with 2 blocks of width 32, for 32 px images and 5 classes, in eval mode."""
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | changes)).eval()


def make_images(batch=2, seed=1):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def perturb(model, adapter="default", std=0.1, seed=2):
    """Move the generators and the head of an adapter away from their start, so that its residual is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"gift_generators.{adapter}." in name or f"modules_to_save.{adapter}." in name:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def make_adapted_vit(seed=0, dtype=None, **options):
    """Return an adapted tiny ViT in eval mode whose residuals are not zero."""
    backbone = make_vit(seed) if dtype is None else make_vit(seed).to(dtype)
    return perturb(get_peft_model(backbone, GiftConfig(**({"r": 4, "num_clusters": 6} | options)))).eval()


class Chain(nn.Module):
    """Linear layers (or Conv1D with the same weights) one after the other, with a GELU between them."""

    def __init__(self, widths=(6, 10, 6), transposed=False):
        super().__init__()
        layers = [nn.Linear(*pair) for pair in pairwise(widths)]
        self.layers = nn.ModuleList(_transpose(layer) if transposed else layer for layer in layers)

    def forward(self, x):
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))
        return x


def _transpose(linear):
    layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight.data = linear.weight.data.T.contiguous()
    layer.bias.data = linear.bias.data.clone()
    return layer
