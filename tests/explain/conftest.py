"""What the tests of what people look at share: runs of `gift train` on striped pictures, made once."""

import shutil

import pytest

from gift.data.pictures import picture_files, read_pictures
from gift.explain.viewer import Viewer
from gift.training.options import TrainOptions
from gift.training.train import train
from tests.training.pictures import make_backbone, make_pictures

GENERATOR = {"r": 4, "num_clusters": 6, "norm": "layer", "assignment": "softmax", "assignment_gain": 16}


@pytest.fixture(scope="session")
def striped(tmp_path_factory):
    """Return a folder of pictures, 8 of each of 3 classes to train and 8 to test, which no test changes."""
    return make_pictures(tmp_path_factory.mktemp("data") / "stripes")


@pytest.fixture(scope="session")
def trained(striped, tmp_path_factory):
    """Return two runs of different seeds, which no test changes."""
    folder = tmp_path_factory.mktemp("runs")
    backbone = str(make_backbone(folder / "tiny-vit"))
    for seed in (0, 1):
        given = {"data": str(striped), "model": backbone, "output_dir": str(folder / f"seed-{seed}"), "seed": seed}
        given |= {"epochs": 2, "batch_size": 8, "learning_rate": 0.02, "resize": "squash", "progress": False}
        train(TrainOptions(**given, method_options=GENERATOR))
    return folder / "seed-0", folder / "seed-1"


@pytest.fixture
def run(trained, tmp_path):
    """Return a run of a test's own, in which it may name clusters."""
    return shutil.copytree(trained[0], tmp_path / "run")


@pytest.fixture(scope="session")
def viewer(trained):
    """Return a viewer of a run, whose folder no test changes."""
    return Viewer.load(trained[0])


@pytest.fixture(scope="session")
def pictures(striped, viewer):
    """Return the test pictures as the viewer takes them."""
    found, problems = read_pictures(picture_files([striped / "test"]), viewer.geometry)
    assert not problems
    return found
