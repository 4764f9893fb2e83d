"""Reading the original authors' checkpoints: a pickle in, the folder of a PEFT adapter out.

Names and shapes of the tensors decide which generator a file holds. Its `args`, the options of the training, are only
asked what no tensor shows: heads, norm, activations.

Format: github.com/savadikarc/gift @ f0cb80c, as its training script stores image classifiers. For a target, written
`attn:proj`, with `in_projections` (r, d_in) and `out_projections` (d_in, r):

    U = W in^T (+ b_in);   U <- block(U), repeated;   dW = U out^T (+ 1 b_out^T)
"""

import hashlib
import io
import json
import re
import tempfile
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from gift.tuner.config import GENERATOR_DTYPES, GiftConfig
from gift.tuner.generator import WeightGenerator
from gift.tuner.model import group_name
from gift.tuner.options import GeneratorOptions
from gift.tuner.saving import GENERATORS_KEY
from gift.tuner.targets import Target

MAX_FILE_BYTES = 2**30  # the published file has 1.2 MB, and a whole ViT-B with the state of its optimizer 1.0 GB
MAX_PICKLE_BYTES = 2**20  # names and options, without the tensors' data: 6 kB in the published file
DTYPES = tuple(getattr(torch, name) for name in GENERATOR_DTYPES)

HEAD = {"backbone.head.weight": "weight", "backbone.head.bias": "bias"}
IN, OUT = "in_projections", "out_projections"
BLOCKS = r"hypernets\.([\w:]+)\.blocks\.(0|[1-9]\d*)\.([\w.]+)"
KEY = re.compile(rf"({IN}|{OUT})\.([\w:]+)\.(weight|bias)|{BLOCKS}|backbone\.head\.(?:weight|bias)", re.ASCII)
SHARED = "shared_projection"  # stands for the target where all targets share one generator
# A target may be given by its last name; our side groups targets by the name they have inside a block of timm's.
NAMES_IN_BLOCK = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
LAYER = re.compile(r"([a-z_]\w*\.)+[a-z_]\w*", re.ASCII | re.IGNORECASE)

# Our names of the modules in a block by the authors'; a fused module has several, one after the other.
Modules = dict[str, tuple[str, ...]]
_SELF: Modules = {"attn.qkv": ("mixing.query", "mixing.key", "mixing.value"), "attn.proj": ("mixing.project",)}
_CLUSTERS: Modules = {"attn.q": ("mixing.query",), "attn.k": ("mixing.key",), "attn.v": ("mixing.value",)}
_CLUSTERS |= {"attn.cluster.cluster": ("mixing.cluster",), "attn.proj": ("mixing.project",)}
_MLP: Modules = {"mlp.fc1": ("feed_forward.expand",), "mlp.fc2": ("feed_forward.contract",)}
_TOKENS: Modules = {"mlp1.fc1": ("mixing.feed_forward.expand",), "mlp1.fc2": ("mixing.feed_forward.contract",)}
_CHANNELS: Modules = {"mlp2.fc1": ("feed_forward.expand",), "mlp2.fc2": ("feed_forward.contract",)}
_TWO_NORMS: Modules = {"norm1": ("mixing_norm",), "norm2": ("feed_forward_norm",)}


class Form(NamedTuple):
    """A kind of block: the authors' name, ours, its modules, its norms, and the options that no tensor shows."""

    name: str
    generator: str
    modules: Modules
    norms: Modules  # have tensors only where they are layer norms
    hidden_options: tuple[str, ...]


