"""BitFit: nothing but the biases of a frozen model is trained, and the head (arXiv 2106.10199).

The biases of the model itself are trained: no layer is wrapped, nothing costs time, and also biases are reached that no
layer applies (`q_bias` in BEiT). PEFT's own `bias="all"` would store those of the replaced head too, and cannot
be switched off.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, PeftType
from peft.utils.other import set_additional_trainable_modules
from torch import Tensor, nn

from gift.backbones import classification_heads
from gift.baselines.single_adapter import SingleAdapterTuner


@dataclass
class BitFitConfig(PeftConfig):
    """Configuration of BitFit for `peft.get_peft_model`, on any model with biases.

    Args:
        modules_to_save: Further modules to train and to store; by default the classification head of the families of
            `gift.backbones`, `[]` for none.
    """

    modules_to_save: list[str] | None = None

    target_modules = None  # not an option: all biases are trained; PEFT asks for the attribute

    def __post_init__(self) -> None:
        """Set the type."""
        super().__post_init__()
        self.peft_type = PeftType("BITFIT")


class BiasSwitch(nn.Module, BaseTunerLayer):
    """The values that the biases had before and, while the adapter is off, those that were trained.

    Args:
        biases: Names of the biases in the model.
    """

    def __init__(self, biases: tuple[str, ...]) -> None:
        super().__init__()
        self.biases = biases
        self.originals: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] = {}  # empty while the adapter is on
        self.merged_adapters = []

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """There is no layer, and the biases are where the model is."""

    @torch.no_grad()
    def switch(self, model: nn.Module, on: bool) -> None:
        """Put the trained values into the model, or those from before; doing it again changes nothing."""
        if on != self._disable_adapters:
            return
        if not on:
            self.trained = {name: model.get_parameter(name).clone() for name in self.biases}
        for name, value in (self.trained if on else self.originals).items():
            model.get_parameter(name).copy_(value)
        if on:
            self.trained = {}
        self._disable_adapters = not on


class BitFitModel(SingleAdapterTuner):
    """PEFT's tuner for BitFit, made by `peft.get_peft_model(model, BitFitConfig())`."""

    prefix: str = "bitfit_"
    tuner_layer_cls = BiasSwitch

    def places(self, model: nn.Module, config: BitFitConfig) -> tuple[str, ...]:
        """Return no modules: the biases stay where they are.

        Raises:
            ValueError: If the model has no biases.
        """
        return ()

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Free the biases of the model and freeze the rest; see PEFT."""
        config: Any = self.peft_config[adapter_name]
        self._check_new_adapter_config(config)
        config = self._prepare_adapter_config(config, self.get_model_config(model))
        biases = _find_biases(model, (*classification_heads(model), *(config.modules_to_save or ())))
        self.bitfit_switch = BiasSwitch(biases)
        self.bitfit_switch.originals = {name: model.get_parameter(name).detach().clone() for name in biases}
        set_additional_trainable_modules(model, config, self.get_model_config(self), adapter_name)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("BitFit wraps no modules.")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter, and whether it is trained."""
        super().set_adapter(adapter_name, inference_mode)
        self.bitfit_switch._active_adapter = adapter_name
        wrapped = {p for m in self.model.modules() if isinstance(m, AuxiliaryTrainingWrapper) for p in m.parameters()}
        for parameter in set(self.model.parameters()) - wrapped:
            parameter.requires_grad_(False)
        self._set_biases_trained(not inference_mode)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Say whether the adapter is trained."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._set_biases_trained(requires_grad)

    def _set_biases_trained(self, trained: bool) -> None:
        for name in self.bitfit_switch.biases:
            self.model.get_parameter(name).requires_grad_(trained)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self.bitfit_switch.switch(self.model, enabled)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        self.bitfit_switch.switch(self.model, merge)
        return model  # type: ignore[return-value]

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: Any,
    ) -> dict[str, Tensor]:
        tuner = _tuner_of(model)
        trained = tuner.bitfit_switch.trained
        return {
            f"base_model.model.{name}": trained.get(name, state_dict[f"base_model.model.{name}"])
            for name in tuner.bitfit_switch.biases
        }

    @classmethod
    def own_tensors(cls, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        """Return the biases of the model, and the modules trained with them.

        Raises:
            ValueError: If the adapter is switched off: what is loaded now would be lost.
        """
        tuner = _tuner_of(model)
        if tuner.bitfit_switch.disable_adapters:
            raise ValueError("The adapter is switched off. Load weights outside of disable_adapter().")
        names = {f"base_model.model.{name}" for name in tuner.bitfit_switch.biases}
        heads = super().own_tensors(model, adapter_name)
        return heads | {name: tensor for name, tensor in model.state_dict().items() if name in names}


def _tuner_of(model: nn.Module) -> BitFitModel:
    return next(module for module in model.modules() if isinstance(module, BitFitModel))


def _find_biases(model: nn.Module, left_out: tuple[str, ...]) -> tuple[str, ...]:
    whole = [f"{name}." for name, _ in model.named_modules() if name.endswith(left_out)]
    biases = tuple(
        name
        for name, _ in model.named_parameters()
        if name.rpartition(".")[2].endswith("bias") and not name.startswith(tuple(whole))
    )
    if not biases:
        raise ValueError(f"{type(model).__name__} has no biases outside of its head, so BitFit trains nothing.")
    return biases
