"""What a stored adapter is, in words: method, sizes, layers, what it was trained on and how well."""

import json
from math import prod
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_NAME

from gift.adapters import find_adapter, read_classifier
from gift.tuner.options import GeneratorOptions

SHOWN = ("r", "lora_alpha", "generator", "num_clusters", "num_blocks", "num_heads", "share", "scaling", "num_prompts")


def describe_adapter(folder: Path | str) -> str:
    """Return what an adapter or a run is, a line each; no backbone is loaded.

    Raises:
        ValueError: If the folder holds none.
    """
    folder = find_adapter(Path(folder))
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text()) if config_file.exists() else {}
    weights = folder / (SAFETENSORS_WEIGHTS_NAME if config else SAFE_WEIGHTS_NAME)
    classifier = read_classifier(folder)
    lines = [f"{folder}", f"  method      {_method(config, classifier)}"]
    settings = {name: config[name] for name in SHOWN if name in config and _is_of_method(name, config)}
    if settings:
        lines.append(f"  options     {', '.join(f'{name} {value}' for name, value in settings.items())}")
    if config.get("target_modules"):
        targets = config["target_modules"]
        lines.append(f"  targets     {targets if isinstance(targets, str) else ', '.join(sorted(targets))}")
    lines.append(f"  backbone    {classifier.backbone if classifier else config.get('base_model_name_or_path')}")
    lines.append(f"  stored      {_count(weights):,} numbers, {weights.stat().st_size / 1e6:.2f} MB")
    if classifier:
        geometry, names = classifier.geometry, classifier.class_names
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        lines.append(f"  classes     {len(names)}: {shown}")
        lines.append(f"  images      {geometry.size_px} px, {geometry.resize}, {geometry.interpolation}")
    return "\n".join(lines + _trained(folder.parent))


def _method(config: dict[str, Any], classifier: Any) -> str:
    named = classifier.method if classifier else None
    kind = str(config.get("peft_type", "full"))
    return f"{named} ({kind})" if named and named != kind.lower() else kind.lower()


def _is_of_method(name: str, config: dict[str, Any]) -> bool:
    """Return whether an option does something: `linear` has no blocks, others than `paca` no clusters."""
    if config.get("generator") == "linear":
        return name not in ("num_clusters", "num_blocks", "num_heads")
    return name != "num_clusters" or config.get("generator") == GeneratorOptions.generator


def _count(weights: Path) -> int:
    with safe_open(weights, framework="np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - no mapping
    return sum(map(prod, shapes))


def _trained(run: Path) -> list[str]:
    """Return what the run around the adapter says, if there is one."""
    metrics_file, evaluation_file = run / "metrics.json", run / "evaluation.json"
    lines = []
    if metrics_file.exists():
        metrics = json.loads(metrics_file.read_text())
        trained = f"{metrics['trained_parameters']:,} ({metrics['trained_parameters_without_head']:,} without the head)"
        lines.append(f"  trained     {trained} in {metrics['seconds']:.0f} s, seed {metrics['seed']}")
    if evaluation_file.exists():
        for name, score in json.loads(evaluation_file.read_text()).items():
            lines.append(f"  {name:<11} {100 * score['accuracy']:.2f} % of {score['images']} images")
    return lines
