"""The gradients of an adapted model in two processes, in every way of wrapping it, against those of plain eager.

Part of the table of benchmarks/modes.py, which starts this program under torchrun. The processes talk through gloo, so
no GPU is needed.
"""

import argparse
import copy
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from interleaved import write_json
from mode_table import Mode, try_mode
from modes import backward, checkpoint_blocks, inner_model
from peft import PeftModel
from plain import (
    GENERATORS,
    Gradients,
    adapt,
    collect,
    largest_difference,
    loss_of,
    make_backbone,
    make_images,
    plain_gradients,
)
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from gift import GiftConfig

PROCESSES = 2
BATCH = 4


def of_this_process(images: Tensor) -> Tensor:
    return images.chunk(PROCESSES)[dist.get_rank()]


def whole(gradients: Gradients) -> Gradients:
    """Return gradients with those of sharded parameters gathered."""
    return {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in gradients.items()}


def against_plain(
    wrap: Callable[[nn.Module], nn.Module],
    before: Callable[[nn.Module], Any] | None = None,
    step: Callable[[nn.Module, Tensor], Gradients] = backward,
    **sizes: int,
) -> Callable[[str], float]:
    """Return a mode: wrap the model, take a step in which every process has its share of the batch."""

    def run(generator: str) -> float:
        model, images = adapt(make_backbone(**sizes), generator), make_images(BATCH)
        expected = plain_gradients(model, images)
        if before is not None:
            before(model)
        wrapped = wrap(model)
        try:
            step(wrapped, of_this_process(images))
        finally:
            dist.barrier()
        return worst_of_all(largest_difference(whole(collect(model)), expected))

    return run


def worst_of_all(difference: float) -> float:
    everywhere = [0.0] * PROCESSES
    dist.all_gather_object(everywhere, difference)
    return max(everywhere)


# ---- wrappers --------------------------------------------------------------------------------------------------------


ddp = DistributedDataParallel


def ddp_inside(model: nn.Module) -> nn.Module:
    model.base_model.model = DistributedDataParallel(model.base_model.model)
    return model


def ddp_around_inner(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model.base_model.model)


def ddp_before_adding(model: nn.Module) -> nn.Module:
    """Add another adapter and train it, once DDP knows what it averages."""
    wrapped = DistributedDataParallel(model)
    model.add_adapter("later", GiftConfig(r=2, num_clusters=3, generator_dtype="float64"))
    model.set_adapter("later")
    return wrapped


def compiled(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Return a wrapper around another one that compiles the whole."""

    def wrap_and_compile(model: nn.Module) -> nn.Module:
        torch.compiler.reset()
        return torch.compile(wrap(model), backend="aot_eager")

    return wrap_and_compile


def shard(*parts: str, **options: Any) -> Callable[[nn.Module], nn.Module]:
    """Return a wrapper that applies fully_shard to some parts of the model, from the inside out."""

    def wrap(model: nn.Module) -> nn.Module:
        inner = model.base_model.model
        units = {
            "blocks": list(inner.blocks),
            "generators": list(model.base_model.gift_generators["default"].values()),
            "inner model": [inner],
            "PeftModel": [model],
        }
        for part in parts:
            for unit in units[part]:
                fully_shard(unit, **options)
        return model

    return wrap


def shard_at_load_time(model: nn.Module) -> nn.Module:
    """Do as transformers' Trainer does for a model that was sharded before it was adapted: average by hand."""
    shard("blocks", "inner model")(model)
    for parameter in model.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad, op=dist.ReduceOp.AVG))
    return model


def accumulate(model: nn.Module, images: Tensor) -> Gradients:
    """Take the batch in two halves, and bring gradients together in the second only."""
    first, second = images.chunk(2)
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            (loss_of(model(first)) / 2).backward()
    else:
        model.set_requires_gradient_sync(False)
        (loss_of(model(first)) / 2).backward()
        model.set_requires_gradient_sync(True)
    (loss_of(model(second)) / 2).backward()
    return {}


def accumulate_gathered(model: nn.Module, images: Tensor) -> Gradients:
    """Accumulate as torch recommends where memory allows it: keep the weights gathered until the last half."""
    first, second = images.chunk(2)
    for half, is_last in ((first, False), (second, True)):
        model.set_requires_gradient_sync(is_last)
        model.set_reshard_after_backward(is_last)
        (loss_of(model(half)) / 2).backward()
    return {}


def after_evaluation(model: nn.Module, images: Tensor) -> Gradients:
    with torch.no_grad():
        model.eval()(images)
        model(images)
    return backward(model.train(), images)


def shard_transposed(generator: str) -> float:
    """Shard layers that store their weights transposed, as GPT-2's: what is distributed are columns, 7 and 10."""
    torch.manual_seed(0)
    backbone = nn.Sequential(Conv1D(10, 7), nn.GELU(), Conv1D(6, 10)).double()
    for weight in (backbone[0].weight, backbone[2].weight):
        nn.init.normal_(weight)  # Conv1D's own are so small that differences could hide
    model = adapt(backbone, generator, target_modules=["0", "2"], modules_to_save=[])
    inputs = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = plain_gradients(model, inputs)
    for layer in (backbone[0], backbone[2], model):
        fully_shard(layer)
    return worst_of_all(largest_difference(whole(backward(model, of_this_process(inputs))), expected))


