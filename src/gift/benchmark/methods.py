"""What `--methods` names: a way to fine-tune, its options, its title in tables, the learning rates to search."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig
from transformers import PreTrainedModel

from gift.backbones import classification_heads
from gift.baselines.methods import LORA_DEFAULTS, method_config
from gift.baselines.toast import ToastConfig
from gift.baselines.vpt import VptConfig
from gift.benchmark.suites import Protocol
from gift.pretrained import load_backbone
from gift.tuner.config import GiftConfig

OF_TRAINING = "train."
# Options of `gift train` that a method may have for itself; the others are set for all, or by the benchmark.
TRAINING = ("head_learning_rate", "warmup_ratio", "schedule", "optimizer", "batch_size", "accumulation", "precision")
TRAINING += ("label_smoothing", "mixup", "cutmix", "ema", "diversity", "reconstruction", "workers", "drop_path")
TRAINING += ("image_size_px",)
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # YAML takes 1e-3 for a word
ALIASES = {"gift-paca": ("gift", {"generator": "paca"}), "gift-linear": ("gift", {"generator": "linear"})}
DEFAULT_METHODS = ("linear-probe", "bitfit", "lora", "vpt-deep", "toast-lite", "gift-paca", "gift-linear")
_TITLES = {"linear-probe": "linear probe", "full": "full fine-tuning", "bitfit": "BitFit", "lora": "LoRA"}
_TITLES |= {"dora": "DoRA", "vera": "VeRA", "vpt-deep": "VPT-deep", "vpt-shallow": "VPT-shallow"}
_TITLES |= {"toast": "TOAST", "toast-lite": "TOAST-lite", "gift": "GIFT"}


@dataclass(frozen=True)
class BenchmarkMethod:
    """A method of a benchmark.

    Attributes:
        name: As it was asked for; results are stored under it.
        title: For tables.
        options: Of `gift train`: the method, its options and how it is trained.
        rates: Learning rates to search, ascending.
        made_of: What decides its results beside these, for its lines: every option of its configuration, digests of the
            backbone and of what else it starts from.
    """

    name: str
    title: str
    options: dict[str, Any]
    rates: tuple[float, ...]
    made_of: dict[str, Any] = field(default_factory=dict)


def read_methods(names: Sequence[str], protocol: Protocol) -> list[BenchmarkMethod]:
    """Return the methods that are asked for.

    Args:
        names: Each `NAME` or `NAME:OPTION=VALUE,...`, such as `lora:r=4` or `gift-paca:r=8,num_clusters=32`; NAME as
            for `gift train --method`, or `gift-paca`, `gift-linear`. An option `train.NAME` is one of `gift train`:
            `gift-paca:train.warmup_ratio=0.2`.
        protocol: Of the suite.

    Raises:
        ValueError: If a method or an option is unknown or stands there twice.
    """
    doubled = sorted({name for name in names if list(names).count(name) > 1})
    if doubled or not names:
        raise ValueError(f"Name each method once{f', got {doubled[0]} twice' if doubled else ', got none'}.")
    return [_read_method(name, protocol) for name in names]


def _read_method(name: str, protocol: Protocol) -> BenchmarkMethod:
    given, _, text = name.partition(":")
    method, fixed = ALIASES.get(given, (given.lower(), {}))
    own, of_training = {}, {}
    for part in _split(text):
        key, found, value = part.partition("=")
        if not found or not key.strip():
            raise ValueError(f"The method {name!r} must read NAME:OPTION=VALUE,OPTION=VALUE; {part!r} is no option.")
        is_of_training = key.strip().startswith(OF_TRAINING)
        (of_training if is_of_training else own)[key.strip().removeprefix(OF_TRAINING)] = _read_value(value)
    _check_training(name, of_training)
    of_method = dict(protocol.of_methods.get(method, {}))
    method_options = {**of_method.pop("method_options", {}), **fixed, **own}
    options = {**protocol.options, **of_method, **of_training, "method": method, "method_options": method_options}
    title = _title(method, method_options, own | of_training)
    return BenchmarkMethod(name, title, options, protocol.rates_of(method))


def _split(text: str) -> list[str]:
    """Return what stands between the commas that are in no brackets: a list, of parts of layers perhaps, is one."""
    parts, depth = [""] if text else [], 0
    if text.count("[") != text.count("]"):
        raise ValueError(f"The brackets in {text!r} do not match.")
    for letter in text:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _read_value(text: str) -> Any:
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return [_read_value(one) for one in _split(text[1:-1])]
    return float(text) if _NUMBER.fullmatch(text) else yaml.safe_load(text)


def _check_training(name: str, options: dict[str, Any]) -> None:
    for option in options:
        if option not in TRAINING:
            allowed = ", ".join(TRAINING)
            raise ValueError(
                f"{OF_TRAINING}{option} in the method {name!r} cannot be set for one method: {allowed} can."
            )


def _title(method: str, options: dict[str, Any], named: dict[str, Any]) -> str:
    """Return what a method is called in tables: with its size, and with whatever was named beyond that."""
    title, sizes = _TITLES.get(method, method), {}
    if method == "gift":
        defaults = GiftConfig()
        generator = options.get("generator", defaults.generator)
        title += f" {generator}"
        sizes = {"r": ("r", defaults.r)} | (
            {"num_clusters": ("M", defaults.num_clusters)} if generator == "paca" else {}
        )
    elif method in ("lora", "dora"):
        sizes = {"r": ("r", LORA_DEFAULTS["r"])}
    elif method.startswith("vpt"):
        sizes = {"num_prompts": ("p", VptConfig().num_prompts)}
    elif method.startswith("toast"):
        title += ", pre-trained feedback" if options.get("feedback", ToastConfig().feedback) else ", random feedback"
    said = {"generator", "feedback", *sizes} if method in _TITLES else set()
    shown = [f"{sign}={options.get(key, default)}" for key, (sign, default) in sizes.items()]
    return " ".join([title, *shown, *(f"{key}={value}" for key, value in named.items() if key not in said)])


def resolve_methods(methods: Sequence[BenchmarkMethod], model: str) -> list[BenchmarkMethod]:
    """Return the methods with what they are made of on this backbone, before anything is trained.

    Raises:
        ValueError: If the backbone is no classifier of images, or a method or an option of it is unknown. Layers that
            are not there are found out when a run starts.
    """
    backbones: dict[float, PreTrainedModel] = {}
    resolved = []
    for method in methods:
        drop_path = method.options.get("drop_path", 0)
        if drop_path not in backbones:
            backbones[drop_path] = load_backbone(model, ("a", "b"), drop_path)
        config = method_config(method.options["method"], backbones[drop_path], method.options["method_options"])
        made_of = {"backbone_digest": _digest_of_backbone(backbones[drop_path]), "adapter": _as_json(config)}
        feedback = method.options["method_options"].get("feedback")
        if feedback and Path(feedback).is_dir():
            made_of["feedback_digest"] = _digest(
                path.read_bytes() for path in sorted(Path(feedback).glob("*.safetensors"))
            )
        resolved.append(replace(method, made_of=made_of))
    return resolved


def _digest_of_backbone(backbone: PreTrainedModel) -> str:
    heads = tuple(f"{head}." for head in classification_heads(backbone))
    weights = {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith(heads)}
    return _digest(part for name in sorted(weights) for part in (name.encode(), weights[name].cpu().numpy().tobytes()))


def _digest(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _as_json(config: PeftConfig | str | None) -> dict[str, Any]:
    """Return every option of a configuration that is set, defaults of today too, as JSON holds them."""
    if not isinstance(config, PeftConfig):
        return {}
    options = json.loads(
        json.dumps(config.to_dict(), default=lambda it: sorted(it) if isinstance(it, set) else str(it))
    )
    return {name: value for name, value in options.items() if value is not None}
