"""Which layers of a model are adapted: names and parts of fused layers, checked before anything is changed."""

import difflib
import re
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from gift.backbones import classification_heads, default_targets, fused_parts, reads_weight_directly
from gift.tuner.config import GiftConfig
from gift.tuner.layer import GiftLinear
from gift.tuner.weights import PARTS, is_quantised, weight_shape

READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PEFT_HEADS = (["classifier", "score"], ["qa_outputs"])  # what PEFT takes for modules_to_save with a task type


class Target(NamedTuple):
    """One adapted weight: a linear layer, or one part of a fused one.

    Attributes:
        layer: Dotted name of the module in the wrapped model.
        part: `q`, `k` or `v` of a fused layer; None for a whole layer.
    """

    layer: str
    part: str | None = None

    @classmethod
    def parse(cls, name: str) -> "Target":
        """Return the target whose string is `name`."""
        return cls(*_split(name))

    def __str__(self) -> str:
        return self.layer if self.part is None else f"{self.layer}[{self.part}]"

    @property
    def kind(self) -> str:
        """What remains of the name when the block is left out, e.g. `attn.proj` or `attn.qkv[v]`."""
        return re.sub(r"^.*\.\d+\.", "", str(self))


def check_without_adapters(model: nn.Module) -> None:
    """Raise ValueError if a layer of the model already carries an adapter, of GIFT or of another method."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise ValueError(
                f"{name} already carries an adapter ({kind}), and GIFT cannot be mixed with it. Call unload() or "
                "merge_and_unload() on the PeftModel it belongs to; further GIFT adapters are added with add_adapter."
            )


def find_targets(model: nn.Module, config: GiftConfig) -> list[Target]:
    """Return the targets that `config` names in `model`, in the order of its modules; fill in the family's default.

    Raises:
        ValueError: If a name matches nothing, only part of what it names, or something that cannot be adapted.
    """
    if config.target_modules is None:
        config.target_modules = _family_targets(model)  # type: ignore[assignment]
    if config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        config.target_modules = _all_linear(model, config)  # type: ignore[assignment]
    modules = _modules_outside_tuner_layers(model)
    parts: dict[str, set[str | None]] = {}
    for entry in _entries(config):
        for name in _matches(entry, config, modules):
            parts.setdefault(name, set()).add(_split(entry)[1])
    _check_layer_indices(config, parts)
    for name, names_parts in parts.items():
        _check_layer(model, name, names_parts)
    return [Target(name, part) for name in modules if name in parts for part in _in_order(parts[name])]


def find_modules_to_save(model: nn.Module, config: GiftConfig, targets: list[Target]) -> list[str]:
    """Return the modules to train beside the targets; by default the family's heads that are no targets themselves.

    With a task type PEFT adds names of its own to `modules_to_save`, which need not all exist.

    Raises:
        ValueError: If a name matches no module.
    """
    given = list(config.modules_to_save or ())
    if config.modules_to_save is None or (config.task_type and given in PEFT_HEADS):
        adapted = {target.layer for target in targets}
        heads = [head for head in classification_heads(model) if not head.endswith(tuple(given))]
        return [*given, *(head for head in heads if not any(f"{name}.".startswith(f"{head}.") for name in adapted))]
    names = [name for name, _ in model.named_modules()]
    optional = [head for heads in PEFT_HEADS for head in heads] if config.task_type else []
    missing = [save for save in given if save not in optional and not any(name.endswith(save) for name in names)]
    if missing:
        raise ValueError(f"modules_to_save names {missing}, but the model has no such modules.{_near(missing, names)}")
    return given


def check_not_sharded(model: nn.Module, modules_to_save: list[str]) -> None:
    """Raise ValueError if a module to be trained as a whole is sharded already: PEFT makes a copy, which cannot be."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and any(name.rpartition(".")[0].endswith(save) for save in modules_to_save):
            raise ValueError(
                f"{name} is sharded over processes already, and PEFT cannot copy it to train it. Adapt the model "
                "before it is sharded, or train no such module: modules_to_save=[]."
            )