def fsdp1(model: nn.Module) -> nn.Module:
    """Wrap every block and the whole as FSDP's first version does."""
    policy = ModuleWrapPolicy({type(model.base_model.model.blocks[0])})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


# ---- sharded models in use -------------------------------------------------------------------------------------------


def sharded_and_plain(generator: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a sharded model, the same model in one piece, and images, all in evaluation mode."""
    plain = adapt(make_backbone(), generator).eval()
    return shard("blocks", "PeftModel")(copy.deepcopy(plain)), plain, make_images(BATCH)


@torch.no_grad()
def evaluate(generator: str) -> float:
    """Compare outputs, also after the generator's numbers were changed by hand."""
    sharded, plain, images = sharded_and_plain(generator)
    worst = 0.0
    for _ in range(2):
        worst = max(worst, *((sharded(images) - plain(images)).abs().max().item() for _ in range(2)))
        sharded.reshard()  # the root stays gathered, and what is written then is lost
        for model in (sharded, plain):
            for parameter in model.base_model.gift_generators.parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.mul_(1.1)
    return worst_of_all(worst)


@torch.no_grad()
def reload_shards(generator: str) -> float:
    sharded, plain, images = sharded_and_plain(generator)
    trained = StateDictOptions(ignore_frozen_params=True)
    with shared_folder() as folder:
        checkpoint.save({"adapter": get_model_state_dict(sharded, options=trained)}, checkpoint_id=folder)
        state = get_model_state_dict(sharded, options=trained)
        for tensor in state.values():
            tensor.zero_()
        checkpoint.load({"adapter": state}, checkpoint_id=folder)
        set_model_state_dict(sharded, state, options=StateDictOptions(strict=False))
    return worst_of_all((sharded(images) - plain(images)).abs().max().item())


@torch.no_grad()
def load_whole_into_shards(generator: str) -> float:
    sharded, plain, images = sharded_and_plain(generator)
    for parameter in sharded.parameters():
        if parameter.requires_grad:
            parameter.zero_()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(sharded, plain.state_dict() if dist.get_rank() == 0 else {}, options=options)
    return worst_of_all((sharded(images) - plain(images)).abs().max().item())


def save_and_load(generator: str) -> float:
    sharded, plain, images = sharded_and_plain(generator)
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with shared_folder() as folder, torch.no_grad():
        if dist.get_rank() == 0:
            sharded.save_pretrained(folder, state_dict=state)
        dist.barrier()
        loaded = PeftModel.from_pretrained(make_backbone(), folder).double().eval()
        return worst_of_all((loaded(images) - plain(images)).abs().max().item())


def save_one_shard(generator: str) -> float:
    with shared_folder() as folder:
        sharded_and_plain(generator)[0].save_pretrained(folder)
    return float("inf")


def merge_shards(generator: str) -> float:
    sharded_and_plain(generator)[0].merge_adapter()
    return float("inf")


def generate_text(generator: str) -> float:
    """Return how many tokens differ from those of the model in one piece; the generator may be called once only."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=1, **sizes)).double().eval()
    plain = adapt(backbone, generator).eval()
    sharded = copy.deepcopy(plain)
    for layer in sharded.base_model.model.model.layers:
        fully_shard(layer)
    register_fsdp_forward_method(fully_shard(sharded), "generate")
    options = {"input_ids": torch.tensor([[1, 2, 3]]), "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    calls: list[int] = []
    for one in sharded.base_model.gift_generators["default"].values():
        one.register_forward_hook(lambda *_: calls.append(1))
    wrong = (sharded.generate(**options) != plain.generate(**options)).sum().item()
    return worst_of_all(wrong if len(calls) == 1 else float("inf"))


@contextmanager
def shared_folder() -> Iterator[str]:
    """Give all processes the same new folder, and remove it afterwards."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    try:
        yield folder[0]
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])


# ---- the table -------------------------------------------------------------------------------------------------------

DDP_INSIDE = "put around the inner model only"
DDP_LATER = "were not when DistributedDataParallel was made"
FSDP_INSIDE = "applied to the inner model or some of its parts only"
REENTRANT = "Use non-reentrant checkpointing"
FSDP1 = "wrapped by FSDP1|FSDP1 and DeepSpeed ZeRO-3 keep frozen weights"

