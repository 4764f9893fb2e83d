"""Whether the generators' gradients are brought together across processes; wrappers that would not do so are refused.

A generator is shared by all layers and lives outside of them. What averages gradients layer by layer may miss it, and
nothing in torch would say so: every process would train a generator of its own.
"""

from collections.abc import Sequence, Set
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel


def is_distributed() -> bool:
    """Return whether several processes work together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def refuse_reentrant() -> None:
    """Raise RuntimeError where the recomputation of reentrant checkpointing would spoil shared gradients.

    DDP counts a parameter's gradient as complete when the first layer adds to it, unless its graph is static.
    """
    if not is_distributed() or getattr(DistributedDataParallel._get_active_ddp_module(), "static_graph", False):
        return
    raise RuntimeError(
        "An adapted layer was called without gradients inside a forward pass with gradients, as reentrant "
        "checkpointing does. Its recomputation gives wrong gradients of the shared generator across processes. "
        "Use non-reentrant checkpointing: gradient_checkpointing_kwargs={'use_reentrant': False}; or, with DDP, "
        "static_graph=True."
    )


def refuse_gradients_kept_apart(model: nn.Module, generators: nn.Module) -> None:
    """Raise RuntimeError if the model is wrapped in such a way that every process would train its own generator.

    Args:
        model: The wrapped model, without the tuner.
        generators: The generators, which live on the tuner.
    """
    names = {parameter: name for name, parameter in generators.named_parameters() if parameter.requires_grad}
    trained = {parameter for parameter in names if not parameter._post_accumulate_grad_hooks}  # averaged by hand
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is not None:
        _refuse_outside_ddp(ddp, trained)
        return
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    apart = trained - _managed_by_fsdp(sharded, generators) if sharded else set()
    if apart:
        adapter = next(names[parameter] for parameter in names if parameter in apart).partition(".")[0]
        raise RuntimeError(
            f"fully_shard was applied to the inner model or its blocks only, or before adapter {adapter!r} was added, "
            "so the gradients of its generators would not be averaged over the processes. Apply it to the PeftModel "
            "too, after the blocks, or to every generator: for one in "
            f"model.base_model.gift_generators[{adapter!r}].values(): fully_shard(one)."
        )


def _refuse_outside_ddp(ddp: DistributedDataParallel, trained: Set[Tensor]) -> None:
    if trained - set(ddp.parameters()):
        raise RuntimeError(
            "DistributedDataParallel was put around the inner model only, so the gradients of the generators "
            "would not be averaged over the processes. Put it around the PeftModel."
        )
    if ddp not in _averaged_by_ddp:  # fixed when it was made, and costly to ask for
        buckets = ddp.reducer._get_zeros_like_grad_buckets()
        _averaged_by_ddp[ddp] = {parameter for bucket in buckets for parameter in bucket.parameters()}
    if trained - _averaged_by_ddp[ddp]:
        raise RuntimeError(
            "Generators that are trained now were not when DistributedDataParallel was made (add_adapter or "
            "set_adapter came later, or it was told to ignore them), so their gradients would not be averaged over the "
            "processes. Make a new DistributedDataParallel."
        )


_averaged_by_ddp: "WeakKeyDictionary[nn.Module, set[Tensor]]" = WeakKeyDictionary()


def sharded_parameters(model: nn.Module) -> "dict[nn.Module, Any]":
    """Return FSDP2's record of the weight of every module below `model` that it shards, also while it is gathered."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    states: list[Any] = [unit._get_fsdp_state() for unit in units]
    records = [record for state in states for group in state._fsdp_param_groups for record in group.fsdp_params]
    return {record._module_info.module: record for record in records if record._module_info.param_name == "weight"}


def _managed_by_fsdp(sharded: Sequence[FSDPModule], generators: nn.Module) -> set[Tensor]:
    """Return the parameters of the generators whose gradients FSDP2 averages.

    While they are gathered they look like any parameter, and torch tells only through these private attributes which
    ones they are; the tests notice if that changes.
    """
    own = [module for module in generators.modules() if isinstance(module, FSDPModule)]
    states = {state for module in (*sharded, *own) for state in _states(module)}
    modules = {
        parameter._module_info.module
        for state in states
        for group in state._fsdp_param_groups
        for parameter in group.fsdp_params
    }
    return {
        parameter
        for module in generators.modules()
        if module in modules
        for parameter in module.parameters(recurse=False)
    }


def _states(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    return [state, *state._state_ctx.all_states]
