"""What adapted layers cost beside frozen ones and PEFT's LoRA: time of a training step, of evaluation, and memory.

By default the layers are the twelve attention projections of a ViT-B/16, each called on an input of its own. Every
round runs every variant once, in a new order, and ratios are taken within a round: what else the machine does then
hits all variants alike.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from interleaved import Estimate, environment, estimate, interleave, ratio, write_json
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from gift import GiftConfig
from gift.tuner.products import DENSE_FROM, adapted_linear, dense_is_faster

FROZEN, LORA = "frozen", "lora r=8"
TARGETS = r"layers\.\d+"  # a regular expression for whole names
MAX_EVALUATION_TO_FROZEN = 1.05
EXAMPLE = "example: python benchmarks/layer.py --rounds 21 --sweep --out results/layer.json"


@dataclass(frozen=True)
class Sizes:
    layers: int = 12
    width: int = 768
    batch: int = 8
    tokens: int = 197
    sweep_tokens: tuple[int, ...] = (16, 64, 197, 394, 768, 1576, 3152, 6304)
    sweep_features: tuple[int, ...] = (192, 384, 768)
    sweep_ranks: tuple[int, ...] = (8, 16, 32)
    sweep_products: float = 1e8  # multiplications of one measurement, which repeats small steps


TINY = Sizes(2, 32, 2, 5, sweep_tokens=(16, 64), sweep_features=(32,), sweep_ranks=(8,), sweep_products=1e6)


@dataclass(frozen=True)
class Generator:
    """A GIFT variant, and the most its training step may cost as a multiple of LoRA's (None: no target)."""

    kind: str
    rank: int
    max_training_to_lora: float | None = None

    @property
    def name(self) -> str:
        return f"gift {self.kind} r={self.rank}"


GENERATORS = (Generator("linear", 16, 0.95), Generator("paca", 16), Generator("paca", 32, 1.15), Generator("paca", 96))


# ---- the layers ------------------------------------------------------------------------------------------------------


class Projections(nn.Module):
    """Linear layers that each have an input of their own, as the attention projections of a Transformer do."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(sizes.width, sizes.width) for _ in range(sizes.layers))

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def make_variants(sizes: Sizes, extra_applications: Sequence[str]) -> dict[str, nn.Module]:
    """Return the frozen layers, LoRA, and every generator with apply=auto and the further ways of applying it."""
    lora = LoraConfig(r=8, target_modules=TARGETS)
    variants: dict[str, nn.Module] = {
        FROZEN: make_frozen(sizes),
        LORA: get_peft_model(make_frozen(sizes), lora),
    }
    for generator in GENERATORS:
        for application in ["auto", *extra_applications]:
            config = GiftConfig(
                target_modules=TARGETS,
                generator=generator.kind,
                r=generator.rank,
                num_clusters=96,
                apply=application,
                modules_to_save=[],
            )
            name = generator.name if application == "auto" else f"{generator.name} {application}"
            variants[name] = get_peft_model(make_frozen(sizes), config)
    return variants


def make_frozen(sizes: Sizes) -> nn.Module:
    torch.manual_seed(0)
    return Projections(sizes).requires_grad_(False)


def make_inputs(sizes: Sizes) -> tuple[list[Tensor], list[Tensor]]:
    """Return an input for every layer, and the gradient that reaches every output."""
    torch.manual_seed(1)
    shape = (sizes.batch, sizes.tokens, sizes.width)
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(sizes.layers)]
    return inputs, [torch.randn(shape) for _ in range(sizes.layers)]


def training_seconds(model: nn.Module, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> float:
    """Return the time of one forward and backward pass."""
    for leaf in [*model.parameters(), *inputs]:
        leaf.grad = None
    start = time.perf_counter()
    torch.autograd.backward(model(inputs), gradients)
    return time.perf_counter() - start


@torch.no_grad()
def evaluation_seconds(model: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Return the time of one forward pass without gradients."""
    start = time.perf_counter()
    model(inputs)
    return time.perf_counter() - start


