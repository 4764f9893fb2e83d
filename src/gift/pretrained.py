"""A pretrained backbone by its name, with a new head, and what it takes images as."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging

from gift.backbones import SMALL_BACKBONE, classification_heads
from gift.data.geometry import Geometry

SMALL = "small"  # the backbone that comes with the package
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # by PIL's number; others become bicubic


def resolve_model(name: str) -> str:
    """Return what transformers loads for a name: `small`, a folder, a hub id, or a name of timm.

    A folder that is not there but is called as the small backbone is, on another machine, is the small backbone.
    """
    if name == SMALL or (Path(name).name == SMALL_BACKBONE.name and not Path(name).exists()):
        return str(SMALL_BACKBONE)
    if "/" not in name and not Path(name).exists() and timm.is_model(name.partition(".")[0]):
        return f"timm/{name}"
    return name


def portable_name(name: str) -> str:
    """Return a model's name as others can use it: `small`, a whole path, or what transformers loads."""
    resolved = resolve_model(name)
    if resolved == str(SMALL_BACKBONE):
        return SMALL
    return str(Path(resolved).absolute()) if Path(resolved).exists() else resolved


def load_backbone(name: str, class_names: Sequence[str], drop_path: float | int = 0) -> PreTrainedModel:
    """Return a classifier with pretrained weights and a head for these classes, new unless it fits.

    The values of a new head come from torch's global generator.

    Args:
        name: See `resolve_model`.
        class_names: Names of the classes; stored in the model's configuration.
        drop_path: Rate of stochastic depth in the last block, rising linearly from the first.

    Raises:
        ValueError: If there is no such model, it is no image classifier, or its family has no drop path.
    """
    resolved = resolve_model(name)
    if "/" not in resolved and not Path(resolved).exists():
        raise ValueError(f"The model {name} cannot be loaded: there is no such folder, and timm does not know it.")
    try:
        with quiet_loading():
            config = AutoConfig.from_pretrained(resolved, num_labels=len(class_names))
            config.id2label = dict(enumerate(class_names))
            if hasattr(config, "label_names"):  # where timm's wrapper keeps the names that it stores
                config.label_names = list(class_names)
            config.label2id = {class_name: number for number, class_name in enumerate(class_names)}
            _set_drop_path(config, name, drop_path)
            model, loading = AutoModelForImageClassification.from_pretrained(
                resolved, config=config, ignore_mismatched_sizes=True, output_loading_info=True
            )
    except OSError as error:
        raise ValueError(
            f"The model {name} cannot be loaded: {_first_line(error)} Give `{SMALL}` (the backbone that comes with the "
            "package), a folder that save_pretrained wrote, a hub id or a name that timm knows."
        ) from error
    except (ValueError, KeyError) as error:
        if "drop path" in str(error):
            raise
        raise ValueError(f"The model {name} is no classifier of images: {_first_line(error)}") from error
    _check_loaded(name, model, loading)
    return model


def _check_loaded(name: str, model: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Raise ValueError if anything but a head is new: it would stay random under an adapter."""
    heads = tuple(f"{head}." for head in classification_heads(model))
    new = [*loading["missing_keys"], *(str(key[0]) for key in loading["mismatched_keys"])]
    new = sorted(key for key in new if not key.startswith(heads))
    if new:
        raise ValueError(
            f"The model {name} lacks weights of its own, or they have other shapes: {', '.join(new[:4])}"
            f"{f' and {len(new) - 4} more' if len(new) > 4 else ''}. Is the folder damaged, or of another architecture?"
        )


def check_takes(model: PreTrainedModel, geometry: Geometry) -> None:
    """Raise ValueError if a model does not take images of this size."""
    image = torch.zeros(1, 3, geometry.size_px, geometry.size_px, device=model.device)
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(pixel_values=image)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The backbone does not take images of {geometry.size_px} px: {_first_line(error)} Leave image_size_px out."
        ) from error
    finally:
        model.train(was_training)


def _set_drop_path(config: Any, name: str, drop_path: float | int) -> None:
    """Ask for stochastic depth where the model's family calls it; forget what timm must not be told twice."""
    if config.model_type == "timm_wrapper":
        # A folder that timm wrote names the number of classes here too, where it would win over the new head.
        arguments = {key: value for key, value in (config.model_args or {}).items() if key != "num_classes"}
        config.model_args = arguments | ({"drop_path_rate": drop_path} if drop_path else {})
    elif hasattr(config, "drop_path_rate"):
        config.drop_path_rate = drop_path
    elif drop_path:
        raise ValueError(f"{name} ({config.model_type}) has no drop path: set drop_path to 0, or take a timm model.")


def read_geometry(name: str, **changes: Any) -> Geometry:
    """Return what a model takes images as: side, mean, standard deviation and interpolation, as it says itself.

    Args:
        name: See `resolve_model`.
        changes: Fields of `Geometry` to set otherwise; None leaves a field as the model says.
    """
    resolved = resolve_model(name)
    with quiet_loading():
        try:
            said = _said(AutoImageProcessor.from_pretrained(resolved))
        except OSError:
            size = getattr(AutoConfig.from_pretrained(resolved), "image_size", 224)
            said = {"size_px": size, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic"}
            logging.get_logger(__name__).warning("%s does not say how it takes images: ImageNet's mean is taken.", name)
    return Geometry(**(said | {field: value for field, value in changes.items() if value is not None}))


def _said(processor: Any) -> dict[str, Any]:
    """Return what a processor of timm or transformers says."""
    if hasattr(processor, "data_config"):
        data = processor.data_config
        said = {"size_px": data["input_size"][-1], "mean": tuple(data["mean"]), "std": tuple(data["std"])}
        return said | {"interpolation": data["interpolation"] if data["interpolation"] == "bilinear" else "bicubic"}
    size = getattr(processor, "crop_size", None) or processor.size
    side = size.get("height") or size.get("shortest_edge")
    said = {"size_px": int(side), "mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    return said | {"interpolation": INTERPOLATIONS.get(int(processor.resample), "bicubic")}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") + "."


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Say nothing of heads that are new, as they should be, and of what PEFT reads from transformers."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
