"""What `gift benchmark` is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser

from gift.benchmark.methods import DEFAULT_METHODS
from gift.benchmark.runs import SEARCH_SEED
from gift.benchmark.suites import REDUCED, SUITES
from gift.tuner.options import check_choice, check_number

LOCAL, NO_RAY = "local", "none"
FIFO, ASHA = "fifo", "asha"
LISTS = {
    "methods": str,
    "seeds": int,
    "tasks": str,
    "folders": Path,
    "learning_rates": float,
}  # options of several words


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Which methods to compare on which tasks, and how.

    Args:
        suite: `fgvc`, `vtab1k` or `offline`.
        out: Folder of this benchmark and of nothing else.
        data: Folder that holds a folder for every task, as `gift data prepare` makes them; drawn ones are drawn there.
        methods: Each NAME or NAME:OPTION=VALUE,...: `lora:r=4`, `gift-paca:r=8`; names as `gift methods` lists them.
        seeds: Of the final runs: one run, one test, for each.
        tasks: Which tasks; by default all of the suite.
        folders: Further tasks: images in any form that `gift train --data` takes, with test images.
        model: Backbone; by default that of the suite.
        epochs: Passes over the images; by default those of the suite.
        budget: Tries of learning rate and weight decay, the same number for every method; by default all pairs.
        learning_rates: To search, for every method; by default six for each, those of the suite.
        search_only: Whether to stop after the searches, with the best accuracies on validation images: for choosing
            between configurations.
        reduced: Whether to take a first look: 4 epochs and 4 tries, unless they are given.
        plan: Whether to count the runs, measure what they cost and say how long they would take, and stop there.
        ray: Address of a Ray cluster, `auto` for the one that is found; `local` for one of this machine's cores;
            `none` to run one after the other in this process.
        cpus_per_run: Cores, and threads, of each run.
        gpus_per_run: Accelerators of each run, such as 0.5; by default 1 where the cluster has some, else 0.
        keep_weights: Whether to keep what final runs trained; full fine-tuning stores a whole model for each.
        retries: How often a run is started again when its worker has died.
        scheduler: Of the search on Ray: `fifo`, or `asha`, which stops tries that are behind (not the protocol of the
            published tables).
        reference: Method that the table takes differences to; by default `lora` if it is there, else the first.

    Raises:
        ValueError: If an option does not make sense.
    """

    suite: str
    out: Path
    data: Path = Path("data")
    methods: Sequence[str] = DEFAULT_METHODS
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    tasks: Sequence[str] | None = None
    folders: Sequence[Path] = ()
    model: str | None = None
    epochs: int | None = None
    budget: int | None = None
    learning_rates: Sequence[float] | None = None
    search_only: bool = False
    reduced: bool = False
    plan: bool = False
    ray: str = LOCAL
    cpus_per_run: int = 1
    gpus_per_run: float | int | None = None
    keep_weights: bool = True
    retries: int = 3
    scheduler: str = FIFO
    reference: str | None = None

    def __post_init__(self) -> None:
        """Check every option."""
        check_choice("suite", self.suite, tuple(SUITES))
        check_choice("scheduler", self.scheduler, (FIFO, ASHA))
        for name, least in (("cpus_per_run", 1), ("retries", 0)):
            check_number(name, getattr(self, name), smallest=least, whole=True)
        for name in ("epochs", "budget"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), smallest=1, whole=True)
        if self.gpus_per_run is not None:
            check_number("gpus_per_run", self.gpus_per_run, smallest=0)
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(f"reference must be one of the methods {', '.join(self.methods)}, got {self.reference!r}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or SEARCH_SEED in self.seeds or min(self.seeds) < 0:
            raise ValueError(
                f"seeds must be different whole numbers, not {SEARCH_SEED} (the search), got {self.seeds}."
            )
        rates = self.learning_rates
        if rates is not None and (not rates or len(set(rates)) < len(rates) or not 0 < min(rates) <= max(rates) < 1e3):
            raise ValueError(f"learning_rates must be different positive numbers, got {rates}.")
        if self.scheduler == ASHA and self.ray == NO_RAY:
            raise ValueError("The scheduler asha is Ray Tune's: it needs --ray.")

    @property
    def changes(self) -> dict[str, Any]:
        """What is set otherwise than in the suite's protocol."""
        epochs = self.epochs or (REDUCED["epochs"] if self.reduced else None)
        given = {"model": self.model, "epochs": epochs}
        return {key: value for key, value in given.items() if value is not None}

    @property
    def final_seeds(self) -> Sequence[int]:
        """Seeds of the final runs; none if there shall be none."""
        return () if self.search_only else self.seeds

    @property
    def tries(self) -> int | None:
        """How many pairs of learning rate and weight decay each method has; None for all."""
        return self.budget or (REDUCED["budget"] if self.reduced else None)


def room(cores: float | int, accelerators: float | int, cpus_per_run: int, gpus_per_run: float | int) -> int:
    """Return how many runs go on at once on a host, as if each that shares an accelerator had it alone."""
    by_cores = int(cores // cpus_per_run)
    return by_cores if not gpus_per_run else min(by_cores, int(accelerators // max(gpus_per_run, 1)))


def add_benchmark_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the options of `gift benchmark` to a parser; words after those that take several are a list."""
    parser.add_argument("suite", help=_help("suite"))
    parser.add_class_arguments(BenchmarkOptions, as_group=False, skip={"suite", *LISTS})
    for name, kind in LISTS.items():
        default = BenchmarkOptions.__dataclass_fields__[name].default
        parser.add_argument(f"--{name}", nargs="+", type=kind, default=default and list(default), help=_help(name))
    return parser


def _help(option: str) -> str:
    described = docstring_parser.parse(BenchmarkOptions.__doc__ or "").params
    return next(param.description or "" for param in described if param.arg_name == option)