def matches(config: GiftConfig, name: str) -> Any:
    """Return what PEFT's matching rules say of a module: true, false, or false in the form that means excluded."""
    return check_target_module_exists(_selection(config), name)


def _family_targets(model: nn.Module) -> set[str]:
    targets = default_targets(model)
    if targets is None:
        raise ValueError(
            f"{type(model).__name__} is not of a family whose attention projections are known. Name the layers to "
            f"adapt in target_modules. Its linear layers are:\n{describe_linear_layers(model)}"
        )
    return set(targets)


def _all_linear(model: nn.Module, config: GiftConfig) -> set[str]:
    """Return every linear layer that can be adapted, without heads and what the configuration leaves out."""
    expanded = GiftConfig(target_modules=INCLUDE_LINEAR_LAYERS_SHORTHAND, task_type=config.task_type)
    _maybe_include_all_linear_layers(expanded, model)
    selection = _selection(config, target_modules=expanded.target_modules)
    heads = classification_heads(model)
    inside = tuple(f"{head}." for head in heads)
    names = [str(name) for name in expanded.target_modules or () if not f"{name}.".startswith(inside)]
    names = [name for name in names if check_target_module_exists(selection, name)]
    parents = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    return {name for name in names if not reads_weight_directly(parents[name], name.rpartition(".")[2])}


def _modules_outside_tuner_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by name, without what lies inside layers that already carry an adapter."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return {name: module for name, module in model.named_modules() if name and not name.startswith(inside)}


def _entries(config: GiftConfig) -> list[str]:
    targets = config.target_modules or []
    entries = [targets] if isinstance(targets, str) else sorted(targets)
    if not entries:
        raise ValueError("target_modules is empty: name at least one layer, or leave it out for the family's default.")
    return entries


def _split(entry: str) -> tuple[str, str | None]:
    """Return the name and the part of `attn.qkv[v]`; the part of a plain name is None."""
    match = re.fullmatch(r"([\w.\-]+)\[(\w+)\]", entry)
    return (match[1], match[2]) if match else (entry, None)


def _selection(config: GiftConfig, **changes: Any) -> Any:
    """Return what PEFT's matching rules read of a config, with the parts of fused layers left out."""
    options = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_modules")
    chosen = {option: getattr(config, option) for option in options} | changes
    if not isinstance(chosen["target_modules"], str):
        chosen["target_modules"] = {_split(entry)[0] for entry in chosen["target_modules"]}
    # By default the first number in a name is the block's index, also where nothing stands before `blocks.0`.
    chosen["layers_pattern"] = chosen["layers_pattern"] or r"[^.]+"
    return SimpleNamespace(target_parameters=None, **chosen)


