import pytest

from gift.benchmark.methods import DEFAULT_METHODS, read_methods, resolve_methods
from gift.benchmark.suites import SUITES
from gift.pretrained import SMALL

OFFLINE, VTAB = SUITES["offline"].protocol, SUITES["vtab1k"].protocol


def read(name, protocol=OFFLINE):
    return read_methods([name], protocol)[0]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("lora", "LoRA r=8"),
        ("lora:r=4", "LoRA r=4"),
        ("lora:r=4,lora_alpha=16", "LoRA r=4 lora_alpha=16"),
        ("gift", "GIFT paca r=16 M=96"),
        ("gift-paca:r=8,num_clusters=32", "GIFT paca r=8 M=32"),
        ("gift-linear:r=4", "GIFT linear r=4"),
        ("gift:generator=mlp", "GIFT mlp r=16"),
        ("gift-paca:train.warmup_ratio=0.3", "GIFT paca r=16 M=96 warmup_ratio=0.3"),
        ("vpt-deep:num_prompts=2", "VPT-deep p=2"),
        ("toast-lite", "TOAST-lite, random feedback"),
        ("toast-lite:feedback=runs/upstream/adapter", "TOAST-lite, pre-trained feedback"),
        ("linear-probe", "linear probe"),
        ("ia3", "ia3"),
        ("vera:r=64", "VeRA r=64"),
    ],
)
def test_a_title_says_what_was_trained(name, title):
    assert read(name).title == title


def test_options_are_read_as_yaml_and_reach_the_method_or_the_training():
    method = read("gift-paca:r=8,target_modules=[attn.proj,mlp.fc1],norm=layer,train.warmup_ratio=0.3")
    assert method.options["method_options"] == {
        **{"generator": "paca", "r": 8, "norm": "layer"},
        "target_modules": ["attn.proj", "mlp.fc1"],
    }
    assert (method.options["method"], method.options["warmup_ratio"]) == ("gift", 0.3)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("[attn.qkv[q],attn.qkv[v]],r=8", ["attn.qkv[q]", "attn.qkv[v]"]),
        ("attn.qkv[v],r=8", "attn.qkv[v]"),
        ("[attn.proj],r=8", ["attn.proj"]),
        ("all-linear,r=8", "all-linear"),
    ],
)
def test_targets_may_be_parts_of_fused_layers(text, targets):
    method = read(f"gift-paca:target_modules={text}")
    assert method.options["method_options"] == {"generator": "paca", "target_modules": targets, "r": 8}
    resolve_methods([method], SMALL)


def test_numbers_may_have_an_exponent():
    assert read("lora:train.head_learning_rate=1e-3").options["head_learning_rate"] == 0.001
    assert read("lora:lora_dropout=5E-1").options["method_options"] == {"lora_dropout": 0.5}


def test_an_option_that_is_named_wins_over_that_of_the_suite():
    assert read("lora", VTAB).options["method_options"] == {"lora_alpha": 1}
    assert read("lora:lora_alpha=8", VTAB).options["method_options"] == {"lora_alpha": 8}
    assert read("vpt-deep", VTAB).options["optimizer"] == "sgd"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora:r", "'r' is no option"),
        ("lora:=4", "is no option"),
        ("lora:train.warmup=0.1", "cannot be set for one method: head_learning_rate, warmup_ratio"),
        ("lora:train.learning_rate=0.1", "cannot be set for one method"),
        ("lora:train.epochs=9", "cannot be set for one method"),
        ("lora:train.select_best=true", "cannot be set for one method"),
        ("gift:genrator=mlp", "generator"),
    ],
)
def test_what_cannot_be_read_is_refused(name, message):
    with pytest.raises((ValueError, TypeError), match=message):
        resolve_methods([read(name)], SMALL)


@pytest.mark.parametrize(
    ("name", "message"),
    [("lorra", "Did you mean 'lora'"), ("lora:rank=4", "has no option 'rank'"), ("prefix_tuning", "language models")],
)
def test_a_method_that_cannot_train_is_refused_before_anything_is_trained(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_methods([read(name)], SMALL)


@pytest.mark.parametrize("names", [(), ("lora", "lora")])
def test_methods_are_named_once(names):
    with pytest.raises(ValueError, match="once"):
        read_methods(names, OFFLINE)


def test_the_methods_that_are_compared_by_default_go_with_the_backbone_that_ships():
    resolve_methods(read_methods(DEFAULT_METHODS, OFFLINE), SMALL)
