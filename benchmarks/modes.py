"""The gradients of an adapted model in every way it is run, against those of plain eager: a table mode x generator.

Plain eager is benchmarks/plain.py: a plain backbone with dense weights W + dW, by autograd, in float64. A mode either
gives the same gradients, or raises an error that says what to do instead; what it must do stands in `MODES` below.
The modes of several processes are in benchmarks/parallel.py, which this program starts.
"""

import argparse
import copy
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from documents import replace_between
from interleaved import environment, write_json
from mode_table import Mode, table, try_mode
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
    relative_difference,
)
from quantised import QUANTISE
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

ROUNDED = 0.03  # relative, where bfloat16 is part of the mode
FLOAT32 = 1e-4  # relative
PARALLEL = Path(__file__).with_name("parallel.py")


def backward(model: nn.Module, images: Tensor) -> Gradients:
    loss_of(model(images)).backward()
    return collect(model)


def against_plain(change: Callable[[nn.Module], Any], **sizes: float) -> Callable[[str], float]:
    """Return a mode that changes the model, then takes one ordinary step."""

    def run(generator: str) -> float:
        model, images = adapt(make_backbone(**sizes), generator), make_images()
        expected = plain_gradients(model, images)
        changed = change(model)
        return largest_difference(backward(model if changed is None else changed, images), expected)

    return run


# ---- checkpointing ---------------------------------------------------------------------------------------------------


def checkpoint_blocks(use_reentrant: bool) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for block in model.base_model.model.blocks:
            block.forward = lambda x, f=block.forward, **_: checkpoint(f, x, use_reentrant=use_reentrant)
        embed = model.base_model.model.patch_embed  # reentrant checkpointing needs an input with gradients
        embed.register_forward_hook(lambda _, __, tokens: tokens.requires_grad_())

    return change


def checkpoint_as_timm_does(model: nn.Module) -> None:
    model.base_model.model.set_grad_checkpointing(True)


def offload_saved(generator: str) -> float:
    model, images = adapt(make_backbone(), generator), make_images()
    expected = plain_gradients(model, images)
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(model(images))
    loss.backward()
    return largest_difference(collect(model), expected)


# ---- several passes --------------------------------------------------------------------------------------------------


def accumulate(generator: str) -> float:
    model, images = adapt(make_backbone(), generator), make_images()
    expected = plain_gradients(model, images)
    for half in images.chunk(2):
        (loss_of(model(half)) / 2).backward()
    return largest_difference(collect(model), expected)


def two_forwards(generator: str) -> float:
    model, images = adapt(make_backbone(), generator), make_images()
    expected = plain_gradients(model, images)
    losses = [loss_of(model(half)) for half in images.chunk(2)]
    (sum(losses) / 2).backward()
    return largest_difference(collect(model), expected)


def backward_twice(generator: str) -> float:
    model, images = adapt(make_backbone(), generator), make_images()
    expected = plain_gradients(model, images)
    loss = loss_of(model(images)) / 2
    loss.backward(retain_graph=True)
    loss.backward()
    return largest_difference(collect(model), expected)


def penalise_gradients(generator: str) -> float:
    """Train on the norm of the gradient with respect to the images."""
    model, images = adapt(make_backbone(), generator), make_images().requires_grad_()

    def penalty(backbone: nn.Module, replaced: Any, batch: Tensor) -> Tensor:
        loss = loss_of(functional_call(backbone, dict(replaced), (batch,)))
        return torch.autograd.grad(loss, batch, create_graph=True)[0].square().sum()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the others have no second derivative
        expected = plain_gradients(model, images, penalty)
        torch.autograd.grad(loss_of(model(images)), images, create_graph=True)[0].square().sum().backward()
    return largest_difference(collect(model), expected)


def evaluate_in_between(generator: str) -> float:
    """Train after evaluations in every order of modes."""
    worst = 0.0
    for orders in itertools.permutations((torch.no_grad, torch.inference_mode, torch.enable_grad)):
        model, images = adapt(make_backbone(), generator), make_images()
        expected = plain_gradients(model, images)
        for context in orders:
            model.eval()
            with context():
                model(images)
            model.train()
            with context():
                model(images)
        worst = max(worst, largest_difference(backward(model, images), expected))
    return worst


# ---- parts of the model ----------------------------------------------------------------------------------------------