def _matches(entry: str, config: GiftConfig, modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the modules that one entry of target_modules selects.

    Raises:
        ValueError: If there are none; the message says whether exclusions or block indices are the reason.
    """
    single = entry if isinstance(config.target_modules, str) else [entry]
    selection = _selection(config, target_modules=single)
    names = [name for name in modules if check_target_module_exists(selection, name)]
    if names:
        return names
    filters = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    unfiltered = _selection(config, target_modules=single, **dict.fromkeys(filters))
    left_out = [name for name in modules if check_target_module_exists(unfiltered, name)]
    if left_out:
        raise ValueError(
            f"target_modules names {entry!r}, but all it matches ({', '.join(left_out[:4])}, ...) is left out by "
            f"exclude_modules={config.exclude_modules}, layers_to_transform={config.layers_to_transform}, "
            f"layers_pattern={config.layers_pattern} or modules_to_save={config.modules_to_save}."
        )
    linear = [name for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer))]
    raise ValueError(f"target_modules names {entry!r}, but no module matches it.{_near([_split(entry)[0]], linear)}")


def _check_layer_indices(config: GiftConfig, names: Iterable[str]) -> None:
    """Raise ValueError if a target is of none of the blocks of layers_to_transform, or a block there has no target.

    PEFT adapts a layer that is named in full whatever its block, so what matches is asked without the block.
    """
    if config.layers_to_transform is None:
        return
    kinds = {kind for name in names if (kind := Target(name).kind) != name}
    wanted = [config.layers_to_transform] if isinstance(config.layers_to_transform, int) else config.layers_to_transform
    found = {
        index: [
            name
            for name in names
            if check_target_module_exists(_selection(config, layers_to_transform=[index], target_modules=kinds), name)
        ]
        for index in wanted
    }
    for index, of_block in found.items():
        if not of_block:
            raise ValueError(
                f"layers_to_transform names block {index}, but no target lies in it. Found: {sorted(names)[:8]}."
            )
    outside = set(names) - {name for of_block in found.values() for name in of_block}
    if outside:
        raise ValueError(
            f"target_modules names {min(outside)} in full, which is of none of the blocks {wanted} of "
            "layers_to_transform. Leave one of the two out, or name layers without their block, such as 'attn.proj'."
        )


def _check_layer(model: nn.Module, name: str, parts: set[str | None]) -> None:
    """Raise ValueError unless the module called `name` is a linear layer whose output an adapter can change."""
    parent = model.get_submodule(name.rpartition(".")[0])
    layer = model.get_submodule(name)
    layer = layer.get_base_layer() if isinstance(layer, GiftLinear) else layer
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise ValueError(
            f"target_modules selects {name}, a {type(layer).__name__}: GIFT adapts linear layers (nn.Linear, "
            f"transformers Conv1D). Write more of the name, or exclude it with exclude_modules=['{name}']."
        )
    if layer.weight.dtype not in READABLE and not is_quantised(layer):
        raise ValueError(
            f"{name} holds a weight of {layer.weight.dtype}: GIFT reads weights of 16, 32 and 64 bit floating point, "
            "and those quantised by bitsandbytes (8 and 4 bit) or torchao."
        )
    if reads_weight_directly(parent, name.rpartition(".")[2]):
        raise ValueError(
            f"{type(parent).__name__} reads the weight of {name} without calling the layer, so an adapter there would "
            "do nothing. Choose other layers, for example the final projection of the attention."
        )
    _check_parts(name, layer, parts)


def _check_parts(name: str, layer: nn.Linear | Conv1D, parts: set[str | None]) -> None:
    named = {part for part in parts if part is not None}
    if not named:
        return
    known = fused_parts(name)
    out_features, _ = weight_shape(layer)
    if not named <= set(known) or out_features % len(PARTS):
        raise ValueError(
            f"target_modules names part {', '.join(sorted(named))} of {name} ({out_features} rows), which has "
            f"{'the parts ' + ', '.join(known) if known else 'no known parts'}."
        )
    if None in parts:
        raise ValueError(f"target_modules names {name} both as a whole and by its part {', '.join(sorted(named))}.")


def _in_order(parts: set[str | None]) -> list[str | None]:
    return sorted(parts, key=lambda part: PARTS.index(part or PARTS[0]))


def _near(names: list[str], existing: list[str]) -> str:
    """Return a sentence with existing names close to the missing ones."""
    kinds = list(dict.fromkeys(Target(name).kind for name in existing))
    tails = {tail: kind for kind in reversed(kinds) for tail in (kind, kind.rpartition(".")[2])}
    close = [tails[tail] for name in names for tail in difflib.get_close_matches(name, tails, n=4, cutoff=0.5)]
    return f" Did you mean one of {sorted(set(close))}?" if close else f" The model has {kinds[:12]}."


def describe_linear_layers(model: nn.Module) -> str:
    """Return one line per kind of linear layer: its name with the numbers left open, shape and count."""
    kinds: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            key = (re.sub(r"\b\d+(?=\.|$)", "N", name), weight_shape(module))
            kinds[key] = kinds.get(key, 0) + 1
    return "\n".join(f"  {name} {tuple(shape)}, {count} times" for (name, shape), count in kinds.items())
