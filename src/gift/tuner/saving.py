"""What is stored of an adapter, and the checks before a stored one is loaded."""

import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError

import torch
from jaxtyping import Float, Int64
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, AuxiliaryTrainingWrapper
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

GENERATORS_KEY = "base_model.gift_generators."
WEIGHTS_FILES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
FINGERPRINT_SIDE = 4  # a weight is remembered by 4 x 4 numbers: enough to estimate how far another one is from it
SAME_WEIGHTS = 4e-3  # relative deviation up to which weights count as the same: a cast to bf16 gives 1.7e-3


def name_parts(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return what stands between the dots of the names."""
    return {part for name in tensors for part in name.split(".")}


def stored_tensors(model: nn.Module, generators: nn.ModuleDict, modules_to_save: list[str]) -> dict[str, Tensor]:
    """Return the tensors a stored adapter must hold, by the names PEFT stores them under."""
    stored = {GENERATORS_KEY + name: tensor for name, tensor in generators.state_dict().items()}
    for name, module in model.named_modules():
        if name and any(name.endswith(save) for save in modules_to_save):
            original = getattr(module, "original_module", module)
            stored |= {f"base_model.model.{name}.{key}": tensor for key, tensor in original.state_dict().items()}
    return stored


def embedding_tensors(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return the input and output embeddings, which PEFT stores with an adapter when asked to or when resized."""
    embeddings = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):
            embeddings.append(getattr(model, getter)())
    names = [name for name, module in model.named_modules() if any(module is found for found in embeddings)]
    tensors = model.state_dict()
    return {prefix + key: tensor for key, tensor in tensors.items() for name in names if key.startswith(f"{name}.")}


def check_tensors(
    stored: Mapping[str, Tensor], expected: Mapping[str, Tensor], allowed: Mapping[str, Tensor], origin: str
) -> None:
    """Raise ValueError unless exactly the expected tensors are there, in the right shapes, floating and finite.

    Args:
        stored: Tensors by name, as stored.
        expected: Tensors (or meta tensors) of the model by the same names.
        allowed: Further tensors that may be there, in the right shapes.
        origin: What to call the stored adapter in the message.
    """
    known = {**allowed, **expected}
    problems = [f"{name} is missing" for name in expected if name not in stored]
    problems += [f"{name} is unexpected" for name in stored if name not in known]
    for name in known.keys() & stored.keys():
        tensor, shape = stored[name], tuple(known[name].shape)
        if tuple(tensor.shape) != shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, this model needs {shape}")
        elif tensor.is_floating_point() != known[name].is_floating_point():
            problems.append(f"{name} has dtype {tensor.dtype}, this model needs {known[name].dtype}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} has NaN or infinite entries")
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        listed = "; ".join(sorted(problems)[:6])
        raise ValueError(f"{origin} does not fit this model and configuration; no tensor was loaded: {listed}{more}.")


def check_folder(folder: Path, expected: Mapping[str, Tensor], allowed: Mapping[str, Tensor]) -> None:
    """Check the stored weights of a local adapter folder against the tensors of the model, before it is changed.

    Raises:
        ValueError: If the file is missing, cannot be read or does not hold exactly the expected tensors.
    """
    path = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} holds no adapter weights ({' or '.join(WEIGHTS_FILES)}); nothing was loaded.")
    try:
        stored = load_peft_weights(str(folder), device="cpu")  # safetensors, or a pickle of tensors only
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{path} is damaged and cannot be read ({error}); nothing was loaded.") from error
    check_tensors(stored, expected, allowed, str(path))


