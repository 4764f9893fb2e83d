"""A benchmark that takes seconds: a folder of pictures, a tiny backbone, two methods."""

from pathlib import Path

from gift.benchmark.methods import BenchmarkMethod
from gift.benchmark.options import BenchmarkOptions
from gift.benchmark.runs import SEARCH, SEARCH_SEED, TEST, Run
from gift.benchmark.tasks import BenchmarkTask

METHODS = ("linear-probe", "gift-paca:r=4,num_clusters=6")
# What a line says of the moment and the machine, not of the result.
OF_THE_MOMENT = ("train_seconds", "train_ms_per_image", "inference_ms_per_image", "peak_memory_mb", "date")


def small_options(out: Path, pictures: Path, backbone: Path, **changes) -> BenchmarkOptions:
    given = {"suite": "offline", "out": out, "data": out.with_name("data"), "model": str(backbone), "ray": "none"}
    given |= {"folders": (pictures,), "tasks": (pictures.name,), "methods": METHODS, "seeds": (0, 1)}
    return BenchmarkOptions(**(given | {"epochs": 1, "budget": 2} | changes))


def small_run(phase=SEARCH, seed=SEARCH_SEED, rate=0.01, decay=0.0, task="stripes", method="lora", **options) -> Run:
    of_method = {"model": "small", "epochs": 2, "method": method, "method_options": {}} | options
    one = BenchmarkMethod(method, method, of_method, (0.01,))
    search = {"tries": 4, "scheduler": "fifo"}
    return Run("offline", BenchmarkTask(task, "stripes", 80, 20, 50, "abc"), one, phase, seed, rate, decay, search)


def final_run(seed=0, **changes) -> Run:
    return small_run(TEST, seed, **changes)


def lasting(line: dict) -> dict:
    """Return what of a line another run of the same must give again."""
    return {key: value for key, value in line.items() if key not in OF_THE_MOMENT}
