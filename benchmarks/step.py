"""What a whole training step of a ViT costs with each way of fine-tuning it: time, peak memory, parameters.

A step is forward, loss, backward and AdamW on what is trained. The frozen bound trains the head and nothing else, but
sends the gradient back through every block as far as the first adapted layer: no method that adapts the attention
projections can cost less. Weights are random, since time does not depend on them.
"""

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from interleaved import Estimate, environment, estimate, interleave, ratio, write_json
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from gift import GiftConfig

TARGET = "attn.proj"
BOUND = "frozen bound"
CLASSES = 100
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
EXAMPLE = "example: python benchmarks/step.py --device cuda --dtype bfloat16 --batch 64 --out results/step.json"


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
    "lora r=8": add_lora,
    "gift linear r=16": partial(add_gift, generator="linear"),
    "gift paca r=16": partial(add_gift, generator="paca"),
    "full fine-tuning": train_everything,
}


# ---- one step --------------------------------------------------------------------------------------------------------


def make_backbone(arguments: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    sizes = TINY if arguments.tiny else {}
    model = timm.create_model(arguments.model, pretrained=False, num_classes=CLASSES, **sizes)
    return model.to(device=arguments.device, dtype=getattr(torch, arguments.dtype))


def trained_parameters(name: str, arguments: argparse.Namespace) -> int:
    """Return how many parameters a method trains beside the head."""
    backbone = make_backbone(arguments)
    head = sum(p.numel() for p in backbone.get_classifier().parameters())
    return sum(p.numel() for p in METHODS[name](backbone).parameters() if p.requires_grad) - head


def make_step(name: str, arguments: argparse.Namespace) -> Callable[[], float]:
    """Return a measurement that takes one training step of a fresh model and returns its seconds."""
    model = METHODS[name](make_backbone(arguments)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    forward = torch.compile(model) if arguments.compile else model
    side_px = TINY["img_size"] if arguments.tiny else model.default_cfg["input_size"][-1]
    images = torch.randn(arguments.batch, 3, side_px, side_px, dtype=getattr(torch, arguments.dtype))
    labels = torch.randint(CLASSES, (arguments.batch,), device=arguments.device)
    return partial(step_seconds, forward, optimizer, images.to(arguments.device), labels)


def step_seconds(
    forward: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> float:
    synchronize(images.device)
    start = time.perf_counter()
    optimizer.zero_grad()
    functional.cross_entropy(forward(images).float(), labels).backward()
    optimizer.step()
    synchronize(images.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(name: str, arguments: argparse.Namespace) -> int | None:
    """Return the most CUDA memory that training holds at once, weights and optimiser included; None on a CPU."""
    if torch.device(arguments.device).type != "cuda":
        return None
    step = make_step(name, arguments)
    step()  # makes the optimiser's state, and compiles
    torch.cuda.reset_peak_memory_stats(arguments.device)
    step()
    peak = torch.cuda.max_memory_allocated(arguments.device)
    del step
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return peak


# ---- the command -----------------------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the measurements of every method; memory first, while only one model exists at a time."""
    memory = {name: peak_memory_bytes(name, arguments) for name in METHODS}
    parameters = {name: trained_parameters(name, arguments) for name in METHODS}
    seconds = interleave({name: make_step(name, arguments) for name in METHODS}, arguments.rounds)
    return {
        name: {
            "step_s": estimate(seconds[name])._asdict(),
            "step_to_bound": ratio(seconds[name], seconds[BOUND])._asdict(),
            "peak_memory_bytes": memory[name],
            "trainable_parameters_without_head": parameters[name],
            "step_s_by_round": seconds[name],
        }
        for name in METHODS
    }


def print_comparison(results: dict[str, Any]) -> None:
    print(f"{'':18}{'step ms':>10}  {'to the frozen bound':26}{'peak MB':>9}{'parameters without head':>25}")
    for name, measured in results.items():
        memory = measured["peak_memory_bytes"]
        print(
            f"{name:18}{1000 * measured['step_s']['median']:10.2f}  {Estimate(**measured['step_to_bound'])!s:26}"
            f"{'-' if memory is None else f'{memory / 1e6:.0f}':>9}{measured['trainable_parameters_without_head']:25,}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], epilog=EXAMPLE)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a ViT of timm, e.g. vit_large_patch16_224")
    parser.add_argument("--batch", type=int, default=8, help="images in a batch (default 8)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of the model; adapters stay float32"
    )
    parser.add_argument("--compile", action="store_true", help="train what torch.compile makes of the model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--rounds", type=int, default=21, help="rounds that count, after 3 that do not (default 21)")
    parser.add_argument("--tiny", action="store_true", help="2 blocks of width 32, to see that it runs")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    results = compare(arguments)
    print_comparison(results)
    if arguments.out is not None:
        gpu = torch.cuda.get_device_name(arguments.device) if arguments.device == "cuda" else None
        versions = {"timm": timm.__version__, "gpu": gpu, "matmul": torch.get_float32_matmul_precision()}
        options = {name: value for name, value in vars(arguments).items() if name != "out"}
        write_json(arguments.out, {"environment": environment() | versions, "options": options, "methods": results})


if __name__ == "__main__":
    main()
