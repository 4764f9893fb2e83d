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
from torch.distributed.tensor import DTensor
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
    """Raise RuntimeError if the model is wrapped in such a way that every process would train on its own.

    Args:
        model: The wrapped model, without the tuner.
        generators: The generators, which live on the tuner.
    """
    named = [*generators.named_parameters(prefix="gift_generators"), *model.named_parameters()]
    # A hook on a gradient stands for averaging by hand.
    names = {p: name for name, p in named if p.requires_grad and not p._post_accumulate_grad_hooks}
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is not None:
        _refuse_outside_ddp(ddp, set(names))
        return
    units = [module for module in (*model.modules(), *generators.modules()) if isinstance(module, FSDPModule)]
    apart = set(names) - _managed_by_fsdp(units, (model, generators)) if units else set()
    if apart:
        name = next(names[parameter] for parameter in names if parameter in apart)
        raise RuntimeError(
            "fully_shard was applied to the inner model or some of its parts only, or before an adapter was added, so "
            f"the gradients of {name} would not be averaged over the processes. Apply it to the PeftModel, after the "
            "blocks and after every add_adapter: for block in blocks: fully_shard(block); fully_shard(model)."
        )


def refuse_unread_generators(generators: nn.Module) -> None:
    """Raise RuntimeError if FSDP holds the generators' parameters and did not gather them for this call."""
    for generator in (one for of_adapter in generators.children() for one in of_adapter.children()):
        first: Any = generator.recover
        if not isinstance(first, nn.Parameter):  # but a view of a flat one
            raise RuntimeError(
                "The model is wrapped by FSDP1 (FullyShardedDataParallel), which puts the generators' parameters into "
                "flat ones. Use FSDP2 (fully_shard, or fsdp_version 2 in accelerate) or DDP."
            )
        if isinstance(first, DTensor) and not isinstance(generator, FSDPModule):
            raise RuntimeError(
                "The generators are sharded and were not gathered for this call. Call the PeftModel, not the model "
                "inside; for generate, say register_fsdp_forward_method(model, 'generate') first."
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


def _managed_by_fsdp(units: Sequence[FSDPModule], roots: Sequence[nn.Module]) -> Set[Tensor]:
    """Return the parameters whose gradients FSDP2 averages.

    While they are gathered they look like any parameter, and torch tells only through these private attributes which
    ones they are; the tests notice if that changes.
    """
    states = {state for unit in units for state in _states(unit)}
    records = [record for state in states for group in state._fsdp_param_groups for record in group.fsdp_params]
    managed = {(record._module_info.module, record._module_info.param_name) for record in records}
    return {
        parameter
        for root in roots
        for module in root.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if (module, name) in managed or isinstance(parameter, DTensor)
    }


def _states(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    return [state, *state._state_ctx.all_states]
