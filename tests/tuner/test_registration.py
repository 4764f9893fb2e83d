"""Our methods are some of PEFT's: these tests fail loudly when a PEFT version moves what registration.py relies on."""

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
from gift.baselines import BASELINES
from gift.baselines.bitfit import BitFitConfig, BitFitModel
from gift.baselines.toast import ToastConfig, ToastModel
from gift.baselines.vpt import VptConfig, VptModel
from gift.tuner.registration import GIFT, Method, register

METHODS = {
    "GIFT": (gift.GiftConfig, gift.GiftModel),
    "VPT": (VptConfig, VptModel),
    "TOAST": (ToastConfig, ToastModel),
    "BITFIT": (BitFitConfig, BitFitModel),
}


def test_this_is_the_version_of_peft_that_was_read():
    assert peft.__version__ == "0.21.2", "read PEFT's tuners_utils.py again, then pin the new version here"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_member_of_the_enum_like_any_other(name):
    member = PeftType(name)
    assert member is getattr(PeftType, name) is PeftType[name]
    assert (member.name, member.value, str(member.value)) == (name, name, name)
    assert member in list(PeftType)
    assert member == name
    assert hash(member) == hash(name)
    assert PeftType.LORA is PeftType("LORA")


@pytest.mark.parametrize("name", METHODS)
def test_the_member_survives_json_copy_and_pickle(name):
    member = PeftType(name)
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": name}
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member


@pytest.mark.parametrize("name", METHODS)
def test_peft_finds_config_tuner_and_prefix_by_name(name):
    assert (PEFT_TYPE_TO_CONFIG_MAPPING[name], PEFT_TYPE_TO_TUNER_MAPPING[name]) == METHODS[name]
    assert PEFT_TYPE_TO_PREFIX_MAPPING[name] == f"{name.lower()}_"


def test_registering_again_changes_nothing():
    before = list(PeftType)
    for method in (GIFT, *BASELINES):
        register()
        register(method)
    assert list(PeftType) == before
    assert {method.name for method in (GIFT, *BASELINES)} == set(METHODS)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["GIFT"] is gift.GiftConfig


def test_a_name_of_peft_is_never_taken_over():
    before = PEFT_TYPE_TO_CONFIG_MAPPING["LORA"]
    register(Method("LORA", "gift.baselines.vpt", "VptConfig", "VptModel"))
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is before


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (
            BaseTuner,
            "_pre_injection_hook inject_adapter _prepare_adapter_config _check_target_module_exists "
            "_create_and_replace _replace_module delete_adapter _cast_adapter_dtype _unload_and_optionally_merge "
            "_get_adapter_state_dict _remove_adapter_name_from_key "
            "_remap_adapter_state_dict_for_load uses_shared_state "
            "_post_injection_hook _check_new_adapter_config _check_merge_allowed _enable_adapter_layers set_adapter "
            "set_requires_grad",
        ),
        (
            BaseTunerLayer,
            "_get_available_adapters _move_adapter_to_device_of_base_layer supports_lora_conversion merge "
            "frozen_peft_weight_names _get_base_layer_device_and_dtype",
        ),
    ],
)
def test_what_the_tuner_overrides_exists_in_peft(owner, names):
    assert not [name for name in names.split() if not hasattr(owner, name)]


def test_without_import_a_stored_adapter_is_unknown_to_peft():
    code = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m; print('GIFT' in m)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
