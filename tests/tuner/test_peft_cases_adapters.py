"""PEFT's cases about several adapters on one model: which are active, trained, deleted; and heads of their own."""

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from gift import GiftConfig
from tests.models import perturb
from tests.tuner.test_peft_cases_models import (
    KINDS,
    LLAMA,
    adapt,
    adapt_twice,
    assert_same,
    delete,
    differ,
    every_kind,
    gift_layers,
    is_trainable,
    make_base,
    make_config,
    normal,
    run,
    train,
    trainable,
)


class Deep(nn.Module):
    """Four linear layers in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(10, 10) for _ in range(4))

    def forward(self, X):
        for layer in self.layers:
            X = torch.tanh(layer(X))
        return X


def adapt_deep(first: GiftConfig, second: GiftConfig):
    """Return a model with the adapters `default` (active) and `other`."""
    torch.manual_seed(0)
    model = get_peft_model(Deep(), first).eval()
    model.add_adapter("other", second)
    return model


def config_for(*layers: int, head: int | None = None) -> GiftConfig:
    names = [f"layers.{layer}" for layer in layers]
    return make_config(target_modules=names, modules_to_save=[] if head is None else [f"layers.{head}"])


def adapters_of(model) -> list[list[str]]:
    """Return the active adapters of every layer of a `Deep` model; None for a layer that is not wrapped."""
    return [getattr(layer, "active_adapters", None) for layer in model.base_model.model.layers]


def trained_heads(model) -> set[str]:
    """Return the adapters whose copies of trained modules require gradients."""
    names = [name.partition("modules_to_save.")[2] for name in trainable(model) if "modules_to_save." in name]
    return {name.partition(".")[0] for name in names}


# ---- active adapters -------------------------------------------------------------------------------------------------


@every_kind
def test_the_active_adapters_are_those_that_were_set(kind):
    model = adapt(kind)
    assert (model.active_adapter, model.active_adapters) == ("default", ["default"])

    model.add_adapter("other", make_config(kind))
    assert (model.active_adapter, model.active_adapters) == ("default", ["default"])
    model.set_adapter("other")
    assert (model.active_adapter, model.active_adapters) == ("other", ["other"])
    model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == model.base_model.active_adapter == ["default", "other"]
    with pytest.raises(ValueError, match="Adapter nobody not found"):
        model.set_adapter("nobody")


@every_kind
def test_each_adapter_gives_its_own_output_whenever_it_is_set(kind):
    model = adapt_twice(kind)
    outputs = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        outputs[adapter] = run(model, kind)

    for adapter in ("default", "other", "other", "default"):
        model.set_adapter(adapter)
        assert torch.equal(run(model, kind), outputs[adapter])
    assert differ(*outputs.values())


@pytest.mark.parametrize("options", [{}, {"modules_to_save": None}, {"target_modules": "all-linear"}])
@pytest.mark.parametrize("kind", ["mlp", "timm", "gpt2"])
def test_one_config_object_may_serve_several_adapters(kind, options, tmp_path):
    config = make_config(kind, **options)
    model = get_peft_model(make_base(kind), config).eval()
    model.add_adapter("other", config)
    perturb(model, "other", std=0.2)
    model.set_adapter("other")

    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(make_base(kind), tmp_path / "other")
    assert torch.equal(run(loaded, kind), run(model, kind))


def test_setting_adapters_on_partly_the_same_layers_reaches_every_layer():
    model = adapt_deep(config_for(0, 1), config_for(1, 2))

    for adapter in ("default", "other", ["other"], ["default"], ["default", "other"]):
        model.base_model.set_adapter(adapter)
        active = [adapter] if isinstance(adapter, str) else adapter
        assert model.base_model.active_adapters == active
        assert adapters_of(model) == [active, active, active, None]


def test_activating_layer_by_layer_adds_the_residuals_too():
    model = adapt_twice()
    model.base_model.set_adapter(["default", "other"])
    both = run(model)
    model.set_adapter("default")

    for layer in gift_layers(model).values():
        layer.set_adapter(["default", "other"])

    assert torch.equal(run(model), both)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["lin0"], ["lin1"]])
def test_the_active_adapter_and_no_other_is_trained(targets):
    model = adapt(target_modules=["lin0"])
    model.add_adapter("other", make_config(target_modules=targets))

    for active in ("default", "default", "other"):
        model.set_adapter(active)
        assert [is_trainable(model, name) for name in ("default", "other")] == [active == "default", active == "other"]
        with model.disable_adapter():
            assert trainable(model) == []
        assert is_trainable(model, active)
        assert trainable(model) == [name for name in trainable(model) if f"gift_generators.{active}." in name]


def test_an_adapter_that_is_set_in_inference_mode_is_not_trained():
    model = adapt(target_modules=["lin0"], modules_to_save=["lin1"])
    model.add_adapter("other", make_config(target_modules=["lin0"], modules_to_save=["lin1"]))

    for active in ("default", "other"):
        model.set_adapter(active, inference_mode=True)
        assert trainable(model) == []
        model.set_adapter(active, inference_mode=False)
        assert (is_trainable(model, active), trained_heads(model)) == (True, {active})


def test_gradients_can_be_asked_for_adapter_by_adapter():
    model = adapt_deep(config_for(0), config_for(0, 1, head=2))
    assert [is_trainable(model, name) for name in ("default", "other")] == [True, False]

    model.set_requires_grad("other")
    assert [is_trainable(model, name) for name in ("default", "other")] == [True, True]
    assert trained_heads(model) == {"other"}
    model.set_requires_grad(["default", "other"], requires_grad=False)
    assert trainable(model) == []


def test_a_trained_head_follows_disabling_and_enabling():
    model = adapt(target_modules=["lin0"], modules_to_save=["lin1"])
    before = trainable(model)
    assert len([name for name in before if name.startswith("base_model.model.lin1.modules_to_save.default.")]) == 2

    model.base_model.disable_adapter_layers()
    assert trainable(model) == []
    model.base_model.enable_adapter_layers()
    assert trainable(model) == before


# ---- heads of their own ----------------------------------------------------------------------------------------------


def test_a_head_of_one_adapter_is_active_with_that_adapter_only():
    model = adapt_deep(config_for(0), config_for(0, head=1))
    assert (adapters_of(model)[:2], trained_heads(model)) == ([["default"], []], set())

    for adapter in ("other", ["other"]):
        model.base_model.set_adapter(adapter)
        assert (adapters_of(model)[:2], trained_heads(model)) == ([["other"], ["other"]], {"other"})
        model.base_model.set_adapter("default")
        assert (adapters_of(model)[:2], trained_heads(model)) == ([["default"], []], set())


@pytest.mark.parametrize("with_head", ["default", "other"])
def test_adapters_with_and_without_a_head_can_be_switched(with_head):
    heads = {name: 1 if name == with_head else None for name in ("default", "other")}
    model = adapt_deep(config_for(0, head=heads["default"]), config_for(0, head=heads["other"]))
    perturb(model, with_head, std=0.2)
    torch.manual_seed(0)
    base = Deep()(normal(6, 10))

    outputs = {}
    for adapter in ("default", "other", "default"):
        model.set_adapter(adapter)
        outputs[adapter] = model(normal(6, 10))

    assert list(model.base_model.model.layers[1].modules_to_save) == [with_head]
    assert differ(outputs[with_head], base)
    assert not differ(outputs["other" if with_head == "default" else "default"], base)


@pytest.mark.parametrize("heads", [(1, 1), (1, 2)])
def test_two_adapters_are_active_together_unless_they_train_the_same_module(heads):
    model = adapt_deep(config_for(0, head=heads[0]), config_for(0, head=heads[1]))

    if heads[0] != heads[1]:
        model.base_model.set_adapter(["default", "other"])
        assert adapters_of(model)[1:3] == [["default"], ["other"]]
        return

    with pytest.raises(ValueError, match="Only one adapter can be set at a time for ModulesToSaveWrapper"):
        model.base_model.set_adapter(["default", "other"])


def test_each_adapter_copies_its_own_modules_only():
    model = get_peft_model(LlamaForCausalLM(LLAMA), make_config("llama", modules_to_save=["embed_tokens"]))

    model.add_adapter("other", make_config("llama", modules_to_save=["lm_head"]))

    wrapped = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    assert {name.rpartition(".")[2]: list(module.modules_to_save) for name, module in wrapped.items()} == {
        "embed_tokens": ["default"],
        "lm_head": ["other"],
    }


def test_with_a_task_type_the_head_of_every_adapter_is_trained():
    configs = [GiftConfig(r=4, num_clusters=6, task_type=TaskType.SEQ_CLS) for _ in range(2)]

    model = get_peft_model(LlamaForSequenceClassification(LLAMA), configs[0])
    model.add_adapter("other", configs[1])

    assert model.modules_to_save == {"classifier", "score"}
    assert set(model.base_model.score.modules_to_save) == {"default", "other"}
    assert trained_heads(model) == {"default"}
    loss = model(**KINDS["llama"].inputs, labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert all(model.get_parameter(name).grad is not None for name in trainable(model))


# ---- deleting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", ["delete_me", "default"])
@every_kind
def test_a_deleted_adapter_is_gone_without_trace(kind, active):
    model = adapt(kind)
    before = run(model, kind)
    model.add_adapter("delete_me", make_config(kind))
    model.set_adapter(active)

    delete(model, "delete_me")

    assert (list(model.peft_config), model.active_adapters) == (["default"], ["default"])
    assert not any("delete_me" in name for name in model.state_dict())
    for layer in gift_layers(model).values():
        tables = [value for value in vars(layer).values() if hasattr(value, "keys")]
        assert not any("delete_me" in table for table in tables)
    source = model.base_model.gift_source
    assert not any("delete_me" in table for table in (source.generators, source.groups, model.base_model.peft_config))
    assert torch.equal(run(model, kind), before)


@every_kind
def test_after_the_last_adapter_the_tuner_computes_what_the_backbone_does(kind):
    model = adapt(kind, modules_to_save=["head"] if kind == "timm" else [])

    model.delete_adapter("default")

    assert (dict(model.peft_config), model.active_adapters) == ({}, [])
    assert not any("gift_" in name for name, _ in model.named_parameters())
    assert torch.equal(run(model.base_model, kind), run(make_base(kind), kind))


def test_after_the_last_adapter_another_can_be_added_and_trained():
    model = adapt()
    model.delete_adapter("default")

    model.add_adapter("other", make_config())
    model.set_adapter("other")
    train(model, steps=5, learning_rate=1.0)

    assert is_trainable(model, "other")
    assert differ(run(model), run(make_base("mlp")))


def test_deleting_the_active_adapter_activates_the_next_one_and_trains_it():
    model = adapt_twice()

    delete(model, "default")

    assert (model.active_adapter, model.active_adapters) == ("other", ["other"])
    assert is_trainable(model, "other")


def test_deleting_one_of_two_active_adapters_leaves_the_other_active():
    model = adapt_twice()
    model.set_adapter("other")
    before = run(model)
    model.base_model.set_adapter(["default", "other"])

    delete(model, "default")

    assert model.active_adapters == ["other"]
    assert torch.equal(run(model), before)


def test_of_three_adapters_the_next_takes_over_an_inactive_goes_unnoticed():
    model = adapt_twice()
    model.add_adapter("third", make_config())

    delete(model, "default")
    assert model.active_adapters == ["other"]
    before = run(model)
    delete(model, "third")

    assert (model.active_adapters, list(model.peft_config)) == (["other"], ["other"])
    assert torch.equal(run(model), before)


def test_deleting_adapters_with_and_without_head_switches_to_the_head_of_the_next():
    model = adapt_deep(config_for(0, head=1), config_for(0))
    model.add_adapter("third", config_for(0, head=1))
    head = model.base_model.model.layers[1]

    for name, heads in {"default": {"third"}, "other": {"third"}, "third": set()}.items():
        delete(model, name)
        assert set(head.modules_to_save) == heads
        assert name not in model.active_adapters

    assert (model.active_adapters, model.modules_to_save) == ([], None)


def test_the_head_of_the_adapter_that_takes_over_is_trained_again():
    model = adapt_deep(config_for(0, head=1), config_for(0))
    model.set_adapter("other")
    assert trained_heads(model) == set()

    delete(model, "other")

    assert model.active_adapters == ["default"]
    assert (trained_heads(model), is_trainable(model, "default")) == ({"default"}, True)


def test_deleting_an_adapter_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="Adapter unknown-adapter does not exist"):
        adapt().delete_adapter("unknown-adapter")


def test_a_deleted_name_can_be_used_again():
    model = adapt_twice()
    model.delete_adapter("other")

    model.add_adapter("other", make_config(generator="linear"))
    model.set_adapter("other")

    assert_same(run(model), run(make_base("mlp")))
    assert is_trainable(model, "other")
