"""What we know of each Transformer family, as data: one row of `FAMILIES` per family.

For a new family, add a row and a line to the tables in `tests/test_backbones.py`. Nothing else in the package may
depend on which family a model belongs to. Layer names follow timm 1.0 and transformers 5.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import MethodType

from torch import nn
from transformers import PreTrainedModel

# A small ViT that comes with the package, for `AutoModelForImageClassification.from_pretrained`; see its README.md.
SMALL_BACKBONE = Path(__file__).parent / "assets" / "vit_64px_patch8_d128_l8"


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


FAMILIES: tuple[Family, ...] = (
    Family(
        name="timm ViT, DeiT, DeiT-3, DINOv2, CLIP, SigLIP",
        timm_classes=("VisionTransformer", "VisionTransformerRelPos"),
        # `attn_out_proj` is the projection in blocks that run attention and MLP side by side (`vit_*_xp_*`).
        targets=("attn.proj", "attn_out_proj"),
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
        name="ViT, BEiT, DINOv2",
        model_types=("vit", "vit_msn", "beit", "dinov2"),
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
    ),
    Family(
        name="DINOv2 with registers, DINOv3",
        model_types=("dinov2_with_registers", "dinov3_vit"),
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

_BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
_BY_TIMM_CLASS = {timm_class: family for family in FAMILIES for timm_class in family.timm_classes}
_FUSED_LAYERS = {family.fused_qkv.rpartition(".")[2] for family in FAMILIES if family.fused_qkv}
# Qualified name of an attention class -> the child whose weight it reads; PyTorch's own belongs to no family.
_WEIGHT_READERS = {"torch.nn.modules.activation.MultiheadAttention": "out_proj"} | {
    family.reads_qkv_in: family.fused_qkv.rpartition(".")[2]
    for family in FAMILIES
    if family.reads_qkv_in and family.fused_qkv
}


def find_family(model: nn.Module) -> tuple[str, Family] | None:
    """Return the dotted name and the family of the known backbone in `model`, or None if that is not one answer.

    The name is "" if the model is the backbone, else that of the outermost submodule that is one (`timm_model` in
    transformers' TimmWrapper, `base_model.model` in a `PeftModel`). Of several outermost backbones the first is
    returned if all are of one family; if they differ, as in an image captioner, the answer is None.
    """
    found = list(_outermost_backbones(model))
    if len({family.name for _, family in found}) != 1:
        return None
    return found[0]


def default_targets(model: nn.Module) -> tuple[str, ...] | None:
    """Return the suffixes, as in PEFT's `target_modules`, of the final projection of every self-attention.

    None for an unknown model, or if the model has no layer of such a name. The suffixes hold for the whole model: a
    custom model's own layers outside the backbone match too if they are named alike.
    """
    found = find_family(model)
    if found is None:
        return None
    layer_names = [f".{name}" for name, _ in model.named_modules()]
    suffixes = [suffix for suffix in found[1].targets if any(name.endswith(f".{suffix}") for name in layer_names)]
    return tuple(suffixes) or None


def classification_heads(model: nn.Module) -> list[str]:
    """Return the full dotted names of the classification heads of every known backbone in `model`.

    A head is a classifier of images, sequences or tokens, or of answer spans; a language-model head is not one. A head
    without parameters (`nn.Identity`, as timm's `num_classes=0` leaves it) does not count, nor does a layer that a
    custom model puts behind the backbone.
    """
    names = [_join(backbone, head) for backbone, family in _outermost_backbones(model) for head in family.head]
    modules = dict(model.named_modules(remove_duplicate=False))
    return [name for name in names if name in modules and next(modules[name].parameters(), None) is not None]


def prefix_tokens(model: nn.Module) -> int:
    """Return how many non-patch tokens (class, distillation, registers) come first in each sequence of `model`.

    Raises:
        ValueError: The model is not a known backbone of image patches.
    """
    backbone, family = _image_backbone(model)
    return sum(
        part if isinstance(part, int) else int(attrgetter(part)(backbone)) for part in family.prefix_tokens or ()
    )


def patch_grid(model: nn.Module, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of patches that `model` makes of an image of `height` x `width` pixels.

    For a hierarchical family (Swin) this is the grid of the first stage.

    Raises:
        ValueError: The model is not a known backbone of image patches.
    """
    backbone, family = _image_backbone(model)
    source = attrgetter(str(family.patch_grid))(backbone)
    if isinstance(source, MethodType):
        return source((height, width))
    rows, columns = patch_size(model)
    if family.hierarchical:
        return -(-height // rows), -(-width // columns)
    return height // rows, width // columns


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Return the height and width in pixels of the patches that `model` cuts images into.

    Raises:
        ValueError: As for `patch_grid`.
    """
    backbone, family = _image_backbone(model)
    source = attrgetter(str(family.patch_grid))(backbone)
    size = backbone.patch_embed.patch_size if isinstance(source, MethodType) else source  # type: ignore[union-attr]
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))  # type: ignore[index]


def reads_weight_directly(parent: nn.Module, child_name: str) -> bool:
    """Return whether `parent` uses the weight of its child `child_name` without ever calling the child.

    An adapter on such a child would silently do nothing. True for the `out_proj` of PyTorch's `nn.MultiheadAttention`,
    and for the `qkv` of timm's BEiT, EVA and Swin v2 attention if that has a query and value bias of its own
    (`q_bias`) which is not added separately (`qkv_bias_separate`).
    """
    # The class that defines `forward` decides: subclasses inherit the habit, until they write a `forward` of their own.
    forward = type(parent).forward
    reader = f"{forward.__module__}.{forward.__qualname__}".removesuffix(".forward")
    if _WEIGHT_READERS.get(reader) != child_name:
        return False
    # The two attributes exist in timm's classes only.
    has_bias = getattr(parent, "q_bias", True) is not None
    return has_bias and not getattr(parent, "qkv_bias_separate", False)


def fused_parts(name: str) -> tuple[str, ...]:
    """Return ("q", "k", "v") if a layer of this dotted name yields these as three equal contiguous parts, else ().

    The name alone is judged. Outside the known families a layer of the same name may be laid out otherwise: head by
    head, or with fewer keys than queries.
    """
    parent, _, layer = name.rpartition(".")
    # GPT-2's cross-attention calls its layer `c_attn` too, but it holds key and value only.
    is_cross_attention = parent.rpartition(".")[2].startswith("cross")
    return ("q", "k", "v") if layer in _FUSED_LAYERS and not is_cross_attention else ()


def _outermost_backbones(module: nn.Module, name: str = "") -> Iterator[tuple[str, Family]]:
    family = _family_of(module)
    if family is not None:
        yield name, family
        return
    for child_name, child in module.named_children():
        yield from _outermost_backbones(child, _join(name, child_name))


def _family_of(module: nn.Module) -> Family | None:
    # Only the real thing: a PeftModel or a custom wrapper may show the `config` of a model that it merely holds.
    if isinstance(module, PreTrainedModel):
        return _BY_MODEL_TYPE.get(module.config.model_type)
    timm_classes = [parent.__name__ for parent in type(module).__mro__ if parent.__module__.startswith("timm.models.")]
    return next((_BY_TIMM_CLASS[name] for name in timm_classes if name in _BY_TIMM_CLASS), None)


def _image_backbone(model: nn.Module) -> tuple[nn.Module, Family]:
    found = find_family(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} does not hold exactly one kind of known backbone, so its image patches are "
            "unknown. Pass the backbone itself, or add its family to gift.backbones.FAMILIES."
        )
    name, family = found
    if family.prefix_tokens is None:
        raise ValueError(
            f"{type(model).__name__} ({family.name}) does not keep its tokens as a grid of image patches. "
            "Pass a vision Transformer."
        )
    return model.get_submodule(name), family


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
