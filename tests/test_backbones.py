"""Every fact of `gift.backbones` is held against models that are really built, on the meta device for names."""

from collections.abc import Callable

import peft
import pytest
import timm
import torch
import transformers
from timm.models import beit, deit, eva, swin_transformer, swin_transformer_v2, vision_transformer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gift.backbones import (
    classification_heads,
    default_targets,
    find_family,
    fused_parts,
    patch_grid,
    prefix_tokens,
    reads_weight_directly,
)

DEPTH = 2
HEIGHT_PX, WIDTH_PX, PATCH_PX = 32, 48, 8


def in_blocks(template: str, depth: int = DEPTH) -> list[str]:
    return [template.format(block) for block in range(depth)]


def in_stages(template: str, depths: tuple[int, ...]) -> list[str]:
    return [template.format(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]


TIMM_BLOCKS = in_blocks("blocks.{}.attn.proj", 12)
SWIN_BLOCKS = in_stages("layers.{}.blocks.{}.attn.proj", (2, 2, 6, 2))
# architecture -> layers that the default targets must hit, heads; the sizes are timm's own.
TIMM_MODELS = {
    "vit_tiny_patch16_224": (TIMM_BLOCKS, ["head"]),
    "vit_tiny_r_s16_p8_224": (TIMM_BLOCKS, ["head"]),
    "vit_relpos_small_patch16_224": (TIMM_BLOCKS, ["head"]),
    "vit_base_patch16_xp_224": (in_blocks("blocks.{}.attn_out_proj", 12), ["head"]),
    "vit_small_patch16_18x2_224": (in_stages("blocks.{}.attns.{}.attn.proj", (2,) * 18), ["head"]),
    "deit_tiny_patch16_224": (TIMM_BLOCKS, ["head"]),
    "deit_tiny_distilled_patch16_224": (TIMM_BLOCKS, ["head", "head_dist"]),
    "deit3_small_patch16_224": (TIMM_BLOCKS, ["head"]),
    "vit_small_patch14_dinov2": (TIMM_BLOCKS, []),
    "vit_small_patch14_reg4_dinov2": (TIMM_BLOCKS, []),
    "vit_base_patch16_clip_224": (TIMM_BLOCKS, ["head"]),
    "vit_base_patch16_siglip_224": (TIMM_BLOCKS, []),
    "vit_base_patch16_siglip_gap_224": (TIMM_BLOCKS, []),
    "eva02_tiny_patch14_224": (TIMM_BLOCKS, []),
    "vit_small_patch16_dinov3": (TIMM_BLOCKS, []),
    "beit_base_patch16_224": (TIMM_BLOCKS, ["head"]),
    "beitv2_base_patch16_224": (TIMM_BLOCKS, ["head"]),
    "beit3_base_patch16_224": (TIMM_BLOCKS, ["head"]),
    "swin_tiny_patch4_window7_224": (SWIN_BLOCKS, ["head.fc"]),
    "swinv2_tiny_window8_256": (SWIN_BLOCKS, ["head.fc"]),
}

TOWER = "encoder.layers.{}.self_attn.out_proj"
BERT = "encoder.layer.{}.attention.output.dense"
LLAMA = "model.layers.{}.self_attn.o_proj"
GPT2 = "transformer.h.{}.attn.c_proj"
# model class -> heads, then the names of the layers that the default targets must hit, in two blocks each.
TRANSFORMERS_MODELS = {
    "ViTForImageClassification": (["classifier"], "vit.layers.{}.attention.o_proj"),
    "ViTMSNForImageClassification": (["classifier"], "vit.layers.{}.attention.o_proj"),
    "ViTMAEForPreTraining": ([], "vit.layers.{}.attention.o_proj", "decoder.decoder_layers.{}.attention.o_proj"),
    "IJepaForImageClassification": (["classifier"], "ijepa.layers.{}.attention.o_proj"),
    "DeiTForImageClassification": (["classifier"], "deit.layers.{}.attention.o_proj"),
    "DeiTForImageClassificationWithTeacher": (
        ["cls_classifier", "distillation_classifier"],
        "deit.layers.{}.attention.o_proj",
    ),
    "BeitForImageClassification": (["classifier"], "beit.layers.{}.attention.o_proj"),
    "BeitForMaskedImageModeling": ([], "beit.layers.{}.attention.o_proj"),
    "Dinov2ForImageClassification": (["classifier"], "dinov2.encoder.layer.{}.attention.o_proj"),
    "Dinov2WithRegistersForImageClassification": (
        ["classifier"],
        "dinov2_with_registers.encoder.layer.{}.attention.o_proj",
    ),
    "DINOv3ViTModel": ([], "model.layer.{}.attention.o_proj"),
    "SwinForImageClassification": (["classifier"], "swin.encoder.layers.{}.blocks.0.attention.o_proj"),
    "Swinv2ForImageClassification": (["classifier"], "swinv2.encoder.layers.{}.blocks.0.attention.output.dense"),
    "CLIPModel": ([], f"text_model.{TOWER}", f"vision_model.{TOWER}"),
    "CLIPForImageClassification": (["classifier"], f"vision_model.{TOWER}"),
    "CLIPVisionModel": ([], TOWER),
    "CLIPTextModel": ([], TOWER),
    "SiglipModel": ([], f"text_model.{TOWER}", f"vision_model.{TOWER}"),
    "SiglipForImageClassification": (["classifier"], f"vision_model.{TOWER}"),
    "SiglipVisionModel": ([], TOWER),
    "SiglipTextModel": ([], TOWER),
    "BertForSequenceClassification": (["classifier"], f"bert.{BERT}"),
    "BertForQuestionAnswering": (["qa_outputs"], f"bert.{BERT}"),
    "BertLMHeadModel": ([], f"bert.{BERT}"),
    "RobertaForSequenceClassification": (["classifier"], f"roberta.{BERT}"),
    "XLMRobertaForSequenceClassification": (["classifier"], f"roberta.{BERT}"),
    "CamembertForSequenceClassification": (["classifier"], f"roberta.{BERT}"),
    "ElectraForSequenceClassification": (["classifier"], f"electra.{BERT}"),
    "DebertaV2ForSequenceClassification": (["pooler", "classifier"], f"deberta.{BERT}"),
    "DistilBertForSequenceClassification": (
        ["pre_classifier", "classifier"],
        "distilbert.transformer.layer.{}.attention.out_lin",
    ),
    "LlamaForSequenceClassification": (["score"], LLAMA),
    "LlamaForCausalLM": ([], LLAMA),
    "MistralForSequenceClassification": (["score"], LLAMA),
    "Qwen2ForSequenceClassification": (["score"], LLAMA),
    "Qwen3ForSequenceClassification": (["score"], LLAMA),
    "GemmaForSequenceClassification": (["score"], LLAMA),
    "Gemma2ForSequenceClassification": (["score"], LLAMA),
    "Phi3ForSequenceClassification": (["score"], LLAMA),
    "Olmo2ForSequenceClassification": (["score"], LLAMA),
    "GPT2ForSequenceClassification": (["score"], GPT2),
    "GPT2ForTokenClassification": (["classifier"], GPT2),
    "GPT2LMHeadModel": ([], GPT2),
    "GPTNeoXForSequenceClassification": (["score"], "gpt_neox.layers.{}.attention.dense"),
}
TWO_STAGES = {"depths": (1, 1), "num_heads": (3, 6)}
TWO_TOWERS = {"text_config": {"num_hidden_layers": DEPTH}, "vision_config": {"num_hidden_layers": DEPTH}}
# Where `num_hidden_layers` does not give two blocks of each kind, or where cross-attention must be told apart.
OPTIONS: dict[str, dict[str, object]] = {
    "ViTMAEForPreTraining": {"num_hidden_layers": DEPTH, "decoder_num_hidden_layers": DEPTH},
    "SwinForImageClassification": TWO_STAGES,
    "Swinv2ForImageClassification": TWO_STAGES,
    "CLIPModel": TWO_TOWERS,
    "CLIPForImageClassification": TWO_TOWERS,
    "SiglipModel": TWO_TOWERS,
    "SiglipForImageClassification": TWO_TOWERS,
    "BertLMHeadModel": {"num_hidden_layers": DEPTH, "is_decoder": True, "add_cross_attention": True},
    "GPT2LMHeadModel": {"num_hidden_layers": DEPTH, "add_cross_attention": True},
}


def transformers_model(model_class: str, **options: object) -> nn.Module:
    build = getattr(transformers, model_class)
    return build(build.config_class(**options))


def matched_layers(model: nn.Module) -> list[str]:
    """Apply PEFT's rule for a list of target modules."""
    suffixes = default_targets(model) or ()
    return [name for name, _ in model.named_modules() if any(name == s or name.endswith(f".{s}") for s in suffixes)]


def assert_facts(model: nn.Module, layers: list[str], heads: list[str]) -> None:
    assert matched_layers(model) == layers
    assert all(isinstance(model.get_submodule(name), nn.Linear | Conv1D) for name in layers)
    assert classification_heads(model) == heads


@pytest.mark.parametrize("architecture", TIMM_MODELS)
def test_timm_targets_hit_the_final_projection_of_every_block_once(architecture):
    with torch.device("meta"):
        model = timm.create_model(architecture)
    assert_facts(model, *TIMM_MODELS[architecture])


@pytest.mark.parametrize("model_class", TRANSFORMERS_MODELS)
def test_transformers_targets_hit_the_final_projection_of_every_block_once(model_class):
    heads, *templates = TRANSFORMERS_MODELS[model_class]
    with torch.device("meta"):
        model = transformers_model(model_class, **OPTIONS.get(model_class, {"num_hidden_layers": DEPTH}))
    assert_facts(model, [name for template in templates for name in in_blocks(template)], heads)


def test_a_timm_model_is_found_inside_the_wrapper_of_transformers():
    with torch.device("meta"):
        model = transformers_model("TimmWrapperForImageClassification", architecture="vit_tiny_patch16_224")
    assert_facts(model, [f"timm_model.{name}" for name in TIMM_BLOCKS], ["timm_model.head"])


def test_a_new_timm_head_is_found_after_the_number_of_classes_is_set():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_dinov3", num_classes=5)
    assert classification_heads(model) == ["head"]


def test_a_block_that_fuses_attention_and_mlp_into_one_projection_has_no_default_target():
    with torch.device("meta"):
        model = timm.create_model("vit_dpwee_patch16_reg1_gap_256")
    assert default_targets(model) is None


TINY_TIMM = {"img_size": (HEIGHT_PX, WIDTH_PX), "patch_size": PATCH_PX, "embed_dim": 24, "depth": 1, "num_heads": 2}
TINY_SWIN = {"img_size": (32, 48), "embed_dim": 12, "depths": (1,), "num_heads": (2,), "window_size": 4}
TINY = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TINY_VISION = TINY | {"patch_size": PATCH_PX, "image_size": HEIGHT_PX}
TINY_WIDE = TINY_VISION | {"image_size": (HEIGHT_PX, WIDTH_PX)}


def tiny_vit(**options: object) -> nn.Module:
    return vision_transformer.VisionTransformer(**(TINY_TIMM | options))


# The image is wider than high everywhere; a square `image_size` is stretched by the model itself.
REAL_FORWARDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm ViT": (tiny_vit, 1),
    "timm ViT with registers": (lambda: tiny_vit(reg_tokens=4), 5),
    "timm SigLIP": (lambda: tiny_vit(class_token=False, global_pool="map"), 0),
    "timm ViT that pads": (lambda: tiny_vit(patch_size=7, dynamic_img_size=True, dynamic_img_pad=True), 1),
    "timm distilled DeiT": (lambda: deit.VisionTransformerDistilled(**TINY_TIMM), 2),
    "timm EVA-02": (lambda: eva.Eva(**TINY_TIMM, use_rot_pos_emb=True), 1),
    "timm DINOv3": (lambda: timm.create_model("vit_small_patch16_dinov3", **TINY_TIMM), 5),
    "timm BEiT": (lambda: beit.Beit(**TINY_TIMM, use_abs_pos_emb=False, use_rel_pos_bias=True), 1),
    "ViT": (lambda: transformers_model("ViTModel", **TINY_WIDE), 1),
    "ViT with oblong patches": (lambda: transformers_model("ViTModel", **TINY_WIDE | {"patch_size": [16, 8]}), 1),
    "DeiT": (lambda: transformers_model("DeiTModel", **TINY_WIDE), 2),
    "BEiT": (lambda: transformers_model("BeitModel", **TINY_WIDE), 1),
    "I-JEPA": (lambda: transformers_model("IJepaModel", **TINY_WIDE), 0),
    "DINOv2": (lambda: transformers_model("Dinov2Model", **TINY_VISION), 1),
    "DINOv2 with registers": (lambda: transformers_model("Dinov2WithRegistersModel", **TINY_VISION), 5),
    "DINOv3": (lambda: transformers_model("DINOv3ViTModel", num_register_tokens=3, **TINY_VISION), 4),
    "CLIP vision": (lambda: transformers_model("CLIPVisionModel", **TINY_VISION), 1),
    "SigLIP vision": (lambda: transformers_model("SiglipVisionModel", **TINY_VISION), 0),
}
STRETCHED = {"CLIP vision", "SigLIP vision"}


