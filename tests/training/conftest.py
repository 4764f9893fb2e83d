"""What the tests of `gift train` share: pictures and a backbone, made once."""

import pytest
from transformers.utils import logging

from tests.training.pictures import make_backbone, make_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Return a folder of pictures, 8 of each of 3 classes to train and 8 to test, which no test changes."""
    return make_pictures(tmp_path_factory.mktemp("data") / "stripes")


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """Return the folder of a tiny ViT, which no test changes."""
    logging.disable_progress_bar()
    return make_backbone(tmp_path_factory.mktemp("model") / "tiny-vit")
