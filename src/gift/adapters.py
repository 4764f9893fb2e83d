"""A stored adapter, or a whole fine-tuned model, back in memory: its classes, and what it takes images as.

Beside the weights lies `classifier.json`, which `gift train` writes: classes, geometry of the images, backbone, method.
Without it (another program's) an adapter's classes have numbers, a whole model names its own, and the backbone says how
it takes images.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from gift.backbones import FAMILIES
from gift.data.geometry import Geometry
from gift.pretrained import load_backbone, quiet_loading, read_geometry
from gift.tuner.saving import GENERATORS_KEY

CLASSIFIER, ONNX_MODEL = "classifier.json", "model.onnx"
OF_TRANSFORMERS = "name the run that it comes from, or merge that with --format transformers"


@dataclass(frozen=True)
class Classifier:
    """What a fine-tuned model is beside its weights.

    Attributes:
        backbone: Name of the pretrained model.
        method: What it was fine-tuned with.
        class_names: Names of the classes, in the order of the logits.
        geometry: How images become its input.
    """

    backbone: str
    method: str
    class_names: tuple[str, ...]
    geometry: Geometry

    def write(self, folder: Path) -> None:
        """Write it beside the weights."""
        (folder / CLASSIFIER).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def numbers_of(self, class_names: Sequence[str], data: Path | str) -> list[int]:
        """Return its number of every class of some data, found by name; by number where it has no names.

        Args:
            class_names: The classes of the data, in the order of their labels.
            data: What to call the data.

        Raises:
            ValueError: If it does not know one of them.
        """
        known = {name: number for number, name in enumerate(self.class_names)}
        unknown = [name for name in class_names if name not in known]
        is_numbered = self.class_names == tuple(str(number) for number in range(len(known)))
        if unknown and is_numbered and len(class_names) == len(known):
            return list(range(len(known)))
        if unknown:
            raise ValueError(
                f"{data} has {len(class_names)} classes, and the head was trained for {len(known)} "
                f"({', '.join(self.class_names[:5])}, ...). It does not know {', '.join(unknown[:5])}"
                f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}: give images of its own classes."
            )
        return [known[name] for name in class_names]


@dataclass(frozen=True)
class LoadedAdapter:
    """A model with its adapter, or one that was fine-tuned as a whole, in evaluation; and how images become its input.

    Attributes:
        model: The backbone with the adapter, or the whole model.
        classifier: Its classes and the geometry of its images.
        folder: Where it was loaded from.
    """

    model: PeftModel | PreTrainedModel
    classifier: Classifier
    folder: Path

    @property
    def image_size_px(self) -> int:
        """Side of the square images that the backbone takes."""
        return self.classifier.geometry.size_px

    @property
    def normalise(self) -> Callable[[UInt8[np.ndarray, "batch height width 3"]], Tensor]:
        """A function from pixels to what the model takes, (batch, 3, height, width)."""
        geometry = self.classifier.geometry
        return lambda pixels: normalised(pixels, geometry.mean, geometry.std)


def normalised(
    pixels: UInt8[np.ndarray, "batch height width 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Return pixels as a model takes them: scaled to 0..1, less the mean, by the standard deviation of each channel."""
    offset, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - offset) / scale


def load_adapter(folder: Path | str, backbone: str | None = None) -> LoadedAdapter:
    """Return the adapter of a folder on its backbone, which must be one for image classification.

    Args:
        folder: As `save_pretrained`, `gift train` or `gift merge --format transformers` leaves it: the adapter, the
            whole model, or the run that holds it.
        backbone: Name or folder of the backbone; by default what the adapter says it was trained on.

    Raises:
        ValueError: If the folder holds no adapter with a classification head, a model for timm or ONNX, or the backbone
            is not there.
    """
    folder = find_adapter(Path(folder))
    known = read_classifier(folder)
    if not (folder / "adapter_config.json").exists():
        model = _whole_model(folder)
        return LoadedAdapter(model, known or _guessed(folder, str(folder), "full", _names_in(model)), folder)
    name = backbone or (known.backbone if known else _backbone_of(folder))
    known = known or _guessed(folder, name, "adapter", _numbered_classes(folder))
    heads = _head_sizes(folder)
    if not heads:
        raise ValueError(f"{folder} holds an adapter without a head: train it with one, which is the default.")
    if len(known.class_names) not in heads:
        raise ValueError(f"{folder} has a head for {heads} classes, and {CLASSIFIER} names {len(known.class_names)}.")
    try:
        model = load_backbone(name, known.class_names)
    except ValueError as error:
        raise ValueError(f"The backbone of {folder} cannot be loaded. {error}") from error
    with quiet_loading():
        return LoadedAdapter(PeftModel.from_pretrained(model, str(folder)).eval(), known, folder)