@torch.no_grad()
def inputs_of(model: nn.Module, layer: str, *args: Tensor, **options: bool) -> list[Tensor]:
    """Return what the layer receives in one forward pass; nothing if it is not called."""
    received: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _layer, args, _: received.append(args[0]))
    model.eval()(*args, **options)
    handle.remove()
    return received


@pytest.mark.parametrize("name", REAL_FORWARDS)
def test_prefix_tokens_and_patches_are_all_the_tokens_that_the_target_sees(name):
    build, prefix = REAL_FORWARDS[name]
    model = build()
    options = {"interpolate_pos_encoding": True} if name in STRETCHED else {}
    [tokens] = inputs_of(model, matched_layers(model)[0], torch.zeros(1, 3, HEIGHT_PX, WIDTH_PX), **options)
    rows, columns = patch_grid(model, HEIGHT_PX, WIDTH_PX)
    assert prefix_tokens(model) == prefix
    assert rows < columns
    assert tokens.shape[1] == prefix + rows * columns


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_a_model_of_two_towers_has_the_tokens_of_its_vision_tower(name):
    with torch.device("meta"):
        model = transformers_model(f"{name}Model", **TWO_TOWERS)
    tower = model.vision_model
    assert prefix_tokens(model) == prefix_tokens(tower)
    assert patch_grid(model, 224, 224) == patch_grid(tower, 224, 224)


