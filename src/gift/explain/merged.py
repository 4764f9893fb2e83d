"""A model whose adapter was merged for good, with its clusters beside it."""

from pathlib import Path

from timm.models import save_for_hf
from torch import nn
from transformers import PreTrainedModel

from gift.explain.assignments import explained_model, find_tuner, with_fingerprints


def merge_and_save(model: nn.Module, folder: Path | str, block: int = -1, safe_merge: bool = True) -> nn.Module:
    """Merge the active adapter, write the model and its clusters into a folder, and return the model without adapter.

    `explain_images` finds the clusters by itself when transformers loads the folder; for a timm model
    (`timm.create_model("local-dir:FOLDER", pretrained=True)`) pass `Reading(assignments=Assignments.load(folder))`.

    Args:
        model: A `PeftModel` of a transformers or timm model with one active GIFT adapter.
        folder: Where to write `model.safetensors`, `config.json` and `clusters.safetensors`.
        block: Which of the generator's blocks gives the assignment.
        safe_merge: Whether to refuse NaN and infinite weights.

    Raises:
        ValueError: If there is no such adapter, it has no clusters, or the model is neither of timm nor of
            transformers, or a merged weight would not be finite; nothing was merged.
        OSError: If the folder cannot be made; nothing was merged.
    """
    explained = explained_model(model, block)
    tuner = find_tuner(model)
    if tuner is None:
        raise ValueError("This model's adapter was merged and dropped before: pass the PeftModel.")
    if not (isinstance(explained.inner, PreTrainedModel) or type(explained.inner).__module__.startswith("timm.")):
        raise ValueError(
            f"{type(explained.inner).__name__} is neither a transformers nor a timm model. Save its clusters "
            "with explained_model(model).assignments.save(folder), then merge_and_unload() and save it in your own way."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not any(layer.merged for layer in tuner.gift_source.layers.values()):
        tuner.merge_adapter(safe_merge=safe_merge)  # all layers or, after an error, none
    merged = tuner.unload()
    if isinstance(merged, PreTrainedModel):
        merged.save_pretrained(folder)
    else:
        save_for_hf(merged, str(folder), safe_serialization=True)
    with_fingerprints(explained.assignments, merged).save(folder)
    return merged
