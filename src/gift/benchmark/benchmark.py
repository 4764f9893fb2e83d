"""A whole benchmark: search, train on all images, test; stopped and started again, it goes on.

The folder of a benchmark holds

    runs.jsonl       one line a run: what was run, with what, on what, and what came out
    runs/            what `gift train` left of each; weights of final runs only
    table.md, table.csv, pareto.png, pareto.svg
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from gift.benchmark.methods import BenchmarkMethod, check_methods, read_methods
from gift.benchmark.options import NO_RAY, BenchmarkOptions
from gift.benchmark.outcome import write_outcome
from gift.benchmark.perform import forget_weights, perform
from gift.benchmark.record import Record, locked
from gift.benchmark.runs import SEARCH, SEARCH_SEED, Line, Run, final_runs, search_runs
from gift.benchmark.suites import SUITES, tries
from gift.benchmark.tasks import BenchmarkTask, open_tasks, task_names

logger = logging.getLogger(__name__)


@dataclass
class _Progress:
    """Says how far a phase is, and when it may be over."""

    total: int
    left: int
    report: Callable[[str], None]
    started: float = field(default_factory=time.monotonic)
    done: int = 0

    def say(self, line: Line) -> None:
        self.done += 1
        seconds = (time.monotonic() - self.started) * (self.left - self.done) / self.done
        what = "nothing: its loss was not finite" if line["accuracy"] is None else f"{100 * line['accuracy']:.2f} %"
        count = self.total - self.left + self.done
        self.report(f"[{count} of {self.total}] {line['id']}: {what}; about {seconds / 60:.0f} minutes left")


def run_benchmark(options: BenchmarkOptions, report: Callable[[str], None] = logger.info) -> list[Line]:
    """Do all runs that have no line yet, write table and plot, and return the lines of all runs that were asked for.

    Raises:
        ValueError: If tasks or methods cannot be used, the folder holds runs of other options, or a run failed.
        OSError: If something cannot be written.
    """
    suite = SUITES[options.suite]
    methods = read_methods(options.methods, suite.protocol)
    names, folders = task_names(suite, options.tasks, options.folders)
    torch.set_num_threads(options.cpus_per_run)
    with locked(options.out):
        tasks = open_tasks(options.suite, names, folders, options.data, SEARCH_SEED)
        check_methods(methods, options.changes.get("model", suite.protocol.options["model"]))
        record = Record(options.out)
        searches = planned_searches(options, tasks, methods)
        _perform(options, record, searches, "search", report)
        finals = final_runs(searches, record.lines, options.seeds)
        _perform(options, record, finals, "final runs", report)
        lines = [record.lines[run.id] for run in (*searches, *finals)]
        write_outcome(lines, options.out, options.reference)
    return lines


def planned_searches(
    options: BenchmarkOptions, tasks: list[BenchmarkTask], methods: list[BenchmarkMethod]
) -> list[Run]:
    """Return the runs of all searches."""
    pairs = {method.name: tries(method.rates, options.tries) for method in methods}
    return search_runs(options.suite, tasks, methods, pairs, options.changes)


def _perform(
    options: BenchmarkOptions, record: Record, runs: list[Run], phase: str, report: Callable[[str], None]
) -> None:
    left = record.missing(runs)
    for run in runs:  # what a killed benchmark had not deleted yet
        if run.phase == SEARCH and run not in left:
            forget_weights(run.folder(options.out))
    report(f"{phase}: {len(runs)} runs, {len(runs) - len(left)} of them done before")
    progress = _Progress(len(runs), len(left), report)

    def keep(run: Run, line: Line) -> None:
        record.add(line)
        if run.phase == SEARCH:
            forget_weights(run.folder(options.out))
        progress.say(line)

    if options.ray != NO_RAY and left:
        _on_ray()(left, options, keep)
        return
    for run in left:
        keep(run, perform(run, options.out))


def _on_ray() -> Callable[[list[Run], BenchmarkOptions, Callable[[Run, Line], None]], None]:
    try:
        from gift.benchmark.cluster import perform_on_ray  # noqa: PLC0415 - an extra, and slow to import
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Runs in parallel need {error.name}: pip install 'gift-peft[cluster]', or run one after the other with "
            f"--ray {NO_RAY}."
        ) from error
    return perform_on_ray
