"""What all of VTAB-1k costs by the paper's protocol, from milliseconds per image that are measured here.

    python benchmarks/vtab_cost.py --out results/vtab_cost.json --write_docs docs/scaling.md

The backbone is a ViT-B/16 with random weights: time does not depend on them. About five minutes on one thread.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
from jsonargparse import auto_cli
from timm.models import save_for_hf

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.documents import replace_between
from benchmarks.interleaved import environment, write_json
from gift.benchmark.options import NO_RAY, BenchmarkOptions
from gift.benchmark.plan import SECONDS_PER_RUN, plan_benchmark
from gift.data.catalog import TASKS

START, END = "<!-- cost of VTAB-1k -->", "<!-- /cost of VTAB-1k -->"
METHODS = ("linear-probe", "bitfit", "lora", "vpt-deep", "toast-lite", "gift-paca", "gift-linear", "full")
TRIES, EPOCHS = 24, 100


def images(seeds: int) -> tuple[int, int]:
    """Return how many images one method is trained on, and predicts, in all runs; see `gift.benchmark.runs`."""
    tasks = [task for task in TASKS.values() if task.suite == "vtab1k"]
    trained = EPOCHS * sum(TRIES * task.train + seeds * (task.train + task.validation) for task in tasks)
    predicted = sum(TRIES * task.validation + seeds * task.test for task in tasks)
    return trained, predicted


def table(results: dict[str, Any]) -> str:
    """Return the table of `docs/scaling.md`."""
    trained, predicted = images(results["seeds"])
    lines = [
        f"{results['runs of a method']} runs a method, {trained / 1e6:.1f} million images trained on, "
        f"{predicted / 1e6:.1f} million predicted; {results['environment']['cpu']}, one thread, float32, batches of 8:",
        "",
        "| method | ms per image trained | ms per image predicted | hours on one thread |",
        "|---|---|---|---|",
    ]
    for name, cost in results["methods"].items():
        lines.append(f"| {name} | {cost['train_ms']:,.0f} | {cost['predict_ms']:,.0f} | {cost['hours']:,.0f} |")
    return "\n".join(lines)


def main(out: Path, write_docs: Path | None = None, seeds: int = 5, measure: bool = True) -> None:
    """Measure, and write the table.

    Args:
        out: JSON file to write.
        write_docs: Document whose table is written anew.
        seeds: Of the final runs.
        measure: Whether to measure, or to write the table of what lies there.
    """
    if measure:
        with tempfile.TemporaryDirectory() as folder:
            save_for_hf(timm.create_model("vit_base_patch16_224"), folder, safe_serialization=True)
            plan = plan_benchmark(
                BenchmarkOptions(
                    suite="vtab1k",
                    out=Path(folder, "out"),
                    model=folder,
                    methods=METHODS,
                    seeds=tuple(range(seeds)),
                    ray=NO_RAY,
                )
            )
        costs = {
            cost.method.title: {"train_ms": cost.train_ms, "predict_ms": cost.predict_ms, "hours": cost.hours}
            for cost in plan.costs
        }
        results = {"environment": environment(), "seeds": seeds, "runs of a method": plan.costs[0].runs}
        write_json(out, results | {"seconds added per run": SECONDS_PER_RUN, "methods": costs})
    if write_docs is not None:
        replace_between(write_docs, START, END, table(json.loads(out.read_text())))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
