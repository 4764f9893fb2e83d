"""What the tuners of the baselines have in common: one adapter per model, whose places are known beforehand."""

from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from gift.backbones import classification_heads
from gift.tuner.saving import check_tensors


def check_flags(config: PeftConfig, *names: str) -> None:
    """Raise ValueError unless the options of these names are True or False."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}.")


class SingleAdapterTuner(BaseTuner):
    """A tuner of PEFT that allows one adapter per model and checks what it loads.

    Subclasses set `prefix`, `tuner_layer_cls` and `no_merging`, and say in `places` which modules they wrap.
    """

    uses_shared_state: bool = True  # so that PEFT never hands out the wrapped model without its tuner
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's name
    no_merging: str = ""  # why the adapter cannot be merged

    def places(self, model: nn.Module, config: Any) -> tuple[str, ...]:
        """Return the full names of the modules to wrap; raise ValueError, before anything is changed, if it cannot."""
        raise NotImplementedError

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                raise ValueError(
                    f"{name} already carries an adapter ({type(module).__name__}), and {type(self).__name__} cannot be "
                    "mixed with it. Call unload() on the PeftModel it belongs to, or load a fresh backbone."
                )
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        if len(self.peft_config) > 1:
            raise ValueError(
                f"{config.peft_type.value} allows one adapter per model, and there is {min(self.peft_config)!r}. "  # type: ignore[union-attr]
                "Call unload() first, or load the other adapter onto a backbone of its own."
            )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.modules_to_save is None:
            peft_config.modules_to_save = classification_heads(self.model) or None
        self._places = self.places(self.model, peft_config)
        _check_modules_to_save(self.model, peft_config.modules_to_save, self._places)
        return peft_config

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._places

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT also carries weight and device over; ours are made in place, and an nn.Identity has neither.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        if self.no_merging:
            name = type(self).prefix.rstrip("_").upper()
            raise ValueError(f"{name} cannot be merged into the weights: {self.no_merging}. unload() removes it.")
        super()._check_merge_allowed()

    def delete_adapter(self, adapter_name: str) -> None:
        """Refuse: it is the only one, and PEFT cannot call a model without any."""
        raise ValueError(f"{adapter_name!r} is the only adapter of this model. Call unload() to take it out.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Translate the stored names, and check that exactly this adapter's tensors came, before one is copied."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = cls.own_tensors(model, adapter_name)
        check_tensors(remapped, expected, {}, f"The stored adapter {adapter_name!r}")
        # With `low_cpu_mem_usage` they take the place of the model's tensors, also of those that are not on meta.
        return {name: it if expected[name].is_meta else it.to(expected[name].device) for name, it in remapped.items()}

    @classmethod
    def own_tensors(cls, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        """Return the tensors of an adapter and of the modules trained with it, by their names in the model."""
        return {
            name: tensor
            for name, tensor in model.state_dict().items()
            if f".modules_to_save.{adapter_name}." in name
            or (f".{cls.prefix}" in name and name.endswith(f".{adapter_name}"))
        }


def _check_modules_to_save(model: nn.Module, wanted: Any, places: tuple[str, ...]) -> None:
    """Raise ValueError where PEFT would silently train nothing: unless each name ends that of a module that stays."""
    if isinstance(wanted, str):
        raise ValueError(f"modules_to_save must be a list of names, got {wanted!r}.")
    names = [name for name, _ in model.named_modules() if name]
    for end in wanted or ():
        found = [name for name in names if name.endswith(end)]
        inside = [name for name in found if f"{name}.".startswith(tuple(f"{place}." for place in places))]
        if not found:
            raise ValueError(f"modules_to_save names {end!r}, but no module of {type(model).__name__} ends like that.")
        if inside:
            raise ValueError(
                f"modules_to_save names {end!r}, but {inside[0]} lies in a part that this method wraps, and cannot be "
                "trained in full beside it."
            )