def find_adapter(folder: Path) -> Path:
    """Return the folder of the weights: this one, or that inside a run.

    Raises:
        ValueError: If there is none.
    """
    for found in (folder, folder / "adapter", folder / "model"):
        weights = SAFETENSORS_WEIGHTS_NAME if (found / "adapter_config.json").exists() else SAFE_WEIGHTS_NAME
        if (found / weights).exists():
            return found
    if (folder / ONNX_MODEL).exists():
        raise ValueError(f"{folder} holds a model for ONNX, which only its own programs read: {OF_TRANSFORMERS}.")
    raise ValueError(
        f"{folder} holds no adapter that can be read: name the folder of a run of `gift train`, or one with "
        f"adapter_config.json and {SAFETENSORS_WEIGHTS_NAME}."
    )


def read_classifier(folder: Path) -> Classifier | None:
    """Return what `classifier.json` says, or None if there is no such file.

    Raises:
        ValueError: If it is damaged.
    """
    path = folder / CLASSIFIER
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text())
        pairs = {name: tuple(stored["geometry"][name]) for name in ("mean", "std")}
        geometry = Geometry(**(stored["geometry"] | pairs))
        return Classifier(stored["backbone"], stored["method"], tuple(stored["class_names"]), geometry)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Take it from a copy of the run.") from error


def _guessed(folder: Path, name: str, method: str, class_names: tuple[str, ...]) -> Classifier:
    """Return what can be said without `classifier.json`: geometry as the backbone says."""
    try:
        return Classifier(name, method, class_names, read_geometry(name))
    except OSError as error:
        raise ValueError(f"The backbone {name} of {folder} cannot be loaded: {error}. Name another.") from error


def _numbered_classes(folder: Path) -> tuple[str, ...]:
    sizes = sorted(set(_head_sizes(folder)))
    if len(sizes) != 1:
        raise ValueError(f"{folder} must hold an adapter with one classification head, got heads of {sizes} classes.")
    return tuple(str(number) for number in range(sizes[0]))


def _names_in(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the class names of a loaded model; the file of a timm model keeps them in words of its own."""
    labels: dict[Any, Any] = model.config.id2label or {}
    return tuple(str(labels[number]) for number in sorted(labels))


def _head_sizes(folder: Path) -> list[int]:
    """Return the number of classes of every head of an adapter: what is stored under the head's own name."""
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no adapter that can be read: {error}.") from error
    heads = tuple(f".{head}.weight" for family in FAMILIES for head in family.head)
    return [s[0] for name, s in shapes.items() if name.endswith(heads) and not name.startswith(GENERATORS_KEY)]


def _backbone_of(folder: Path) -> str:
    try:
        name = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except ValueError as error:
        raise ValueError(f"{folder} holds no adapter that can be read: {error}.") from error
    if not name:
        raise ValueError(f"{folder} does not say which backbone it belongs to: name it.")
    return name


def _whole_model(folder: Path) -> PreTrainedModel:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no model that can be read: {error}.") from error
    if "architecture" in config and "model_type" not in config:
        raise ValueError(f"{folder} holds a model for timm, which only timm reads: {OF_TRANSFORMERS}.")
    try:
        with quiet_loading():
            return AutoModelForImageClassification.from_pretrained(str(folder)).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no model that can be read: {error}.") from error
