"""The only file that touches PEFT's global tables: it makes `GIFT` one of PEFT's methods.

PEFT's list of methods is a closed enum. A real member is added to it, as the class statement would have done, and the
rest goes through `register_peft_method`. `tests/tuner/test_registration.py` fails loudly on a PEFT that changed.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "GIFT"
PREFIX = "gift_"


def add_peft_type() -> PeftType:
    """Return `PeftType.GIFT`, added to the enum if it is not there yet."""
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    return member


def register() -> None:
    """Make `GiftConfig` and `GiftModel` known to PEFT; doing it again changes nothing."""
    peft_type = add_peft_type()
    if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    from gift.tuner.config import GiftConfig  # noqa: PLC0415 - the config needs the enum's member
    from gift.tuner.model import GiftModel  # noqa: PLC0415

    register_peft_method(name=NAME.lower(), config_cls=GiftConfig, model_cls=GiftModel, prefix=PREFIX)
