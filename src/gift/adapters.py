"""A stored adapter back on its backbone, and what that takes images as."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from gift.backbones import SMALL_BACKBONE
from gift.tuner.saving import GENERATORS_KEY


@dataclass(frozen=True)
class LoadedAdapter:
    """A model with its adapter, in evaluation, and how images become its input.

    Attributes:
        model: The backbone with the adapter.
        image_size_px: Side of the square images that the backbone takes.
        mean: Of every channel, of pixels from 0 to 1.
        std: Of every channel.
    """

    model: PeftModel
    image_size_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def normalise(self) -> Callable[[UInt8[np.ndarray, "batch height width 3"]], Tensor]:
        """A function from pixels to what the model takes, (batch, 3, height, width)."""
        return lambda pixels: normalised(pixels, self.mean, self.std)


def normalised(
    pixels: UInt8[np.ndarray, "batch height width 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Return pixels as a model takes them: scaled to 0..1, less the mean, by the standard deviation of each channel."""
    offset, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - offset) / scale


def load_adapter(folder: Path | str, backbone: str | None = None) -> LoadedAdapter:
    """Return the adapter of a folder on its backbone, which must be one for image classification.

    Args:
        folder: As `save_pretrained` leaves it.
        backbone: Name or folder of the backbone for transformers; by default what the adapter says it was trained on.

    Raises:
        ValueError: If the folder holds no adapter with a classification head, or the backbone is not there.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no adapter that can be read: {error}.") from error
    heads = [shape[0] for name, shape in shapes.items() if not name.startswith(GENERATORS_KEY) and len(shape) == 2]
    if len(set(heads)) != 1:
        raise ValueError(f"{folder} must hold an adapter with one classification head, got heads of {heads} classes.")
    name = backbone or _backbone_of(folder, config)
    try:
        model = AutoModelForImageClassification.from_pretrained(name, num_labels=heads[0], ignore_mismatched_sizes=True)
        processor: Any = AutoImageProcessor.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"The backbone {name} of {folder} cannot be loaded: {error}. Name another.") from error
    adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    return LoadedAdapter(adapted, *_preprocessing(processor))


def _backbone_of(folder: Path, config: dict[str, Any]) -> str:
    name = config.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{folder} does not say which backbone it belongs to: name it.")
    # A folder of another machine; the small backbone comes with the package.
    is_shipped = not Path(name).exists() and Path(name).name == SMALL_BACKBONE.name
    return str(SMALL_BACKBONE) if is_shipped else name


def _preprocessing(processor: Any) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Return side of the images in pixels, mean and standard deviation, as a processor of timm or transformers says."""
    if hasattr(processor, "data_config"):
        data = processor.data_config
        return data["input_size"][-1], tuple(data["mean"]), tuple(data["std"])
    size = getattr(processor, "crop_size", None) or processor.size
    side = size.get("height") or size.get("shortest_edge")
    return int(side), tuple(processor.image_mean), tuple(processor.image_std)