_PACA_OPTIONS = ("num_heads", "norm_layer", "cluster_activation")
FORMS = (
    Form("simple_block", "linear", {}, {}, ("act_layer",)),
    Form("pamcat_attn", "paca", _CLUSTERS, {"norm": ("mixing_norm",)}, _PACA_OPTIONS),
    Form("pamcat_transformer", "paca", _CLUSTERS | _MLP, _TWO_NORMS, _PACA_OPTIONS),
    Form("transformer", "transformer", _SELF | _MLP, _TWO_NORMS, ("num_heads", "norm_layer")),
    Form("mlp", "mlp", _MLP, {"norm1": ("feed_forward_norm",)}, ("norm_layer",)),
    Form("mlp_mixer", "mixer", _TOKENS | _CHANNELS, _TWO_NORMS, ("norm_layer",)),
)
# Our name of an option, and what its values mean here, beginning with the authors' default. Left out on purpose:
# `softmax` as the assignment, which in their code runs along a batch axis of length one and makes all clusters equal,
# and any other activation, all of which there do nothing.
OPTIONS: dict[str, tuple[str, dict[Any, str | int]]] = {
    "num_heads": ("num_heads", {heads: heads for heads in range(1, 65)}),
    "norm_layer": ("norm", {"l2": "l2", "none": "none", "identity": "none", "ln": "layer"}),
    "cluster_activation": ("assignment", {"sigmoid": "sigmoid"}),
    "act_layer": ("activation", {"identity": "identity", "gelu": "gelu", "sigmoid": "sigmoid"}),
}
PREFIXES = ("gift_", "hypernet_")  # of the options: in the released code, and before it in the published files
CARD = """\
---
library_name: peft
tags: [gift]
---
Converted from `{file}`, a checkpoint in the format of GIFT's authors (arXiv 2312.00700). What is known of it stands in
`original.json`; its metric, {metric}, was not measured again. The residual is generated from the backbone's weights,
which the file does not identify: load it onto exactly those of its training.

    import gift, timm
    from peft import PeftModel
    backbone = timm.create_model("{arch}", pretrained=True, num_classes={classes})
    model = PeftModel.from_pretrained(backbone, "this/folder").eval()
"""


def convert_checkpoint(checkpoint: Path, out: Path) -> GiftConfig:
    """Write an original checkpoint as the folder of a PEFT adapter, and return the adapter's configuration.

    `PeftModel.from_pretrained(backbone, out)` loads it. Reading executes nothing: only tensors, plain containers and
    `argparse.Namespace` are read. The folder is written completely or not at all.

    Args:
        checkpoint: The file, as the authors' training script writes it (`last.pth.tar`).
        out: Folder to write, which must not exist or be empty.

    Raises:
        ValueError: If `out` holds something, or the file is damaged, of another kind, or says what cannot be expressed.
    """
    checkpoint, out = Path(checkpoint), Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder. Name a new folder; nothing was written.")
    try:
        data = _read(checkpoint)
        config, tensors, origin = _convert(_unpickle(data))
    except ValueError as error:
        raise ValueError(f"{checkpoint} cannot be converted, and nothing was written: {error}") from error
    origin |= {"file": checkpoint.name, "sha256": hashlib.sha256(data).hexdigest()}
    _write(out, config, tensors, origin)
    return config


def _read(checkpoint: Path) -> bytes:
    if not checkpoint.is_file():
        raise ValueError(f"it is {'a folder' if checkpoint.is_dir() else 'no file'}. Name the authors' .pth.tar file.")
    size = checkpoint.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"it has {size >> 20} MB, where an adapter has a few. Is it the checkpoint of a whole model?")
    return checkpoint.read_bytes()


def _unpickle(data: bytes) -> dict[str, Any]:
    """Return what a file holds, without executing anything."""
    content = None
    try:
        problem = _archive_problem(data)
        if problem is None:
            with torch.serialization.safe_globals([Namespace]):
                content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can make its reader raise nearly anything
        refused = re.search(r"GLOBAL (\S{1,80})", str(error))  # torch goes on to tell how to execute it after all
        reason = f"it asks for {refused[1]}" if refused else type(error).__name__
        problem = f"it is damaged, or holds more than tensors and options ({reason}). Fetch it again from its authors."
    if problem is None and isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        return content
    raise ValueError(problem or "it has no `state_dict`, so the authors' training script did not write it.")


def _archive_problem(data: bytes) -> str | None:
    """Return why this is no undamaged archive as torch.save writes it, if so; torch itself compares no checksums."""
    if not data.startswith(b"PK\x03\x04"):
        return f"it is no file of torch.save (1.6 or newer), but begins with {data[:8]!r}. Fetch it again."
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            return "it has compressed parts, which torch.save does not write. Fetch it again."
        if sum(entry.file_size for entry in entries) > len(data):
            return f"its parts claim to be larger than the {len(data)} bytes that it has. Fetch it again."
        if any(entry.file_size > MAX_PICKLE_BYTES for entry in entries if entry.filename.endswith(".pkl")):
            return "its names and options alone take more than 1 MB, so it is not a file of the authors."
        damaged = archive.testzip()
    return damaged and f"its part {damaged!r} is damaged: the checksum is wrong. Fetch it again."


