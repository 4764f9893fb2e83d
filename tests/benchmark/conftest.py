"""Pictures and a backbone, as in the tests of training."""

from tests.training.conftest import backbone, pictures

__all__ = ["backbone", "pictures"]
