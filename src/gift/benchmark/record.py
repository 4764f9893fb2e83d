"""The results of a benchmark: one JSON object a line, one line a run."""

import fcntl
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gift.benchmark.runs import Line, Run
from gift.training.folder import write

FILE = "runs.jsonl"
PROTOCOL = ("suite", "model", "epochs", "tries", "scheduler")  # the same for all lines of a folder
LONGEST_WAIT_S = 120

logger = logging.getLogger(__name__)


def read_lines(results: Path) -> list[Line]:
    """Return the lines of a file, or of `runs.jsonl` in the folder of a benchmark.

    Raises:
        ValueError: If there is no such file, or a line is no result.
    """
    path = results / FILE if results.is_dir() else results
    if not path.is_file():
        raise ValueError(f"There are no results at {results}: name the folder of a benchmark, or its {FILE}.")
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            lines.append(json.loads(text))
            lines[-1]["id"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Line {number} of {path} is no result: {error}. Delete it to have it run again."
            ) from error
    return lines


class Record:
    """The lines of a benchmark that goes on: what is written is never lost, nor ever half a line.

    Args:
        out: Folder of the benchmark.

    Attributes:
        lines: By id of the run.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / FILE
        self.lines: dict[str, Line] = {line["id"]: line for line in read_lines(out)} if self.path.exists() else {}

    def add(self, *lines: Line) -> None:
        """Write lines: the file is replaced by a longer one, which is on the disk by then."""
        self.lines |= {line["id"]: json.loads(json.dumps(line)) for line in lines}
        write(self.path, "".join(f"{json.dumps(one)}\n" for one in self.lines.values()))

    def missing(self, runs: list[Run]) -> list[Run]:
        """Return the runs that have no line yet.

        Raises:
            ValueError: If a run has the line of another one: of other options, or on other images.
        """
        for run in runs:
            _check_same(self.path, run, self.lines.get(run.id))
        methods = {run.method.name: run.described() for run in runs}
        for line in self.lines.values() if runs else ():
            self._check_protocol(line, methods.get(line["method"], runs[0].described()))
        return [run for run in runs if run.id not in self.lines]

    def _check_protocol(self, line: Line, now: Line) -> None:
        differences = [
            f"{name} was {line[name]!r}, now {now[name]!r}"
            for name in PROTOCOL
            if name in line and name in now and line[name] != now[name]
        ]
        tried, trying = (it.get("pairs_tried") for it in (line, now))
        if line["method"] == now["method"] and tried and trying and tried != trying:
            differences.append(f"learning rates and decays tried were {tried}, now {trying}")
        if differences:
            raise ValueError(
                f"{self.path} is of another protocol ({line['id']}): {'; '.join(differences)}. Results of both do not "
                "go into one table: name another folder with --out."
            )


def _check_same(path: Path, run: Run, line: Line | None) -> None:
    if line is None:
        return
    now, then = (_flat(json.loads(json.dumps(it, default=str))) for it in (run.described(), line))
    # Options that came after the line was written have their defaults.
    names = [name for name, value in now.items() if value is not None and name in then and then[name] != value]
    if names:
        differences = "; ".join(f"{name} was {then[name]!r}, now {now[name]!r}" for name in names)
        raise ValueError(f"{path} has {run.id} of other options: {differences}. Name another folder with --out.")


def _flat(line: Line) -> Line:
    """Return a line with the options of training and adapter beside the rest; titles are only words."""
    plain = {key: value for key, value in line.items() if key not in ("config", "adapter", "title")}
    return {**plain, **line["config"], **{f"adapter.{key}": it for key, it in line.get("adapter", {}).items()}}


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep others from running a benchmark in this folder; the lock ends with the process, however that ends.

    Raises:
        ValueError: If another process holds it, or the folder holds something else.
    """
    is_own = (out / ".lock").exists() or (out / FILE).exists()
    if out.exists() and not is_own and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no folder of a benchmark: name another with --out.")
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"A benchmark is running in {out} already: wait for it, or stop it.") from error
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start one benchmark at a time there.", out, error)
        yield


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process does the run of this folder: one whose benchmark was killed may not know it yet.

    Not for ever: some shared disks have no locks, or keep those of a host that is gone.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("a") as file:
        for _ in range(LONGEST_WAIT_S):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(1)
            except OSError:
                break
        yield
