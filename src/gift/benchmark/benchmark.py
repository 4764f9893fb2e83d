"""A whole benchmark: search, train on all images, test; stopped and started again, it goes on.

The folder of a benchmark holds

    runs.jsonl       one line a run: what was run, with what, on what, and what came out
    runs/            what `gift train` left of each; weights of final runs only
    validation.md    the best of every search
    table.md, table.csv, pareto.png, pareto.svg
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from gift.benchmark.methods import BenchmarkMethod, read_methods, resolve_methods
from gift.benchmark.options import NO_RAY, BenchmarkOptions
from gift.benchmark.outcome import write_outcome
from gift.benchmark.perform import forget_weights, perform
from gift.benchmark.record import Record, locked
from gift.benchmark.runs import SEARCH, SEARCH_SEED, Line, Run, final_runs, search_runs
from gift.benchmark.suites import SUITES, tries
from gift.benchmark.tasks import BenchmarkTask, open_tasks, task_names

logger = logging.getLogger(__name__)
SHOWN = 3  # problems in a message


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
        what = line["problem"] if line["accuracy"] is None else f"{100 * line['accuracy']:.2f} %"
        count = self.total - self.left + self.done
        self.report(f"[{count} of {self.total}] {line['id']}: {what}; about {seconds / 60:.0f} minutes left")


def run_benchmark(options: BenchmarkOptions, report: Callable[[str], None] = logger.info) -> list[Line]:
    """Do all runs that have no line yet, write table and plot, and return the lines of all runs that were asked for.

    Table and plot are of all lines in the folder: methods, tasks and seeds can be added to it.

    Raises:
        ValueError: If tasks or methods cannot be used, the folder holds runs of other options, or runs failed; what
            does not need these was done by then.
        OSError: If something cannot be written.
    """
    suite = SUITES[options.suite]
    methods = read_methods(options.methods, suite.protocol)
    names, folders = task_names(suite, options.tasks, options.folders)
    torch.set_num_threads(options.cpus_per_run)
    with locked(options.out):
        tasks = open_tasks(options.suite, names, folders, options.data, SEARCH_SEED)
        methods = resolve_methods(methods, options.changes.get("model", suite.protocol.options["model"]))
        record = Record(options.out)
        searches = planned_searches(options, tasks, methods)
        problems = _perform(options, record, searches, "search", report)
        finals = final_runs(searches, record.lines, options.final_seeds)
        problems |= _perform(options, record, finals, "final runs", report)
        for task, method in _without_final_runs(searches, finals) if options.final_seeds else ():
            report(f"{task}/{method}: no try came to an end that could be chosen, so there is no final run")
        write_outcome(list(record.lines.values()), options.out, options.reference)
        _check_done(problems, len(searches) + len(finals))
    return [record.lines[run.id] for run in (*searches, *finals)]


def _without_final_runs(searches: list[Run], finals: list[Run]) -> list[tuple[str, str]]:
    have = {(run.task.name, run.method.name) for run in finals}
    return [key for key in dict.fromkeys((run.task.name, run.method.name) for run in searches) if key not in have]


def _check_done(problems: dict[str, str], runs: int) -> None:
    if problems:
        shown = "; ".join(f"{name}: {problem}" for name, problem in list(problems.items())[:SHOWN])
        raise ValueError(f"{len(problems)} of {runs} runs failed: {shown}. Start it again to repeat only these.")


def planned_searches(
    options: BenchmarkOptions, tasks: list[BenchmarkTask], methods: list[BenchmarkMethod]
) -> list[Run]:
    """Return the runs of all searches."""
    given = tuple(sorted(options.learning_rates or ()))
    pairs = {method.name: tries(given or method.rates, options.tries) for method in methods}
    search = {"tries": max(map(len, pairs.values())), "scheduler": options.scheduler}
    return search_runs(options.suite, tasks, methods, pairs, search, options.changes)


def _perform(
    options: BenchmarkOptions, record: Record, runs: list[Run], phase: str, report: Callable[[str], None]
) -> dict[str, str]:
    """Do the runs that have no line; return why some could not be done, by id."""
    left = record.missing(runs)
    waiting = {run.id for run in left}
    for run in runs:  # what a killed benchmark had not deleted yet
        if run.id not in waiting:
            _forget(run, options)
    report(f"{phase}: {len(runs)} runs, {len(runs) - len(left)} of them done before")
    progress = _Progress(len(runs), len(left), report)

    def keep(run: Run, line: Line) -> None:
        record.add(line)
        _forget(run, options)
        progress.say(line)

    if options.ray != NO_RAY and left:
        return _on_ray()(left, options, keep)
    problems = {}
    for run in left:
        try:
            keep(run, perform(run, options.out))
        except ValueError as error:
            problems[run.id] = str(error)
    return problems


def _forget(run: Run, options: BenchmarkOptions) -> None:
    if run.phase == SEARCH or not options.keep_weights:
        forget_weights(run.folder(options.out))


def _on_ray() -> Callable[[list[Run], BenchmarkOptions, Callable[[Run, Line], None]], dict[str, str]]:
    try:
        from gift.benchmark.cluster import perform_on_ray  # noqa: PLC0415 - an extra, and slow to import
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Runs in parallel need {error.name}: pip install 'gift-peft[cluster]', or run one after the other with "
            f"--ray {NO_RAY}."
        ) from error
    return perform_on_ray
