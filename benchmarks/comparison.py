"""The comparison that docs/plan-of-comparison.md plans: its runs, and the documents that show what they came to.

    python benchmarks/comparison.py main --data runs/data --photos runs/data/photos --runs runs/comparison
    python benchmarks/comparison.py screening --data runs/data --photos runs/data/photos --runs runs/ablations
    python benchmarks/comparison.py ablations --data runs/data --photos runs/data/photos --runs runs/ablations
    python benchmarks/comparison.py write --runs runs/comparison runs/ablations --documents docs/benchmarks.md README.md

`main` is the table, `screening` every ablation on one seed, `ablations` five seeds of those that matter. Each is a call
of `gift benchmark`: stopped and started again, it goes on. `--plan true` says how long it would take. `write` takes the
lines over into `results/` and writes the tables anew, without --runs from what lies there.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import comparison_tables as tables
from gift.benchmark.benchmark import run_benchmark
from gift.benchmark.options import BenchmarkOptions
from gift.benchmark.plan import describe_plan, plan_benchmark
from gift.benchmark.record import read_lines

EPOCHS, TRIES, SEEDS = 5, 4, (0, 1, 2, 3, 4)
PHOTOS = ("flowers17", "caltech97")
FEEDBACK = "runs/upstream/adapter"  # of TOAST, pre-trained on the same backbone

DEFAULT = tables.DEFAULT
PRIMARY = (tables.LORA, *tables.PACA)
OTHERS = (
    "linear-probe",
    *("lora:r=1,lora_alpha=1", "lora:r=2,lora_alpha=2", "lora:r=4,lora_alpha=4"),
    *("gift-linear:r=8", "gift-linear", "gift-linear:r=32"),
    *("bitfit", "vpt-deep", "vera", f"toast-lite:feedback={FEEDBACK}", "full"),
)

ABLATED_ON = ("digits", "rendered_flowers", "flowers17")
ABLATION_RATES = (5e-3, 1e-2)
ABLATIONS = (
    *(f"{DEFAULT}:num_clusters={count}" for count in (8, 32, 192)),
    *(f"{DEFAULT}:{option}" for option in ("num_blocks=2", "num_heads=2", "num_heads=4", "mlp_ratio=0")),
    *(f"{DEFAULT}:{option}" for option in ("position=none", "position=learned", "norm=layer", "norm=none")),
    *(
        f"{DEFAULT}:{option}"
        for option in ("assignment=softmax", "assignment_gain=8", "init_scale=0.25", "init_scale=4")
    ),
    *(f"{DEFAULT}:{option}" for option in ("share=layer", "recover_bias=true", "scaling=0.25", "scaling=4")),
    *("gift-linear", "gift:generator=mlp", "gift:generator=transformer", "gift:generator=mixer"),
)
PLACES = tuple(
    f"{DEFAULT}:target_modules={place}"
    for place in ("attn.qkv[v]", "[attn.qkv[q],attn.qkv[v]]", "mlp.fc2", "all-linear")
)


@dataclass(frozen=True)
class Part:
    """A part of the comparison: groups of methods that are run one after the other, on some tasks or all."""

    groups: tuple[tuple[str, ...], ...]
    tasks: tuple[str, ...] | None = None
    rates: tuple[float, ...] | None = None
    search_only: bool = False

    def options(self, group: Sequence[str], data: Path, photos: Path, runs: Path) -> BenchmarkOptions:
        return BenchmarkOptions(
            suite="offline",
            out=runs,
            data=data,
            folders=[photos / name for name in PHOTOS if self.tasks is None or name in self.tasks],
            tasks=self.tasks,
            methods=group,
            learning_rates=self.rates,
            budget=len(self.rates) if self.rates else TRIES,
            epochs=EPOCHS,
            seeds=SEEDS,
            search_only=self.search_only,
            keep_weights=False,
        )


PARTS = {
    "main": Part((PRIMARY, *((method,) for method in OTHERS))),
    "screening": Part(((DEFAULT, *ABLATIONS, *PLACES),), ABLATED_ON, ABLATION_RATES, search_only=True),
}


def _run(part: Part, data: Path, photos: Path, runs: Path, plan: bool) -> None:
    for group in part.groups:
        options = part.options(group, data, photos, runs)
        if plan:
            print(describe_plan(plan_benchmark(options)))
        else:
            run_benchmark(options, report=lambda text: print(text, flush=True))


def main(data: Path, photos: Path, runs: Path, plan: bool = False) -> None:
    """Run the table: the methods of the primary question first.

    Args:
        data: Folder that holds the drawn tasks, or where they are drawn.
        photos: Folder that holds the folders flowers17 and caltech97.
        runs: Folder of this benchmark.
        plan: Whether to say only how long it would take.
    """
    _run(PARTS["main"], data, photos, runs, plan)


def screening(data: Path, photos: Path, runs: Path, plan: bool = False) -> None:
    """Run the search of every ablation, on one seed.

    Args:
        data: As for `main`.
        photos: As for `main`.
        runs: Folder of this benchmark, another one.
        plan: Whether to say only how long it would take.
    """
    _run(PARTS["screening"], data, photos, runs, plan)


def ablations(data: Path, photos: Path, runs: Path, plan: bool = False) -> None:
    """Run five seeds of the ablations that differ most from the default on validation images, and of all places.

    Args:
        data: As for `main`.
        photos: As for `main`.
        runs: Folder of the screening.
        plan: Whether to say only how long it would take.
    """
    matter = tables.that_matter(read_lines(runs), PLACES)
    print(f"Five seeds of {', '.join(matter)}")
    _run(Part(((DEFAULT, *matter),), ABLATED_ON, ABLATION_RATES), data, photos, runs, plan)


def write(results: Path = Path("results"), runs: Sequence[Path] = (), documents: Sequence[Path] = ()) -> None:
    """Take over lines, and write the tables of documents anew.

    Args:
        results: Folder of the repository that holds the lines.
        runs: Folders of benchmarks; the lines of each become a file of the folder's name.
        documents: Documents whose tables are written anew.
    """
    for folder in runs:
        lines = "".join(f"{json.dumps(line)}\n" for line in read_lines(folder))
        (results / f"{folder.name}.jsonl").write_text(lines)
    lines = {path.stem: read_lines(path) for name in tables.FILES if (path := results / f"{name}.jsonl").exists()}
    for document in documents:
        tables.write_tables(document, lines)


if __name__ == "__main__":
    auto_cli([main, screening, ablations, write], as_positional=False)