MODES: dict[str, Mode] = {
    "DDP": Mode(against_plain(ddp)),
    "DDP, no_sync": Mode(against_plain(ddp, step=accumulate)),
    "DDP, after evaluation": Mode(against_plain(ddp, step=after_evaluation)),
    "DDP, checkpointing": Mode(against_plain(ddp, checkpoint_blocks(use_reentrant=False))),
    "DDP, reentrant checkpointing": Mode(against_plain(ddp, checkpoint_blocks(use_reentrant=True)), raises=REENTRANT),
    "DDP, reentrant, static_graph": Mode(
        against_plain(partial(ddp, static_graph=True), checkpoint_blocks(use_reentrant=True))
    ),
    "DDP around the inner model": Mode(against_plain(ddp_around_inner), raises=DDP_INSIDE),
    "DDP, another adapter added later": Mode(against_plain(ddp_before_adding), raises=DDP_LATER),
    "torch.compile of DDP": Mode(against_plain(compiled(ddp))),
    "torch.compile of DDP around the inner model": Mode(against_plain(compiled(ddp_around_inner)), raises=DDP_INSIDE),
    "torch.compile, DDP inside": Mode(against_plain(compiled(ddp_inside)), raises=DDP_INSIDE),
    "DDP inside the PeftModel": Mode(against_plain(ddp_inside), raises=DDP_INSIDE),
    "FSDP2, PeftModel": Mode(against_plain(shard("PeftModel"))),
    "FSDP2, blocks and PeftModel": Mode(against_plain(shard("blocks", "PeftModel"))),
    "FSDP2, odd number of rows": Mode(against_plain(shard("blocks", "PeftModel"), width=33, num_heads=3)),
    "FSDP2, Conv1D": Mode(shard_transposed),
    "FSDP2, all resharded": Mode(against_plain(shard("blocks", "PeftModel", reshard_after_forward=True))),
    "FSDP2, none resharded": Mode(against_plain(shard("blocks", "PeftModel", reshard_after_forward=False))),
    "FSDP2, none resharded, after evaluation": Mode(
        against_plain(shard("blocks", "PeftModel", reshard_after_forward=False), step=after_evaluation)
    ),
    "FSDP2, gathered while accumulating": Mode(against_plain(shard("blocks", "PeftModel"), step=accumulate_gathered)),
    "torch.compile of FSDP2": Mode(against_plain(compiled(shard("blocks", "PeftModel")))),
    "torch.compile, FSDP2 of blocks only": Mode(against_plain(compiled(shard("blocks"))), raises=FSDP_INSIDE),
    "FSDP2, no gradient sync": Mode(against_plain(shard("blocks", "PeftModel"), step=accumulate)),
    "FSDP2, after evaluation": Mode(against_plain(shard("blocks", "PeftModel"), step=after_evaluation)),
    "FSDP2, checkpointing": Mode(against_plain(shard("blocks", "PeftModel"), checkpoint_blocks(use_reentrant=False))),
    "FSDP2, reentrant checkpointing": Mode(
        against_plain(shard("blocks", "PeftModel"), checkpoint_blocks(use_reentrant=True)), raises=REENTRANT
    ),
    "FSDP2, generators their own units": Mode(against_plain(shard("blocks", "generators", "PeftModel"))),
    "FSDP2, inner model and generators": Mode(against_plain(shard("blocks", "generators", "inner model"))),
    "FSDP2, sharded before adapting, averaged by hooks": Mode(against_plain(shard_at_load_time)),
    "FSDP2, inner model only": Mode(against_plain(shard("inner model")), raises=FSDP_INSIDE),
    "FSDP2, blocks and inner model only": Mode(against_plain(shard("blocks", "inner model")), raises=FSDP_INSIDE),
    "FSDP2, blocks only": Mode(against_plain(shard("blocks")), raises=FSDP_INSIDE),
    "FSDP2, evaluation (outputs)": Mode(evaluate),
    "FSDP2, generate (tokens)": Mode(generate_text),
    "FSDP2, shards saved and loaded (outputs)": Mode(reload_shards),
    "FSDP2, whole adapter loaded into shards (outputs)": Mode(load_whole_into_shards),
    "FSDP2, saved as one adapter (outputs)": Mode(save_and_load),
    "FSDP2, saved without gathering": Mode(save_one_shard, raises="Gather the state on all of them"),
    "FSDP2, merged": Mode(merge_shards, raises="sharded over processes, so nothing was merged"),
    "FSDP2, blocks and generators only": Mode(against_plain(shard("blocks", "generators")), raises=FSDP_INSIDE),
    "FSDP2, inner model called": Mode(
        against_plain(lambda model: inner_model(shard("blocks", "PeftModel")(model))), raises="Call the PeftModel"
    ),
    "FSDP1, blocks": Mode(against_plain(fsdp1), raises=FSDP1),
    "FSDP1, whole model": Mode(
        against_plain(partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))),
        raises="wrapped by FSDP1",
    ),
}


def leave() -> None:
    """End this process, with everything done: in an ordinary exit a thread of gloo aborts it once in a while."""
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--generators", nargs="+", default=list(GENERATORS), choices=GENERATORS)
    parser.add_argument("--only", default="", help="part of the names of the modes to try; by default all")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the table")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    results = {
        name: {generator: try_mode(mode, generator) for generator in arguments.generators}
        for name, mode in MODES.items()
        if arguments.only in name
    }
    if dist.get_rank() == 0:
        write_json(arguments.out, results)
    leave()


if __name__ == "__main__":
    main()
