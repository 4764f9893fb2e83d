"""GIFT: fine-tune Transformers with residuals generated from their own frozen weights.

Importing this package makes GIFT known to PEFT, so import it before `PeftModel.from_pretrained`.
"""

from gift.tuner.config import GiftConfig
from gift.tuner.layer import GiftLinear
from gift.tuner.model import GiftModel
from gift.tuner.registration import register

register()

__all__ = ["GiftConfig", "GiftLinear", "GiftModel"]
