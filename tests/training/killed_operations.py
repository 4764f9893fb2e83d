"""Run `killed_run` in processes that kill themselves at a file operation: `python killed_operations.py FOLDER KILLS`.

Everything is imported once; each attempt is a fork of this process. Printed as JSON: how each of them ended. The
uninterrupted run is in FOLDER/whole, the killed one in FOLDER/killed.
"""

import json
import os
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.training.killed_run import kill_at, train


def attempt(folder, operation=None):
    """Return how a process ended that trains and kills itself before that operation, if any."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    status = 1
    try:
        watch = kill_at(str(folder), operation)
        train(str(folder))
        folder.with_suffix(".count").write_text(str(watch.count))
        status = 0
    finally:
        os._exit(status)


def main(root, kills):
    moments, ends = random.Random(0), [attempt(root / "whole")]
    total = int((root / "whole.count").read_text())
    # Each goes on where the one before was killed, so all of them stay below the operations of a whole run.
    for operation in sorted(moments.randrange(10, total // kills) for _ in range(kills)):
        ends.append(attempt(root / "killed", operation))
    print(json.dumps([*ends, attempt(root / "killed")]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
