"""Remedies for where GIFT loses, tried on validation images as docs/plan-of-comparison.md says.

    python benchmarks/remedies.py --data runs/data --photos runs/data/photos

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
from functools import cache
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
from gift.benchmark.methods import BenchmarkMethod, read_methods, resolve_methods
from gift.benchmark.perform import forget_weights, perform
from gift.benchmark.record import Record, locked, read_lines
from gift.benchmark.runs import SEARCH, SEARCH_SEED, Line, Run, final_runs
from gift.benchmark.suites import SUITES
from gift.benchmark.tasks import open_tasks
from gift.pretrained import SMALL
from gift.training import finetune
from gift.training.loop import make_optimizer
from gift.tuner import model as tuner
from gift.tuner.generator import WeightGenerator

SEEDS, OTHERS = remedy_tables.SEEDS, 2
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
    """Generators with a learned factor for every layer, one at the start; a single layer, as in merging, has none."""

    def calibrate(self, weights: Sequence[Any]) -> None:
        super().calibrate(weights)
        self.scales = nn.Parameter(torch.ones(len(weights), dtype=self.recover.dtype, device=self.recover.device))

    def _tokens_to_left(self, tokens: Any) -> Any:
        left, assignments = super()._tokens_to_left(tokens)
        return left * self.scales[:, None, None], assignments


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


def runs_of(place: comparison.Place, tasks: Sequence[str], lines: Sequence[Line]) -> list[Run]:
    """Return a run of every remedy, task and seed; `lines` are those of the comparison."""
    chosen, found = _chosen(lines), []
    for seed in SEEDS:
        for run in _best_of_searches(place, chosen, tasks, lines, (seed,), validation_of=seed):
            found += [replace(run, phase=SEARCH, method=changed(chosen.name, name)) for name in REMEDIES]
    return found


def tests_of(place: comparison.Place, names: Sequence[str], lines: Sequence[Line]) -> list[Run]:
    """Return the tests of some remedies, on all tasks."""
    chosen = _chosen(lines)
    runs = _best_of_searches(place, chosen, tables.TASKS, lines, tables.SEEDS, validation_of=SEARCH_SEED)
    return [replace(run, method=changed(chosen.name, name)) for name in names for run in runs]


def _chosen(lines: Sequence[Line]) -> BenchmarkMethod:
    (method,) = resolve_methods(read_methods([tables.choose(lines)], SUITES["offline"].protocol), SMALL)
    return method


def _best_of_searches(
    place: comparison.Place,
    method: BenchmarkMethod,
    tasks: Sequence[str],
    lines: Sequence[Line],
    seeds: Sequence[int],
    validation_of: int,
) -> list[Run]:
    """Return the tests of a method with what was best for it in the searches of the comparison."""
    options = place.benchmark("remedies", [method.name], tasks=tasks)
    drawn = [name for name in tasks if name not in tables.PHOTOS]
    opened = open_tasks("offline", drawn, list(options.folders), options.data, validation_of)
    return final_runs(planned_searches(options, opened, [method]), {line["id"]: line for line in lines}, seeds)


@cache
def changed(method: str, name: str) -> BenchmarkMethod:
    """Return a method with a remedy, under a name of its own."""
    remedy = REMEDIES[name]
    (plain,) = read_methods([method], SUITES["offline"].protocol)
    own = {**plain.options["method_options"], **remedy.options}
    options = {**plain.options, **remedy.training, "method_options": own}
    called = remedy_tables.method_of(method, name)
    return resolve_methods([replace(plain, name=called, title=remedy.title, options=options)], SMALL)[0]


def do(run: Run, out: Path) -> Line:
    """Return the line of a run with its remedy in force."""
    torch.set_num_threads(1)
    with REMEDIES[remedy_tables.remedy_of(run.method.name)].change():
        return perform(run, out)


def do_all(runs: Sequence[Run], out: Path, workers: int) -> list[Line]:
    """Do the runs that have no line yet, each seed in a folder of its own; return the lines of all.

    A run that fails keeps no other from being done.
    """
    folders = {run.seed: out / f"seed={run.seed}" for run in runs}
    records = {seed: Record(folder) for seed, folder in folders.items()}
    left = [run for seed in records for run in records[seed].missing([run for run in runs if run.seed == seed])]
    problems = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(do, run, folders[run.seed]): run for run in left}
        for count, future in enumerate(as_completed(waiting), 1):
            run = waiting[future]
            try:
                line = future.result()
            except (ValueError, OSError) as error:
                problems.append(f"{run.id}, seed {run.seed}: {error}")
                continue
            records[run.seed].add(line)
            forget_weights(run.folder(folders[run.seed]))
            print(f"[{count} of {len(left)}] {run.id}, seed {run.seed}: {line['accuracy']}", flush=True)
    if problems:
        sys.exit("\n".join(problems))
    return [records[run.seed].lines[run.id] for run in runs]


def run(
    others: str = "digits,dsprites_ori",
    data: Path = Path("runs/data"),
    photos: Path = Path("runs/data/photos"),
    runs: Path = Path("runs"),
    workers: int = 2,
) -> None:
    """Run every remedy where GIFT loses and on two other tasks, then test on all what helps; or go on with it.

    Args:
        others: The two others, to see harm, with a comma between.
        data: Folder that holds the drawn tasks.
        photos: Folder that holds the folders flowers17 and caltech97.
        runs: Folder of the folders of the benchmarks; the comparison is in one of them.
        workers: Number of trainings at once.
    """
    place, out, lines = comparison.Place(data, photos, runs), runs / "remedies", read_lines(runs / "comparison")
    where_lost, to_see_harm = remedy_tables.lost(lines), others.split(",")
    if len(to_see_harm) != OTHERS or not set(to_see_harm) <= set(tables.TASKS) - set(where_lost):
        free = ", ".join(task for task in tables.TASKS if task not in where_lost)
        raise ValueError(f"--others names {OTHERS} tasks on which GIFT does not lose, of {free}; got {others}.")
    with locked(out):
        tried = do_all(runs_of(place, (*where_lost, *to_see_harm), lines), out, workers)
        tested = remedy_tables.to_test(tried, where_lost)
        print(f"tested: {', '.join(tested) or 'none'}", flush=True)
        do_all(tests_of(place, tested, lines), out, workers)


if __name__ == "__main__":
    auto_cli(run, as_positional=False)