def _check_tensors(tensors: Mapping[Any, Any]) -> None:
    """Raise ValueError unless these are ordinary, finite tensors of GIFT, together no larger than a file may be."""
    foreign = [name for name in tensors if not isinstance(name, str) or len(name) > 200 or not KEY.fullmatch(name)]
    if foreign:
        raise ValueError(f"it holds {_listed(foreign)}, which is not of GIFT. Was it trained with another method?")
    wrong = [name for name, tensor in tensors.items() if not _is_ordinary(tensor)]
    if wrong:
        raise ValueError(
            f"{_listed(wrong)} is not a plain vector or matrix of {', '.join(GENERATOR_DTYPES)}. Integer, sparse, "
            "quantised, expanded, empty and virtual tensors are none of the authors'."
        )
    if sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()) > MAX_FILE_BYTES:
        raise ValueError("its tensors share memory and show more than it has, so it is not a file of the authors.")
    wrong = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise ValueError(f"{_listed(wrong)} has NaN or infinite entries. Take a checkpoint of an earlier epoch.")


def _is_ordinary(tensor: Any) -> bool:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or vars(tensor) or tensor.is_nested:
        return False
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPES:
        return False
    stored = tensor.untyped_storage().nbytes() // tensor.itemsize  # fewer where strides are zero or overlap
    return tensor.dim() in (1, 2) and 0 < tensor.numel() <= stored


def _recorded(value: Any) -> str | int | float | None:
    """Return a short name or a number of the file as it is, and None for anything else."""
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w.:/+-]{1,100}", value, re.ASCII) else None
    return value if isinstance(value, (int, float)) and abs(value) < 2**53 else None


def _listed(values: Iterable[Any]) -> str:
    """Return values of the file for a message; no containers, a few of which can write themselves out forever."""
    shown = [repr(v[:60] if isinstance(v, str) else v if _recorded(v) is not None else type(v)) for v in values]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _convert(content: dict[str, Any]) -> tuple[GiftConfig, dict[str, Tensor], dict[str, Any]]:
    """Return the configuration, the tensors by the names PEFT stores them under, and what is recorded of the origin."""
    tensors = dict(dict.items(content["state_dict"]))
    _check_tensors(tensors)
    args = _arguments(content.get("args"))
    stored = _head({key: tensors.pop(key) for key in HEAD if key in tensors})
    targets = _by_target(tensors)
    forms = {target: _form(target, found, args) for target, found in targets.items()}
    renamed = {target: _renamed(forms[target], found) for target, found in targets.items()}
    options = {target: _options(forms[target], found, args) for target, found in renamed.items()}
    first = next(iter(targets))
    for target in targets:
        one, other = asdict(options[first]), asdict(options[target])
        unlike = {name: (one[name], other[name]) for name in one if one[name] != other[name]}
        if unlike:
            raise ValueError(
                f"its targets {first!r} and {target!r} have unlike generators, and an adapter has one kind: {unlike}. "
                "Make one checkpoint of each."
            )
    config = _config(options[first], list(targets), args, list(tensors.values()))
    origin = {name: _recorded(content.get(name)) for name in ("arch", "epoch", "version", "metric")}
    origin |= {"classes": len(stored["base_model.model.head.bias"]), "block_type": forms[first].name}
    origin |= {"options": asdict(options[first])}
    origin |= {"defaults_for_lack_of": [name for name in forms[first].hidden_options if name not in args]}
    for target, found in renamed.items():
        stored |= _generator(target, found, config)
    return config, {name: tensor.detach().clone().contiguous() for name, tensor in stored.items()}, origin


