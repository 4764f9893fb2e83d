import pytest
import torch

from gift.benchmark import plan as module
from gift.benchmark.benchmark import planned_searches, run_benchmark
from gift.benchmark.methods import read_methods
from gift.benchmark.options import room
from gift.benchmark.plan import describe_plan, plan_benchmark
from gift.benchmark.record import Record
from gift.benchmark.runs import SEARCH_SEED
from gift.benchmark.suites import SUITES
from gift.benchmark.tasks import open_tasks
from gift.cli import main
from tests.benchmark.small import METHODS, small_options


@pytest.fixture
def at_known_speed(monkeypatch):
    """Let training cost 2 ms an image, and a prediction 1 ms."""
    monkeypatch.setattr(module, "measure", lambda run, out: (2.0, 1.0))


def test_the_runs_of_vtab_are_19_times_24_and_19_a_seed(at_known_speed, backbone, tmp_path):
    options = small_options(tmp_path / "out", tmp_path, backbone, suite="vtab1k", folders=(), tasks=None, budget=None)
    plan = plan_benchmark(options)
    assert plan.runs == 2 * (19 * 24 + 19 * 2)
    assert [cost.runs for cost in plan.costs] == [19 * 24 + 19 * 2] * 2


def test_hours_are_those_of_all_images_of_all_runs(at_known_speed, backbone, tmp_path):
    options = small_options(
        tmp_path / "out", tmp_path, backbone, suite="vtab1k", folders=(), tasks=["kitti"], epochs=100
    )
    searched = 2 * (100 * 800 * 2 + 200 * 1)  # milliseconds
    final = 2 * (100 * 1000 * 2 + 711 * 1)
    hours = ((searched + final) / 1000 + 4 * module.SECONDS_PER_RUN) / 3600
    assert [cost.hours for cost in plan_benchmark(options).costs] == pytest.approx([hours, hours])


def test_nothing_is_trained_written_or_drawn(at_known_speed, pictures, backbone, tmp_path):
    out = tmp_path / "out"
    options = small_options(out, pictures, backbone, tasks=["digits", pictures.name])
    assert plan_benchmark(options).runs == 2 * 2 * (2 + 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_runs_that_are_done_are_not_counted_again(pictures, backbone, tmp_path):
    options = small_options(tmp_path / "out", pictures, backbone, methods=METHODS[:1])
    run_benchmark(options)
    plan = plan_benchmark(small_options(tmp_path / "out", pictures, backbone))
    assert (plan.runs, plan.done, [cost.runs for cost in plan.costs]) == (8, 4, [0, 4])
    assert plan.costs[1].train_ms > plan.costs[1].predict_ms > 0
    assert plan.costs[0].hours == 0 < plan.hours


def test_runs_on_drawn_tasks_that_are_done_are_not_counted_again(at_known_speed, backbone, tmp_path):
    options = small_options(tmp_path / "out", tmp_path, backbone, folders=(), tasks=["digits"])
    tasks = open_tasks(options.suite, options.tasks, (), options.data, SEARCH_SEED)
    methods = read_methods(options.methods, SUITES[options.suite].protocol)
    done = planned_searches(options, tasks, methods)[0]
    options.out.mkdir()
    Record(options.out).add(done.described())
    assert plan_benchmark(options).done == 1


def test_the_command_says_how_many_runs_and_hours(pictures, backbone, tmp_path, capsys):
    words = ["--out", str(tmp_path / "out"), "--model", str(backbone), "--folders", str(pictures), "--ray", "none"]
    words += ["--tasks", pictures.name, "--methods", "linear-probe", "lora", "--seeds", "0", "--plan", "true"]
    main(["benchmark", "offline", *words])
    said = capsys.readouterr().out
    assert "30 epochs: 1 tasks x 2 methods x (24 tries + 1 seeds) = 50 runs, 0 of them done" in said
    assert "| LoRA r=8 | 25 |" in said
    assert not (tmp_path / "out").exists()


def test_runs_at_once_divide_the_hours(at_known_speed, backbone, tmp_path):
    options = small_options(tmp_path / "out", tmp_path, backbone, suite="fgvc", folders=(), tasks=None, ray="local")
    plan = plan_benchmark(options)
    assert plan.at_once >= 1
    assert f"about {plan.hours / plan.at_once:.1f} with {plan.at_once} at once" in describe_plan(plan)


@pytest.mark.parametrize(
    ("cores", "accelerators", "cpus", "gpus", "expected"),
    [(8, 0, 1, 0, 8), (8, 0, 3, 0, 2), (8, 2, 1, 1, 2), (8, 2, 1, 0.5, 2), (2, 4, 1, 1, 2), (8, 1, 1, 2, 0)],
)
def test_a_host_has_room_for_as_many_runs_as_its_cores_and_accelerators(cores, accelerators, cpus, gpus, expected):
    assert room(cores, accelerators, cpus, gpus) == expected


def test_a_plan_without_room_for_a_run_is_refused(at_known_speed, backbone, tmp_path):
    given = {"suite": "fgvc", "folders": (), "tasks": None, "ray": "local", "cpus_per_run": 1000}
    with pytest.raises(ValueError, match="has no room for a run of 1000 cores"):
        plan_benchmark(small_options(tmp_path / "out", tmp_path, backbone, **given))
    assert torch.get_num_threads() == 1  # refused before anything is measured


@pytest.mark.slow
def test_a_plan_refuses_what_the_benchmark_would_refuse(at_known_speed, pictures, backbone, tmp_path):
    run_benchmark(small_options(tmp_path / "out", pictures, backbone, methods=METHODS[:1], seeds=(0,), budget=1))
    with pytest.raises(ValueError, match="epochs was 1, now 9"):
        plan_benchmark(small_options(tmp_path / "out", pictures, backbone, methods=METHODS[:1], epochs=9, budget=1))
