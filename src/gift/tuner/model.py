"""The tuner: find the targets, share generators among them, follow the life of every adapter."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gift.tuner.config import GiftConfig
from gift.tuner.generator import WeightGenerator
from gift.tuner.layer import GiftLinear
from gift.tuner.saving import (
    check_can_be_saved,
    check_folder,
    check_tensors,
    embedding_tensors,
    fingerprint,
    name_parts,
    stored_tensors,
    warn_about_other_weights,
)
from gift.tuner.scope import FactorSource
from gift.tuner.targets import (
    Target,
    check_not_sharded,
    check_without_adapters,
    find_modules_to_save,
    find_targets,
    matches,
)
from gift.tuner.weights import (
    QuantisedWeight,
    ShardedWeight,
    refuse_layers_without_gradients,
    rows_of_part,
    stop_repacking,
    torchao_config,
)


class GiftModel(BaseTuner):
    """PEFT's tuner for GIFT, made by `peft.get_peft_model(model, GiftConfig())`.

    The generators live here, once per adapter and group of targets, under `gift_generators`; the layers reach them
    through `gift_source`.

    Args:
        model: The model to adapt; its target layers are wrapped in place.
        peft_config: The configuration, or configurations by adapter name.
        adapter_name: Name of the first adapter.
    """

    uses_shared_state: bool = True
    prefix: str = "gift_"
    tuner_layer_cls = GiftLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's name; our families are in families.py

    # ---- creating ------------------------------------------------------------------------------------------------

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        check_without_adapters(model)
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.gift_generators = nn.ModuleDict()
        self.gift_source = FactorSource(self.gift_generators, torchao_config=torchao_config(model), model=model)
        self._gift_hooks, self._gift_not_repacked = [], []  # to be removed and restored when the adapter goes
        self._gift_planned: dict[str, set[str]] = {}  # by adapter, the names of its target layers

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wrap the targets of an adapter and make its generators; on any error the model stays as it was.

        Args:
            model: The wrapped model.
            adapter_name: Name of the adapter, whose configuration is in `peft_config`.
            autocast_adapter_dtype: Ignored: the generator's dtype is an option of the configuration.
            low_cpu_mem_usage: Whether to make the generators on the meta device, to be loaded.
            state_dict: Must be None: a generator cannot be told from a state dict.

        Raises:
            ValueError: If the configuration does not fit the model, or the stored adapter does not fit both.
        """
        if state_dict is not None:
            raise ValueError("GIFT adapters cannot be injected from a state_dict: pass a GiftConfig instead.")
        config: GiftConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        targets = find_targets(model, config)
        modules_to_save = find_modules_to_save(model, config, targets)
        check_not_sharded(model, modules_to_save)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            generators, groups = _make_generators(model, config, targets)
        stored = stored_tensors(model, generators, modules_to_save)
        self._check_adapter_name(model, adapter_name, generators, stored)
        if (folder := config.folder_being_loaded()) is not None:
            check_folder(folder, stored, embedding_tensors(model, "base_model.model."))
        config.modules_to_save = modules_to_save or None  # PEFT wants None where there are none ...
        self._inject(model, adapter_name, targets, generators, groups)
        config.modules_to_save = modules_to_save  # ... and a stored [] says that none were looked up

    def _check_adapter_name(
        self, model: nn.Module, adapter_name: str, generators: nn.ModuleDict, stored: dict[str, Tensor]
    ) -> None:
        """Refuse names by which PEFT would leave out tensors when it saves one of several adapters.

        It saves what has no part that is called like another adapter.
        """
        clashes = {adapter_name} & (name_parts(generators.state_dict()) | {"gift_generators"})
        for other in set(self.peft_config) - {adapter_name}:
            config: Any = self.peft_config[other]
            stored_by_other = stored_tensors(model, self.gift_generators[other], config.modules_to_save)  # type: ignore
            clashes |= ({adapter_name} & name_parts(stored_by_other)) | ({other} & name_parts(stored))
        if clashes:
            raise ValueError(
                f"An adapter cannot be called {clashes.pop()!r} here, which names a part of the generators or of the "
                "path to a trained module: PEFT could not save the adapters apart. Choose another name."
            )

    def _inject(
        self,
        model: nn.Module,
        adapter_name: str,
        targets: list[Target],
        generators: nn.ModuleDict,
        groups: dict[str, list[Target]],
    ) -> None:
        """Change the model, through PEFT; everything was checked before."""
        config: Any = self.peft_config[adapter_name]
        refuse_layers_without_gradients(self.model)
        self._gift_not_repacked += stop_repacking(self.model)
        trainable = {p: p.requires_grad for p in self.gift_generators.parameters()}
        self.gift_generators[adapter_name] = generators
        self.gift_source.groups[adapter_name] = groups
        self._gift_planned[adapter_name] = {target.layer for target in targets}
        wanted = config.target_modules  # PEFT shortens long lists, which parts of fused layers would not survive
        try:
            super().inject_adapter(model, adapter_name)
        except Exception:
            self._undo_injection(adapter_name)
            raise
        config.target_modules = wanted
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)
        if config.inference_mode or adapter_name not in self.active_adapters:
            generators.requires_grad_(False)
        self.gift_source.drop()
        self._add_hooks()

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        found = matches(peft_config, key)  # PEFT may have shortened a long list of targets: the plan decides
        adapter = next(name for name, config in self.peft_config.items() if config is peft_config)
        return key in self._gift_planned[adapter] if found else found

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config  # targets were found in `inject_adapter`

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: GiftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not isinstance(target, GiftLinear):
            wrapped = GiftLinear(target, current_key, self.gift_source)
            self._replace_module(parent, target_name, wrapped, target)
            self.gift_source.layers[current_key] = target = wrapped
        served = [t for targets in self.gift_source.groups[adapter_name].values() for t in targets]
        parts = tuple(t.part for t in served if t.layer == current_key)
        target.add_adapter(adapter_name, parts, peft_config.scaling, peft_config.apply)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT also carries weight and device over, which fails for heads of several layers; both are in place here.
        setattr(parent, child_name, new_module)

    def _add_hooks(self) -> None:
        if not self._gift_hooks:
            opening = self.model.register_forward_pre_hook(self.gift_source.open_scope)
            closing = self.model.register_forward_hook(self.gift_source.close_scope, always_call=True)
            self._gift_hooks = [opening, closing]

    # ---- living --------------------------------------------------------------------------------------------------

    def set_scale(self, adapter_name: str, scale: float | int) -> None:
        """Multiply the configured scaling of an adapter by `scale` in all layers."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"There is no adapter {adapter_name!r}, only {sorted(self.peft_config)}.")
        for layer in self.gift_source.layers.values():
            layer.set_scale(adapter_name, scale)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: a weighted sum of residuals is not the residual of one generator."""
        raise ValueError(
            "GIFT has no add_weighted_adapter: one generator cannot give a weighted sum of residuals. Activate several "
            "adapters without heads (modules_to_save=[]) with base_model.set_adapter([...]) and weigh them with "
            "base_model.set_scale(name, scale)."
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, its generators and its head."""
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        for layer in self.gift_source.layers.values():
            if adapter_name in layer.gift_parts:  # PEFT passes over layers below a module called like its prefix
                layer.delete_adapter(adapter_name)
        self._forget(adapter_name)
        if was_active and self.active_adapters:
            self.set_adapter(self.active_adapters)  # the head of the adapter that takes over, too

    def _forget(self, adapter_name: str) -> None:
        """Drop what is kept of an adapter outside its layers."""
        if adapter_name in self.gift_generators:
            del self.gift_generators[adapter_name]
        self.gift_source.groups.pop(adapter_name, None)
        self._gift_planned.pop(adapter_name, None)
        self.gift_source.drop()

    def _undo_injection(self, adapter_name: str) -> None:
        """Take an adapter back out of the model, and the wrappers that were made for it alone."""
        self._forget(adapter_name)
        for name, layer in list(self.gift_source.layers.items()):
            for table in layer.other_param_names:
                getattr(layer, table).pop(adapter_name, None)
            if not layer.gift_parts:
                parent = self.model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], layer.base_layer)
                del self.gift_source.layers[name]
        if not self.gift_source.layers:
            self._allow_repacking()

    def _allow_repacking(self) -> None:
        for layer in self._gift_not_repacked:
            layer.support_avx512bf16_for_cpu = True
        self._gift_not_repacked = []

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        config: Any = self.peft_config[adapter_name]
        self.gift_generators[adapter_name].to(config.torch_dtype)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters (by default the active ones) into the weights of all layers, or after an error of none.

        Args:
            adapter_names: Adapters to merge.
            safe_merge: Whether to refuse NaN and infinite results.

        Raises:
            ValueError: As `GiftLinear.merge`.
        """
        before = {layer: list(layer.merged_adapters) for layer in self.gift_source.layers.values()}
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except Exception:
            for layer, names in before.items():
                if layer.merged_adapters != names:
                    layer.unmerge()
                    layer.merge(adapter_names=names)
            raise
        self.gift_source.drop()  # W + dW is in the layers now

    def train(self, mode: bool = True) -> "GiftModel":
        """Set the mode, and forget factors that were kept in the other one."""
        self.gift_source.drop()
        return super().train(mode)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        while self._gift_hooks:
            self._gift_hooks.pop().remove()
        self._allow_repacking()
        for layer in self.gift_source.layers.values():
            layer.gift_original_weight = layer.gift_original_stored = None
        self.gift_source.drop()  # who still holds the PeftModel holds no second copy of the weights
        return model  # type: ignore[return-value]

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Called by PEFT around forward and generate."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "GIFT cannot use another adapter for each sample (adapter_names): its residuals are added to the "
                "weights, which a batch shares. Call the model once per adapter, after set_adapter."
            )
        with self.gift_source.pin():
            yield

    # ---- saving and loading --------------------------------------------------------------------------------------

    def fingerprints(self, adapter_name: str, gathered: Mapping[str, Tensor] | None = None) -> dict[str, list[float]]:
        """Return 16 numbers for the frozen weight of every target of an adapter, by the target's name.

        Weights on the meta device are left out, and sharded ones that are not in the `gathered` state of the PeftModel.
        """
        targets = [target for group in self.gift_source.groups[adapter_name].values() for target in group]
        weights = {str(target): self._whole_weight(target, gathered or {}) for target in targets}
        return {name: fingerprint(weight) for name, weight in weights.items() if weight is not None}

    def _whole_weight(self, target: Target, gathered: Mapping[str, Tensor]) -> Tensor | None:
        layer = self.gift_source.layers[target.layer]
        weight = layer.frozen_weight(target.part)
        if isinstance(weight, ShardedWeight):
            stored = gathered.get(f"base_model.model.{target.layer}.base_layer.weight")
            if stored is None or isinstance(stored, DTensor):
                return None
            return rows_of_part(stored.T if layer.is_transposed else stored, target.part)
        dense = weight.dense() if isinstance(weight, QuantisedWeight) else weight
        return None if dense.device.type == "meta" else dense

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: Any,
    ) -> dict[str, Tensor]:
        check_can_be_saved(model, adapter_name, config.modules_to_save or [], state_dict)
        config.fingerprint = _tuner_of(model).fingerprints(adapter_name, state_dict)
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f"gift_generators.{adapter_name}.", "gift_generators.", 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Translate the stored names, and check everything before the first tensor is copied."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = _tuner_of(model)
        belongs = (f".{adapter_name}.", "gift_generators.", "modules_to_save.")
        expected = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if belongs[0] in name and any(part + adapter_name + "." in name for part in belongs[1:])
        }
        allowed = embedding_tensors(tuner.model, "base_model.model.")
        check_tensors(remapped, expected, allowed, f"The stored adapter {adapter_name!r}")
        if config.fingerprint:
            targets = {str(target) for group in tuner.gift_source.groups[adapter_name].values() for target in group}
            warn_about_other_weights(config.fingerprint, tuner.fingerprints(adapter_name), targets)
        tuner.gift_source.drop()
        return remapped


