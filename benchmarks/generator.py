"""What the generator costs beside a training step of the largest models: time and memory against L, N and d_in.

The real architectures are built on the meta device, which takes no memory: their sizes, the parameters trained and the
FLOPs are *counted*. Then random weights of those shapes are made, one tensor per layer, and the generator is *measured*
on them. Last, L, N and d_in are varied one at a time. The tables go into docs/scale.md.

Glossary (symbol: word): L: layers, N: out_features (rows of a weight), d_in: in_features (its columns), d: rank, M:
clusters. FLOPs are those of matrix products, 2 for a multiplication and its addition.
"""

import argparse
import gc
import json
import math
import os
import resource
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from generator_tables import AXES, GROWING, KINDS, SHARES, TIMES, label, tables, write_docs
from interleaved import WARM_UP_ROUNDS, environment, estimate, interleave, write_json
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gift import GiftConfig
from gift.tuner.generator import WeightGenerator
from gift.tuner.options import GeneratorOptions
from gift.tuner.targets import find_targets

RANK, CLUSTERS, MLP_RATIO = 16, 96, 2  # `paca` as it is by default, with one block and one head
SEQUENCE_TOKENS = 2048
BYTES_READ = 4e9  # by one kind of measurement: the weights of large models are read in fewer rounds
EXAMPLE = "example: python benchmarks/generator.py --out results/generator.json --write-docs docs/scale.md"

Shape = tuple[int, int]  # of one weight: out_features, in_features

