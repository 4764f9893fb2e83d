"""The clusters of a model: how much every output channel of its adapted layers belongs to each of them.

While there is a generator it gives the assignments; of a model whose adapter was merged and dropped they come from the
file `clusters.safetensors` that was written beside it (`gift.explain.merged`).
"""

import json
import operator
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gift.tuner.layer import GiftLinear
from gift.tuner.model import GiftModel
from gift.tuner.saving import SAME_WEIGHTS, fingerprint
from gift.tuner.targets import Target
from gift.tuner.weights import rows_of_part

CLUSTERS_FILE = "clusters.safetensors"
FORMAT = "gift clusters 1"

Chosen = Iterable[Any] | str | int | None  # numbers or names; None for all


@dataclass(frozen=True, eq=False)
class Assignments:
    """The assignment of every target of one adapter.

    Attributes:
        matrices: By the name of the target, in the order of the model: entry (n, m) says how much output channel n
            belongs to cluster m. All have as many clusters.
        block: Which block of the generator they are of, as it was asked for.
        fingerprints: 16 numbers of the weight that each layer had when its adapter was merged, by the target's name;
            empty while it is not.
    """

    matrices: dict[str, Float[Tensor, "_ clusters"]]
    block: int = -1
    fingerprints: dict[str, list[float]] = field(default_factory=dict)

    @property
    def clusters(self) -> int:
        """The number of clusters."""
        return next(iter(self.matrices.values())).shape[1]

    def save(self, folder: Path | str) -> Path:
        """Write `clusters.safetensors` into a folder, whole or not at all, and return its path."""
        path = Path(folder) / CLUSTERS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"format": FORMAT, "block": str(self.block), "fingerprints": json.dumps(self.fingerprints)}
        header["targets"] = json.dumps(list(self.matrices))
        partial = path.with_name(f"{path.name}.partial")
        save_file({name: matrix.float().cpu().contiguous() for name, matrix in self.matrices.items()}, partial, header)
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: Path | str) -> "Assignments":
        """Return the assignments of a file, or of `clusters.safetensors` in a folder.

        Raises:
            ValueError: If there is no such file, or it is damaged or of another kind.
        """
        path = Path(path) / CLUSTERS_FILE if Path(path).is_dir() else Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ValueError(f"its format is {header.get('format')!r} instead of {FORMAT!r}")
                matrices = {name: file.get_tensor(name) for name in json.loads(header["targets"])}
            loaded = cls(matrices, int(header["block"]), json.loads(header["fingerprints"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} holds no clusters of a model: {error}.") from error
        _check_matrices(path, loaded)
        return loaded


def _check_matrices(path: Path, loaded: Assignments) -> None:
    shapes = {name: tuple(matrix.shape) for name, matrix in loaded.matrices.items()}
    same = len({shape[1] for shape in shapes.values() if len(shape) == 2}) == 1
    whole = all(len(shape) == 2 for shape in shapes.values())
    if not (whole and same and all(torch.isfinite(matrix).all() for matrix in loaded.matrices.values())):
        raise ValueError(f"{path} is damaged: it must hold finite matrices with as many clusters each, got {shapes}.")


@dataclass(frozen=True, eq=False)
class ExplainedModel:
    """A model that has clusters.

    Attributes:
        inner: The model without wrappers, in which the names of layers hold.
        modules: The layers of the targets by layer name, in the order of the model.
        assignments: The clusters of all targets.
        adapter: Name of the adapter; None if it was merged and dropped.
    """

    inner: nn.Module
    modules: dict[str, nn.Module]
    assignments: Assignments
    adapter: str | None

    @property
    def is_before_adaptation_known(self) -> bool:
        """Whether the layers still hold their original weights beside the residual."""
        return all(isinstance(layer, GiftLinear) and not layer.merged for layer in self.modules.values())


def find_tuner(model: nn.Module) -> GiftModel | None:
    """Return the GIFT tuner in a model, or None.

    Raises:
        ValueError: If there are several.
    """
    tuners = [module for module in model.modules() if isinstance(module, GiftModel)]
    if len(tuners) > 1:
        raise ValueError(f"{type(model).__name__} holds {len(tuners)} GIFT tuners: pass the model of one of them.")
    return tuners[0] if tuners else None


def explained_model(model: nn.Module, block: int = -1, stored: Assignments | None = None) -> ExplainedModel:
    """Return a model with its clusters: those of its active adapter, or stored ones.

    Args:
        model: A model with one active GIFT adapter, merged or not; or one whose adapter was merged and dropped.
        block: Which of the generator's blocks gives the assignment.
        stored: The clusters of a model without adapter; by default those beside the files that transformers loaded it
            from.

    Raises:
        ValueError: If the model has no such adapter, the adapter no clusters, or the stored clusters are of another
            model.
    """
    tuner = find_tuner(model)
    if tuner is None:
        return _with_stored(model, stored or _beside(model), block)
    if stored is not None:
        raise ValueError("This model has a GIFT adapter, which says what its clusters are: pass no stored ones.")
    if len(tuner.active_adapters) != 1:
        raise ValueError(f"Cluster maps are of one adapter, but {tuner.active_adapters} are active: use set_adapter.")
    (adapter,) = tuner.active_adapters
    layers = {name: layer for name, layer in tuner.gift_source.layers.items() if adapter in layer.gift_parts}
    if not all(adapter in layer.adapters_in_effect or adapter in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"The adapter {adapter!r} is not in effect, so its clusters tell nothing: it is disabled, or another one "
            "is merged. Enable it, or unmerge the other."
        )
    return ExplainedModel(tuner.model, dict(layers), _generated(tuner, adapter, block), adapter)


@torch.no_grad()
def _generated(tuner: GiftModel, adapter: str, block: int) -> Assignments:
    source = tuner.gift_source
    targets = [target for group in source.groups[adapter].values() for target in group]
    found: dict[Target, Tensor] = {}
    for _, served, factors in source.generate_targets(adapter, targets):
        for target, of_blocks in zip(served, factors.assignments, strict=True):
            found[target] = _of_block(of_blocks, block)
    order = {name: index for index, name in enumerate(source.layers)}
    places = sorted(found, key=lambda target: (order[target.layer], str(target)))
    return Assignments({str(target): found[target] for target in places}, block)


def _of_block(of_blocks: Sequence[Tensor], block: int) -> Tensor:
    if not -len(of_blocks) <= block < len(of_blocks):
        raise ValueError(
            f"There is no block {block} with clusters: this generator has {len(of_blocks)} of them. The kinds `paca` "
            "and `linear` have clusters."
        )
    return of_blocks[block]


def _beside(model: nn.Module) -> Assignments:
    """Return the clusters stored beside the files of a transformers model."""
    folder = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not folder or not (Path(folder) / CLUSTERS_FILE).is_file():
        raise ValueError(
            f"{type(model).__name__} has no GIFT adapter, and there is no {CLUSTERS_FILE} beside it. Pass a PeftModel "
            "with a GIFT adapter, or the clusters that were stored when it was merged: "
            "Reading(assignments=Assignments.load(folder))."
        )
    return Assignments.load(folder)


def _with_stored(model: nn.Module, stored: Assignments, block: int) -> ExplainedModel:
    if block not in (-1, stored.block):
        raise ValueError(f"The stored clusters are of block {stored.block}, not of block {block}.")
    modules: dict[str, Any] = {}
    for name, matrix in stored.matrices.items():
        target = Target.parse(name)
        try:
            modules[target.layer] = module = model.get_submodule(target.layer)
            weight = _rows(module, target.part)
        except AttributeError as error:
            raise ValueError(f"The stored clusters are of another model: there is no layer {target.layer}.") from error
        if len(weight) != len(matrix):
            raise ValueError(f"The stored clusters of {name} are for {len(matrix)} channels, and it has {len(weight)}.")
    _warn_of_other_weights(modules, stored)
    return ExplainedModel(model, modules, stored, None)


def with_fingerprints(assignments: Assignments, model: nn.Module) -> Assignments:
    """Return assignments that remember the weights of their layers in a model whose adapter was merged and dropped."""
    targets = [Target.parse(name) for name in assignments.matrices]
    prints = {str(one): fingerprint(_rows(model.get_submodule(one.layer), one.part)) for one in targets}
    return replace(assignments, fingerprints=prints)


def _rows(layer: Any, part: str | None) -> Float[Tensor, "_ in_features"]:
    """Return the weight of a layer, or of a part of it, one row per output channel."""
    plain: Any = layer.base_layer if isinstance(layer, GiftLinear) else layer
    return rows_of_part(plain.weight.T if isinstance(plain, Conv1D) else plain.weight, part)


def _warn_of_other_weights(modules: dict[str, Any], stored: Assignments) -> None:
    for name, numbers in stored.fingerprints.items():
        target, then = Target.parse(name), torch.tensor(numbers)
        now = torch.tensor(fingerprint(_rows(modules[target.layer], target.part)))
        deviation = float((now - then).norm() / then.norm())
        if deviation > SAME_WEIGHTS:
            warnings.warn(
                f"The weight of {name} deviates by {deviation:.2g} from that of the model whose clusters were stored: "
                "the maps are those of other clusters.",
                stacklevel=4,
            )
            return


def choose(names: Sequence[str], wanted: Chosen, kind: str) -> list[int]:
    """Return the numbers of what is wanted, by number or by name, in the order asked for; all by default.

    Raises:
        ValueError: If something wanted is not there, twice there or nothing is wanted.
    """
    if wanted is None:
        return list(range(len(names)))
    chosen = []
    for one in [wanted] if isinstance(wanted, (str, int)) else wanted:
        number: Any = list(names).index(one) if isinstance(one, str) and one in names else one
        if isinstance(number, bool) or not isinstance(number, SupportsIndex) or not -len(names) <= number < len(names):  # type: ignore[operator]
            known = ", ".join(names[:6]) if names and not re.fullmatch(r"\d+", names[0]) else f"0 to {len(names) - 1}"
            raise ValueError(f"There is no {kind} {one!r}; there are {len(names)}: {known}.")
        chosen.append(operator.index(number) % len(names))
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"Name at least one {kind} and each once, got {wanted}.")
    return chosen