def check_can_be_saved(
    model: nn.Module, adapter_name: str, modules_to_save: Sequence[str], state_dict: Mapping[str, Tensor]
) -> None:
    """Raise ValueError if a part of an adapter would be missing from its file, or only a shard of it be there."""
    wrapped = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)
    )
    for name, _ in model.named_modules():
        is_wrapped = f"{name}.".startswith(wrapped) if wrapped else False
        if any(name.endswith(save) for save in modules_to_save) and not is_wrapped:
            raise ValueError(
                f"{name} was replaced after the adapter was made (by reset_classifier?), so it would not be saved. "
                "Reset the head of the backbone first, then call get_peft_model."
            )
    own = (f"gift_generators.{adapter_name}.", f"modules_to_save.{adapter_name}.")
    sharded = [
        name for name, tensor in state_dict.items() if isinstance(tensor, DTensor) and any(part in name for part in own)
    ]
    if sharded:
        raise ValueError(
            f"{sharded[0]} is sharded over processes. Gather the state on all of them, then save it on one: state = "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)); "
            "model.save_pretrained(folder, state_dict=state)."
        )


def fingerprint(weight: Float[Tensor, "rows columns"]) -> list[float]:
    """Return 16 numbers by which a weight is recognised: projections on fixed random signs, in float32.

    The root mean square of the difference of two fingerprints estimates the Frobenius norm of the difference of the
    weights; the numbers are rounded to six digits.
    """
    rows = _signs(weight.shape[0], 1).to(weight.device)
    columns = _signs(weight.shape[1], 2).to(weight.device)
    sketch = rows @ (weight.detach().to(columns.dtype) @ columns.T)
    return [float(f"{number:.6g}") for number in sketch.flatten().tolist()]


def _signs(length: int, salt: int) -> Float[Tensor, "side length"]:
    """Return fixed signs +-1 from an integer hash: the same on every platform and version."""
    index = torch.arange(FINGERPRINT_SIDE * length, dtype=torch.int64) + salt * 1_000_003
    bits = _hash(index) & 1
    return (2.0 * bits - 1.0).view(FINGERPRINT_SIDE, length).to(torch.float32)


def _hash(index: Int64[Tensor, " count"]) -> Int64[Tensor, " count"]:
    for _ in range(2):
        index = ((index >> 15) ^ index) * 0x2C1B3C6D & 0x7FFFFFFF
        index = ((index >> 12) ^ index) * 0x297A2D39 & 0x7FFFFFFF
    return index >> 7


def warn_about_other_weights(
    stored: Mapping[str, list[float]], current: Mapping[str, list[float]], targets: Set[str]
) -> None:
    """Warn if the frozen weights are not those the adapter was saved with: the same generator then gives other dW.

    Args:
        stored: Fingerprint by target, from the adapter's configuration.
        current: Fingerprint by target of this model, as far as its weights can be read here.
        targets: All targets of this model.
    """
    if stored.keys() != targets:
        other = sorted(stored.keys() ^ targets)
        warnings.warn(
            f"This adapter was saved for other layers; those of only one side are {other[:6]}. The backbone or the "
            "targets in adapter_config.json are not those it was trained with.",
            stacklevel=2,
        )
    shared = [name for name in stored if name in current and len(stored[name]) == len(current[name])]
    if not shared:
        return
    deviation = {name: _relative_deviation([name], stored, current) for name in shared}
    overall = _relative_deviation(shared, stored, current)
    worst = max(deviation, key=lambda name: deviation[name])
    if deviation[worst] > SAME_WEIGHTS:
        warnings.warn(
            f"This adapter was saved with other frozen weights: they deviate by {overall:.2g} of their norm (most in "
            f"{worst}: {deviation[worst]:.2g}). The residual is generated from the weights, so it will differ too. "
            "Load the adapter onto the checkpoint it was trained on.",
            stacklevel=2,
        )


def _relative_deviation(
    names: Iterable[str], stored: Mapping[str, list[float]], current: Mapping[str, list[float]]
) -> float:
    """Return the estimated norm of the weights' difference over the norm of the stored ones."""
    old = torch.tensor([number for name in names for number in stored[name]], dtype=torch.float64)
    new = torch.tensor([number for name in names for number in current[name]], dtype=torch.float64)
    return float((new - old).norm() / old.norm().clamp_min(1e-12))