def _tuner_of(model: nn.Module) -> GiftModel:
    tuners = [module for module in model.modules() if isinstance(module, GiftModel)]
    if len(tuners) != 1:
        raise ValueError(f"Expected a PeftModel with one GIFT tuner, got {type(model).__name__} with {len(tuners)}.")
    return tuners[0]


def _make_generators(
    model: nn.Module, config: GiftConfig, targets: list[Target]
) -> tuple[nn.ModuleDict, dict[str, list[Target]]]:
    """Return one generator for every group of targets that share one, and the groups."""
    options = config.generator_options()
    weights = {target: _weight_of(model, target) for target in targets}
    groups: dict[str, list[Target]] = {}
    for target, weight in weights.items():
        groups.setdefault(group_name(config, options.binds_tokens, target, weight.shape), []).append(target)
    generators = nn.ModuleDict()
    for group, members in groups.items():
        first = weights[members[0]]
        generator = WeightGenerator(first.shape[1], first.shape[0], options)
        generator.to(dtype=config.torch_dtype)
        if first.device.type != "meta" and generator.recover.device.type != "meta":
            generator.to(first.device)
            generator.calibrate([weights[member] for member in members])
        generators[group] = generator
    return generators, groups


def _weight_of(model: nn.Module, target: Target) -> Tensor | QuantisedWeight | ShardedWeight:
    layer = model.get_submodule(target.layer)
    view = layer if isinstance(layer, GiftLinear) else GiftLinear(layer, target.layer, FactorSource(nn.ModuleDict()))
    return view.frozen_weight(target.part)


def group_name(config: GiftConfig, binds_tokens: bool, target: Target, shape: torch.Size) -> str:
    """Return which targets share a generator: `all-768`, or with the rows where a generator binds them."""
    label = {"all": "all", "kind": target.kind, "layer": str(target)}[config.share].replace(".", ":")
    rows, columns = shape
    return f"{label}-{rows}x{columns}" if binds_tokens else f"{label}-{columns}"