@pytest.mark.parametrize(("prefix", "height_px", "width_px"), [("Swin", 32, 48), ("Swin", 33, 50), ("Swinv2", 33, 50)])
def test_the_grid_of_swin_is_that_of_its_first_stage(prefix, height_px, width_px):
    options = {"image_size": (height_px, width_px), "embed_dim": 12, "depths": (1,), "num_heads": (2,)}
    model = transformers_model(f"{prefix}Model", window_size=4, **options)
    _, grid = model.embeddings(torch.zeros(1, 3, height_px, width_px))
    assert patch_grid(model, height_px, width_px) == tuple(grid)
    assert prefix_tokens(model) == 0


@pytest.mark.parametrize("build", [swin_transformer.SwinTransformer, swin_transformer_v2.SwinTransformerV2])
def test_the_grid_of_timm_swin_is_that_of_its_first_stage(build):
    model = build(**TINY_SWIN)
    assert patch_grid(model, 32, 48) == model.patch_embed(torch.zeros(1, 3, 32, 48)).shape[1:3]
    assert prefix_tokens(model) == 0


def test_text_has_no_patches():
    model = transformers_model("BertModel", **TINY)
    with pytest.raises(ValueError, match=r"BertModel .* does not keep its tokens as a grid of image patches"):
        prefix_tokens(model)


