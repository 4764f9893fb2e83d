"""Every option of GIFT, its default and its check."""

import json
import math
import os
import re
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import PeftType

from gift.tuner.options import GeneratorOptions, check_choice, check_number

SHARINGS = ("all", "kind", "layer")
APPLICATIONS = ("auto", "factored", "dense")
GENERATOR_DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass
class GiftConfig(GeneratorOptions, PeftConfig):
    """Configuration of GIFT for `peft.get_peft_model`; the options of the generator are those of `GeneratorOptions`.

    Args:
        target_modules: Linear layers to adapt: a list of names or of their last components, a regular expression for
            whole names, or `all-linear`. Parts of a fused layer are written `attn.qkv[q]`, `attn.qkv[v]`. By default
            the final projection of every self-attention, for the families of `gift.backbones`.
        exclude_modules: Names (list) or regular expression (str) of layers to leave out.
        layers_to_transform: Index or indices of the blocks to adapt; by default all.
        layers_pattern: Name of the module list the index belongs to, if the first number in a name is not it.
        modules_to_save: Further modules to train and to store. By default the classification head, where the family
            has a known one; `[]` trains none.
        share: Which targets share a generator: `all`, those of the same `kind` (query, value, projection, ...), or none
            (`layer`: one each). Targets of different `in_features` never share.
        scaling: Factor on the residual.
        apply: How the residual is applied: `factored`, `dense` (added to the weight before the product), or `auto` by
            measured speed. In half precision and under autocast it is always factored, since adding would round
            small residuals away.
        generator_dtype: Dtype in which the generator is held and computes, whatever the backbone's.
        fingerprint: Filled in when the adapter is saved: a few numbers for the frozen weight of every target, by
            which loading onto other weights is noticed.
        rank_pattern: Refused: layers that share a generator share its rank.
        alpha_pattern: Refused, as `rank_pattern`.

    Raises:
        ValueError: If an option is unknown or does not make sense.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    share: str = "all"
    scaling: float | int = 1.0
    apply: str = "auto"
    generator_dtype: str = "float32"
    fingerprint: dict[str, list[float]] | None = field(default=None, repr=False)
    rank_pattern: InitVar[dict[str, int] | None] = None
    alpha_pattern: InitVar[dict[str, float] | None] = None

    def __post_init__(  # type: ignore[override]
        self, rank_pattern: dict[str, int] | None, alpha_pattern: dict[str, float] | None
    ) -> None:
        """Check every option and bring names into PEFT's form (sets)."""
        PeftConfig.__post_init__(self)
        GeneratorOptions.__post_init__(self)
        self.peft_type = PeftType("GIFT")
        self._folder: Path | None = None  # where it was read from
        self._is_loading = False  # whether PEFT is about to load the weights beside it
        if rank_pattern or alpha_pattern:
            raise ValueError(
                "rank_pattern and alpha_pattern are not supported: all layers that share a generator have its rank. "
                "Train two adapters with different target_modules instead."
            )
        check_choice("share", self.share, SHARINGS)
        check_choice("apply", self.apply, APPLICATIONS)
        check_choice("generator_dtype", self.generator_dtype, GENERATOR_DTYPES)
        check_number("scaling", self.scaling)
        _check_fingerprint(self.fingerprint)
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save must be a list of names, got {self.modules_to_save!r}.")
        self.target_modules = _as_names("target_modules", self.target_modules)  # type: ignore[assignment]
        self.exclude_modules = _as_names("exclude_modules", self.exclude_modules)  # type: ignore[assignment]
        indices = self.layers_to_transform if isinstance(self.layers_to_transform, list) else [self.layers_to_transform]
        if not all(index is None or type(index) is int for index in indices):
            raise ValueError(f"layers_to_transform must be whole numbers, got {self.layers_to_transform!r}.")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules as a list of names, not a regular expression.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is only used together with layers_to_transform: give that too.")

    def __setattr__(self, name: str, value: Any) -> None:
        """Notice that PEFT is about to load an adapter: it sets `inference_mode` of what was read from a folder.

        So may a user who makes a new adapter of it; then `get_peft_model` sets the name of the backbone after that.
        """
        super().__setattr__(name, value)
        if name in ("inference_mode", "base_model_name_or_path") and self.__dict__.get("_folder") is not None:
            self._is_loading = name == "inference_mode"

    def folder_being_loaded(self) -> Path | None:
        """Return the local folder whose weights PEFT is about to load, once; None when an adapter is made anew."""
        folder = self._folder if self._is_loading else None
        self._folder, self._is_loading = None, False
        return folder

    @property
    def torch_dtype(self) -> torch.dtype:
        """The generator's dtype as torch names it."""
        return getattr(torch, self.generator_dtype)

    def generator_options(self) -> GeneratorOptions:
        """Return the part of the options that a generator is made from."""
        return GeneratorOptions(**{option.name: getattr(self, option.name) for option in fields(GeneratorOptions)})

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> "GiftConfig":
        """Return the configuration stored in a folder or hub repository, as PEFT does, but refuse incomplete ones.

        The folder is remembered, so that the weights beside it are checked before a model is touched.

        Raises:
            ValueError: If the file is damaged or lacks an option.
        """
        config = super().from_pretrained(str(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if not isinstance(config, cls):
            raise ValueError(f"{folder} holds an adapter of type {config.peft_type}, not of GIFT.")
        if (folder / "adapter_config.json").is_file():
            stored = json.loads((folder / "adapter_config.json").read_text())
            own = {option.name for option in fields(cls)} - {option.name for option in fields(PeftConfig)}
            missing = sorted(own - set(stored))
            if missing:
                raise ValueError(f"{folder / 'adapter_config.json'} is damaged: it lacks {', '.join(missing)}.")
            config._folder = folder
        return config


def _as_names(option: str, names: Any) -> set[str] | str | None:
    """Return a list of names as a set, as PEFT keeps them; a string or None stays."""
    if isinstance(names, str) and re.fullmatch(r"[\w.]+\[[qkv]\]", names):
        return {names}  # a part of a fused layer, not a regular expression
    if names is None or isinstance(names, str):
        return names
    if not isinstance(names, (list, tuple, set)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{option} must be a list of names or one string, got {names!r}.")
    return set(names)


def _check_fingerprint(fingerprint: Any) -> None:
    """Raise ValueError unless this is None or what `gift.tuner.saving.fingerprint` gives, by target."""
    if fingerprint is None:
        return
    whole = isinstance(fingerprint, dict) and all(isinstance(numbers, list) for numbers in fingerprint.values())
    numbers = [number for of_one in fingerprint.values() for number in of_one] if whole else [None]
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
        raise ValueError(f"fingerprint must be lists of finite numbers by target, got {str(fingerprint)[:60]}.")
