"""What `import gift` offers."""

import subprocess
import sys

import pytest

import gift
from gift.training.arguments import FinetuneOptions
from gift.training.finetune import finetune


def test_the_public_names_are_few_and_all_there():
    few = {
        "SMALL_BACKBONE",
        "ClusterMaps",
        "FinetuneOptions",
        "GiftConfig",
        "GiftLinear",
        "GiftModel",
        "explain_images",
    }
    few |= {"finetune"}
    assert set(gift.__all__) == few
    assert gift.finetune is finetune
    assert gift.FinetuneOptions is FinetuneOptions
    assert (gift.SMALL_BACKBONE / "config.json").exists()


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fine_tune'"):
        gift.fine_tune  # noqa: B018


@pytest.mark.slow
def test_the_trainer_is_imported_only_when_it_is_asked_for():
    code = (
        "import sys, gift; first = 'transformers.trainer' in sys.modules; gift.finetune; "
        "print(first, 'transformers.trainer' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
