"""What a whole training step of a ViT costs with each way of fine-tuning it: time, peak memory, parameters.

A step is forward, loss, backward and AdamW on what is trained. The frozen bound trains the head and nothing else, but
sends the gradient back through every block as far as the first adapted layer: no method that adapts the attention
projections can cost less. Weights are random, since time does not depend on them.

A run takes one backbone, plain or compiled. Its methods are all kept on the device, so that their steps can be timed in
turn. What does not fit there, or into the time, is named with the reason and the others go on.
"""

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from interleaved import WARM_UP_ROUNDS, Estimate, environment, estimate, interleave, ratio, write_json
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn import functional

from gift import GiftConfig

TARGET = "attn.proj"
BOUND, LORA, PACA, FULL = "frozen bound", "lora r=8", "gift paca r=16", "full fine-tuning"
COMPILED = (BOUND, LORA, PACA, FULL)  # compiling takes up to minutes for each
CLASSES = 100
TIME_IS_UP = "no time left"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
# The options that --suite changes; 9 minutes leave one for starting Python and for what takes longer than expected.
DEFAULTS = {"model": ["vit_base_patch16_224"], "batch": 8, "compile": "no", "minutes": None}
SUITE = {"model": ["vit_base_patch16_224", "vit_large_patch16_224"], "batch": 64, "compile": "both", "minutes": 9.0}
EXAMPLE = "example: python benchmarks/step.py --device cuda --dtype bfloat16 --suite --out results/step_cuda.json"


# ---- what is trained -------------------------------------------------------------------------------------------------


def train_head(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    return model


def train_head_through_blocks(model: nn.Module) -> nn.Module:
    """Train the bias of the first target too, at next to no cost: that is how far back the gradient has to go."""
    first = next(module for name, module in model.named_modules() if name.endswith(TARGET))
    train_head(model)
    first.bias.requires_grad_(True)
    return model


def train_everything(model: nn.Module) -> nn.Module:
    return model


def add_lora(model: nn.Module) -> nn.Module:
    config = LoraConfig(r=8, target_modules=[TARGET], modules_to_save=["head"])
    return get_peft_model(model, config)


def add_gift(model: nn.Module, generator: str) -> nn.Module:
    config = GiftConfig(generator=generator, r=16, target_modules=[TARGET], modules_to_save=["head"])
    return get_peft_model(model, config)


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    BOUND: train_head_through_blocks,
    "linear probe": train_head,
    LORA: add_lora,
    "gift linear r=16": partial(add_gift, generator="linear"),
    PACA: partial(add_gift, generator="paca"),
    FULL: train_everything,
}


# ---- the device ------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def held_bytes(device: str) -> int | None:
    """Return what all tensors on the device hold; None on a CPU, where it is not counted."""
    return torch.cuda.memory_allocated() if device == "cuda" else None


