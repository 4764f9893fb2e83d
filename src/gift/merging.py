"""A fine-tuned model without its adapter, in the form of the library that is to run it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, BitImageProcessor, PreTrainedModel

from gift.adapters import ONNX_MODEL, LoadedAdapter, load_adapter
from gift.data.geometry import FILTERS, Geometry
from gift.explain.assignments import Assignments, explained_model, with_fingerprints
from gift.pretrained import quiet_loading
from gift.tuner.options import check_choice

TIMM = "timm_model."  # what transformers puts before the names of timm's layers
FORMATS = ("transformers", "timm", "onnx")
IMAGES_COMPARED = 4
TOLERANCE = 1e-3  # of logits, relative to the largest


def merge(adapter: Path | str, out: Path | str, form: str = "transformers", backbone: str | None = None) -> float:
    """Write the merged model, load it in its library, and return the largest difference of its logits on noise.

    Beside the model lies `classifier.json`, and after GIFT with clusters `clusters.safetensors`, for `explain_images`.

    Args:
        adapter: Folder of an adapter, of a run or of a model that was fine-tuned as a whole.
        out: Folder to write; must not exist or be empty. It is written as a whole or not at all.
        form: `transformers` (for `AutoModelForImageClassification`), `timm` (for
            `timm.create_model("local-dir:OUT", pretrained=True)`; timm's models only), or `onnx` (`model.onnx` from
            `pixel_values` (batch, 3, size, size) to `logits`, for any batch).
        backbone: Name or folder of the backbone; by default what the adapter says.

    Raises:
        ValueError: If `out` holds something, the method cannot be merged, the model is not of that library, or the
            written model gives other logits; nothing is left then.
    """
    out = Path(out)
    check_choice("format", form, FORMATS)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder. Name a new folder; nothing was written.")
    loaded = load_adapter(adapter, backbone)
    size = loaded.image_size_px
    images = torch.randn(IMAGES_COMPARED, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = loaded.model(pixel_values=images).logits
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        reload = {"transformers": _to_transformers, "timm": _to_timm, "onnx": _to_onnx}[form]
        merged, clusters = _merged(loaded)
        after = reload(merged, loaded, partial)(images)
        difference = float((after - before).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(before.abs().max())):
            raise ValueError(f"The {form} model gives logits that differ by {difference:.1e}; nothing was written.")
        loaded.classifier.write(partial)
        if clusters is not None:
            _named_as_in(form, clusters).save(partial)
        out.mkdir(parents=True, exist_ok=True)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return difference


Run = Callable[[Float[Tensor, "batch 3 height width"]], Float[Tensor, "batch classes"]]


def without_adapter(model: PeftModel, method: str) -> PreTrainedModel:
    """Return the model with its adapter merged into it, in place.

    Raises:
        ValueError: If the method cannot be merged.
    """
    try:
        merged: Any = model.merge_and_unload(safe_merge=True)
    except NotImplementedError as error:
        raise ValueError(f"{method} cannot be merged: {error or 'PEFT does not know how'}.") from error
    if any(isinstance(module, BaseTunerLayer) for module in merged.modules()):
        raise ValueError(f"{method} left layers of its own in the model: it cannot be merged.")
    return merged


def _merged(loaded: LoadedAdapter) -> tuple[PreTrainedModel, Assignments | None]:
    """Return the model without adapter, and its clusters if it has some."""
    model = loaded.model
    if not isinstance(model, PeftModel):
        return model, None
    has_clusters = getattr(model.active_peft_config, "generator", None) in ("paca", "linear")
    clusters = explained_model(model, -1).assignments if has_clusters else None
    merged = without_adapter(model, loaded.classifier.method)
    return merged, None if clusters is None else with_fingerprints(clusters, merged)


def _named_as_in(form: str, clusters: Assignments) -> Assignments:
    """Return clusters whose layers are called as the library calls them."""
    if form != "timm":
        return clusters
    matrices = {name.removeprefix(TIMM): matrix for name, matrix in clusters.matrices.items()}
    return replace(
        clusters,
        matrices=matrices,
        fingerprints={name.removeprefix(TIMM): numbers for name, numbers in clusters.fingerprints.items()},
    )


def _to_transformers(merged: PreTrainedModel, loaded: LoadedAdapter, folder: Path) -> Run:
    geometry = loaded.classifier.geometry
    with quiet_loading():
        if hasattr(merged.config, "pretrained_cfg"):  # where timm's wrapper keeps it
            merged.config.pretrained_cfg = {**merged.config.pretrained_cfg, **_as_timm_says(geometry)}
        else:
            _processor(geometry).save_pretrained(folder)
        merged.save_pretrained(folder)
        again = AutoModelForImageClassification.from_pretrained(folder).eval()
    return lambda images: _logits_of(again, images)


def _processor(geometry: Geometry) -> BitImageProcessor:
    """Return the processor of transformers that does what the model was trained with, but for its last bits."""
    side = geometry.size_px
    is_cropped = geometry.resize == "crop"
    return BitImageProcessor(
        size={"shortest_edge": geometry.resized_px} if is_cropped else {"height": side, "width": side},
        do_center_crop=is_cropped,
        crop_size={"height": side, "width": side},
        resample=FILTERS[geometry.interpolation],
        image_mean=list(geometry.mean),
        image_std=list(geometry.std),
    )


def _as_timm_says(geometry: Geometry) -> dict[str, Any]:
    """Return the geometry in the words of timm's configurations."""
    said = {"input_size": [3, geometry.size_px, geometry.size_px], "interpolation": geometry.interpolation}
    said |= {"mean": list(geometry.mean), "std": list(geometry.std)}
    is_cropped = geometry.resize == "crop"
    # timm resizes to the whole part of size / crop_pct.
    crop = {"crop_pct": geometry.size_px / (geometry.resized_px + 0.5) if is_cropped else 1.0}
    return said | crop | {"crop_mode": "center" if is_cropped else "squash"}


def _to_timm(merged: PreTrainedModel, loaded: LoadedAdapter, folder: Path) -> Run:
    inner = getattr(merged, "timm_model", None)
    if inner is None:
        raise ValueError(f"{type(merged).__name__} is no model of timm: merge it with --format transformers or onnx.")
    said = _as_timm_says(loaded.classifier.geometry)
    labels = {"label_names": list(loaded.classifier.class_names)}
    save_for_hf(inner, str(folder), model_config=labels, safe_serialization=True, data_config=said)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return torch.no_grad()(again)


class _Logits(nn.Module):
    """The logits alone, from the images alone: exporters take tensors, not dictionaries."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def _to_onnx(merged: PreTrainedModel, loaded: LoadedAdapter, folder: Path) -> Run:
    try:
        import onnxruntime  # noqa: PLC0415 - an extra that few need
        import onnxscript  # noqa: F401, PLC0415
    except ImportError as error:
        raise ValueError(f"ONNX needs {error.name}: pip install 'gift-peft[onnx]'.") from error
    size = loaded.image_size_px
    program = torch.onnx.export(
        _Logits(merged).eval(),
        (torch.zeros(2, 3, size, size),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        input_names=["pixel_values"],
        output_names=["logits"],
        verbose=False,
    )
    if program is None:
        raise ValueError("torch.onnx.export gave no program.")
    program.save(str(folder / ONNX_MODEL))
    names = dict(enumerate(loaded.classifier.class_names))
    (folder / "labels.json").write_text(json.dumps(names, indent=2) + "\n")
    session = onnxruntime.InferenceSession(str(folder / ONNX_MODEL), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"pixel_values": images.numpy()})[0])


@torch.no_grad()
def _logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(pixel_values=images).logits
