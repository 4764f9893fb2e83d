"""The runs of a benchmark: which there are, and the line that each leaves in the results."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gift.benchmark.methods import BenchmarkMethod
from gift.benchmark.tasks import VALIDATION_SHARE, BenchmarkTask
from gift.training.options import TrainOptions

SEARCH, TEST = "search", "test"
SEARCH_SEED = 100  # of all searches; no seed of a final run
# What does not decide a result, or is said elsewhere in a line.
_NOT_IN_LINES = ("output_dir", "data", "root", "save_every_epochs", "keep_checkpoints", "resume", "progress")
_NOT_IN_LINES += ("tensorboard", "evaluate_every_epoch", "evaluate_test", "learning_rate", "weight_decay", "seed")

LONGEST_NAME = 100  # of a folder; file systems allow 255

Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        suite: Name of the suite.
        task: What is learned.
        method: By what.
        phase: `search` (trained on the training images, measured on the validation images) or `test` (trained on both,
            measured on the test images, once).
        seed: Of head, adapter and the order of images.
        learning_rate: Peak learning rate, of adapter and head.
        weight_decay: Of matrices.
        search: How the search is done: `tries`, the number of pairs each method has, `pairs_tried`, and `scheduler`.
        changes: Options of `gift train` that were set for the whole benchmark, such as `epochs`.
    """

    suite: str
    task: BenchmarkTask
    method: BenchmarkMethod
    phase: str
    seed: int
    learning_rate: float
    weight_decay: float
    search: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """What tells the run from all others of a benchmark: task, method, phase, and what was tried or the seed."""
        return f"{self.task.name}/{self.method.name}/{self.phase}/{self._tried}"

    @property
    def _tried(self) -> str:
        if self.phase == TEST:
            return f"seed={self.seed}"
        return f"learning_rate={self.learning_rate:g},weight_decay={self.weight_decay:g}"

    def folder(self, out: Path) -> Path:
        """Return the folder that the training leaves."""
        return folder_of({"task": self.task.name, "method": self.method.name, "phase": self.phase, "id": self.id}, out)

    def options(self, out: Path) -> TrainOptions:
        """Return what `gift train` is given."""
        given = {"validation_share": VALIDATION_SHARE, **self.method.options, **self.task.options, **self.changes}
        given |= {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay, "seed": self.seed}
        is_test = self.phase == TEST
        return TrainOptions(
            **given,
            save_every_epochs=max(1, given["epochs"] // 10),  # a checkpoint of a large model takes longer than an epoch
            data=self.task.source,
            output_dir=str(self.folder(out)),
            train_on_validation=is_test,
            evaluate_test=is_test,
            progress=False,
        )

    def described(self) -> Line:
        """Return the part of the line that is known before the run: what it is a run of."""
        config = {key: value for key, value in asdict(self.options(Path())).items() if key not in _NOT_IN_LINES}
        named = {"id": self.id, "suite": self.suite, "task": self.task.name, "method": self.method.name}
        named |= {"title": self.method.title, "phase": self.phase, "seed": self.seed}
        rates = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        sizes = {"model": config["model"], "epochs": config["epochs"]}
        decided_by = {"config": config, "images_digest": self.task.digest, **self.method.made_of}
        return named | rates | sizes | self.search | decided_by


def folder_of(line: Line, out: Path) -> Path:
    """Return the folder that the training of a line leaves in the folder of a benchmark."""
    tried = line["id"].rpartition("/")[2]
    return out / "runs" / _as_file(line["task"]) / _as_file(line["method"]) / line["phase"] / tried


def _as_file(name: str) -> str:
    """Return the name of a task or a method as a folder is called: none leads elsewhere, and no two become one."""
    quoted = quote(name, safe=",=+").replace(".", "%2E") if name.startswith(".") else quote(name, safe=",=+")
    if len(quoted) <= LONGEST_NAME:
        return quoted
    return f"{quoted[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def search_runs(
    suite: str,
    tasks: Sequence[BenchmarkTask],
    methods: Sequence[BenchmarkMethod],
    pairs: dict[str, list[tuple[float, float]]],
    search: dict[str, Any],
    changes: dict[str, Any],
) -> list[Run]:
    """Return the search of every method on every task; `pairs` are the learning rates and decays by method."""
    tried = {name: [list(pair) for pair in of_method] for name, of_method in pairs.items()}
    return [
        Run(
            suite, task, method, SEARCH, SEARCH_SEED, rate, decay, search | {"pairs_tried": tried[method.name]}, changes
        )
        for task in tasks
        for method in methods
        for rate, decay in pairs[method.name]
    ]


def final_runs(searches: Sequence[Run], lines: dict[str, Line], seeds: Sequence[int]) -> list[Run]:
    """Return the runs on all images, one a seed, with what was best on validation images; `lines` are by id.

    Of equal accuracies the smaller loss is better, then the smaller learning rate. A search of which every try
    diverged, or that lacks a line, has no final runs.
    """
    of_search: dict[tuple[str, str], list[Run]] = {}
    for run in searches:
        of_search.setdefault((run.task.name, run.method.name), []).append(run)
    complete = [runs for runs in of_search.values() if all(run.id in lines for run in runs)]
    best = [min(runs, key=lambda run: rank(lines[run.id])) for runs in complete]
    chosen = [run for run in best if lines[run.id]["accuracy"] is not None]
    return [replace(run, phase=TEST, seed=seed) for run in chosen for seed in seeds]


def rank(line: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return the key by which tries are ordered, the best first."""
    if line["accuracy"] is None:
        return 1.0, 0.0, line["learning_rate"]
    return -line["accuracy"], line["loss"], line["learning_rate"]


def is_at_end(rate: float | int, tried: Sequence[float | int]) -> bool:
    """Return whether a learning rate is the lowest or highest that was tried, of several."""
    return len(set(tried)) > 1 and rate in (min(tried), max(tried))