# ---- the architectures, on paper -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """A backbone by its public sizes, and the layers to adapt.

    Attributes:
        name: What the tables call it.
        sizes: timm's name of a ViT, or the sizes of a LLaMA.
        targets: Names of the layers to adapt; none for the family's default.
        changes: Sizes to change in timm's model.
    """

    name: str
    sizes: str | dict[str, int]
    targets: tuple[str, ...] = ()
    changes: dict[str, int] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if isinstance(self.sizes, str) else torch.bfloat16

    def make(self) -> nn.Module:
        """Return the model on the meta device."""
        with torch.device("meta"):
            if isinstance(self.sizes, str):
                return timm.create_model(self.sizes, pretrained=False, **self.changes)
            return LlamaForCausalLM(LlamaConfig(**self.sizes))


def llama(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int = 128256) -> dict[str, int]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": vocabulary}


LLAMA_8B, LLAMA_70B = llama(4096, 14336, 32, 32), llama(8192, 28672, 80, 64)
QUERY_AND_VALUE = ("q_proj", "v_proj")  # what the paper's later versions adapt in language models
ARCHITECTURES = (
    Architecture("ViT-B/16", "vit_base_patch16_224"),
    Architecture("ViT-L/16", "vit_large_patch16_224"),
    Architecture("ViT-H/14", "vit_huge_patch14_224"),
    Architecture("LLaMA 3 8B", LLAMA_8B),
    Architecture("LLaMA 3 8B", LLAMA_8B, QUERY_AND_VALUE),
    Architecture("LLaMA 3 70B", LLAMA_70B),
    Architecture("LLaMA 3 70B", LLAMA_70B, QUERY_AND_VALUE),
)
TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY_ARCHITECTURES = (
    Architecture("tiny ViT", "vit_tiny_patch16_224", changes=TINY_VIT),
    Architecture("tiny LLaMA", llama(32, 64, 2, 16, 50), QUERY_AND_VALUE),
)


def on_paper(architecture: Architecture) -> dict[str, Any]:
    """Return what can be counted without any weights."""
    model = architecture.make()
    targets = find_targets(model, gift_config("paca", architecture.targets))
    names = [target.layer for target in targets]
    shapes = [tuple(model.get_submodule(name).weight.shape) for name in names]
    methods = {f"gift {kind}": gift_config(kind, names) for kind in KINDS} | {
        "lora r=8": LoraConfig(r=8, target_modules=names)
    }
    in_products = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    is_vit = hasattr(model, "patch_embed")
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens if is_vit else SEQUENCE_TOKENS
    paper = {
        "name": architecture.name,
        "targets": list(dict.fromkeys(target.kind for target in targets)),
        "shapes": [[layers, *shape] for shape, layers in Counter(shapes).items()],
        "dtype": str(architecture.dtype).removeprefix("torch."),
        "weight_bytes": sum(math.prod(shape) for shape in shapes) * architecture.dtype.itemsize,
        "backbone_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "parameters_in_products": in_products,
        "trained_parameters": {name: count_trained(architecture, config) for name, config in methods.items()},
        "step_tokens": tokens,
        "step_flops": 4 * in_products * tokens,  # forward 2; the backward pass to the inputs alone, 2 more
    }
    return paper | {"generators": {kind: generator_on_paper(kind, shapes, paper) for kind in KINDS}}


def gift_config(kind: str, targets: Sequence[str]) -> GiftConfig:
    return GiftConfig(
        generator=kind, r=RANK, num_clusters=CLUSTERS, target_modules=list(targets) or None, modules_to_save=[]
    )


def count_trained(architecture: Architecture, config: PeftConfig) -> int:
    with warnings.catch_warnings():  # PEFT 0.21.2 reads an attribute that transformers 5.23 has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(architecture.make(), config, low_cpu_mem_usage=True)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def generator_on_paper(kind: str, shapes: Sequence[Shape], paper: Mapping[str, Any]) -> dict[str, Any]:
    forward, training = generator_flops(kind, shapes)
    per_token = paper["step_flops"] / paper["step_tokens"]
    return {
        "forward_flops": forward,
        "training_flops": training,
        "share_of_step_flops": training / paper["step_flops"],
        "tokens_at_share": {str(share): math.ceil(training / (share * per_token)) for share in SHARES},
        "left_factor_bytes": sum(rows for rows, _ in shapes) * RANK * torch.float32.itemsize,
        "bytes_read": paper["weight_bytes"] * (3 if kind == "paca" else 2),  # forward, recomputation, backward
    }


def generator_flops(kind: str, shapes: Sequence[Shape]) -> tuple[int, int]:
    """Return the FLOPs of a forward pass, and of a forward and a backward pass with its recomputation.

    The weights are frozen: the backward pass of a reduction is one product. The recomputation stops before its last
    product, and the backward pass of the attention makes its scores anew.
    """
    reduction = sum(2 * rows * columns * RANK for rows, columns in shapes)
    if kind == "linear":
        return reduction, 2 * reduction
    rows, layers = sum(rows for rows, _ in shapes), len(shapes)
    by_clusters = 2 * rows * RANK * CLUSTERS  # assignment, cluster tokens, scores and attended tokens: each as many
    feed_forward = 2 * rows * RANK * MLP_RATIO * RANK  # each of the two maps; layers of equal N are one batch
    last = list(dict.fromkeys(rows for rows, _ in shapes))[-1]
    last_product = feed_forward * sum(last for rows, _ in shapes if rows == last) // rows
    maps = 2 * RANK**2 * (2 * rows + 2 * layers * CLUSTERS)  # query and output, key and value
    block = 4 * by_clusters + maps + 2 * feed_forward
    return reduction + block, 3 * reduction + 4 * block - last_product + by_clusters


# ---- the generator, measured -----------------------------------------------------------------------------------------


class Workload:
    """A generator, the weights it reads, and gradients as they arrive at its factors from the adapted layers."""

    def __init__(self, kind: str, weights: Sequence[Tensor]) -> None:
        torch.manual_seed(0)
        rows, columns = weights[0].shape
        self.generator = WeightGenerator(columns, rows, GeneratorOptions(kind, r=RANK, num_clusters=CLUSTERS))
        self.weights = weights
        self.left_gradients = [torch.randn(len(weight), RANK) for weight in weights]
        self.right_gradient = torch.randn(RANK, columns)

    def factors(self, layers: int | None = None) -> list[Tensor]:
        """Return the left factors of the first `layers` and the right factor; assignments are dropped, as in use."""
        factors = self.generator(self.weights[:layers])
        return [*factors.left, factors.right]

    def backward(self, factors: Sequence[Tensor]) -> None:
        torch.autograd.backward(factors, [*self.left_gradients[: len(factors) - 1], self.right_gradient])


@torch.no_grad()
def forward_seconds(work: Workload, layers: int | None = None) -> float:
    """Return the time of one forward pass without gradients."""
    start = time.perf_counter()
    work.factors(layers)
    return time.perf_counter() - start


def training_seconds(work: Workload, layers: int | None = None) -> float:
    """Return the time of one forward and backward pass."""
    work.generator.zero_grad()
    start = time.perf_counter()
    work.backward(work.factors(layers))
    return time.perf_counter() - start


FUNCTIONS = dict(zip(TIMES, (forward_seconds, training_seconds), strict=True))


def memory_bytes(work: Workload) -> tuple[int, int]:
    """Return the bytes kept from the forward to the backward pass, and the most that both hold at once.

    The profiler sees every allocation and release of torch's own allocator, so the numbers are the same in every run.
    Weights and arriving gradients exist before and do not count; the generator's own gradients do.
    """
    work.generator.zero_grad()
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        factors = work.factors()
        with torch.profiler.record_function("backward of all factors"):
            work.backward(factors)
    kept = held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "backward of all factors":
            kept = held
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return kept, peak


def measure(cases: Mapping[Any, Sequence[Tensor]], rounds: int) -> dict[Any, dict[str, Any]]:
    """Return time and memory of every kind of generator for every case, a sequence of weights."""
    works = {(case, kind): Workload(kind, weights) for case, weights in cases.items() for kind in KINDS}
    timers = {
        (*key, name): after_warm_up(function, work)
        for key, work in works.items()
        for name, function in FUNCTIONS.items()
    }
    seconds = interleave(timers, rounds)
    results: dict[Any, dict[str, Any]] = {case: {} for case in cases}
    for (case, kind), work in works.items():
        kept, peak = memory_bytes(work)
        times = {name: estimate(seconds[case, kind, name])._asdict() for name in TIMES}
        by_round = {f"{name}_by_round": seconds[case, kind, name] for name in TIMES}
        results[case][kind] = times | {"kept_bytes": kept, "peak_bytes": peak} | by_round
    return results


def after_warm_up(function: Callable[..., float], work: Workload) -> Callable[[], float]:
    """Return a measurement that reads the first layer only in the rounds that do not count."""
    turns = count()
    return lambda: function(work, layers=1 if next(turns) < WARM_UP_ROUNDS else None)


def make_weights(shapes: Sequence[Shape], dtype: torch.dtype) -> list[Tensor]:
    """Return random weights, each with memory of its own: what is drawn once for a shape is copied."""
    torch.manual_seed(1)
    drawn = {shape: (torch.randn(shape) / math.sqrt(shape[1])).to(dtype) for shape in dict.fromkeys(shapes)}
    return [drawn[shape].clone() for shape in shapes]


def measure_architecture(paper: dict[str, Any], rounds: int, limit_bytes: float) -> dict[str, Any]:
    """Return time and memory for one architecture's weights, or the reason for which there are none."""
    gc.collect()  # the weights of the one before
    shapes = [(rows, columns) for layers, rows, columns in paper["shapes"] for _ in range(layers)]
    # Beside the weights: a few (N, M) tensors of every layer, and float32 copies of a weight. A generous bound.
    beside = 4 * (6 * CLUSTERS * sum(rows for rows, _ in shapes) + 3 * max(math.prod(shape) for shape in shapes))
    needed, available = paper["weight_bytes"] + beside, min(limit_bytes, available_bytes())
    if needed > available:
        return {"skipped": f"needs {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB may be used"}
    dtype = getattr(torch, paper["dtype"])
    enough = max(1, min(rounds, int(BYTES_READ // paper["weight_bytes"])))
    measured = measure({"weights": make_weights(shapes, dtype)}, enough)["weights"]
    return {"skipped": None, "rounds": enough, "measured": measured}


def available_bytes() -> float:
    information = Path("/proc/meminfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)


def product_flops_per_s(dtype: torch.dtype, size: int) -> float:
    """Return how fast a large product of matrices runs: the speed a training step would have at best."""
    matrix = torch.randn(size, size).to(dtype)

    def seconds() -> float:
        start = time.perf_counter()
        matrix @ matrix
        return time.perf_counter() - start

    return 2 * size**3 / statistics.median(interleave({"product": seconds}, 5)["product"])


# ---- how it grows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """Where the sweep starts, and the multiples it takes of one size at a time."""

    layers: int = 24
    rows: int = 1024
    columns: int = 1024
    factors: tuple[float, ...] = (0.25, 0.5, 1, 2, 4)

    def varied(self, axis: str) -> dict[int, list[Shape]]:
        """Return the shapes of all weights by the size called `axis`."""
        sizes = {name: getattr(self, name) for name in AXES}
        points = [sizes | {axis: int(sizes[axis] * factor)} for factor in self.factors]
        return {point[axis]: [(point["rows"], point["columns"])] * point["layers"] for point in points}


TINY_BASE = Base(2, 32, 32, factors=(1, 2))


def sweep(base: Base, rounds: int) -> list[dict[str, Any]]:
    """Return for every axis and kind of generator how FLOPs, time and memory grow, and with which exponent."""
    found = []
    for axis in AXES:
        shapes = base.varied(axis)
        results = measure({size: make_weights(of_size, torch.float32) for size, of_size in shapes.items()}, rounds)
        for kind in KINDS:
            points = []
            for size, of_size in shapes.items():
                measured = results[size][kind]
                counted = {axis: size, "training_flops": generator_flops(kind, of_size)[1]}
                medians = {name: measured[name]["median"] for name in TIMES}
                points.append(counted | medians | {"peak_bytes": measured["peak_bytes"]})
            exponents = {name: exponent(list(shapes), [point[name] for point in points]) for name in GROWING}
            found.append({"axis": axis, "kind": kind, "exponents": exponents, "points": points})
        print(f"{axis} varied", flush=True)
    return found


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of the straight line through the logarithms: 1 is linear, 0 is constant."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values]).slope


# ---- the command -----------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return everything that is counted and measured."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is used for memory only: no word about missing GPUs
    torch.set_num_threads(arguments.threads)
    base = TINY_BASE if arguments.tiny else Base()
    size = 64 if arguments.tiny else 2048
    speeds = {dtype: product_flops_per_s(dtype, size) for dtype in (torch.float32, torch.bfloat16)}
    architectures = []
    for architecture in TINY_ARCHITECTURES if arguments.tiny else ARCHITECTURES:
        row = on_paper(architecture) | {"product_flops_per_s": speeds[architecture.dtype]}
        row |= measure_architecture(row, arguments.rounds, arguments.memory_gib * 2**30)
        print(f"{label(row)}: {row['skipped'] or 'measured'}", flush=True)
        architectures.append(row)
    versions = {"timm": timm.__version__, "transformers": transformers.__version__}
    options = {name: getattr(arguments, name) for name in ("rounds", "threads", "memory_gib", "tiny")}
    return {
        "environment": environment() | versions,
        "options": options | {"sweep": asdict(base)},
        "architectures": architectures,
        "sweep": sweep(base, arguments.rounds),
        "process_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,  # given in KiB by Linux
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], epilog=EXAMPLE)
    parser.add_argument("--rounds", type=int, default=9, help="rounds, fewer for weights over 0.4 GB (default 9)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--memory-gib", type=float, default=20, help="what needs more is left out (default 20)")
    parser.add_argument("--tiny", action="store_true", help="2 layers of width 32, to see that it runs")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    parser.add_argument("--tables", type=Path, metavar="JSON", help="measure nothing, take the numbers from this file")
    parser.add_argument("--write-docs", type=Path, metavar="MD", help="put the tables between the markers of this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    results = json.loads(arguments.tables.read_text()) if arguments.tables else run(arguments)
    if arguments.out is not None:
        write_json(arguments.out, results)
    print(tables(results))
    if arguments.write_docs is not None:
        write_docs(arguments.write_docs, results)


if __name__ == "__main__":
    main()