def peak_bytes(device: str) -> int | None:
    """Return the most they held since `forget_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def release(device: str) -> None:
    """Give back what unreachable tensors held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# ---- one method ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What all methods of one run have in common.

    Attributes:
        model: timm's name of the backbone.
        compiled: Whether to train what torch.compile makes of the model.
        images: The batch.
        labels: Its classes.
        tiny: Whether to shrink the backbone.
    """

    model: str
    compiled: bool
    images: Tensor
    labels: Tensor
    tiny: bool

    @property
    def device(self) -> str:
        return self.images.device.type


@dataclass(frozen=True)
class Training:
    """A method that is ready to be timed.

    Attributes:
        step: Takes one training step and returns its seconds.
        seconds: Those of the second step.
        parameters: Numbers trained, without the head.
        peak_memory_bytes: The most that its own tensors held during the second step, weights and optimiser included,
            the batch not; None on a CPU.
    """

    step: Callable[[], float]
    seconds: float
    parameters: int
    peak_memory_bytes: int | None


def make_setting(model: str, compiled: bool, arguments: argparse.Namespace) -> Setting:
    torch.manual_seed(0)
    side_px = TINY["img_size"] if arguments.tiny else timm.get_pretrained_cfg(model).input_size[-1]
    images = torch.randn(arguments.batch, 3, side_px, side_px, dtype=getattr(torch, arguments.dtype))
    labels = torch.randint(CLASSES, (arguments.batch,))
    return Setting(model, compiled, images.to(arguments.device), labels.to(arguments.device), arguments.tiny)


def make_backbone(setting: Setting) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(setting.device):
        sizes = TINY if setting.tiny else {}
        model = timm.create_model(setting.model, pretrained=False, num_classes=CLASSES, **sizes)
    return model.to(setting.images.dtype)


def prepare(name: str, setting: Setting) -> Training:
    """Make a fresh model and take two steps; the first makes the optimiser's state, and compiles.

    Models made before stay where they are. They do not run meanwhile, so what they hold is the same at the start and at
    the peak, and the difference is what this model alone would take.
    """
    release(setting.device)
    held_by_others = held_bytes(setting.device)
    backbone = make_backbone(setting)
    head = sum(p.numel() for p in backbone.get_classifier().parameters())
    model = METHODS[name](backbone).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    forward = torch.compile(model) if setting.compiled else model
    step = partial(step_seconds, forward, torch.optim.AdamW(trained, lr=1e-4), setting.images, setting.labels)
    step()
    forget_peak(setting.device)
    seconds = step()
    peak = peak_bytes(setting.device)
    own = None if peak is None or held_by_others is None else peak - held_by_others
    return Training(step, seconds, sum(p.numel() for p in trained) - head, own)


def step_seconds(
    forward: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> float:
    synchronize(images.device.type)
    start = time.perf_counter()
    optimizer.zero_grad()
    functional.cross_entropy(forward(images).float(), labels).backward()
    optimizer.step()
    synchronize(images.device.type)
    return time.perf_counter() - start


def load_libraries(setting: Setting) -> None:
    """Take one product forward and backward, so that no method is charged with the libraries' own workspaces."""
    x = torch.randn(64, 64, device=setting.device, dtype=setting.images.dtype, requires_grad=True)
    functional.linear(x, x, x[0]).sum().backward()


# ---- one run: all methods of one backbone ----------------------------------------------------------------------------


def compare(setting: Setting, rounds: int, deadline: float) -> dict[str, Any]:
    """Return the measurements of every method, and for those that could not be measured the reasons."""
    load_libraries(setting)
    trainings, skipped = prepare_all(setting, deadline)
    seconds = time_steps(trainings, skipped, setting.device, rounds, deadline)
    bound = seconds.get(BOUND)
    return {
        "model": setting.model,
        "compile": setting.compiled,
        "methods": {
            name: {
                "step_s": estimate(values)._asdict(),
                "step_to_bound": None if bound is None else ratio(values, bound)._asdict(),
                "peak_memory_bytes": trainings[name].peak_memory_bytes,
                "trainable_parameters_without_head": trainings[name].parameters,
                "step_s_by_round": values,
            }
            for name, values in seconds.items()
        },
        "skipped": skipped,
    }


def prepare_all(setting: Setting, deadline: float) -> tuple[dict[str, Training], dict[str, str]]:
    """Return what can be timed, and the reasons for the rest; memory is measured here."""
    trainings: dict[str, Training] = {}
    skipped: dict[str, str] = {}
    slowest = 0.0
    for name in COMPILED if setting.compiled else METHODS:
        start = time.monotonic()
        if start + slowest >= deadline:
            skipped[name] = TIME_IS_UP
            continue
        try:
            trainings[name] = prepare(name, setting)
        except (torch.OutOfMemoryError, TorchDynamoException) as error:
            reason = str(error).partition("\n")[0]
            skipped[name] = f"{type(error).__name__} beside {len(trainings)} other models: {reason}"
        slowest = max(slowest, time.monotonic() - start)
    release(setting.device)
    return trainings, skipped


