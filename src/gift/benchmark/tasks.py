"""The tasks of a benchmark, found or drawn, and checked before anything is trained."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gift.benchmark.suites import DRAWN_OPTIONS, SUITES, Suite
from gift.data.catalog import TASKS
from gift.data.prepare import prepare_task
from gift.data.splits import SplitOptions, read_splits
from gift.training.train import digests

logger = logging.getLogger(__name__)
VALIDATION_SHARE = 0.2  # of given images that have no validation images; VTAB-1k has 200 of 1000


@dataclass(frozen=True)
class BenchmarkTask:
    """A task of a benchmark.

    Attributes:
        name: As in the catalogue, or the name of a given folder.
        source: Its images, as `gift train --data` takes them.
        train: Number of images that are trained on while options are searched.
        validation: Number of images that options are chosen on; the final runs train on these too.
        test: Number of images that are tested on.
        digest: Of the names and labels of all images; None where they are not at hand.
        options: Of `gift train`, for this task.
    """

    name: str
    source: str
    train: int
    validation: int
    test: int
    digest: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def task_names(suite: Suite, chosen: Sequence[str] | None, folders: Sequence[Path]) -> tuple[list[str], list[Path]]:
    """Return the tasks of a suite that are meant, and the folders beside them.

    Raises:
        ValueError: If there is no such task, two have one name, or nothing is left.
    """
    named = {_name(folder): folder for folder in folders}
    known = [*suite.tasks, *named]
    doubled = sorted({name for name in known if known.count(name) > 1} | ({*suite.tasks} & {*named}))
    if doubled or len(named) < len(folders):
        raise ValueError(f"Two tasks have one name, that of their folder: {', '.join(doubled or map(_name, folders))}.")
    if not all(known):
        raise ValueError(f"A folder without a name cannot be a task: {', '.join(map(str, folders))}.")
    unknown = [name for name in chosen or () if name not in known]
    if unknown or (chosen is not None and not chosen):
        raise ValueError(f"There is no task {unknown[0] if unknown else '(none named)'}: choose of {', '.join(known)}.")
    kept = [name for name in known if chosen is None or name in chosen]
    return [name for name in kept if name not in named], [named[name] for name in kept if name in named]


def open_tasks(suite: str, names: Sequence[str], folders: Sequence[Path], root: Path, seed: int) -> list[BenchmarkTask]:
    """Return tasks whose images are there; drawn ones that are missing are drawn.

    Args:
        suite: Name of the suite.
        names: Its tasks.
        folders: Images beside them, in any form that `gift train --data` takes.
        root: Folder that holds a folder for every task.
        seed: Of the validation images of folders that have none.

    Raises:
        ValueError: If images are missing, or something is wrong with them.
    """
    drawn = SUITES[suite].drawn
    places = {name: root / "offline" / name if name in drawn else root / name for name in names}
    for name, place in places.items():
        if name in drawn and not place.exists():
            _draw(name, place, drawn[name])
    missing = [name for name, place in places.items() if not place.exists()]
    if missing:
        raise ValueError(
            f"{root} lacks {len(missing)} of {len(places)} tasks of {suite}: {', '.join(missing)}. Make each, as in "
            f"`gift data prepare {missing[0]} --from SOURCE --out {places[missing[0]]}`, or name other --tasks."
        )
    options = DRAWN_OPTIONS if drawn else {}
    tasks = [_open(name, str(place), seed, root, options) for name, place in places.items()]
    for task, expected in ((task, drawn[task.name] or TASKS[task.name].test) for task in tasks if drawn):
        if task.test != expected:
            raise ValueError(
                f"{task.source} has {task.test:,} test images, and the suite {suite} has {expected:,}: name another "
                "folder with --data."
            )
    return [*tasks, *(_open(_name(folder), str(folder), seed, root, {}) for folder in folders)]


def _draw(name: str, place: Path, count: int | None) -> None:
    logger.info("Drawing %s into %s", name, place)
    try:
        prepare_task(name, None, place, count)
    except (OSError, ValueError):
        if not place.exists():  # or another benchmark was faster, and what it drew is the same
            raise


def _open(name: str, source: str, seed: int, root: Path, options: Mapping[str, Any]) -> BenchmarkTask:
    splits = read_splits(source, SplitOptions(root=root, validation_share=VALIDATION_SHARE, seed=seed))
    if splits.validation is None or splits.test is None:
        raise ValueError(
            f"{source} has no {'test' if splits.test is None else 'validation'} images: a benchmark needs both."
        )
    digest = hashlib.sha256(json.dumps(digests(splits)).encode()).hexdigest()
    counts = (len(splits.train), len(splits.validation), len(splits.test))
    return BenchmarkTask(name, source, *counts, digest, {"root": str(root), **options})


def tasks_by_catalogue(suite: str, names: Sequence[str]) -> list[BenchmarkTask]:
    """Return tasks with the sizes that the catalogue gives them, whether their images are there or not."""
    rows = [TASKS[name] for name in names]
    drawn = SUITES[suite].drawn
    tests = [drawn.get(row.name) or row.test for row in rows]
    options = DRAWN_OPTIONS if drawn else {}
    return [
        BenchmarkTask(row.name, "", row.train, row.validation, test, options=options)
        for row, test in zip(rows, tests, strict=True)
    ]


def _name(folder: Path) -> str:
    name = Path(folder).name.rpartition(":")[2]  # torchvision:NAME
    return Path(name).stem if Path(name).suffix in (".zip", ".parquet") else name.strip(".")
