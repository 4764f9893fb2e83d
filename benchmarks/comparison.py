"""The comparison that docs/plan-of-comparison.md plans: its runs, and the documents that show what they came to.

    python benchmarks/comparison.py run search --data runs/data --photos runs/data/photos
    python benchmarks/comparison.py write --document docs/benchmarks.md --readme README.md --take_over true

The steps of `run`, in this order: `search` (of the methods of the primary question), `primary` (their tests), `others`
(the rest of the table), `screening` (searches of all ablations), `ablations` (tests of those that matter). Each is one
or more benchmarks in runs/comparison or runs/ablations: stopped and started again, it goes on; `--plan true` says how
long it would take. `write` takes lines over into `results/`, if told to, and writes tables anew from what lies there;
`bring_back` is the other way, to go on where these folders are not, such as on another machine.
TOAST needs its feedback path, pre-trained on images of Tiny-ImageNet:

    gift train --data tinyimagenet64-train.parquet --method toast --reconstruction 0.1 --epochs 1 --batch_size 64 \
        --learning_rate 1e-3 --output_dir runs/upstream
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import ablation_tables
from benchmarks import comparison_tables as tables
from benchmarks.comparison_documents import read_results, write_tables
from gift.benchmark.benchmark import run_benchmark
from gift.benchmark.options import BenchmarkOptions
from gift.benchmark.plan import describe_plan, plan_benchmark
from gift.benchmark.record import Record, locked, read_lines
from gift.benchmark.runs import Line, folder_of
from gift.training.folder import write as write_file

EPOCHS, TRIES = 5, 4
FEEDBACK = "runs/upstream/adapter"  # of TOAST, pre-trained on the same backbone

DEFAULT = tables.DEFAULT
PRIMARY = (tables.LORA, *tables.PACA)
OTHERS = (
    "linear-probe",
    *(tables.SMALLEST_LORA, "lora:r=2,lora_alpha=2", "lora:r=4,lora_alpha=4"),
    *("gift-linear:r=8", "gift-linear", "gift-linear:r=32"),
    *("bitfit", "vpt-deep", "vera", "full", f"toast-lite:feedback={FEEDBACK}"),
)

CHANGES = (
    *("num_clusters=8", "num_clusters=32", "num_clusters=192", "num_blocks=2", "num_heads=4"),
    *("position=none", "position=learned", "norm=layer", "norm=none", "assignment=softmax"),
    *("init_scale=0.25", "init_scale=4", "share=layer"),
)
GENERATORS = ("gift-linear", "gift:generator=mlp", "gift:generator=transformer", "gift:generator=mixer")
PLACES = ("[attn.qkv[v]]", "[attn.qkv[q],attn.qkv[v]]", "[mlp.fc2]", "all-linear")
ALWAYS = tuple(f"{DEFAULT}:target_modules={place}" for place in PLACES)  # tested whatever the screening says
ABLATIONS = (*(f"{DEFAULT}:{change}" for change in CHANGES), *GENERATORS, *ALWAYS)

STEPS = ("search", "primary", "others", "screening", "ablations")
REMEDIES = "remedies"  # run by benchmarks/remedies.py
FOLDERS = {"comparison": STEPS[:3], "ablations": STEPS[3:], REMEDIES: ()}


@dataclass(frozen=True)
class Place:
    """Where images and runs are.

    Attributes:
        data: Folder that holds the drawn tasks, or where they are drawn.
        photos: Folder that holds the folders flowers17 and caltech97.
        runs: Folder of the folders of the benchmarks.
    """

    data: Path
    photos: Path
    runs: Path

    def benchmark(self, folder: str, methods: Sequence[str], **changes: Any) -> BenchmarkOptions:
        """Return what `gift benchmark` is told: the whole protocol of the plan."""
        tasks = changes.get("tasks", tables.TASKS)
        given = {"suite": "offline", "out": self.runs / folder, "data": self.data, "keep_weights": False}
        given |= {"folders": [self.photos / name for name in tables.PHOTOS if name in tasks], "tasks": tasks}
        return BenchmarkOptions(
            **(given | {"methods": methods, "epochs": EPOCHS, "budget": TRIES, "seeds": tables.SEEDS} | changes)
        )


def benchmarks_of(step: str, place: Place) -> list[BenchmarkOptions]:
    """Return the benchmarks of a step, in the order in which they are run.

    Raises:
        ValueError: If a step before it is not finished.
    """
    if step == "search":
        return [place.benchmark("comparison", PRIMARY, search_only=True)]
    if step == "primary":
        chosen = tables.choose(_lines(place, "comparison"))
        more = place.benchmark("comparison", (tables.LORA, chosen), seeds=tables.PRIMARY_SEEDS)
        return [place.benchmark("comparison", PRIMARY), more]
    if step == "others":
        return [place.benchmark("comparison", (method,)) for method in OTHERS]
    if step == "screening":
        return [place.benchmark("ablations", (DEFAULT, *ABLATIONS), tasks=ablation_tables.ABLATED_ON, search_only=True)]
    matter = ablation_tables.that_matter(_lines(place, "ablations"), ABLATIONS, ALWAYS)
    return [place.benchmark("ablations", (DEFAULT, *matter), tasks=ablation_tables.ABLATED_ON)]


def _lines(place: Place, folder: str) -> list[Line]:
    return read_lines(place.runs / folder)


def run(
    step: str,
    data: Path = Path("runs/data"),
    photos: Path = Path("runs/data/photos"),
    runs: Path = Path("runs"),
    plan: bool = False,
) -> None:
    """Run a step, or go on with it; a benchmark that fails keeps no other from being run.

    Args:
        step: search, primary, others, screening or ablations.
        data: Folder that holds the drawn tasks, or where they are drawn.
        photos: Folder that holds the folders flowers17 and caltech97.
        runs: Folder of the folders of the benchmarks.
        plan: Whether to say only how long it would take.
    """
    if step not in STEPS:
        raise ValueError(f"There is no step {step!r}: choose {', '.join(STEPS)}.")
    problems, hours = [], 0.0
    for options in benchmarks_of(step, Place(data, photos, runs)):
        try:
            if plan:
                planned = plan_benchmark(options)
                hours += planned.hours / planned.at_once
                print(describe_plan(planned), f"{hours:.1f} hours up to here", sep="\n")
            else:
                run_benchmark(options, report=lambda text: print(text, flush=True))
        except ValueError as error:
            problems.append(f"{', '.join(options.methods)}: {error}")
    if problems:
        sys.exit("\n".join(problems))


def write(
    document: Path | None = None,
    readme: Path | None = None,
    results: Path = Path("results"),
    runs: Path = Path("runs"),
    take_over: bool = False,
) -> None:
    """Write the tables of documents anew, from what lies in `results/`.

    Args:
        document: Document whose tables are written anew, with the plot beside it.
        readme: README whose table is written anew.
        results: Folder of the repository that holds the lines.
        runs: Folder of the folders of the benchmarks.
        take_over: Whether to take the lines of these over into `results/` first.
    """
    for name in FOLDERS if take_over else ():
        if (runs / name).exists():
            take_over_lines(runs / name, results / f"{name}.jsonl")
    for path in filter(None, (document, readme)):
        write_tables(path, read_results(results))


def bring_back(results: Path = Path("results"), runs: Path = Path("runs")) -> None:
    """Put the lines that lie in `results/` back into the folders of the benchmarks, where `run` goes on from there.

    Args:
        results: Folder of the repository that holds the lines.
        runs: Folder of the folders of the benchmarks; the lines that these have stay.
    """
    for path in (results / f"{name}.jsonl" for name in FOLDERS):
        if path.exists():
            with locked(runs / path.stem):
                _bring_back(read_lines(path), runs / path.stem)


def _bring_back(lines: Sequence[Line], out: Path) -> None:
    # The remedies have a folder for every seed.
    folders = [out / f"seed={line['seed']}" if out.name == REMEDIES else out for line in lines]
    for folder in sorted(set(folders)):
        folder.mkdir(parents=True, exist_ok=True)
        record = Record(folder)
        lost = [line for line, place in zip(lines, folders, strict=True) if place == folder]
        record.add(*(line for line in lost if line["id"] not in record.lines))
        print(f"{folder}: {len(record.lines)} runs")


def take_over_lines(folder: Path, path: Path) -> None:
    """Write the lines of a benchmark into a file of the repository, with losses; none that is there is ever lost.

    That of the remedies has a folder for every seed.
    """
    folders = [file.parent for file in (*folder.glob("runs.jsonl"), *sorted(folder.glob("seed=*/runs.jsonl")))]
    lines = [_with_loss(line, one) for one in folders for line in read_lines(one)]
    had = {(line["id"], line["seed"]) for line in read_lines(path)} if path.exists() else set()
    if lost := had - {(line["id"], line["seed"]) for line in lines}:
        raise ValueError(
            f"{folder} lacks {len(lost)} runs of {path}, such as {min(lost)[0]}, which would be lost: "
            "`bring_back` puts them there."
        )
    if lines:
        write_file(path, "".join(f"{json.dumps(line)}\n" for line in lines))


def _with_loss(line: Line, out: Path) -> Line:
    return line if "train_loss" in line else {**line, "train_loss": _train_loss(folder_of(line, out))}


def _train_loss(folder: Path) -> float | None:
    """Return the mean loss of the last epoch of a training, or None if it left no log, or diverged."""
    path = folder / "log.jsonl"
    entries = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    loss = next((entry["loss"] for entry in reversed(entries) if "loss" in entry), None)
    return loss if loss is not None and isfinite(loss) else None


if __name__ == "__main__":
    auto_cli([run, write, bring_back], as_positional=True)