def _head(head: dict[str, Tensor]) -> dict[str, Tensor]:
    shapes = [tuple(tensor.shape) for tensor in head.values()]
    if [len(shape) for shape in shapes] != [2, 1] or shapes[0][0] != shapes[1][0]:
        names = " (classes, width) and ".join(HEAD)
        raise ValueError(f"it needs the head of an image classifier, {names} (classes), and has {shapes or 'none'}.")
    return {f"base_model.model.head.{HEAD[key]}": tensor for key, tensor in head.items()}


def _by_target(tensors: dict[str, Tensor]) -> dict[str, dict[tuple[str, str], Tensor]]:
    """Return the tensors of every target, by (projection, leaf) or by (index of the block, name in it)."""
    targets: dict[str, dict[tuple[str, str], Tensor]] = {}
    for key, tensor in tensors.items():
        if match := KEY.fullmatch(key):
            side, projected, leaf, generated, index, name = match.groups()
            targets.setdefault(projected or generated, {})[side or index, leaf or name] = tensor
    if not targets:
        raise ValueError(f"it holds a head and no {IN}. Was it trained with another method?")
    for target, found in targets.items():
        shapes = [tuple(found[side, "weight"].shape) for side in (IN, OUT) if (side, "weight") in found]
        if len(shapes) != 2 or len(shapes[0]) != 2 or shapes[0] != shapes[1][::-1]:
            raise ValueError(f"its target {target!r} needs {IN} (r, d_in) and {OUT} (d_in, r), and has {shapes}.")
    return targets


def _form(target: str, found: Mapping[tuple[str, str], Tensor], args: Mapping[str, Any]) -> Form:
    """Return the kind of a target's blocks by their modules, of which none that the options imply may be missing."""
    modules = {name.rpartition(".")[0] for index, name in found if index not in (IN, OUT)}
    named = {module for form in FORMS if form.name == args.get("block_type") for module in form.modules}
    for form in FORMS:
        if modules - form.norms.keys() == form.modules.keys() and named <= modules:
            return form
    raise ValueError(
        f"the blocks of its target {target!r} have the parts {', '.join(sorted(modules)) or 'none'}: those of no known "
        f"kind ({', '.join(form.name for form in FORMS)}), or not all of the kind its options name. Is it complete?"
    )