def features_then_head(model: nn.Module) -> nn.Module:
    inner = model.base_model.model
    return Calling(model, lambda x: inner.forward_head(inner.forward_features(x)))


def intermediates_then_head(model: nn.Module) -> nn.Module:
    inner = model.base_model.model
    return Calling(model, lambda x: inner.forward_head(inner.forward_intermediates(x)[0]))


def inner_model(model: nn.Module) -> nn.Module:
    return Calling(model, model.base_model.model)


class Calling(nn.Module):
    """The parameters of a model, called in another way."""

    def __init__(self, model: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, [call]

    def forward(self, images: Tensor) -> Tensor:
        return self.call[0](images)


def reset_classifier(generator: str) -> float:
    """Put a new head onto the adapted model; saving it raises, see tests/tuner/test_saving.py."""
    model, images = adapt(make_backbone(), generator), make_images()
    inner = model.base_model.model
    inner.reset_classifier(7)
    inner.head.double()
    head = {f"head.{name}": p for name, p in inner.head.named_parameters()}

    def with_head(backbone: nn.Module, replaced: Any, batch: Tensor) -> Tensor:
        return loss_of(functional_call(backbone, dict(replaced) | head, (batch,)))

    expected = plain_gradients(model, images, with_head)
    got = {name: gradient for name, gradient in backward(model, images).items() if name not in head}
    return largest_difference(got, expected)


def drop_path(generator: str) -> float:
    model, images = adapt(make_backbone(drop_path_rate=0.5, proj_drop_rate=0.2), generator), make_images()
    torch.manual_seed(5)
    expected = plain_gradients(model, images)
    torch.manual_seed(5)
    return largest_difference(backward(model, images), expected)


def user_hooks(model: nn.Module) -> None:
    """Hook everything, and change the output of adapted layers on the way."""
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: None)
        module.register_forward_hook(lambda *_: None)
        if not isinstance(module, nn.ModuleDict):
            module.register_full_backward_hook(lambda *_: None)


# ---- other arithmetic ------------------------------------------------------------------------------------------------


def autocast(generator: str) -> float:
    model, images = adapt(make_backbone(dtype=torch.float32), generator), make_images(dtype=torch.float32)
    expected = plain_gradients(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model(images).float())
    loss.backward()
    return relative_difference(collect(model), expected)


def half_precision(generator: str) -> float:
    """Hold the backbone in bfloat16, and generator and head in float32, as PEFT does."""
    model, images = adapt(make_backbone(dtype=torch.float32), generator), make_images(dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
        elif "modules_to_save" in name:
            parameter.requires_grad_(False).data = parameter.data.bfloat16()
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data = parameter.data.float()
    expected = plain_gradients(twin, images)
    loss_of(model(images.bfloat16()).float()).backward()
    return relative_difference(collect(model), expected)


def average_weights(generator: str) -> float:
    """Compare the averaged model's output with that of a model that holds the average."""
    model, images = adapt(make_backbone(), generator), make_images()
    averaged = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    parameters = [p for p in model.parameters() if p.requires_grad]
    by_hand = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    averaged.update_parameters(model)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, images)
        optimizer.step()
        averaged.update_parameters(model)
        with torch.no_grad():
            averaged.eval()(images)  # keeps factors, which the next average makes stale
            for mean, parameter in zip(by_hand, parameters, strict=True):
                mean.lerp_(parameter, 0.5)
    with torch.no_grad():
        for parameter, mean in zip(parameters, by_hand, strict=True):
            parameter.copy_(mean)
        return (averaged.eval()(images) - model.eval()(images)).abs().max().item()


# ---- compiling and exporting -----------------------------------------------------------------------------------------


def compile_training(generator: str) -> float:
    torch.compiler.reset()
    return against_plain(lambda model: torch.compile(model, fullgraph=True))(generator)


def compile_evaluation(generator: str) -> float:
    """Compare outputs, also after a step of training in between."""
    torch.compiler.reset()
    model, images = adapt(make_backbone(), generator).eval(), make_images()
    compiled = torch.compile(model, fullgraph=True)
    worst = 0.0
    for _ in range(2):
        with torch.no_grad():
            worst = max(worst, (compiled(images) - model(images)).abs().max().item())
            for parameter in model.base_model.gift_generators.parameters():
                parameter.mul_(1.1)
    return worst


