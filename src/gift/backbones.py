"""Questions about a model that the facts of its Transformer family answer.

For a new family, add a row to `gift.families.FAMILIES` and a line to the tables in `tests/test_backbones.py`. Nothing
else in the package may depend on which family a model belongs to.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gift.families import FAMILIES, Family

# A small ViT that comes with the package, for `AutoModelForImageClassification.from_pretrained`; see its README.md.
SMALL_BACKBONE = Path(__file__).parent / "assets" / "vit_64px_patch8_d128_l8"


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


@dataclass(frozen=True)
class PlainViT:
    """The parts of the one plain ViT in a model: full dotted names, and how its tokens look.

    Attributes:
        family: Name of its family.
        encoder: Name of the module that holds the blocks; "" if that is the model.
        blocks: Names of the blocks, in order.
        values: Names of the layers that yield the values, one per block.
        norm: Name of the norm behind the last block.
        is_fused: Whether the values are the last third of what those layers yield.
        width: Channels of a token.
    """

    family: str
    encoder: str
    blocks: tuple[str, ...]
    values: tuple[str, ...]
    norm: str
    is_fused: bool
    width: int


def plain_vit(model: nn.Module) -> PlainViT:
    """Return where the blocks of the plain ViT in `model` are: one that takes any number of tokens at any place.

    Raises:
        ValueError: If the model does not hold exactly one known backbone, or one of another kind.
    """
    found = list(_outermost_backbones(model))
    if len(found) != 1 or found[0][1].plain is None:
        works = "; ".join(family.name for family in FAMILIES if family.plain is not None)
        holds = ", ".join(family.name for _, family in found) or "no known backbone"
        raise ValueError(
            f"{type(model).__name__} holds {holds}. This method changes the tokens of exactly one plain ViT, whose "
            f"attention does not depend on places or windows; it works with these families: {works}."
        )
    name, family = found[0]
    plain = family.plain
    assert plain is not None
    backbone = model.get_submodule(name)
    encoder: Any = getattr(backbone, "base_model", backbone)  # transformers: the model without its head
    if encoder is not backbone:
        name = _join(name, backbone.base_model_prefix)  # type: ignore[arg-type]
    blocks = [_join(name, f"{plain.blocks}.{index}") for index in range(len(attrgetter(plain.blocks)(encoder)))]
    return PlainViT(
        family=family.name,
        encoder=name,
        blocks=tuple(blocks),
        values=tuple(f"{block}.{plain.value}" for block in blocks),
        norm=_join(name, plain.norm),
        is_fused=plain.value == family.fused_qkv,
        width=int(attrgetter(plain.width)(encoder)),
    )


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
