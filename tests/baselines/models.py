"""Tiny plain ViTs of every family, and what they compute, written out block by block."""

import copy

import timm
import torch
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    IJepaConfig,
    IJepaForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
TIMM_SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HEADS = 2


def _timm(**changes):
    return lambda: timm.create_model("vit_tiny_patch16_224", **(TIMM_SIZES | {"num_classes": 5} | changes))


def _wrapped():
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=5, model_args=TIMM_SIZES)
    return TimmWrapperForImageClassification(config)


def _transformers(config_class, model_class, **changes):
    return lambda: model_class(config_class(**(SIZES | {"num_labels": 5} | changes)))


# name -> how to build it, number of prefix tokens
FAMILIES = {
    "timm": (_timm(), 1),
    "timm with registers and scales": (_timm(reg_tokens=3, init_values=0.5, qkv_bias=False), 4),
    "timm without class token": (_timm(class_token=False, global_pool="avg", fc_norm=True), 0),
    "timm with attention pooling": (_timm(class_token=False, global_pool="map"), 0),
    "timm distilled": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **TIMM_SIZES, num_classes=5), 2),
    "timm in transformers": (_wrapped, 1),
    "ViT": (_transformers(ViTConfig, ViTForImageClassification, intermediate_size=64), 1),
    "DeiT": (_transformers(DeiTConfig, DeiTForImageClassification, intermediate_size=64), 2),
    "I-JEPA": (_transformers(IJepaConfig, IJepaForImageClassification, intermediate_size=64), 0),
    "DINOv2": (_transformers(Dinov2Config, Dinov2ForImageClassification), 1),
    "DINOv2 with registers": (
        _transformers(Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification, num_register_tokens=3),
        4,
    ),
}


def make_family(name, dtype=torch.float64):
    """Return a model of a family in eval mode, whose biases, scales and tokens are not zero."""
    torch.manual_seed(0)
    model = FAMILIES[name][0]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_float64_images(batch=2):
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def logits_of(output):
    return output if isinstance(output, torch.Tensor) else output.logits


class WrittenOut:
    """A frozen copy of a model, taken apart: tokens, blocks and head as formulas."""

    def __init__(self, model):
        model = copy.deepcopy(model)
        self.model = getattr(model, "timm_model", model)
        self.is_timm = hasattr(self.model, "blocks")
        self.encoder = self.model if self.is_timm else self.model.base_model
        if self.is_timm:
            self.blocks, self.norm = self.encoder.blocks, self.encoder.norm
        else:
            self.norm = self.encoder.layernorm
            self.blocks = getattr(self.encoder, "layers", None) or self.encoder.encoder.layer

    def tokens(self, images):
        if self.is_timm:
            return self.encoder.norm_pre(self.encoder._pos_embed(self.encoder.patch_embed(images)))
        return self.encoder.embeddings(images)

    def qkv(self, block, tokens):
        if self.is_timm:
            return block.attn.qkv(tokens).chunk(3, dim=-1)
        attention = block.attention
        return attention.q_proj(tokens), attention.k_proj(tokens), attention.v_proj(tokens)

    def block(self, block, tokens, signal=None):
        def child(*names):
            return next((getattr(block, name) for name in names if hasattr(block, name)), nn.Identity())

        query, key, value = self.qkv(block, child("norm1", "layernorm_before")(tokens))
        if signal is not None:
            value = value + self.qkv(block, signal)[2]
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query, key, value))
        weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(dim=-1)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        mixed = block.attn.proj(mixed) if self.is_timm else block.attention.o_proj(mixed)
        tokens = tokens + child("ls1", "layer_scale1")(mixed)
        return tokens + child("ls2", "layer_scale2")(block.mlp(child("norm2", "layernorm_after")(tokens)))

    def head(self, tokens):
        normed = self.norm(tokens)
        if self.is_timm:
            return self.model.forward_head(normed)
        if "Dinov2" in type(self.model).__name__:
            prefix = 1 + getattr(self.model.config, "num_register_tokens", 0)
            return self.model.classifier(torch.cat([normed[:, 0], normed[:, prefix:].mean(dim=1)], dim=-1))
        if "IJepa" in type(self.model).__name__:
            return self.model.classifier(normed.mean(dim=1))
        return self.model.classifier(normed[:, 0])
