"""The only file that touches PEFT's global tables: it makes our methods some of PEFT's.

PEFT's list of methods is a closed enum. A real member is added to it, as the class statement would have done, and the
rest goes through `register_peft_method`. `tests/tuner/test_registration.py` fails loudly on a PEFT that changed.
"""

from dataclasses import dataclass
from importlib import import_module

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method


@dataclass(frozen=True)
class Method:
    """A method to be made known to PEFT.

    Attributes:
        name: What it is called in PEFT's enum, in capital letters.
        module: Module in which its two classes are.
        config: Name of the class of its configuration there.
        model: Name of its tuner there, whose `prefix` is the name in small letters and an underscore.
    """

    name: str
    module: str
    config: str
    model: str


GIFT = Method("GIFT", "gift.tuner.model", "GiftConfig", "GiftModel")


def add_peft_type(name: str) -> PeftType:
    """Return the member of `PeftType` of this name, added to the enum if it is not there yet."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(method: Method = GIFT) -> None:
    """Make a method known to PEFT, by default GIFT; doing it again changes nothing."""
    if add_peft_type(method.name) in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    classes = import_module(method.module)  # only now: they may need the enum's member
    register_peft_method(
        name=method.name.lower(),
        config_cls=getattr(classes, method.config),
        model_cls=getattr(classes, method.model),
        prefix=f"{method.name.lower()}_",
    )