def test_an_unknown_model_has_no_patches_no_targets_and_no_heads():
    model = nn.Sequential(nn.Linear(2, 2))
    assert find_family(model) is None
    assert default_targets(model) is None
    assert classification_heads(model) == []
    with pytest.raises(ValueError, match="Sequential does not hold exactly one kind of known backbone"):
        patch_grid(model, 32, 32)


def test_a_backbone_inside_a_custom_model_is_found_and_the_custom_head_is_left_to_its_owner():
    model = nn.ModuleDict({"body": tiny_vit(num_classes=0), "head": nn.Linear(24, 3)})
    name, family = find_family(model) or pytest.fail("not found")
    assert (name, family.timm_classes[0]) == ("body", "VisionTransformer")
    assert classification_heads(model) == []
    assert patch_grid(model, HEIGHT_PX, WIDTH_PX) == (4, 6)


def test_a_subclass_of_a_timm_model_belongs_to_its_family():
    class OwnTransformer(vision_transformer.VisionTransformer):
        pass

    assert matched_layers(OwnTransformer(**TINY_TIMM)) == ["blocks.0.attn.proj"]


def test_the_first_of_two_backbones_of_one_family_is_found_and_the_heads_of_both():
    model = nn.ModuleDict({"left": tiny_vit(), "right": tiny_vit()})
    name, _ = find_family(model) or pytest.fail("not found")
    assert name == "left"
    assert classification_heads(model) == ["left.head", "right.head"]


def test_two_backbones_of_different_families_have_no_default():
    model = nn.ModuleDict({"eyes": tiny_vit(), "words": transformers_model("BertModel", **TINY)})
    assert find_family(model) is None
    assert default_targets(model) is None


def test_a_peft_model_shows_the_family_of_what_it_wraps():
    model = transformers_model("ViTForImageClassification", **TINY_WIDE)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["classifier"]))
    assert (find_family(wrapped) or pytest.fail("not found"))[0] == "base_model.model"
    assert classification_heads(wrapped) == ["base_model.model.classifier"]
    assert (prefix_tokens(wrapped), patch_grid(wrapped, HEIGHT_PX, WIDTH_PX)) == (1, (4, 6))


