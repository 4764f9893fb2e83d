"""Run a benchmark in processes that are killed at random moments.

    python tests/benchmark/killed_benchmark.py OUT DATA BACKBONE KILLS [RAY]

Everything is imported once; each attempt is a fork of this process. Printed as JSON: the moments, what was wrong with
the results after a kill, and how many runs were done by then. The uninterrupted benchmark is in OUT/complete, the
other one in OUT/killed.
"""

import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from gift.benchmark.benchmark import run_benchmark
from gift.benchmark.record import FILE
from tests.benchmark.small import small_options

torch.set_num_threads(1)


def start(out, data, backbone, ray):
    """Start a benchmark in a process of its own; return its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run_benchmark(small_options(out, data, backbone, ray=ray, epochs=3, seeds=(0, 1)))
        status = 0
    finally:
        os._exit(status)


def wait(child):
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def read(out):
    """Return the lines of a benchmark as text, by id, and what is wrong with them."""
    path = out / FILE
    if not path.exists():
        return {}, []
    text, found, problems = path.read_text(), {}, []
    if not text.endswith("\n"):
        problems.append(f"half a line: {text[-100:]!r}")
    for line in text.splitlines():
        try:
            name = json.loads(line)["id"]
        except ValueError:
            problems.append(f"no JSON: {line[:100]!r}")
            continue
        if name in found:
            problems.append(f"twice: {name}")
        found[name] = line
    return found, problems


def changed(before, after):
    """Return the ids of lines that are not what they were: a finished run was repeated, or lost."""
    return [name for name, line in before.items() if after.get(name) != line]


def main(folder, data, backbone, kills, ray):
    logging.disable(logging.WARNING)
    started = time.monotonic()
    assert wait(start(folder / "complete", data, backbone, ray)) == 0
    seconds = time.monotonic() - started
    moments, problems, done, before = [], [], [], {}
    rng, out = random.Random(0), folder / "killed"
    while len(moments) < kills:
        # The parts of a benchmark that is not finished: each attempt gets on, and is killed before it is through.
        child, moment = start(out, data, backbone, ray), rng.uniform(0.1, 1) * seconds / kills
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL, "it was over before"
        moments.append(round(moment / seconds, 3))
        after, wrong = read(out)
        problems += wrong + [f"repeated or lost: {name}" for name in changed(before, after)]
        done.append(len(after))
        before = after
    assert wait(start(out, data, backbone, ray)) == 0
    after, wrong = read(out)
    problems += wrong + [f"repeated or lost: {name}" for name in changed(before, after)]
    print(json.dumps({"seconds": seconds, "moments": moments, "problems": problems, "done": done}))


if __name__ == "__main__":
    ray = sys.argv[5] if len(sys.argv) > 5 else "none"
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), ray)
