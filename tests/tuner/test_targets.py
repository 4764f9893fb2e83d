"""Which layers are adapted, and the errors for names that match nothing, half, or something else."""

import copy

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from gift import GiftConfig
from tests.models import Chain, make_images, make_vit


def adapt(model=None, **options):
    return get_peft_model(make_vit() if model is None else model, GiftConfig(**options))


def targets(model):
    groups = model.base_model.gift_source.groups["default"]
    return {group: [str(target) for target in members] for group, members in groups.items()}


def test_by_default_the_final_projections_of_the_attention_share_one_generator_and_the_head_is_trained():
    model = adapt()
    assert targets(model) == {"all-32": ["blocks.0.attn.proj", "blocks.1.attn.proj"]}
    assert model.peft_config["default"].modules_to_save == ["head"]


def test_an_empty_list_trains_no_head():
    model = adapt(modules_to_save=[])
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "gift_generators" not in name]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers_to_transform": [1]}, {"all-32": ["blocks.1.attn.proj"]}),
        ({"target_modules": r".*attn\.proj"}, {"all-32": ["blocks.0.attn.proj", "blocks.1.attn.proj"]}),
        ({"target_modules": "blocks.1.attn.qkv[k]"}, {"all-32": ["blocks.1.attn.qkv[k]"]}),
        ({"exclude_modules": ["blocks.0.attn.proj"]}, {"all-32": ["blocks.1.attn.proj"]}),
        (
            {"target_modules": ["mlp.fc1", "mlp.fc2"], "layers_to_transform": 0},
            {"all-32": ["blocks.0.mlp.fc1"], "all-128": ["blocks.0.mlp.fc2"]},
        ),
        (
            {"target_modules": ["attn.qkv[v]", "attn.qkv[q]"], "share": "kind", "layers_to_transform": 0},
            {"attn:qkv[q]-32": ["blocks.0.attn.qkv[q]"], "attn:qkv[v]-32": ["blocks.0.attn.qkv[v]"]},
        ),
        (
            {"share": "layer"},
            {
                "blocks:0:attn:proj-32": ["blocks.0.attn.proj"],
                "blocks:1:attn:proj-32": ["blocks.1.attn.proj"],
            },
        ),
        (
            {"target_modules": ["attn.proj", "mlp.fc1"], "generator": "mixer", "layers_to_transform": [0]},
            {"all-32x32": ["blocks.0.attn.proj"], "all-128x32": ["blocks.0.mlp.fc1"]},
        ),
    ],
)
def test_targets_and_the_generators_they_share_are_those_that_were_named(options, expected):
    model = adapt(**options)
    assert targets(model) == expected
    assert set(model.base_model.gift_generators["default"]) == set(expected)


def test_all_linear_adapts_every_linear_layer_but_the_head():
    model = adapt(target_modules="all-linear", exclude_modules=["head"])
    names = [name for members in targets(model).values() for name in members]
    assert len(names) == 2 * 4
    assert not [name for name in names if "head" in name]


TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}


def test_all_linear_leaves_out_heads_of_several_layers():
    model = adapt(RobertaForSequenceClassification(RobertaConfig(**TEXT)), target_modules="all-linear")
    assert model.peft_config["default"].modules_to_save == ["classifier"]
    assert not [name for name in targets(model)["all-16"] if name.startswith("classifier")]
    assert all(p.requires_grad for p in model.base_model.model.classifier.modules_to_save.parameters())


def test_with_a_task_type_all_of_a_familys_head_is_trained():
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**TEXT))
    plain, with_type = (adapt(copy.deepcopy(model), task_type=kind) for kind in (None, "SEQ_CLS"))
    heads = [{name for name, _ in one.named_parameters() if "modules_to_save" in name} for one in (plain, with_type)]
    assert heads[0] == heads[1]
    assert any("pooler" in name for name in heads[0])


def test_a_head_can_be_a_target_itself():
    model = adapt(target_modules=["attn.proj", "head"])
    assert "head" in targets(model)["all-32"]
    assert model.peft_config["default"].modules_to_save == []


def test_many_named_parts_stay_exactly_those_that_were_named():
    model = make_vit(depth=24)
    named = [f"blocks.{index}.attn.qkv[v]" for index in range(22)]
    adapted = adapt(model, target_modules=named)
    assert targets(adapted) == {"all-32": named}
    assert adapted.peft_config["default"].target_modules == set(named)