def with_separate_bias(model: nn.Module) -> nn.Module:
    model.get_submodule("blocks.0.attn").qkv_bias_separate = True
    return model


# A model with one block -> is its fused layer passed over?
QKV_READERS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "ViT": (lambda: tiny_vit(qkv_bias=True), False),
    "BEiT": (lambda: beit.Beit(**TINY_TIMM, qkv_bias=True), True),
    "BEiT without bias": (lambda: beit.Beit(**TINY_TIMM, qkv_bias=False), False),
    "BEiT that adds its bias": (lambda: with_separate_bias(beit.Beit(**TINY_TIMM, qkv_bias=True)), False),
    "EVA": (lambda: eva.Eva(**TINY_TIMM, qkv_bias=True), True),
    "EVA without bias": (lambda: eva.Eva(**TINY_TIMM, qkv_bias=False), False),
    "EVA that adds its bias": (lambda: with_separate_bias(eva.Eva(**TINY_TIMM, qkv_bias=True)), False),
    "EVA with plain rotary attention": (lambda: eva.Eva(**TINY_TIMM, qkv_bias=True, attn_type="rope"), False),
    "DINOv3": (lambda: timm.create_model("vit_small_patch16_dinov3", **TINY_TIMM), False),
    "Swin": (lambda: swin_transformer.SwinTransformer(**TINY_SWIN), False),
    "Swin v2": (lambda: swin_transformer_v2.SwinTransformerV2(**TINY_SWIN), True),
    "Swin v2 without bias": (lambda: swin_transformer_v2.SwinTransformerV2(**TINY_SWIN, qkv_bias=False), False),
}


@pytest.mark.parametrize("name", QKV_READERS)
def test_a_layer_is_said_to_be_passed_over_exactly_if_it_is_never_called(name):
    build, passes_over_qkv = QKV_READERS[name]
    model = build()
    [attention] = [name for name, _ in model.named_modules() if name.endswith("attn")]
    for child in ("qkv", "proj"):
        is_called = bool(inputs_of(model, f"{attention}.{child}", torch.zeros(1, 3, HEIGHT_PX, WIDTH_PX)))
        assert reads_weight_directly(model.get_submodule(attention), child) is not is_called
        assert is_called is not (passes_over_qkv and child == "qkv")


def test_the_output_projection_of_pytorch_attention_is_passed_over():
    attention, tokens = nn.MultiheadAttention(8, 2, batch_first=True), torch.zeros(1, 3, 8)
    assert inputs_of(attention, "out_proj", tokens, tokens, tokens) == []
    assert reads_weight_directly(attention, "out_proj")


def test_a_subclass_with_a_forward_of_its_own_is_not_accused():
    class CallsItsLayer(beit.Attention):
        def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
            return self.proj(self.qkv(x)[..., : x.shape[-1]])

    assert not reads_weight_directly(CallsItsLayer(8, 2, qkv_bias=True), "qkv")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("blocks.0.attn.qkv", ("q", "k", "v")),
        ("qkv", ("q", "k", "v")),
        ("transformer.h.0.attn.c_attn", ("q", "k", "v")),
        ("transformer.h.0.crossattention.c_attn", ()),
        ("gpt_neox.layers.0.attention.query_key_value", ()),
        ("blocks.0.attn.proj", ()),
        ("model.layers.0.self_attn.o_proj", ()),
    ],
)
def test_fused_parts_of_a_layer_name(name, parts):
    assert fused_parts(name) == parts


def test_the_second_third_of_a_fused_layer_is_the_key():
    vit, gpt2 = tiny_vit(), transformers_model("GPT2Model", n_embd=24, n_layer=1, n_head=2).eval()
    fused: list[Tensor] = []
    for model, layer in ((vit, "blocks.0.attn.qkv"), (gpt2, "h.0.attn.c_attn")):
        model.get_submodule(layer).register_forward_hook(lambda _layer, _inputs, output: fused.append(output))
    [vit_keys] = inputs_of(vit, "blocks.0.attn.k_norm", torch.rand(1, 3, HEIGHT_PX, WIDTH_PX))
    gpt2_keys = gpt2(torch.arange(5)[None], use_cache=True).past_key_values.layers[0].keys
    for keys, output in zip((vit_keys, gpt2_keys), fused, strict=True):
        torch.testing.assert_close(keys.transpose(1, 2).flatten(2), output.chunk(3, dim=-1)[1])
