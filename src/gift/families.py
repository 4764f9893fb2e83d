"""The facts about each Transformer family, as data: one row of `FAMILIES` per family.

Layer names follow timm 1.0 and transformers 5.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PlainBlocks:
    """Where a plain ViT keeps its blocks: all alike, one token sequence, positions added to the tokens at the start.

    Attributes:
        blocks: Path to the list of blocks; paths start at the encoder (`base_model` in transformers).
        value: Path, inside a block, to the layer that yields the values, alone or as the last third.
        norm: Path to the norm behind the last block.
        width: Path to the number of channels of a token.
    """

    blocks: str
    value: str
    norm: str
    width: str


TIMM_BLOCKS = PlainBlocks("blocks", "attn.qkv", "norm", "embed_dim")
VIT_BLOCKS = PlainBlocks("layers", "attention.v_proj", "layernorm", "config.hidden_size")
DINO_BLOCKS = PlainBlocks("encoder.layer", "attention.v_proj", "layernorm", "config.hidden_size")


@dataclass(frozen=True)
class Family:
    """The facts about one Transformer family; dotted paths start at the family's own module.

    Attributes:
        name: What to call the family in messages.
        targets: Name suffixes of the final projection of every self-attention, in PEFT's `target_modules` form.
        model_types: `config.model_type` of its transformers models.
        timm_classes: Names of its classes in `timm.models`; subclasses count too.
        head: Paths a classification head may have; a model holds some of them or none.
        prefix_tokens: Non-patch tokens that stand first in the sequence, as numbers and paths whose sum counts. None
            where the tokens are not a grid of image patches: text, or a masked autoencoder.
        patch_grid: Path to the patch size (one number or a pair), or to a method from (height, width) to the grid.
        hierarchical: True if the grid halves from stage to stage (`layers.N`), attention sees one window of it at a
            time (blocks hold `window_size` and `shift_size`), and an image that is no whole number of patches is padded
            (other families cut it).
        pads_before_shift: True if a grid that is no whole number of windows is padded before it is shifted.
        fused_qkv: Suffix of the layer that yields query, key and value as three equal contiguous parts.
        reads_qkv_in: Class of the attention that may use the weight of that layer without calling the layer.
        plain: Where its blocks are. None unless any token may be added and any value be changed: not if attention
            depends on positions (rotary, relative) or on windows.
    """

    name: str
    targets: tuple[str, ...]
    model_types: tuple[str, ...] = ()
    timm_classes: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    prefix_tokens: tuple[int | str, ...] | None = None
    patch_grid: str | None = None
    hierarchical: bool = False
    pads_before_shift: bool = False
    fused_qkv: str | None = None
    reads_qkv_in: str | None = None
    plain: PlainBlocks | None = None


FAMILIES: tuple[Family, ...] = (
    Family(
        name="timm ViT, DeiT, DeiT-3, DINOv2, CLIP, SigLIP",
        timm_classes=("VisionTransformer",),
        # `attn_out_proj` is the projection in blocks that run attention and MLP side by side (`vit_*_xp_*`).
        targets=("attn.proj", "attn_out_proj"),
        head=("head",),
        prefix_tokens=("num_prefix_tokens",),
        patch_grid="patch_embed.dynamic_feat_size",
        fused_qkv="attn.qkv",
        plain=TIMM_BLOCKS,
    ),
    Family(
        name="timm ViT with relative positions",
        timm_classes=("VisionTransformerRelPos",),
        targets=("attn.proj",),
        head=("head",),
        prefix_tokens=("num_prefix_tokens",),
        patch_grid="patch_embed.dynamic_feat_size",
        fused_qkv="attn.qkv",
    ),
    Family(
        name="timm distilled DeiT",
        timm_classes=("VisionTransformerDistilled",),
        targets=("attn.proj",),
        head=("head", "head_dist"),
        prefix_tokens=("num_prefix_tokens",),
        patch_grid="patch_embed.dynamic_feat_size",
        fused_qkv="attn.qkv",
        plain=TIMM_BLOCKS,
    ),
    Family(
        name="timm EVA-02, DINOv3",
        timm_classes=("Eva",),
        targets=("attn.proj",),
        head=("head",),
        prefix_tokens=("num_prefix_tokens",),
        patch_grid="patch_embed.dynamic_feat_size",
        fused_qkv="attn.qkv",
        reads_qkv_in="timm.models.eva.EvaAttention",
    ),
    Family(
        name="timm BEiT",
        timm_classes=("Beit",),
        targets=("attn.proj",),
        head=("head",),
        prefix_tokens=("num_prefix_tokens",),
        patch_grid="patch_embed.dynamic_feat_size",
        fused_qkv="attn.qkv",
        reads_qkv_in="timm.models.beit.Attention",
    ),
    Family(
        name="timm Swin",
        timm_classes=("SwinTransformer",),
        targets=("attn.proj",),
        head=("head.fc",),
        prefix_tokens=(),
        patch_grid="patch_embed.dynamic_feat_size",
        hierarchical=True,
        fused_qkv="attn.qkv",
    ),
    Family(
        name="timm Swin v2",
        timm_classes=("SwinTransformerV2",),
        targets=("attn.proj",),
        head=("head.fc",),
        prefix_tokens=(),
        patch_grid="patch_embed.dynamic_feat_size",
        hierarchical=True,
        fused_qkv="attn.qkv",
        reads_qkv_in="timm.models.swin_transformer_v2.WindowAttention",
    ),
    Family(
        name="ViT",
        model_types=(
            "vit",
            "vit_msn",
        ),
        targets=("attention.o_proj",),
        head=("classifier",),
        prefix_tokens=(1,),
        patch_grid="config.patch_size",
        plain=VIT_BLOCKS,
    ),
    Family(
        name="DINOv2",
        model_types=("dinov2",),
        targets=("attention.o_proj",),
        head=("classifier",),
        prefix_tokens=(1,),
        patch_grid="config.patch_size",
        plain=DINO_BLOCKS,
    ),
    Family(
        name="BEiT",
        model_types=("beit",),
        targets=("attention.o_proj",),
        head=("classifier",),
        prefix_tokens=(1,),
        patch_grid="config.patch_size",
    ),
    Family(
        name="DeiT",
        model_types=("deit",),
        targets=("attention.o_proj",),
        head=("classifier", "cls_classifier", "distillation_classifier"),
        prefix_tokens=(2,),
        patch_grid="config.patch_size",
        plain=VIT_BLOCKS,
    ),
    Family(
        name="DINOv2 with registers",
        model_types=("dinov2_with_registers",),
        targets=("attention.o_proj",),
        head=("classifier",),
        prefix_tokens=(1, "config.num_register_tokens"),
        patch_grid="config.patch_size",
        plain=DINO_BLOCKS,
    ),
    Family(
        name="DINOv3",
        model_types=("dinov3_vit",),
        targets=("attention.o_proj",),
        head=("classifier",),
        prefix_tokens=(1, "config.num_register_tokens"),
        patch_grid="config.patch_size",
    ),
    Family(
        name="I-JEPA",
        model_types=("ijepa",),
        targets=("attention.o_proj",),
        head=("classifier",),
        prefix_tokens=(),
        patch_grid="config.patch_size",
        plain=VIT_BLOCKS,
    ),
    # The encoder drops a random part of the patches, so its tokens are no grid.
    Family(name="ViT-MAE", model_types=("vit_mae",), targets=("attention.o_proj",)),
    Family(
        name="Swin",
        model_types=("swin",),
        targets=("attention.o_proj",),
        head=("classifier",),
        prefix_tokens=(),
        patch_grid="config.patch_size",
        hierarchical=True,
        pads_before_shift=True,
    ),
    Family(
        name="Swin v2",
        model_types=("swinv2",),
        targets=("attention.output.dense",),
        head=("classifier",),
        prefix_tokens=(),
        patch_grid="config.patch_size",
        hierarchical=True,
        pads_before_shift=True,
    ),
    # CLIP and SigLIP hold a text and a vision tower: the tokens and the grid are those of the vision tower.
    Family(
        name="CLIP",
        model_types=("clip",),
        targets=("self_attn.out_proj",),
        head=("classifier",),
        prefix_tokens=(1,),
        patch_grid="config.vision_config.patch_size",
    ),
    Family(
        name="SigLIP",
        model_types=("siglip",),
        targets=("self_attn.out_proj",),
        head=("classifier",),
        prefix_tokens=(),
        patch_grid="config.vision_config.patch_size",
    ),
    Family(
        name="CLIP vision tower",
        model_types=("clip_vision_model",),
        targets=("self_attn.out_proj",),
        prefix_tokens=(1,),
        patch_grid="config.patch_size",
    ),
    Family(
        name="SigLIP vision tower",
        model_types=("siglip_vision_model",),
        targets=("self_attn.out_proj",),
        prefix_tokens=(),
        patch_grid="config.patch_size",
    ),
    Family(
        name="CLIP or SigLIP text tower",
        model_types=("clip_text_model", "siglip_text_model"),
        targets=("self_attn.out_proj",),
    ),
    Family(
        name="BERT, RoBERTa, ELECTRA",
        model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
        targets=("attention.output.dense",),
        head=("classifier", "qa_outputs"),
    ),
    Family(
        name="DeBERTa v2, v3",
        model_types=("deberta-v2",),
        targets=("attention.output.dense",),
        # The pooler belongs to the classifier, not to the encoder: pretrained weights have none.
        head=("pooler", "classifier", "qa_outputs"),
    ),
    Family(
        name="DistilBERT",
        model_types=("distilbert",),
        targets=("attention.out_lin",),
        head=("pre_classifier", "classifier", "qa_outputs"),
    ),
    Family(
        name="LLaMA, Mistral, Qwen, Gemma, Phi-3, OLMo 2",
        model_types=("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2"),
        targets=("self_attn.o_proj",),
        head=("score", "qa_outputs"),
    ),
    Family(
        name="GPT-2",
        model_types=("gpt2",),
        targets=("attn.c_proj",),
        head=("score", "classifier", "qa_outputs"),
        fused_qkv="attn.c_attn",
    ),
    # `query_key_value` is not listed as fused: its rows go head by head, not in three contiguous parts.
    Family(
        name="GPT-NeoX",
        model_types=("gpt_neox",),
        targets=("attention.dense",),
        head=("score", "classifier", "qa_outputs"),
    ),
)
