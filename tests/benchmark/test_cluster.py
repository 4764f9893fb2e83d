"""Benchmarks on Ray: on this machine and on two hosts, with workers and a host lost."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import Mock

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.tune.experiment import Trial

from gift.benchmark import cluster as module
from gift.benchmark.benchmark import run_benchmark
from gift.benchmark.cluster import perform_on_ray
from gift.benchmark.options import LOCAL
from tests.benchmark.small import METHODS, lasting, small_options, small_run

# Most of the time workers import: each takes half a minute of a slow core, again for every phase.
TRIES = {"methods": METHODS[1:], "budget": 4, "epochs": 8, "search_only": True}


@pytest.fixture
def workers_find_the_tests(monkeypatch):
    """Let workers import what this process can, with one thread each."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # warnings of Ray's own are no errors there
    ray.shutdown()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def own_cluster():
    """Start Ray once for several benchmarks."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONWARNINGS", "ignore")
        with module._connected(LOCAL):
            yield


class After:
    """Does something, once each, when so many runs are over."""

    def __init__(self, do: dict[int, Callable[[], None]]) -> None:
        self.left, self.over = do, 0

    def __call__(self, said: str = "[") -> None:
        if said.startswith("["):
            self.over += 1
            self.left.pop(self.over, lambda: None)()


def kill_one_worker():
    """Kill a worker that does a run, or one that waits for the next if there is no other."""
    titles = {it.pid: " ".join(it.cmdline()) for it in psutil.Process().children(recursive=True)}
    workers = [pid for pid, title in titles.items() if title.startswith("ray::ImplicitFunc")]
    os.kill(max(workers, key=lambda pid: titles[pid].startswith("ray::ImplicitFunc.train")), signal.SIGKILL)


@pytest.mark.slow
def test_two_hosts_of_which_one_loses_a_worker_and_one_is_lost_give_the_results_of_one_process(
    pictures, backbone, tmp_path, workers_find_the_tests
):
    expected = run_benchmark(small_options(tmp_path / "expected", pictures, backbone, **TRIES))
    hosts = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8})
    try:
        second = hosts.add_node(num_cpus=1, object_store_memory=10**8)
        hosts.wait_for_nodes()
        options = small_options(tmp_path / "out", pictures, backbone, ray=hosts.address, **TRIES)
        assert module.runs_at_once(options) == 2
        losses = After({1: kill_one_worker, 2: lambda: hosts.remove_node(second, allow_graceful=False)})
        lines = run_benchmark(options, losses)
    finally:
        ray.shutdown()
        hosts.shutdown()
    assert not losses.left
    assert list(map(lasting, lines)) == list(map(lasting, expected))


@pytest.mark.slow
def test_tries_that_are_behind_are_stopped_and_not_chosen(pictures, backbone, tmp_path, own_cluster):
    given = {"epochs": 5, "budget": 6, "seeds": (0,), "methods": METHODS[:1], "ray": "local", "scheduler": "asha"}
    lines = run_benchmark(small_options(tmp_path / "out", pictures, backbone, **given))
    search, final = lines[:-1], lines[-1]
    stopped = [line for line in search if line["problem"]]
    assert 1 <= len(stopped) < 6
    assert all("stopped by the scheduler after epoch" in line["problem"] for line in stopped)
    assert {line["scheduler"] for line in lines} == {"asha"}
    assert final["learning_rate"] in {line["learning_rate"] for line in search if line["accuracy"] is not None}


def run_of(pictures, backbone, rate=0.01):
    run = small_run(method="linear-probe", model=str(backbone), epochs=1, batch_size=8, rate=rate)
    return replace(run, task=replace(run.task, source=str(pictures)))


@pytest.mark.slow
def test_a_run_that_cannot_be_done_or_was_to_begin_in_a_lost_worker_keeps_no_other_from_being_done(
    pictures, backbone, tmp_path, own_cluster
):
    given = {"ray": "local", "methods": METHODS[:1], "retries": 1, "cpus_per_run": int(ray.cluster_resources()["CPU"])}
    options = small_options(tmp_path / "out", pictures, backbone, **given)  # one after the other, in one worker
    first, second, wrong = run_of(pictures, backbone), run_of(pictures, backbone, 0.02), small_run(task="nowhere")
    loss, kept = After({1: kill_one_worker}), []

    def keep(run, line):
        kept.append((run, line["id"]))
        loss()

    problems = perform_on_ray([first, second, wrong], options, keep)
    assert not loss.left
    assert kept == [(first, first.id), (second, second.id)]
    assert list(problems) == [wrong.id]
    assert "There is no file or folder stripes" in problems[wrong.id]


def test_a_run_that_is_given_up_has_the_last_line_of_its_last_error(tmp_path):
    error = tmp_path / "error.txt"
    error.write_text("Failure # 1\nray::train()\nOSError: old\nFailure # 2\nray::train()\nOSError: disk full\n\n")
    watcher = module._Watcher({}, keep=lambda run, line: None, problems={})
    watcher.on_trial_error(0, [], Mock(Trial, config={"run": "a"}, error_file=str(error)))
    assert (watcher.failed, watcher.problems) == ({"a": "OSError: disk full"}, {})


def test_a_cluster_that_is_not_there_is_said(pictures, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # tests before may be connected
    options = small_options(tmp_path / "out", pictures, backbone, ray="127.0.0.1:1")
    with pytest.raises(ValueError, match=r"There is no Ray cluster at 127.0.0.1:1.*ray start --head"):
        perform_on_ray([small_run()], options, lambda run, line: None)


@pytest.mark.parametrize("needed", [{"cpus_per_run": 3}, {"gpus_per_run": 1}, {"cpus_per_run": 2, "gpus_per_run": 0.5}])
def test_runs_that_no_host_has_room_for_are_refused(needed, pictures, backbone, tmp_path, monkeypatch):
    hosts = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 4.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: hosts)
    with pytest.raises(ValueError, match="no host of the cluster has so many"):
        module._resources(small_options(tmp_path / "out", pictures, backbone, ray="auto", **needed))


def test_runs_have_an_accelerator_where_there_are_some(pictures, backbone, tmp_path, monkeypatch):
    options = small_options(tmp_path / "out", pictures, backbone, ray="auto")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    for host, expected in (({"CPU": 8.0}, (0.0, 8)), ({"CPU": 8.0, "GPU": 2.0}, (1.0, 2))):
        monkeypatch.setattr(ray, "nodes", lambda host=host: [{"Alive": True, "Resources": host}])
        assert (module._resources(options)["gpu"], module.runs_at_once(options)) == expected


def test_searches_are_scheduled_apart_where_they_are_compared_while_they_run(pictures, backbone, tmp_path):
    runs = [small_run(rate=rate, task=task) for task in ("a", "b") for rate in (0.1, 0.2)]
    fifo = small_options(tmp_path / "out", pictures, backbone, ray="local")
    asha = small_options(tmp_path / "out", pictures, backbone, ray="local", scheduler="asha")
    assert module._groups(runs, fifo) == [runs]
    assert module._groups(runs, asha) == [runs[:2], runs[2:]]
