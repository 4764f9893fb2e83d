"""The runs of a benchmark on a Ray cluster: Ray Tune places and schedules them."""

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the results are ours to write
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the benchmark, not one experiment
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a run without accelerators sees none
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # prints tables whatever `verbose` says

import ray
import torch
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler

from gift.benchmark.options import ASHA, LOCAL, BenchmarkOptions, room
from gift.benchmark.perform import UNKNOWN, perform
from gift.benchmark.runs import SEARCH, Line, Run

SECONDS_TO_ANSWER = 10
STORE_BYTES = 10**8  # what runs return is small
Keep = Callable[[Run, Line], None]


def runs_at_once(options: BenchmarkOptions) -> int:
    """Return how many runs a cluster has room for, those that share an accelerator counted as one."""
    with _connected(options.ray):
        gpus = _resources(options)["gpu"]
        hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return sum(room(host.get("CPU", 0), host.get("GPU", 0), options.cpus_per_run, gpus) for host in hosts)


def perform_on_ray(runs: Sequence[Run], options: BenchmarkOptions, keep: Keep) -> dict[str, str]:
    """Do runs on a cluster; `keep` gets each run and its line as soon as it is over.

    A run whose worker or host dies is started again on another when those scheduled with it are over, and goes on from
    its last checkpoint where the folder of the benchmark is shared.

    Returns:
        Why a run could not be done, by its id; all others were.

    Raises:
        ValueError: If the cluster is not there or has no room for a run.
    """
    problems: dict[str, str] = {}
    with _connected(options.ray):
        resources = _resources(options)
        for together in _groups(runs, options):
            left, failed = together, {}
            for _ in range(1 + options.retries):
                failed = _perform_together(left, options, resources, keep, problems)
                left = [run for run in left if run.id in failed]
                if not left:
                    break
            problems |= failed
    return problems


def _perform_together(
    runs: Sequence[Run], options: BenchmarkOptions, resources: dict[str, float], keep: Keep, problems: dict[str, str]
) -> dict[str, str]:
    """Do each run once and note the problems that would come again; return the other errors by the run's id.

    Tune would repeat runs itself, but gives up one that was to begin in a worker just lost, whose failure it takes
    twice (Ray 2.60): then the run is no longer under way, and ends.
    """
    by_id = {run.id: run for run in runs}
    watcher = _Watcher(by_id, keep, problems)
    trial = tune.with_parameters(_trial, runs=by_id, options=options, folder=str(Path.cwd()))
    tune.Tuner(
        tune.with_resources(trial, resources),
        param_space={"run": tune.grid_search(list(by_id))},
        tune_config=tune.TuneConfig(
            reuse_actors=True,  # importing takes as long as a small run
            trial_dirname_creator=lambda it: f"{it.trial_id}",
            **_scheduling(runs, options),
        ),
        run_config=tune.RunConfig(
            name=runs[0].phase,
            storage_path=str(options.out.absolute() / "ray"),
            callbacks=[watcher],
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    ).fit()
    return watcher.failed


def _trial(config: Mapping[str, Any], runs: Mapping[str, Run], options: BenchmarkOptions, folder: str) -> None:
    """Do one run in a worker, which may have done others before."""
    os.chdir(folder)  # where paths begin
    torch.set_num_threads(options.cpus_per_run)
    run = runs[config["run"]]
    is_watched = options.scheduler == ASHA and run.phase == SEARCH
    try:
        line = perform(run, options.out, _reporter(run.options(options.out).epochs) if is_watched else None)
    except ValueError as error:  # would come again
        tune.report({"problem": str(error), "epoch": 0, "accuracy": 0.0})
        return
    tune.report({"line": json.dumps(line), "epoch": line["epochs"], "accuracy": line["accuracy"] or 0.0})


def _reporter(epochs: int) -> Callable[[int, float], None]:
    """Return what tells the scheduler of every epoch but the last, which comes with the line."""

    def report(epoch: int, accuracy: float) -> None:
        if epoch < epochs:
            tune.report({"epoch": epoch, "accuracy": accuracy})

    return report


class _Watcher(tune.Callback):
    """Takes the lines of runs in the process that started them."""

    def __init__(self, runs: Mapping[str, Run], keep: Keep, problems: dict[str, str]) -> None:
        self.runs, self.keep, self.problems = runs, keep, problems
        self.failed: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune stores callbacks to restore an experiment, which is not done here."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Keep the line of a run that is over, or note why it could not be done."""
        run, result = self.runs[trial.config["run"]], trial.last_result
        if "line" in result:
            self.keep(run, json.loads(result["line"]))
        elif "problem" in result:
            self.problems[run.id] = result["problem"]
        else:
            said = f"stopped by the scheduler after epoch {result['epoch']}, at {100 * result['accuracy']:.2f} %"
            self.keep(run, run.described() | UNKNOWN | {"problem": said})

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Note the last line of the error of a run whose worker has died, or that raised what none should."""
        said = Path(str(trial.error_file)).read_text(encoding="utf-8")
        self.failed[trial.config["run"]] = said.strip().rpartition("\n")[2].strip()


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Be connected to a cluster; one of this machine's cores ends with the connection."""
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address == LOCAL:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            ray.init(address=LOCAL, num_cpus=cores, object_store_memory=STORE_BYTES, **quiet)
        else:
            _check_answers(address)
            ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"There is no Ray cluster at {address}: {first} Start one with `ray start --head`.") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise OSError if nobody listens at HOST:PORT: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "//" not in address:
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()


def _resources(options: BenchmarkOptions) -> dict[str, float]:
    """Return what each run takes.

    Raises:
        ValueError: If no host of the cluster has it: Ray would wait for one.
    """
    hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = options.gpus_per_run
    if gpus is None:
        gpus = 1 if any(host.get("GPU", 0) for host in hosts) else 0
    if not any(host.get("CPU", 0) >= options.cpus_per_run and host.get("GPU", 0) >= gpus for host in hosts):
        there = "; ".join(f"{host.get('CPU', 0):g} cores, {host.get('GPU', 0):g} accelerators" for host in hosts)
        raise ValueError(
            f"Each run takes {options.cpus_per_run} cores and {gpus:g} accelerators, and no host of the cluster has so "
            f"many ({there}): lower cpus_per_run or gpus_per_run."
        )
    return {"cpu": float(options.cpus_per_run), "gpu": float(gpus)}


def _groups(runs: Sequence[Run], options: BenchmarkOptions) -> list[list[Run]]:
    """Return which runs are scheduled together: all, or those of one search where they are compared while they run."""
    if options.scheduler != ASHA:
        return [list(runs)]
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        key = (run.phase, run.task.name, run.method.name) if run.phase == SEARCH else (run.phase,)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def _scheduling(runs: Sequence[Run], options: BenchmarkOptions) -> dict[str, Any]:
    if options.scheduler != ASHA or runs[0].phase != SEARCH:
        return {}
    epochs = runs[0].options(options.out).epochs
    scheduler = ASHAScheduler("epoch", "accuracy", "max", max_t=epochs + 1, grace_period=max(1, epochs // 10))
    return {"scheduler": scheduler}
