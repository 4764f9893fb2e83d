"""Remedies for where GIFT loses, tried on validation images as docs/plan-of-comparison.md says.

    python benchmarks/remedies.py --tasks digits,flowers17 --data runs/data --photos runs/data/photos

Each is the chosen size of GIFT with one change, with the learning rate and weight decay that were best for it on the
task, on three seeds; what helps is tested on all tasks, on five. Changes that are no options of GIFT are made here, to
a subclass of its generator or to the optimizer: only what helps belongs into the package. Killed, it goes on where it
was; `--workers` trainings at once. `benchmarks/comparison.py write` makes the table.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from jsonargparse import auto_cli
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import comparison, remedy_tables
from benchmarks import comparison_tables as tables
from gift.benchmark.benchmark import planned_searches
from gift.benchmark.methods import read_methods, resolve_methods
from gift.benchmark.perform import perform
from gift.benchmark.record import Record, locked, read_lines
from gift.benchmark.runs import SEARCH, TEST, Line, Run, final_runs
from gift.benchmark.suites import SUITES
from gift.benchmark.tasks import open_tasks
from gift.pretrained import SMALL
from gift.training import finetune
from gift.training.loop import make_optimizer
from gift.tuner import model as tuner
from gift.tuner.generator import WeightGenerator

SEEDS = (101, 102, 103)
END_MAPS = ("reduce", "recover")


@dataclass(frozen=True)
class Remedy:
    """A change of GIFT.

    Attributes:
        title: For the table.
        options: Of `GiftConfig`, otherwise than by default.
        training: Of `gift train`, otherwise than in the protocol.
        change: What is in force while a run goes on.
    """

    title: str
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[], Any] = nullcontext


@contextmanager
def _generator(kind: type[WeightGenerator]) -> Iterator[None]:
    with patch.object(tuner, "WeightGenerator", kind):
        yield


def starting_at(deviation: float) -> type[WeightGenerator]:
    """Return generators whose recovery does not start at zero."""

    class Started(WeightGenerator):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            nn.init.normal_(self.recover, std=deviation)

    return Started


class OfUnitRows(WeightGenerator):
    """Generators that read every row of a weight at length one."""

    def _reduce(self, weight: Any) -> Any:
        return super()._reduce(weight) / weight.detach().norm(dim=1, keepdim=True).clamp(min=1e-12)


class OfUnitWeights(WeightGenerator):
    """Generators that read every weight with rows of length one on average (root mean square)."""

    def _reduce(self, weight: Any) -> Any:
        return super()._reduce(weight) / weight.detach().square().sum(dim=1).mean().sqrt().clamp(min=1e-12)


class ScaledPerLayer(WeightGenerator):
    """Generators with a learned factor for every layer, one at the start."""

    def calibrate(self, weights: Sequence[Any]) -> None:
        super().calibrate(weights)
        self.scales = nn.Parameter(torch.ones(len(weights), 1, 1, dtype=self.recover.dtype, device=self.recover.device))

    def _tokens_to_left(self, tokens: Any) -> Any:
        left, assignments = super()._tokens_to_left(tokens)
        return left * self.scales, assignments


@contextmanager
def _end_maps_times(factor: float) -> Iterator[None]:
    """Train reduction and recovery with other learning rates than the rest of the generator."""

    def make(model: nn.Module, options: Any) -> torch.optim.Optimizer:
        optimizer = make_optimizer(model, options)
        ends = {id(p) for name, p in model.named_parameters() if any(f".{end}" in name for end in END_MAPS)}
        for group in list(optimizer.param_groups):
            apart = [parameter for parameter in group["params"] if id(parameter) in ends]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ends]
            if apart:
                optimizer.add_param_group({**group, "params": apart, "lr": factor * group["lr"]})
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    with patch.object(finetune, "make_optimizer", make):
        yield


REMEDIES = {
    remedy_tables.UNCHANGED: Remedy("nothing changed"),
    "recover-0.001": Remedy("recovery starts with deviation 0.001", change=lambda: _generator(starting_at(0.001))),
    "recover-0.01": Remedy("recovery starts with deviation 0.01", change=lambda: _generator(starting_at(0.01))),
    "ends-0.25": Remedy("reduction and recovery with 1/4 of the learning rate", change=lambda: _end_maps_times(0.25)),
    "ends-4": Remedy("reduction and recovery with 4 times the learning rate", change=lambda: _end_maps_times(4.0)),
    "warm-up": Remedy("30 % of warm-up", training={"warmup_ratio": 0.3}),
    "unit-rows": Remedy("rows of weights at length one before the reduction", change=lambda: _generator(OfUnitRows)),
    "unit-weights": Remedy(
        "whole weights at one length before the reduction", change=lambda: _generator(OfUnitWeights)
    ),
    "layer-scales": Remedy("a learned scale for every layer", change=lambda: _generator(ScaledPerLayer)),
    "gain": Remedy("a learned gain of the assignment, from 1", {"learn_assignment_gain": True}),
    "gain-8": Remedy("a learned gain of the assignment, from 8", {"learn_assignment_gain": True, "assignment_gain": 8}),
    "recover-bias": Remedy("a bias in the recovery", {"recover_bias": True}),
    "scaling-0.25": Remedy("scaling 1/4", {"scaling": 0.25}),
    "scaling-4": Remedy("scaling 4", {"scaling": 4}),
}


def runs_of(place: comparison.Place, tasks: Sequence[str], lines: Sequence[Line]) -> dict[str, tuple[str, Run]]:
    """Return by id the remedy and the run of every remedy, task and seed; `lines` are those of the comparison."""
    found: dict[str, tuple[str, Run]] = {}
    for seed in SEEDS:
        for run, (name, remedy) in product(_best_of_searches(place, tasks, lines, (seed,)), REMEDIES.items()):
            changed = replace(run, phase=SEARCH, method=_changed(run.method, name, remedy))
            found[f"{run.task.name}/{name}/seed={seed}"] = (name, changed)
    return found


def tests_of(place: comparison.Place, names: Sequence[str], lines: Sequence[Line]) -> dict[str, tuple[str, Run]]:
    """Return by id the remedy and the run of every test of some remedies, on all tasks."""
    runs = _best_of_searches(place, tables.TASKS, lines, tables.SEEDS)
    changed = [(n, replace(run, method=_changed(run.method, n, REMEDIES[n]))) for run, n in product(runs, names)]
    return {f"{run.task.name}/{name}/{TEST}/seed={run.seed}": (name, run) for name, run in changed}


def _best_of_searches(
    place: comparison.Place, tasks: Sequence[str], lines: Sequence[Line], seeds: Sequence[int]
) -> list[Run]:
    """Return the tests of the chosen size with what was best for it on every task; the first seed draws validation."""
    chosen = tables.choose(lines)
    methods = resolve_methods(read_methods([chosen], SUITES["offline"].protocol), SMALL)
    options = place.benchmark("remedies", [chosen], tasks=tasks)
    drawn = [name for name in tasks if name not in comparison.PHOTOS]
    opened = open_tasks("offline", drawn, list(options.folders), options.data, seeds[0])
    return final_runs(planned_searches(options, opened, methods), {line["id"]: line for line in lines}, seeds)


def _changed(method: Any, name: str, remedy: Remedy) -> Any:
    own = {**method.options["method_options"], **remedy.options}
    options = {**method.options, **remedy.training, "method_options": own}
    return replace(method, name=f"{method.name}+{name}", title=remedy.title, options=options)


def do(name: str, run: Run, out: Path) -> Line:
    """Return the line of a run with its remedy in force."""
    torch.set_num_threads(1)
    with REMEDIES[name].change():
        return perform(run, out / f"seed={run.seed}")


def _do_all(planned: Mapping[str, tuple[str, Run]], record: Record, out: Path, workers: int) -> None:
    """Do the runs that have no line yet."""
    left = {key: it for key, it in planned.items() if key not in record.lines}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(do, name, it, out): (key, name) for key, (name, it) in left.items()}
        for count, future in enumerate(as_completed(waiting), 1):
            key, name = waiting[future]
            line = future.result() | {"id": key, "remedy": name}
            record.add(line)
            print(f"[{count} of {len(left)}] {key}: {line['accuracy']}", flush=True)


def run(
    tasks: str,
    data: Path = Path("runs/data"),
    photos: Path = Path("runs/data/photos"),
    runs: Path = Path("runs"),
    workers: int = 2,
) -> None:
    """Run every remedy on some tasks, then test on all what helps; or go on with it.

    Args:
        tasks: Where GIFT lost, and others to see harm, with commas between.
        data: Folder that holds the drawn tasks.
        photos: Folder that holds the folders flowers17 and caltech97.
        runs: Folder of the folders of the benchmarks; the comparison is in one of them.
        workers: Number of trainings at once.
    """
    place, out, lines = comparison.Place(data, photos, runs), runs / "remedies", read_lines(runs / "comparison")
    where_lost = remedy_tables.lost(lines)
    if missing := set(where_lost) - set(tasks.split(",")):
        raise ValueError(f"GIFT loses on {', '.join(sorted(missing))} too: name it in --tasks, which has {tasks}.")
    with locked(out):
        record = Record(out)
        _do_all(runs_of(place, tasks.split(","), lines), record, out, workers)
        tested = remedy_tables.to_test(list(record.lines.values()), where_lost)
        print(f"tested: {', '.join(tested) or 'none'}", flush=True)
        _do_all(tests_of(place, tested, lines), record, out, workers)


if __name__ == "__main__":
    auto_cli(run, as_positional=False)
