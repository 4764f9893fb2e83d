"""Run `gift train` in processes that are killed at random moments: `python killed_train.py FOLDER DATA BACKBONE KILLS`.

Everything is imported once; each attempt is a fork of this process. Printed as JSON: the moments, and what was found
half-written after a kill. The uninterrupted run is in FOLDER/complete, the killed ones in FOLDER/killed-N.
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
import yaml
from PIL import Image
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[2]))
from gift.training.options import TrainOptions
from gift.training.train import train

torch.set_num_threads(1)


def start(out, data, backbone):
    """Start a run in a process of its own; return its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        options = {"epochs": 6, "batch_size": 6, "learning_rate": 0.01, "progress": False, "select_best": True}
        options |= {"ema": 0.9, "mixup": 0.2, "method_options": {"r": 4, "num_clusters": 6}}
        train(TrainOptions(data=data, model=backbone, output_dir=out, **options))
        status = 0
    finally:
        os._exit(status)


def half_written(folder):
    """Return the files below a folder that do not read as a whole, but for what is marked as unfinished."""
    found = []
    for path in folder.rglob("*"):
        unfinished = any(part.endswith(".partial") for part in path.parts)
        checkpoint = next((parent for parent in path.parents if parent.name.startswith("checkpoint-")), None)
        if unfinished or not path.is_file() or (checkpoint is not None and not (checkpoint / "complete.json").exists()):
            continue
        try:
            read(path)
        except Exception as error:
            found.append(f"{path}: {error!r}")
    return found


def read(path):
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".jsonl":
        [json.loads(line) for line in path.read_text().splitlines()]
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - no mapping
    elif path.suffix in (".pt", ".pth"):
        torch.load(path, weights_only=False)  # of this test's own run: states of random generators
    elif path.suffix == ".yaml":
        yaml.safe_load(path.read_text())
    elif path.suffix == ".png":
        Image.open(path).load()


def wait(child):
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def main(folder, data, backbone, kills):
    logging.disable(logging.WARNING)
    started = time.monotonic()
    assert wait(start(str(folder / "complete"), data, backbone)) == 0
    seconds = time.monotonic() - started
    moments, problems, runs = [], [], 0
    rng = random.Random(0)
    while len(moments) < kills:
        out = folder / f"killed-{runs}"
        child, moment = start(str(out), data, backbone), rng.uniform(0, seconds)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        if wait(child) == -signal.SIGKILL:
            moments.append(round(moment / seconds, 3))
            problems += half_written(out)
        else:  # it was over before
            runs += 1
    for number in range(runs + 1):
        assert wait(start(str(folder / f"killed-{number}"), data, backbone)) == 0
    print(json.dumps({"seconds": seconds, "moments": moments, "problems": problems, "runs": runs + 1}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
