"""No network, one thread and the same random numbers for every test."""

import gc
import os

# Read once, when the libraries are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="all kills, damaged files, generators of slow tests")


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what is imported by now, which took it 0.4 s, twice in every training."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else some libraries say at the end that they leak


@pytest.fixture(scope="session")
def repetitions(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """Return a function that chooses between few repetitions and all of them, which `--thorough` takes."""
    return lambda few, thorough: thorough if request.config.getoption("--thorough") else few


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.set_num_threads(1)  # of a benchmark's run there may be more
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
