"""The methods of a comparison, by name: what `finetune` is to be given for each."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, Literal

from peft import LoraConfig, PeftConfig, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from torch import nn
from transformers import PreTrainedModel

from gift.backbones import default_targets, plain_vit
from gift.baselines.bitfit import BitFitConfig
from gift.baselines.toast import ToastConfig
from gift.baselines.vpt import VptConfig
from gift.tuner.config import GiftConfig

FULL: Literal["full"] = "full"

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "gift": "residuals generated from the frozen weights",
        "linear-probe": "the head and nothing else",
        "full": "every weight",
        "bitfit": "all biases and the head",
        "lora": "low-rank residuals, by default r=8 and lora_alpha=8, that is, scale 1",
        "dora": "LoRA with a trained norm for every output, defaults as for lora",
        "vera": "random low-rank residuals with trained scales",
        "vpt-shallow": "prompt tokens before the first block",
        "vpt-deep": "prompt tokens in every block",
        "toast": "a trained feedback path steers attention in a second pass",
        "toast-lite": "the same, with LoRA on a frozen feedback path",
    }
)

LORA_DEFAULTS = {"r": 8, "lora_alpha": 8}
# name -> class of the configuration, the options that make the method what it is, defaults of ours
_OWN: dict[str, tuple[type[PeftConfig], dict[str, Any], dict[str, Any]]] = {
    "gift": (GiftConfig, {}, {}),
    "bitfit": (BitFitConfig, {}, {}),
    "lora": (LoraConfig, {"use_dora": False}, LORA_DEFAULTS),
    "dora": (LoraConfig, {"use_dora": True}, LORA_DEFAULTS),
    "vpt-shallow": (VptConfig, {"deep": False}, {}),
    "vpt-deep": (VptConfig, {"deep": True}, {}),
    "toast": (ToastConfig, {"lite": False}, {}),
    "toast-lite": (ToastConfig, {"lite": True}, {}),
}
_OF_LANGUAGE_MODELS = "is made for the tokens of language models; prompts of images are vpt-shallow and vpt-deep"
_REFUSED = {
    "adaption_prompt": _OF_LANGUAGE_MODELS,
    "trainable_tokens": _OF_LANGUAGE_MODELS,
    "poly": "needs the number of its task with every image, which image classifiers do not pass on",
    "xlora": "mixes adapters that were trained before, of language models",
    "shadow": "is made for language models: it copies their decoder blocks",
}
# Options that PEFT does not guess for image models.
_DEFAULTS = {"ia3": {"feedforward_modules": []}}
_SET_BY_PEFT = {field.name for field in fields(PeftConfig)} | {"peft_type", "inference_mode", "task_type"}


def method_config(
    name: str, backbone: PreTrainedModel, options: Mapping[str, Any]
) -> PeftConfig | Literal["full"] | None:
    """Return what trains a backbone by the method of this name.

    Args:
        name: A name of `METHODS`, or that of another PEFT type in small letters, such as `ia3`.
        backbone: The image classifier; it is looked at for the layers to adapt.
        options: Options of the method's configuration, by name; they replace the defaults.

    Returns:
        The configuration; None for a linear probe; `FULL` for full fine-tuning.

    Raises:
        ValueError: If method or option are unknown, an option does not make sense, the method cannot work on image
            classifiers, or the layers to adapt are unknown.
    """
    name = name.lower()
    _check_can_be_used(name)
    if name in ("linear-probe", FULL):
        _check_options(name, options, set(), {})
        return None if name == "linear-probe" else FULL
    peft_type: Any = name.upper()
    config_class, fixed, defaults = _OWN.get(
        name, (PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type), {}, _DEFAULTS.get(name, {}))
    )
    assert config_class is not None
    known = {field.name for field in fields(config_class) if field.init} - _SET_BY_PEFT
    _check_options(name, options, known, fixed)
    chosen = {**defaults, **options, **fixed}
    if config_class in (VptConfig, ToastConfig):
        plain_vit(backbone)  # raises with the reason, before anyone reads data
    if "target_modules" in known and name != "gift" and chosen.get("target_modules") is None:
        chosen["target_modules"] = _targets(name, backbone)
    try:
        return config_class(**chosen)
    except TypeError as error:
        raise ValueError(f"The options of {name} do not fit together: {error}.") from error


def method_names() -> list[str]:
    """Return the names of all methods: those of `METHODS`, then the others of PEFT that work on image classifiers."""
    types = {peft_type.value.lower() for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING}
    return [*METHODS, *sorted(name for name in types - set(METHODS) if _reason_against(name) is None)]


def _reason_against(name: str) -> str | None:
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(name.upper())  # type: ignore[call-overload]
    if name not in _OWN and config_class is not None and issubclass(config_class, PromptLearningConfig):
        return _OF_LANGUAGE_MODELS
    return _REFUSED.get(name)


def _check_can_be_used(name: str) -> None:
    reason = _reason_against(name)
    if reason is not None:
        raise ValueError(f"{name} cannot train an image classifier: it {reason}.")
    if name not in METHODS and name.upper() not in set(PeftType):
        nearest = _nearest(name, list(METHODS)) or _nearest(name, method_names())
        raise ValueError(f"There is no method {name!r}.{nearest} Methods: {', '.join(method_names())}.")


def _check_options(name: str, options: Mapping[str, Any], known: set[str], fixed: Mapping[str, Any]) -> None:
    for option, value in options.items():
        if option in fixed and value != fixed[option]:
            raise ValueError(f"{option}={value!r} is not an option of {name}, which is {option}={fixed[option]!r}.")
        if option not in known:
            listed = ", ".join(sorted(known - set(fixed))) or "none"
            raise ValueError(
                f"{name} has no option {option!r}.{_nearest(option, sorted(known))} Its options: {listed}."
            )


def _nearest(word: str, words: list[str]) -> str:
    found = difflib.get_close_matches(word.lower(), words, n=1)
    return f" Did you mean {found[0]!r}?" if found else ""


def _targets(name: str, backbone: nn.Module) -> list[str]:
    if name == "ln_tuning":
        targets = [layer for layer, module in backbone.named_modules() if isinstance(module, nn.LayerNorm)]
    else:
        targets = list(default_targets(backbone) or ())
    if not targets:
        raise ValueError(
            f"The layers that {name} should adapt in {type(backbone).__name__} are unknown. Pass target_modules."
        )
    return targets
