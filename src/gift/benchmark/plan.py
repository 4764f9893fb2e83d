"""How many runs a benchmark has, and how long they would take: counted and measured before anything starts."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gift.baselines.methods import method_config
from gift.benchmark.benchmark import planned_searches
from gift.benchmark.methods import BenchmarkMethod, read_methods
from gift.benchmark.options import LOCAL, NO_RAY, BenchmarkOptions, room
from gift.benchmark.perform import device_name, synchronise
from gift.benchmark.record import Record
from gift.benchmark.runs import SEARCH_SEED, TEST, Run
from gift.benchmark.suites import SUITES
from gift.benchmark.tasks import BenchmarkTask, open_tasks, task_names, tasks_by_catalogue
from gift.pretrained import load_backbone, read_geometry
from gift.training.finetune import make_model, with_head
from gift.training.loop import make_optimizer
from gift.training.train import finetune_options

SECONDS_PER_RUN = 5.0  # reading images, loading the backbone, writing
STEPS, CLASSES, IMAGES_ON_CPU = 3, 10, 8


@dataclass(frozen=True)
class MethodCost:
    """What a method costs.

    Attributes:
        method: The method.
        runs: Number of runs that are left.
        train_ms: Milliseconds per image and epoch of training.
        predict_ms: Milliseconds per image of a prediction, not merged.
        hours: Of all its runs, one after the other.
    """

    method: BenchmarkMethod
    runs: int
    train_ms: float
    predict_ms: float
    hours: float


@dataclass(frozen=True)
class Plan:
    """What a benchmark would be.

    Attributes:
        title: What is planned, in words.
        runs: Number of all runs.
        done: Number of those that are done.
        costs: By method.
        at_once: How many runs go on at once.
        measured_on: Where the costs were measured.
    """

    title: str
    runs: int
    done: int
    costs: tuple[MethodCost, ...]
    at_once: int
    measured_on: str

    @property
    def hours(self) -> float:
        """Hours of all runs, one after the other."""
        return sum(cost.hours for cost in self.costs)


def plan_benchmark(options: BenchmarkOptions) -> Plan:
    """Return what a benchmark would cost: nothing is trained, images are read of given folders only.

    Raises:
        ValueError: If tasks or methods cannot be used.
    """
    suite = SUITES[options.suite]
    methods = read_methods(options.methods, suite.protocol)
    names, folders = task_names(suite, options.tasks, options.folders)
    tasks = tasks_by_catalogue(options.suite, names)
    tasks += open_tasks(options.suite, (), folders, options.data, SEARCH_SEED)
    searches = planned_searches(options, tasks, methods)
    runs = [*searches, *_finals(searches, options.final_seeds)]
    record = Record(options.out)
    record.missing(searches)  # raises where a benchmark would
    left = [run for run in runs if run.id not in record.lines]
    at_once = _at_once(options)
    torch.set_num_threads(options.cpus_per_run)
    costs = tuple(_cost(method, [run for run in left if run.method == method], options) for method in methods)
    tries = len(searches) // (len(tasks) * len(methods))
    count = f"({tries} tries + {len(options.final_seeds)} seeds) = {len(runs):,} runs"
    trained = searches[0].options(options.out)
    sizes = f"{len(tasks)} tasks x {len(methods)} methods x {count}"
    title = f"{options.suite}, {trained.model}, {trained.epochs} epochs: {sizes}"
    where = f"{device_name()}, {torch.get_num_threads()} thread(s), one run at a time"
    return Plan(title, len(runs), len(runs) - len(left), costs, at_once, where)


def _finals(searches: Sequence[Run], seeds: Sequence[int]) -> list[Run]:
    """Return the final runs, with the rates of any try: they do not change what a run costs."""
    any_try = {(run.task.name, run.method.name): run for run in searches}
    return [replace(run, phase=TEST, seed=seed) for run in any_try.values() for seed in seeds]


def _cost(method: BenchmarkMethod, runs: Sequence[Run], options: BenchmarkOptions) -> MethodCost:
    if not runs:
        return MethodCost(method, 0, 0.0, 0.0, 0.0)
    train_ms, predict_ms = measure(runs[0], options.out)
    milliseconds = 0.0
    for run in runs:
        trained, measured = _images(run.task, run.phase)
        milliseconds += run.options(options.out).epochs * trained * train_ms + measured * predict_ms
    return MethodCost(
        method, len(runs), train_ms, predict_ms, (milliseconds / 1000 + len(runs) * SECONDS_PER_RUN) / 3600
    )


def _images(task: BenchmarkTask, phase: str) -> tuple[int, int]:
    """Return how many images a run trains on in an epoch, and how many it is measured on."""
    return (task.train + task.validation, task.test) if phase == TEST else (task.train, task.validation)


def measure(run: Run, out: Path) -> tuple[float, float]:
    """Return milliseconds per image of a step of training, and of a prediction, on random images.

    Medians of three, on the accelerator in batches of the run, else in batches of 8.
    """
    options = run.options(out)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    backbone = load_backbone(options.model, tuple(map(str, range(CLASSES))), options.drop_path)
    config = with_head(backbone, method_config(options.method, backbone, options.method_options))
    model = make_model(backbone, config, finetune_options(options)).to(device)
    optimizer = make_optimizer(model, finetune_options(options))
    count = (
        options.batch_size if device is not None and device.type != "cpu" else min(options.batch_size, IMAGES_ON_CPU)
    )
    size = read_geometry(options.model, size_px=options.image_size_px).size_px
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    labels = (torch.arange(count) % CLASSES).to(device)

    def step() -> None:
        model.train()(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def predict() -> None:
        with torch.inference_mode():
            model.eval()(pixel_values=images)

    return _median_ms(step) / count, _median_ms(predict) / count


def _median_ms(work: Callable[[], None]) -> float:
    seconds = []
    for _ in range(STEPS + 1):
        synchronise()
        started = time.perf_counter()
        work()
        synchronise()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[1:])


def _at_once(options: BenchmarkOptions) -> int:
    if options.ray == NO_RAY:
        return 1
    if options.ray != LOCAL:
        from gift.benchmark.cluster import runs_at_once  # noqa: PLC0415 - an extra, and slow to import

        return runs_at_once(options)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = torch.cuda.device_count()
    needed = options.gpus_per_run if options.gpus_per_run is not None else min(gpus, 1)
    at_once = room(cores, gpus, options.cpus_per_run, needed)
    if not at_once:
        raise ValueError(
            f"This machine ({cores} cores, {gpus} accelerators) has no room for a run of {options.cpus_per_run} cores "
            f"and {needed:g} accelerators: lower cpus_per_run or gpus_per_run."
        )
    return at_once


def describe_plan(plan: Plan) -> str:
    """Return the plan as text."""
    lines = [
        f"{plan.title}, {plan.done:,} of them done",
        "",
        "| method | runs left | ms per image trained | ms per image predicted | hours |",
        "|---|---|---|---|---|",
        *(
            f"| {cost.method.title} | {cost.runs:,} | {cost.train_ms:.2f} | {cost.predict_ms:.2f} | {cost.hours:.2f} |"
            for cost in plan.costs
        ),
        "",
        f"{plan.hours:.1f} hours one by one, about {plan.hours / plan.at_once:.1f} with {plan.at_once} at once.",
        f"Milliseconds were measured now: {plan.measured_on}; {SECONDS_PER_RUN:g} s a run are added. "
        "Reading images is not counted.",
    ]
    return "\n".join(lines)
