"""GIFT is one of PEFT's methods: these tests fail loudly when a PEFT version moves what registration.py relies on."""

import copy
import json
import pickle
import subprocess
import sys

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType

import gift
from gift.tuner.registration import register


def test_this_is_the_version_of_peft_that_was_read():
    assert peft.__version__ == "0.21.2", "read PEFT's tuners_utils.py again, then pin the new version here"


def test_gift_is_a_member_of_the_enum_like_any_other():
    member = PeftType("GIFT")
    assert member is PeftType.GIFT is PeftType["GIFT"]
    assert (member.name, member.value, str(member.value)) == ("GIFT", "GIFT", "GIFT")
    assert member in list(PeftType)
    assert member == "GIFT"
    assert hash(member) == hash("GIFT")
    assert PeftType.LORA is PeftType("LORA")


def test_the_member_survives_json_copy_and_pickle():
    assert json.loads(json.dumps({"peft_type": PeftType.GIFT})) == {"peft_type": "GIFT"}
    assert copy.deepcopy(PeftType.GIFT) is PeftType.GIFT
    assert pickle.loads(pickle.dumps(PeftType.GIFT)) is PeftType.GIFT


def test_peft_finds_config_tuner_and_prefix_by_name():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["GIFT"] is gift.GiftConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["GIFT"] is gift.GiftModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["GIFT"] == "gift_"


def test_registering_again_changes_nothing():
    before = list(PeftType)
    register()
    register()
    assert list(PeftType) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING["GIFT"] is gift.GiftConfig


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (
            BaseTuner,
            "_pre_injection_hook inject_adapter _prepare_adapter_config _check_target_module_exists "
            "_create_and_replace _replace_module delete_adapter _cast_adapter_dtype _unload_and_optionally_merge "
            "_get_adapter_state_dict _remove_adapter_name_from_key "
            "_remap_adapter_state_dict_for_load uses_shared_state",
        ),
        (
            BaseTunerLayer,
            "_get_available_adapters _move_adapter_to_device_of_base_layer supports_lora_conversion merge",
        ),
    ],
)
def test_what_the_tuner_overrides_exists_in_peft(owner, names):
    assert not [name for name in names.split() if not hasattr(owner, name)]


def test_without_import_a_stored_adapter_is_unknown_to_peft():
    code = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m; print('GIFT' in m)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