def compile_blocks(model: nn.Module) -> None:
    torch.compiler.reset()
    for block in model.base_model.model.blocks:
        block.compile(fullgraph=True)


def transform_functions(generator: str) -> float:
    model, images = adapt(make_backbone(), generator), make_images()
    torch.func.grad(lambda x: loss_of(model(x)))(images)
    return float("inf")


# ---- quantised backbones ---------------------------------------------------------------------------------------------


def quantised(kind: str) -> Callable[[str], float]:
    """Return a mode that compares with a plain backbone of the dequantised weights."""

    def run(generator: str) -> float:
        backbone = make_backbone(width=64, dtype=torch.float32)
        for block in backbone.blocks:
            block.attn.proj = QUANTISE[kind](block.attn.proj)
        model, images = adapt(backbone, generator), make_images(dtype=torch.float32)
        expected = plain_gradients(model, images)
        with torch.no_grad():
            model.eval()(images)
        return relative_difference(backward(model.train(), images), expected)

    return run


# ---- the table -------------------------------------------------------------------------------------------------------

MODES: dict[str, Mode] = {
    "eager": Mode(against_plain(lambda model: None)),
    "eager, evaluation mode": Mode(against_plain(lambda model: model.eval())),
    "checkpointing, not reentrant": Mode(against_plain(checkpoint_blocks(use_reentrant=False))),
    "checkpointing, reentrant": Mode(against_plain(checkpoint_blocks(use_reentrant=True))),
    "checkpointing of timm": Mode(against_plain(checkpoint_as_timm_does)),
    "saved tensors offloaded": Mode(offload_saved),
    "gradient accumulation": Mode(accumulate),
    "two forwards, one backward": Mode(two_forwards),
    "one forward, two backwards": Mode(backward_twice),
    "gradient penalty (second derivative)": Mode(penalise_gradients),
    "after evaluations in every order": Mode(evaluate_in_between),
    "inner model called": Mode(against_plain(inner_model)),
    "forward_features, forward_head": Mode(against_plain(features_then_head)),
    "forward_intermediates, forward_head": Mode(against_plain(intermediates_then_head)),
    "reset_classifier": Mode(reset_classifier),
    "drop path and dropout": Mode(drop_path),
    "hooks of users everywhere": Mode(against_plain(user_hooks)),
    "moving average of weights (outputs)": Mode(average_weights),
    "autocast bfloat16 (relative)": Mode(autocast, ROUNDED),
    "backbone in bfloat16 (relative)": Mode(half_precision, ROUNDED),
    "torch.compile, inductor, fullgraph": Mode(compile_training),
    "torch.compile of the blocks": Mode(against_plain(compile_blocks)),
    "torch.compile in evaluation (outputs)": Mode(compile_evaluation),
    "torch.func.grad": Mode(transform_functions, raises=r"torch\.func|functorch"),
    **{
        f"{kind} (relative)": Mode(quantised(kind), tolerance, needs=kind.partition(",")[0])
        for kind, tolerance in zip(QUANTISE, (1e-3, FLOAT32, FLOAT32), strict=True)
    },
}


def try_parallel(generators: list[str], only: str) -> dict[str, dict[str, Any]]:
    """Return the same for the modes of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "modes.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run([*launch, PARALLEL, "--out", path, "--only", only, "--generators", *generators], check=True)
        return json.loads(path.read_text())


START, END = "<!-- table: benchmarks/modes.py --write-docs FILE -->", "<!-- end of table -->"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="example: python benchmarks/modes.py --out results/modes.json",
    )
    parser.add_argument("--generators", nargs="+", default=list(GENERATORS), choices=GENERATORS)
    parser.add_argument("--only", default="", help="part of the names of the modes to try; by default all")
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    parser.add_argument("--write-docs", type=Path, metavar="MD", help="put the table between the markers of this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    results = {
        name: {generator: try_mode(mode, generator) for generator in arguments.generators}
        for name, mode in MODES.items()
        if arguments.only in name
    }
    results |= try_parallel(arguments.generators, arguments.only)
    print(table(results))
    if arguments.write_docs is not None:
        replace_between(arguments.write_docs, START, END, table(results))
    if arguments.out is not None:
        write_json(arguments.out, {"environment": environment(), "modes": results})
    wrong = [name for name, row in results.items() if not all(one.get("is_right", True) for one in row.values())]
    sys.exit(f"Not as they should be: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
