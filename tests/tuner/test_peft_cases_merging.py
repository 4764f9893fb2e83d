"""PEFT's cases about merging, unloading and converting adapters."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.conversion import save_as_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from tests.models import perturb
from tests.tuner.test_peft_cases_models import (
    KINDS,
    adapt,
    adapt_twice,
    assert_same,
    delete,
    differ,
    every_generator,
    every_kind,
    every_sharing,
    gift_layers,
    make_base,
    make_config,
    run,
    train,
)


def merged_adapters(model):
    return [layer.merged_adapters for layer in gift_layers(model).values()]


def weights(model):
    return {name: layer.weight.detach().clone() for name, layer in gift_layers(model).items()}


# ---- merging ---------------------------------------------------------------------------------------------------------


@every_kind
def test_merging_unmerging_and_unloading_keep_the_output(kind):
    model = adapt(kind)
    before, frozen = run(model, kind), weights(model)

    model.merge_adapter()
    assert_same(run(model, kind), before, 1e-4)
    model.unmerge_adapter()
    assert torch.equal(run(model, kind), before)
    assert all(torch.equal(weight, frozen[name]) for name, weight in weights(model).items())
    merged = model.merge_and_unload()

    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert not hasattr(merged, "peft_config")
    assert_same(run(merged, kind), before, 1e-4)
    assert differ(run(merged, kind), run(make_base(kind), kind))


@every_sharing
@every_generator
def test_every_generator_and_sharing_is_merged(generator, share):
    model = adapt("timm", generator=generator, share=share)
    before = run(model, "timm")

    assert_same(run(model.merge_and_unload(safe_merge=True), "timm"), before, 1e-4)


@every_kind
def test_a_merged_model_can_be_stored(kind, tmp_path):
    merged = adapt(kind).merge_and_unload()
    before = run(merged, kind)

    if hasattr(merged, "save_pretrained"):
        merged.save_pretrained(tmp_path)
        loaded = type(merged).from_pretrained(tmp_path)
    else:
        save_file(merged.state_dict(), tmp_path / "model.safetensors")
        loaded = make_base(kind)
        loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))

    assert torch.equal(run(loaded.eval(), kind), before)
    assert torch.equal(run(pickle.loads(pickle.dumps(merged)), kind), before)


def test_merging_twice_changes_nothing_and_warns():
    model = adapt()
    model.merge_adapter()
    before = weights(model)

    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()

    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_merging_in_train_mode_gives_the_same_weights_every_time():
    models = [copy.deepcopy(adapt("timm").train()) for _ in range(2)]

    for model in models:
        model.merge_adapter()

    states = [model.get_base_model().state_dict() for model in models]
    torch.testing.assert_close(states[0], states[1], atol=0, rtol=0)


@pytest.mark.parametrize(("dtype", "safe_merge"), [(torch.float16, False), (torch.bfloat16, True)])
@every_kind
def test_a_model_that_was_cast_to_half_precision_is_merged(kind, dtype, safe_merge):
    model = adapt(kind).to(dtype)

    merged = model.merge_and_unload(safe_merge=safe_merge)

    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert all(torch.isfinite(parameter).all() for parameter in merged.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_kind
def test_a_broken_adapter_is_not_merged_safely_and_leaves_the_weights_as_they_were(kind, bad):
    model = adapt(kind)
    frozen = weights(model)
    with torch.no_grad():
        for parameter in model.base_model.gift_generators.parameters():
            parameter.fill_(bad)

    for layer in gift_layers(model).values():
        with pytest.raises(ValueError, match="NaN or infinite"):
            layer.merge(safe_merge=True)
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_and_unload(safe_merge=True)

    assert merged_adapters(model) == [[]] * len(frozen)
    assert all(torch.equal(weight, frozen[name]) for name, weight in weights(model).items())


def test_a_bias_that_is_not_finite_is_none_of_the_adapters_business():
    model = adapt()
    layer = model.base_model.model.lin0
    with torch.no_grad():
        layer.base_layer.bias[0] = float("inf")
    before = layer.bias.clone()

    layer.merge(safe_merge=True)

    assert torch.equal(layer.bias, before)


# ---- several adapters ------------------------------------------------------------------------------------------------


@every_kind
def test_of_several_adapters_those_that_are_named_are_merged(kind):
    model = adapt_twice(kind)
    outputs = {"default": run(model, kind)}
    model.set_adapter("other")
    outputs["other"] = run(model, kind)
    model.base_model.set_adapter(["default", "other"])
    outputs["both"] = run(model, kind)
    model.set_adapter("default")

    for name, adapters in {"default": ["default"], "other": ["other"], "both": ["other", "default"]}.items():
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=adapters)
        assert_same(run(merged, kind), outputs[name], 1e-4)
    assert differ(outputs["default"], outputs["other"])
    assert differ(outputs["both"], outputs["other"])


@pytest.mark.parametrize("targets", [["lin0"], ["lin1"]])
def test_adapters_on_the_same_and_on_different_layers_add_up_merged_or_not(targets):
    model = adapt(target_modules=["lin0"])
    model.add_adapter("other", make_config(target_modules=targets))
    perturb(model, "other", std=0.2, seed=3)
    single = run(model)

    model.base_model.set_adapter(["default", "other"])
    both = run(model)
    model.merge_adapter()

    assert differ(single, both)
    assert_same(run(model), both, 1e-4)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model), run(make_base("mlp")))


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@every_kind
def test_merging_one_after_the_other_gives_what_merging_at_once_gives(kind):
    model, sequential = adapt_twice(kind), adapt_twice(kind)
    frozen = weights(model)

    model.merge_adapter(["default", "other"])
    sequential.merge_adapter(["default"])
    sequential.merge_adapter(["other"])

    torch.testing.assert_close(weights(sequential), weights(model), atol=1e-5, rtol=1e-5)
    sequential.unmerge_adapter()
    assert all(torch.equal(weight, frozen[name]) for name, weight in weights(sequential).items())


def test_merging_a_second_adapter_on_top_warns():
    model = adapt_twice()
    model.merge_adapter(["default"])

    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["other"])

    assert merged_adapters(model) == [["default", "other"]] * 2


def test_activating_an_adapter_unmerges_and_warns():
    model = adapt_twice()
    before = run(model)
    model.merge_adapter()

    with pytest.warns(UserWarning, match="Adapter cannot be set when the model is merged. Unmerging"):
        model.set_adapter("default")

    assert merged_adapters(model) == [[], []]
    assert torch.equal(run(model), before)


def test_a_merged_adapter_is_not_deleted_and_stays_as_it_was():
    model = adapt()
    model.merge_adapter()
    before = run(model)

    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        model.delete_adapter("default")

    assert list(model.peft_config) == list(model.base_model.gift_generators) == ["default"]
    assert (merged_adapters(model), torch.equal(run(model), before)) == ([["default"]] * 2, True)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert not model.peft_config


def test_an_adapter_that_is_not_merged_is_deleted_beside_a_merged_one():
    model = adapt_twice()
    model.set_adapter("other")
    before = run(model)
    model.merge_adapter()

    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("other")
    model.delete_adapter("default")

    assert list(model.peft_config) == ["other"]
    assert merged_adapters(model) == [["other"]] * 2
    assert_same(run(model), before, 1e-4)
    model.unmerge_adapter()
    assert torch.equal(run(model), before)
    delete(model, "other")
    assert torch.equal(run(model.base_model), run(make_base("mlp")))


# ---- disabling and unloading -----------------------------------------------------------------------------------------


@every_kind
def test_a_merged_adapter_can_be_disabled(kind):
    model = adapt(kind)
    train(model, kind)
    before = run(model, kind)
    model.merge_adapter()

    with model.disable_adapter():
        disabled = run(model, kind)

    assert torch.equal(disabled, run(make_base(kind), kind))
    assert_same(run(model, kind), before, 1e-4)


@every_kind
def test_unloading_gives_the_backbone_back(kind):
    base = make_base(kind)
    before, names = run(base, kind), list(base.state_dict())
    model = adapt(kind)
    assert differ(run(model, kind), before)

    unloaded = model.unload()

    assert not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
    assert not hasattr(unloaded, "peft_config")
    assert not unloaded._forward_pre_hooks
    assert list(unloaded.state_dict()) == names
    assert torch.equal(run(unloaded, kind), before)


def test_an_unloaded_backbone_can_be_adapted_again():
    base = adapt().unload()

    model = get_peft_model(base, make_config(target_modules=["lin1"])).eval()

    assert model.targeted_module_names == ["lin1"]
    assert torch.equal(run(model), run(make_base("mlp")))


def test_a_copy_of_a_merged_model_can_be_unmerged():
    model = adapt()
    before = run(model)
    model.merge_adapter()

    copied = copy.deepcopy(model)
    copied.unmerge_adapter()

    assert torch.equal(run(copied), before)
    assert merged_adapters(model) == [["default"]] * 2


# ---- converting ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("rank", [4, 0.9999])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "timm"])  # which is adapted in parts, see below
def test_an_adapter_of_rank_four_is_converted_to_lora_without_loss(kind, rank):
    model = adapt(kind)
    before = run(model, kind)

    config, state = convert_to_lora(model, rank=rank)
    lora = get_peft_model(make_base(kind), config).eval()
    result = set_peft_model_state_dict(lora, state)

    assert model.supports_lora_conversion()
    assert result.unexpected_keys == []
    assert not differ(run(lora, kind), before)


def test_an_adapter_on_parts_of_a_layer_is_not_converted_to_lora_whose_targets_are_whole_layers():
    model = adapt("timm")

    assert not model.supports_lora_conversion()
    with pytest.raises((TypeError, ValueError), match="conver"):
        convert_to_lora(model, rank=4)


def test_a_trained_head_is_converted_too():
    model = adapt("vit", modules_to_save=None)
    train(model, "vit")

    config, state = convert_to_lora(model, rank=4)
    lora = get_peft_model(make_base("vit"), config).eval()
    set_peft_model_state_dict(lora, state)

    assert set(config.modules_to_save) == {"classifier"}
    assert not differ(run(lora, "vit"), run(model, "vit"))


def test_a_converted_adapter_is_stored_as_lora(tmp_path):
    model = adapt("llama")

    save_as_lora(tmp_path, model, rank=4)
    loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path)

    assert loaded.peft_config["default"].peft_type.value == "LORA"
    assert not differ(run(loaded, "llama"), run(model, "llama"))


def test_only_an_adapter_that_is_on_all_layers_is_converted():
    model = adapt(target_modules=["lin0"])
    model.add_adapter("other", make_config(target_modules=["lin1"]))

    with pytest.raises(ValueError, match="'default' does not adapt lin1"):
        convert_to_lora(model, rank=4)
