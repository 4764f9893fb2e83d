"""GIFT: fine-tune Transformers with residuals generated from their own frozen weights, and see what was learned.

Importing this package makes GIFT and its baselines known to PEFT, so import it before `PeftModel.from_pretrained`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gift.backbones import SMALL_BACKBONE
from gift.baselines import BASELINES
from gift.tuner.config import GiftConfig
from gift.tuner.layer import GiftLinear
from gift.tuner.model import GiftModel
from gift.tuner.registration import register

if TYPE_CHECKING:
    from gift.explain.clusters import ClusterMaps, explain_images
    from gift.training.arguments import FinetuneOptions
    from gift.training.finetune import finetune

register()
for _method in BASELINES:
    register(_method)

__all__ = [
    "SMALL_BACKBONE",
    "ClusterMaps",
    "FinetuneOptions",
    "GiftConfig",
    "GiftLinear",
    "GiftModel",
    "explain_images",
    "finetune",
]

# What takes seconds to import (the Trainer, matplotlib) and not everyone needs: imported when it is first used.
_LATE = {
    "ClusterMaps": "gift.explain.clusters",
    "explain_images": "gift.explain.clusters",
    "FinetuneOptions": "gift.training.arguments",
    "finetune": "gift.training.finetune",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(_LATE[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