def saved_bytes(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[int, int]:
    """Return the bytes that a forward pass keeps for the backward pass, with and without the layers' own inputs.

    Every storage counts once; those of parameters, frozen weights and buffers, which exist anyhow, do not count.
    """
    resident = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {x.untyped_storage().data_ptr() for x in inputs}
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        model(inputs)  # returns all outputs at the end: no recorded address is freed and used again before
    return sum(saved.values()), sum(size for address, size in saved.items() if address not in own)


def compare(variants: dict[str, nn.Module], sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Return the measurements of every variant by its name."""
    inputs, gradients = make_inputs(sizes)
    steps = {name: partial(training_seconds, model.train(), inputs, gradients) for name, model in variants.items()}
    training = interleave(steps, rounds)
    saved = {name: saved_bytes(model, inputs) for name, model in variants.items()}
    forwards = {name: partial(evaluation_seconds, model.eval(), inputs) for name, model in variants.items()}
    evaluation = interleave(forwards, rounds)
    return {
        name: {
            "training_s": estimate(training[name])._asdict(),
            "training_to_lora": ratio(training[name], training[LORA])._asdict(),
            "training_to_frozen": ratio(training[name], training[FROZEN])._asdict(),
            "evaluation_s": estimate(evaluation[name])._asdict(),
            "evaluation_to_frozen": ratio(evaluation[name], evaluation[FROZEN])._asdict(),
            "saved_bytes": saved[name][0],
            "saved_bytes_without_inputs": saved[name][1],
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "training_s_by_round": training[name],
            "evaluation_s_by_round": evaluation[name],
        }
        for name, model in variants.items()
    }


def check_targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every target with what was measured (a median) and whether it was met."""
    lora = results[LORA]
    targets: list[tuple[str, float, float]] = []
    for generator in GENERATORS:
        name, measured, at_most = generator.name, results[generator.name], generator.max_training_to_lora
        if at_most is not None:
            targets.append((f"{name}: training to LoRA", measured["training_to_lora"]["median"], at_most))
        evaluation = measured["evaluation_to_frozen"]["median"]
        targets.append((f"{name}: evaluation to frozen", evaluation, MAX_EVALUATION_TO_FROZEN))
        saved = measured["saved_bytes"] / lora["saved_bytes"]
        targets.append((f"{name}: saved activations to LoRA", saved, 1.0))
    return [
        {"target": name, "measured": measured, "at_most": at_most, "met": measured <= at_most}
        for name, measured, at_most in targets
    ]


def print_comparison(results: dict[str, Any], targets: Iterable[dict[str, Any]]) -> None:
    print(f"{'':28}{'training ms':>12}  {'to LoRA':24}{'evaluation ms':>14}  {'to frozen':24}{'saved MB':>9}")
    for name, measured in results.items():
        print(
            f"{name:28}{1000 * measured['training_s']['median']:12.2f}  {Estimate(**measured['training_to_lora'])!s:24}"
            f"{1000 * measured['evaluation_s']['median']:14.2f}  {Estimate(**measured['evaluation_to_frozen'])!s:24}"
            f"{measured['saved_bytes'] / 1e6:9.2f}"
        )
    for target in targets:
        verdict = "met" if target["met"] else "missed"
        print(f"{verdict:7}{target['target']:44}{target['measured']:8.4f}, at most {target['at_most']}")


# ---- when is dense faster? -------------------------------------------------------------------------------------------


def product_seconds(tokens: int, features: int, rank: int, dense: bool, products: float) -> Callable[[], float]:
    """Return a measurement of one layer's forward and backward pass, repeated for about that many multiplications."""
    torch.manual_seed(2)
    weight, bias = torch.randn(features, features), torch.randn(features)
    x = torch.randn(tokens, features, requires_grad=True)
    left = torch.randn(features, rank, requires_grad=True)
    right = torch.randn(rank, features, requires_grad=True)
    gradient = torch.randn(tokens, features)
    repeats = math.ceil(products / (2 * tokens * features**2))

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            output = adapted_linear(x, weight, bias, left, right, dense)
            torch.autograd.grad(output, (x, left, right), gradient)
        return (time.perf_counter() - start) / repeats

    return measure


def sweep(sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    """Return the time of `dense` as a multiple of `factored` for every combination of sizes."""
    points = []
    for features in sizes.sweep_features:
        for rank in sizes.sweep_ranks:
            for tokens in sizes.sweep_tokens:
                measure = partial(product_seconds, tokens, features, rank, products=sizes.sweep_products)
                seconds = interleave({"factored": measure(dense=False), "dense": measure(dense=True)}, rounds)
                dense_to_factored = ratio(seconds["dense"], seconds["factored"])
                point = {"tokens": tokens, "features": features, "rank": rank}
                medians = {f"{way}_s": statistics.median(values) for way, values in seconds.items()}
                points.append({**point, **medians, "dense_to_factored": dense_to_factored._asdict()})
                print(f"{features:4} features, rank {rank:2}, {tokens:5} tokens: dense / factored {dense_to_factored}")
    return points


def break_evens(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for every width and rank the smallest tokens per out_feature from which dense wins at all larger ones."""
    found = []
    for features, rank in dict.fromkeys((point["features"], point["rank"]) for point in points):
        curve = [point for point in points if (point["features"], point["rank"]) == (features, rank)]
        wins = takewhile(lambda point: point["dense_to_factored"]["median"] < 1, reversed(curve))
        shares = [point["tokens"] / features for point in wins]
        found.append({"features": features, "rank": rank, "dense_wins_from": shares[-1] if shares else None})
    return found


def costs_of_rule(points: Sequence[dict[str, Any]]) -> list[float]:
    """Return for every point how much slower the way that `dense_is_faster` picks is than the faster one."""
    dense = [point["dense_to_factored"]["median"] for point in points]
    picks_dense = [dense_is_faster(point["tokens"], point["features"]) for point in points]
    return [(time if pick else 1.0) / min(1.0, time) - 1 for time, pick in zip(dense, picks_dense, strict=True)]


def run_sweep(sizes: Sizes, rounds: int) -> dict[str, Any]:
    points = sweep(sizes, rounds)
    found, costs = break_evens(points), costs_of_rule(points)
    for place in found:
        start = "never" if place["dense_wins_from"] is None else f"from {place['dense_wins_from']:.2f} tokens each"
        print(f"{place['features']:4} out_features, rank {place['rank']:2}: dense wins {start}")
    wrong = sum(cost > 0.02 for cost in costs)
    print(
        f"The rule (dense from {DENSE_FROM} tokens per out_feature) picks a way that is over 2 % slower in {wrong} of "
        f"{len(costs)} cases, {100 * max(costs):.1f} % at worst."
    )
    return {"points": points, "break_evens": found, "dense_from": DENSE_FROM, "largest_cost_of_rule": max(costs)}


# ---- the command -----------------------------------------------------------------------------------------------------


def profile(model: nn.Module, sizes: Sizes) -> None:
    """Print the operators on which one variant's training step spends its time."""
    inputs, gradients = make_inputs(sizes)
    step = partial(training_seconds, model.train(), inputs, gradients)
    interleave({"warm-up": step}, rounds=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], epilog=EXAMPLE)
    parser.add_argument("--rounds", type=int, default=21, help="rounds that count, after 3 that do not (default 21)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--apply", nargs="+", default=[], choices=["factored", "dense"], help="beside apply=auto")
    parser.add_argument("--sweep", action="store_true", help="also measure when dense is faster than factored")
    parser.add_argument("--profile", metavar="VARIANT", help="only profile one variant, e.g. 'gift paca r=32'")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    sizes = TINY if arguments.tiny else Sizes()
    variants = make_variants(sizes, arguments.apply)
    if arguments.profile is not None:
        if arguments.profile not in variants:
            raise SystemExit(f"There is no variant {arguments.profile!r}, only {', '.join(variants)}.")
        profile(variants[arguments.profile], sizes)
        return
    results = compare(variants, sizes, arguments.rounds)
    targets = check_targets(results)
    print_comparison(results, targets)
    points = run_sweep(sizes, arguments.rounds) if arguments.sweep else None
    if arguments.out is not None:
        measured = {"variants": results, "targets": targets, "sweep": points}
        conditions = {"environment": environment(), "rounds": arguments.rounds, "sizes": asdict(sizes)}
        write_json(arguments.out, conditions | measured)


if __name__ == "__main__":
    main()