def time_steps(
    trainings: dict[str, Training], skipped: dict[str, str], device: str, rounds: int, deadline: float
) -> dict[str, list[float]]:
    """Return the seconds of every step by method; one for which no room is left among the others moves to `skipped`."""
    running = ""

    def step(name: str) -> float:
        nonlocal running
        running = name
        return trainings[name].step()

    while trainings:
        try:
            steps = {name: partial(step, name) for name in trainings}
            return interleave(steps, rounds_in_time(trainings, rounds, deadline))
        except torch.OutOfMemoryError:
            peak = trainings.pop(running).peak_memory_bytes
            skipped[running] = f"OutOfMemoryError beside {len(trainings)} other models; its own peak is {peak} bytes"
        release(device)
    return {}


def rounds_in_time(trainings: dict[str, Training], rounds: int, deadline: float) -> int:
    """Return how many of the rounds can be taken before the deadline, at least one."""
    of_one = sum(training.seconds for training in trainings.values())
    return max(1, int(min(rounds, (deadline - time.monotonic()) / of_one - WARM_UP_ROUNDS)))


# ---- the command -----------------------------------------------------------------------------------------------------


def print_comparison(run: dict[str, Any]) -> None:
    print(f"\n{run['model']}{', compiled' if run['compile'] else ''}")
    print(f"{'':18}{'step ms':>10}  {'to the frozen bound':26}{'peak MB':>9}{'parameters without head':>25}")
    for name, measured in run["methods"].items():
        memory, to_bound = measured["peak_memory_bytes"], measured["step_to_bound"]
        print(
            f"{name:18}{1000 * measured['step_s']['median']:10.2f}  "
            f"{'-' if to_bound is None else str(Estimate(**to_bound)):26}"
            f"{'-' if memory is None else f'{memory / 1e6:.0f}':>9}{measured['trainable_parameters_without_head']:25,}"
        )
    for name, reason in run["skipped"].items():
        print(f"{name:18}skipped: {reason}")


def run_all(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one run after the other: plain models first, since compiling takes long."""
    deadline = math.inf if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    for compiled in {"no": [False], "yes": [True], "both": [False, True]}[arguments.compile]:
        for model in arguments.model:
            yield compare(make_setting(model, compiled, arguments), arguments.rounds, deadline)
            torch.compiler.reset()
            release(arguments.device)


def document(runs: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what is written: of a single run its methods, of several a list."""
    gpu = torch.cuda.get_device_name() if arguments.device == "cuda" else None
    versions = {"timm": timm.__version__, "gpu": gpu, "matmul": torch.get_float32_matmul_precision()}
    options = {name: value for name, value in vars(arguments).items() if name != "out"}
    conditions = {"environment": environment() | versions, "options": options}
    if len(arguments.model) > 1 or arguments.compile == "both":
        return conditions | {"runs": runs}
    (run,) = runs
    options |= {"model": run["model"], "compile": run["compile"]}
    return conditions | {"methods": run["methods"], "skipped": run["skipped"]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], epilog=EXAMPLE)
    parser.add_argument("--model", nargs="+", metavar="NAME", help=f"ViTs of timm (default {DEFAULTS['model'][0]})")
    parser.add_argument("--batch", type=int, help="images in a batch (default 8)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of the model; adapters stay float32"
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        const="yes",
        choices=["no", "yes", "both"],
        help=f"train what torch.compile makes of the model, for {', '.join(COMPILED)} (default no)",
    )
    parser.add_argument("--minutes", type=float, help="leave out methods and rounds that would take longer")
    parser.add_argument("--suite", action="store_true", help="ViT-B and ViT-L, batch 64, plain and compiled, 9 minutes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--rounds", type=int, default=21, help="rounds that count, after 3 that do not (default 21)")
    parser.add_argument("--tiny", action="store_true", help="2 blocks of width 32, to see that it runs")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    arguments = parser.parse_args()
    for name, value in (SUITE if arguments.suite else DEFAULTS).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    runs = []
    for run in run_all(arguments):
        runs.append(run)
        print_comparison(run)
        if arguments.out is not None:  # after every run: what was measured survives if a later one is killed
            write_json(arguments.out, document(runs, arguments))


if __name__ == "__main__":
    main()