def _renamed(form: Form, found: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a target by their names in a `WeightGenerator`."""
    ours = {(IN, "weight"): "reduce.weight", (IN, "bias"): "reduce.bias", (OUT, "bias"): "recover_bias"}
    renamed = {ours[key]: tensor for key, tensor in found.items() if key in ours}
    renamed["recover"] = found[OUT, "weight"].T
    for (index, name), tensor in found.items():
        if index not in (IN, OUT):
            module, _, leaf = name.rpartition(".")
            parts = (form.modules | form.norms)[module]
            for part, piece in zip(parts, tensor.chunk(len(parts)), strict=False):  # what is missing is found later
                renamed[f"blocks.{index}.{part}.{leaf}"] = piece
    return renamed


def _options(form: Form, tensors: Mapping[str, Tensor], args: Mapping[str, Any]) -> GeneratorOptions:
    """Return what a generator is made of: sizes by its tensors, and by the options of the training what they hide."""
    rank = len(tensors["reduce.weight"])
    chosen: dict[str, Any] = {OPTIONS[name][0]: _answer(name, args) for name in form.hidden_options}
    if any("norm." in name for name in tensors):
        chosen["norm"] = "layer"
    sizes = {"num_clusters": "mixing.cluster", "num_mixed_tokens": "mixing.feed_forward.expand"}
    for option, name in sizes.items():
        if f"blocks.0.{name}.weight" in tensors:
            chosen[option] = len(tensors[f"blocks.0.{name}.weight"])
    if form.modules:
        hidden = len(tensors.get("blocks.0.feed_forward.expand.weight", ()))
        ratio = hidden / rank
        chosen["mlp_ratio"] = ratio if int(rank * ratio) == hidden else (hidden + 0.5) / rank  # int(7 * (61 / 7)) is 60
        chosen["num_blocks"] = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        if type(args.get("num_blocks")) is int and args["num_blocks"] > chosen["num_blocks"]:
            raise ValueError(f"its options say that it has more blocks than {chosen['num_blocks']}. Is it complete?")
    biases = {"reduce_bias": "reduce.bias" in tensors, "recover_bias": "recover_bias" in tensors}
    return GeneratorOptions(generator=form.generator, r=rank, position="none", **biases, **chosen)


def _arguments(args: Any) -> dict[str, Any]:
    """Return the options of the training by their names without prefix; a file may have none."""
    values = vars(args) if isinstance(args, Namespace) else args
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"its `args` are of type {type(args).__name__}, and not the options of a training.")
    found: dict[str, Any] = {}
    for prefix in PREFIXES:
        for name, value in (values or {}).items():
            if isinstance(name, str) and name.startswith(prefix) and value is not None:
                found.setdefault(name.removeprefix(prefix).removeprefix("block_"), value)
    return found


def _answer(name: str, args: Mapping[str, Any]) -> str | int:
    """Return our value of an option that no tensor shows."""
    meanings = OPTIONS[name][1]
    value = args.get(name, next(iter(meanings)))
    if type(value) in (str, int) and value in meanings:
        return meanings[value]
    known = "whole numbers from 1 to 64" if name == "num_heads" else ", ".join(meanings)
    raise ValueError(f"its options say {name} = {_listed([value])}, and what can be converted is {known}.")


def _layer(target: Any) -> str:
    """Return the name that a target has in a model, from the block on."""
    name = target.replace(":", ".") if isinstance(target, str) else ""
    name = NAMES_IN_BLOCK.get(name, name)
    if not LAYER.fullmatch(name):
        raise ValueError(
            f"it is not known which layers of a block its target {_listed([target])} means: known are names with a "
            f"colon, as `attn:proj`, and {', '.join(NAMES_IN_BLOCK)}. Rename it in the file."
        )
    return name


def _config(options: GeneratorOptions, targets: list[str], args: dict[str, Any], tensors: list[Tensor]) -> GiftConfig:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise ValueError(f"its generators mix the dtypes {dtypes}, and all must have one. Cast them to one.")
    is_shared = targets == [SHARED]
    named = args.get("target_modules") if is_shared else targets
    layers = [_layer(target) for target in named] if isinstance(named, list) else []
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"its targets, {_listed(layers) or 'of unknown names'}, must be different layers.")
    return GiftConfig(
        **asdict(options),
        target_modules=layers,
        modules_to_save=["head"],
        share="all" if is_shared else "kind",
        generator_dtype=str(dtypes.pop()).removeprefix("torch."),
        inference_mode=True,
    )


def _generator(target: str, tensors: dict[str, Tensor], config: GiftConfig) -> dict[str, Tensor]:
    """Return the tensors of a generator by the names PEFT stores them under, if they are all it must have."""
    columns, options = tensors["reduce.weight"].shape[1], config.generator_options()
    rows = tensors.get("blocks.0.mixing.feed_forward.expand.weight", tensors["reduce.weight"]).shape[-1]
    with torch.device("meta"):
        expected = WeightGenerator(columns, rows, options).state_dict()
        weight = torch.empty(rows, columns)
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is too many" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        if tensors[name].shape != expected[name].shape:
            problems.append(f"{name} is {tuple(tensors[name].shape)} and not {tuple(expected[name].shape)}")
    if problems:
        raise ValueError(
            f"its target {target!r} is not one complete generator. In our names: {'; '.join(sorted(problems)[:4])} "
            f"({len(problems)} in all). Fetch it again."
        )
    group = group_name(
        config, options.binds_tokens, Target(target if target == SHARED else _layer(target)), weight.shape
    )
    return {f"{GENERATORS_KEY}{group}.{name}": tensor for name, tensor in tensors.items()}


def _write(out: Path, config: GiftConfig, tensors: dict[str, Tensor], origin: dict[str, Any]) -> None:
    """Write the folder beside its place and move it there, so that it is never seen half written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gift-", dir=out.parent) as temporary:
        folder = Path(temporary, "adapter")
        config.save_pretrained(str(folder))
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / "original.json").write_text(json.dumps(origin, indent=2) + "\n")
        (folder / "README.md").write_text(CARD.format(**origin | {"arch": origin["arch"] or "name of the backbone"}))
        if out.is_dir():
            out.rmdir()  # which only works while it is empty
        folder.rename(out)
