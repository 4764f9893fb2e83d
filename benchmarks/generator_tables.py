"""The numbers of benchmarks/generator.py as Markdown: the tables of docs/scale.md."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from documents import replace_between

KINDS = ("paca", "linear")
TIMES = ("forward_s", "training_s")
SHARES = (0.05, 0.01)  # of a step's FLOPs
AXES = {"layers": "L", "rows": "N", "columns": "d_in"}
GROWING = ("training_flops", *TIMES, "peak_bytes")
START, END = "<!-- tables: benchmarks/generator.py --tables JSON --write-docs FILE -->", "<!-- end of tables -->"


def tables(results: dict[str, Any]) -> str:
    """Return everything that was counted and measured as Markdown."""
    rows, machine = results["architectures"], results["environment"]
    measured = [measured_row(row, kind) for row in rows for kind in KINDS]
    parts = [
        "Counted on the meta device; the last three columns are trained parameters, without a head:",
        table("model | adapted | L × (N × d_in) | backbone | `paca` | `linear` | LoRA r=8", map(size_row, rows)),
        f"Measured on {machine['cpu']}, {machine['threads']} thread, torch {machine['torch']}, in ms, medians of "
        "interleaved rounds with 95 % intervals (one value: one round); weights and memory beside them, in MB:",
        table("model | generator | weights | forward | forward and backward | kept | at most", measured),
        "Beside the matrix products of one training step of the backbone, `paca` / `linear`:",
        table(
            "model | tokens | TFLOP | generator, GFLOP | % of FLOPs | 5 % at, tokens | 1 % at, tokens | % of time",
            map(relation_row, rows),
        ),
        "Exponents when one size is varied (1: linear, 0: no effect); FLOPs counted, the rest measured:",
        table(
            "varied | generator | FLOPs | forward | forward and backward | at most", map(sweep_row, results["sweep"])
        ),
    ]
    return "\n\n".join(parts)


def table(header: str, rows: Iterable[Sequence[str]]) -> str:
    rule = "|" + "---|" * (header.count("|") + 1)
    return "\n".join([f"| {header} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def label(row: dict[str, Any]) -> str:
    return f"{row['name']}, {' and '.join(target.rpartition('.')[2] for target in row['targets'])}"


def short(value: float) -> str:
    """Return three significant digits."""
    return f"{float(f'{value:.3g}'):,g}"


def pair(values: Iterable[float]) -> str:
    return " / ".join(map(short, values))


def size_row(row: dict[str, Any]) -> list[str]:
    trained = (f"{number:,}" for number in row["trained_parameters"].values())
    sizes = " + ".join(f"{layers} × ({rows} × {columns})" for layers, rows, columns in row["shapes"])
    return [row["name"], ", ".join(row["targets"]), sizes, f"{row['backbone_parameters'] / 1e6:,.0f} M", *trained]


def measured_row(row: dict[str, Any], kind: str) -> list[str]:
    start = [label(row), kind, short(row["weight_bytes"] / 1e6)]
    if row["skipped"] is not None:
        return [*start, row["skipped"], "", "", ""]
    measured = row["measured"][kind]
    times = [interval(measured[name]) for name in TIMES]
    return [*start, *times, *(short(measured[name] / 1e6) for name in ("kept_bytes", "peak_bytes"))]


def interval(seconds: dict[str, float]) -> str:
    median, low, high = (short(1000 * seconds[name]) for name in ("median", "low", "high"))
    return median if seconds["low"] == seconds["high"] else f"{median} [{low}, {high}]"


def relation_row(row: dict[str, Any]) -> list[str]:
    generators = [row["generators"][kind] for kind in KINDS]
    tokens = [" / ".join(f"{of_kind['tokens_at_share'][str(share)]:,}" for of_kind in generators) for share in SHARES]
    return [
        label(row),
        f"{row['step_tokens']:,}",
        short(row["step_flops"] / 1e12),
        pair(of_kind["training_flops"] / 1e9 for of_kind in generators),
        pair(100 * of_kind["share_of_step_flops"] for of_kind in generators),
        *tokens,
        "not measured" if row["skipped"] else pair(100 * share_of_time(row, kind) for kind in KINDS),
    ]


def share_of_time(row: dict[str, Any], kind: str) -> float:
    """Return the generator's time over that of the step's products, were all of these as fast as one large product."""
    return row["measured"][kind]["training_s"]["median"] * row["product_flops_per_s"] / row["step_flops"]


def sweep_row(line: dict[str, Any]) -> list[str]:
    sizes = [str(point[line["axis"]]) for point in line["points"]]
    growth = (f"{line['exponents'][name]:.2f}" for name in GROWING)
    return [f"{AXES[line['axis']]} from {sizes[0]} to {sizes[-1]}", line["kind"], *growth]


def write_docs(path: Path, results: dict[str, Any]) -> None:
    """Replace what stands between the two markers of a document by the tables."""
    replace_between(path, START, END, tables(results))
