"""GIFT: fine-tune Transformers with residuals generated from their own frozen weights, and see what was learned.

Importing this package makes GIFT known to PEFT, so import it before `PeftModel.from_pretrained`.
"""

from typing import TYPE_CHECKING, Any

from gift.backbones import SMALL_BACKBONE
from gift.tuner.config import GiftConfig
from gift.tuner.layer import GiftLinear
from gift.tuner.model import GiftModel
from gift.tuner.registration import register

if TYPE_CHECKING:
    from gift.training.arguments import FinetuneOptions
    from gift.training.finetune import finetune

register()

__all__ = ["SMALL_BACKBONE", "FinetuneOptions", "GiftConfig", "GiftLinear", "GiftModel", "finetune"]


def __getattr__(name: str) -> Any:
    """Import what needs the Trainer when it is first used: that takes seconds, and not everyone needs it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gift.training import arguments, finetune  # noqa: PLC0415

    globals().update(FinetuneOptions=arguments.FinetuneOptions, finetune=finetune.finetune)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
