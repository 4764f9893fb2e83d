"""The rows of `gift.families`, and where plain ViTs keep their blocks, held against models that are really built."""

import pytest
import torch
from timm.models import swin_transformer
from torch import Tensor

from gift.backbones import FAMILIES, plain_vit
from tests.test_backbones import HEIGHT_PX, TINY_SWIN, TINY_VISION, inputs_of, tiny_vit, transformers_model

TINY_PLAIN = {
    "ViTForImageClassification": ("vit", "layers", "layernorm"),
    "ViTModel": ("", "layers", "layernorm"),
    "ViTMSNForImageClassification": ("vit", "layers", "layernorm"),
    "DeiTForImageClassification": ("deit", "layers", "layernorm"),
    "IJepaForImageClassification": ("ijepa", "layers", "layernorm"),
    "Dinov2ForImageClassification": ("dinov2", "encoder.layer", "layernorm"),
    "Dinov2WithRegistersForImageClassification": ("dinov2_with_registers", "encoder.layer", "layernorm"),
}


@pytest.mark.parametrize("model_class", TINY_PLAIN)
def test_the_blocks_of_a_plain_vit_lie_between_its_tokens_and_its_norm(model_class):
    encoder, blocks, norm = TINY_PLAIN[model_class]
    model = transformers_model(model_class, **TINY_VISION)
    prefix = f"{encoder}." if encoder else ""
    found = plain_vit(model)
    assert found.blocks == (f"{prefix}{blocks}.0",)
    assert found.values == (f"{prefix}{blocks}.0.attention.v_proj",)
    assert (found.encoder, found.norm, found.width, found.is_fused) == (encoder, f"{prefix}{norm}", 24, False)
    last: list[Tensor] = []
    model.get_submodule(found.blocks[-1]).register_forward_hook(lambda *args: last.append(args[2]))
    [normed] = inputs_of(model, found.norm, torch.rand(1, 3, HEIGHT_PX, HEIGHT_PX))
    assert normed is last[0]


def test_a_timm_vit_is_plain_and_holds_the_values_in_its_fused_layer():
    found = plain_vit(tiny_vit())
    assert (found.blocks, found.values, found.norm) == (("blocks.0",), ("blocks.0.attn.qkv",), "norm")
    assert (found.encoder, found.width, found.is_fused) == ("", 24, True)


def test_a_model_of_windows_is_not_plain():
    with pytest.raises(ValueError, match=r"SwinTransformer holds timm Swin\. This method .* families: timm ViT"):
        plain_vit(swin_transformer.SwinTransformer(**TINY_SWIN))


def test_no_name_model_type_or_class_stands_in_two_rows():
    values = [value for family in FAMILIES for value in (family.name, *family.model_types, *family.timm_classes)]
    assert len(values) == len(set(values))