def test_swin_gets_one_generator_per_input_width():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 1, 1))
    assert set(targets(adapt(model))) == {"all-96", "all-192", "all-384", "all-768"}


def test_an_unknown_model_works_when_targets_are_named():
    model = adapt(Chain(), target_modules=["0"])
    assert targets(model) == {"all-6": ["layers.0"]}


class Holder(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (make_vit, {"target_modules": ["attn.proj", "value"]}, "names 'value', but no module matches it"),
        (make_vit, {"target_modules": ["attn.prj"]}, r"Did you mean one of \['attn.proj'"),
        (make_vit, {"target_modules": []}, "target_modules is empty"),
        (make_vit, {"target_modules": ["proj"]}, "selects patch_embed.proj, a Conv2d"),
        (make_vit, {"target_modules": ["attn"]}, "a Attention: GIFT adapts linear layers"),
        (make_vit, {"target_modules": ["attn.proj"], "layers_to_transform": [0, 7]}, "names block 7, but no target"),
        (
            make_vit,
            {"target_modules": ["blocks.0.attn.proj", "blocks.1.attn.proj"], "layers_to_transform": [0]},
            "names blocks.1.attn.proj in full, which is of none of the blocks",
        ),
        (
            make_vit,
            {"target_modules": ["blocks.0.attn.proj"], "layers_to_transform": [0, 7]},
            "names block 7, but no target",
        ),
        (make_vit, {"target_modules": ["attn.proj"], "exclude_modules": r".*proj"}, "is left out by exclude_modules"),
        (make_vit, {"target_modules": ["head"], "modules_to_save": ["head"]}, "left out by .* modules_to_save"),
        (make_vit, {"target_modules": ["attn.qkv[x]"]}, "part x of blocks.0.attn.qkv .* has the parts q, k, v"),
        (make_vit, {"target_modules": ["mlp.fc1[q]"]}, "part q of blocks.0.mlp.fc1 .* has no known parts"),
        (make_vit, {"target_modules": ["attn.qkv", "attn.qkv[q]"]}, "both as a whole and by its part q"),
        (make_vit, {"modules_to_save": ["classifier"]}, "modules_to_save names .*classifier.*no such modules"),
        (
            make_vit,
            {"modules_to_save": ["haed"], "task_type": "FEATURE_EXTRACTION"},
            "modules_to_save names .*haed.*no such modules",
        ),
        (
            lambda: Holder(layer=nn.Linear(4, 4).to(torch.float8_e4m3fn)),
            {"target_modules": ["layer"]},
            "holds a weight of torch.float8_e4m3fn: GIFT reads weights of 16, 32 and 64 bit",
        ),
        (Chain, {}, r"not of a family[\s\S]*Its linear layers are:\s+layers.N"),
        (
            lambda: Holder(attention=nn.MultiheadAttention(4, 2)),
            {"target_modules": ["out_proj"]},
            "MultiheadAttention reads the weight of attention.out_proj without calling",
        ),
        (
            lambda: timm.create_model("beit_base_patch16_224", depth=1, embed_dim=32, num_heads=2, img_size=32),
            {"target_modules": ["attn.qkv"]},
            "reads the weight of blocks.0.attn.qkv without calling the layer",
        ),
    ],
)
def test_names_that_cannot_be_adapted_are_refused_and_the_model_stays_as_it_was(make, options, message):
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, GiftConfig(**options))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_layers_that_carry_an_adapter_of_another_method_or_model_are_refused():
    lora = get_peft_model(make_vit(), LoraConfig(target_modules=["attn.proj"]))
    with pytest.raises(ValueError, match=r"already carries an adapter .*lora.*cannot be mixed"):
        adapt(lora.base_model.model)
    gift = adapt()
    with pytest.raises(ValueError, match=r"already carries an adapter .*GiftLinear"):
        adapt(gift.base_model.model)
    assert torch.equal(gift.eval()(make_images()), make_vit()(make_images()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": "some"}, "Unknown share 'some': choose one of all, kind, layer"),
        ({"apply": "magic"}, "Unknown apply"),
        ({"generator_dtype": "int8"}, "Unknown generator_dtype"),
        ({"scaling": float("inf")}, "scaling must be a finite number"),
        ({"rank_pattern": {"proj": 4}}, "rank_pattern and alpha_pattern are not supported"),
        ({"target_modules": "proj", "layers_to_transform": [0]}, "needs target_modules as a list"),
        ({"layers_pattern": "blocks"}, "only used together with layers_to_transform"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        GiftConfig(**options)
