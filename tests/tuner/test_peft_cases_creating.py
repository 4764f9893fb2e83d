"""PEFT's cases about creating an adapter: names, targets, gradients, status; and what stays when creating fails."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_layer_status, get_model_status, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, inspect_matched_modules
from torch import nn

from gift import GiftConfig, GiftModel
from tests.tuner.test_peft_cases_models import (
    KINDS,
    Embedded,
    TwoLayers,
    adapt,
    adapt_twice,
    assert_same,
    delete,
    differ,
    every_kind,
    gift_layers,
    make_base,
    make_config,
    normal,
    perturb,
    run,
    train,
    trainable,
)

GENERATORS = "base_model.gift_generators.default."


@every_kind
def test_a_wrapped_model_has_the_methods_of_a_peft_model(kind):
    model = adapt(kind)

    assert isinstance(model, PeftModel)
    assert isinstance(model.base_model, GiftModel)
    assert model.peft_config["default"].peft_type.value == "GIFT"
    assert all(hasattr(model, name) for name in ("save_pretrained", "from_pretrained", "push_to_hub", "unload"))


@every_kind
def test_the_generators_and_nothing_else_require_gradients(kind):
    model = adapt(kind)

    names = trainable(model)

    assert names == [name for name, _ in model.named_parameters() if name.startswith(GENERATORS)]
    assert model.get_nb_trainable_parameters()[0] == sum(
        parameter.numel() for parameter in model.base_model.gift_generators.parameters()
    )


@every_kind
def test_the_adapters_name_stands_exactly_once_in_the_names_of_its_parameters(kind):
    model = adapt(kind, adapter="test-adapter")

    named = [name for name, _ in model.named_parameters() if "test-adapter" in name]

    assert named == trainable(model)
    assert all(name.split(".").count("test-adapter") == 1 for name in named)
    assert all(name.startswith("base_model.gift_generators.test-adapter.") for name in named)


@pytest.mark.parametrize("name", ["adapter", "other-name", "default2"])
def test_the_name_of_the_adapter_makes_no_difference(name):
    default, other = adapt(), adapt(adapter=name)

    states = default.state_dict(), other.state_dict()

    assert [key.replace("default", name) for key in states[0]] == list(states[1])
    assert all(torch.equal(*pair) for pair in zip(states[0].values(), states[1].values(), strict=True))
    assert torch.equal(run(default), run(other))


@every_kind
def test_a_layer_shows_the_features_weight_and_bias_of_the_layer_it_wraps(kind):
    model = adapt(kind)

    for layer in gift_layers(model).values():
        rows, columns = layer.frozen_weight().shape
        assert (layer.out_features, layer.in_features) == (rows, columns)
        assert layer.weight is layer.base_layer.weight
        assert layer.bias is layer.base_layer.bias


def test_the_repr_names_the_method_and_the_wrapped_layer():
    model = adapt("conv1d")

    assert repr(model.base_model.model.lin0).startswith("gift.GiftLinear(")
    assert "in_features=20, out_features=4" in repr(model.base_model.model.lin0)
    assert "Conv1D(nf=4, nx=6)" in repr(model.base_model.model.conv1d)
    assert "WeightGenerator" in str(model)


def test_the_tuner_can_be_made_without_a_peft_model():
    tuner = GiftModel(make_base("mlp"), make_config(), "default").eval()

    perturb(tuner)

    assert differ(run(tuner), run(make_base("mlp")))


def test_a_config_in_inference_mode_gives_an_adapter_that_is_not_trained():
    assert trainable(adapt(inference_mode=True)) == []


def test_the_revision_of_the_backbone_is_kept_in_the_config():
    config = make_config()

    get_peft_model(make_base("mlp"), config, revision="abc")

    assert config.revision == "abc"


# ---- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "conv1d", "llama", "gpt2"])
def test_all_linear_adapts_every_linear_layer_but_the_output_embedding_also_the_second_time(kind):
    model = adapt(kind, target_modules="all-linear")
    first = set(model.targeted_module_names)

    model.add_adapter("other", make_config(kind, target_modules="all-linear"))

    linear = {name for name, module in make_base(kind).named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    assert first == linear - {"lm_head"}
    assert all(set(layer.gift_parts) == {"default", "other"} for layer in gift_layers(model).values())
    assert torch.isfinite(run(model, kind)).all()


@pytest.mark.parametrize("kind", ["timm", "vit"])
def test_all_linear_leaves_the_head_to_be_trained_as_a_whole_and_the_adapter_can_be_stored(kind, tmp_path):
    model = get_peft_model(make_base(kind), GiftConfig(target_modules="all-linear", r=4))

    model.save_pretrained(tmp_path)

    head = {"timm": "head", "vit": "classifier"}[kind]
    assert head not in model.targeted_module_names
    assert any(f"{head}.modules_to_save.default" in name for name in trainable(model))
    assert_same(run(PeftModel.from_pretrained(make_base(kind), tmp_path), kind), run(model.eval(), kind))


@pytest.mark.parametrize("options", [{"exclude_modules": ["lin1"]}, {"modules_to_save": ["lin1"]}])
def test_all_linear_leaves_out_what_is_excluded_or_saved_as_a_whole(options, tmp_path):
    model = adapt(target_modules="all-linear", **options)

    model.save_pretrained(tmp_path)

    assert model.targeted_module_names == ["lin0"]
    assert_same(run(PeftModel.from_pretrained(make_base("mlp"), tmp_path)), run(model))


@pytest.mark.parametrize("exclude", [["layers.1.self_attn.o_proj"], r".*\.1\..*"])
def test_excluding_some_of_the_targets_gives_no_warning(exclude):
    model = adapt("llama", target_modules=["o_proj"], exclude_modules=exclude)

    assert model.targeted_module_names == ["model.layers.0.self_attn.o_proj"]


def test_an_exclusion_that_excludes_nothing_warns():
    with pytest.warns(UserWarning, match="no modules were excluded"):
        adapt(exclude_modules=["nothing"])


@pytest.mark.parametrize("kind", ["timm", "llama", "gpt2"])
@pytest.mark.parametrize("block", [0, 1])
def test_layers_to_transform_adapts_the_given_blocks_only(kind, block):
    model = adapt(kind, layers_to_transform=[block])

    names = model.targeted_module_names

    assert len(names) == KINDS[kind].layers // 2
    assert all(f".{block}." in name for name in names)


@pytest.mark.parametrize("targets", [["nothing"], ["lin0", "nothing"], r".*\.nothing", []])
def test_targets_that_match_nothing_are_an_error(targets):
    with pytest.raises(ValueError, match="target_modules"):
        adapt(target_modules=targets)


@pytest.mark.parametrize("build", [TwoLayers, Embedded])
def test_a_model_of_an_unknown_family_needs_targets_and_the_error_lists_its_layers(build):
    with pytest.raises(ValueError, match=r"Name the layers to adapt in target_modules[\s\S]*lin0"):
        get_peft_model(build(), GiftConfig())


def test_peft_can_say_which_layers_each_adapter_matched():
    model = adapt(target_modules=["lin0"])
    model.add_adapter("other", make_config(target_modules=["lin1"]))

    assert inspect_matched_modules(model.base_model, "other")["matched"] == ["lin1"]
    assert inspect_matched_modules(model.base_model, "default")["matched"] == ["lin0"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_targeting_an_output_embedding_that_is_tied_to_the_input_warns():
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        adapt("gpt2", target_modules=["lm_head"])


@pytest.mark.parametrize("option", ["bias", "target_parameters", "trainable_token_indices", "lora_alpha", "nonsense"])
def test_an_option_that_gift_does_not_have_is_refused(option):
    with pytest.raises(TypeError, match=option):
        GiftConfig(**{option: "all"})


# ---- names of modules and of adapters --------------------------------------------------------------------------------


class Nested(nn.Module):
    """Two linear layers inside a module of any name, and one after it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = name
        self.add_module(name, TwoLayers())
        self.lin = nn.Linear(4, 3)

    def forward(self, X):
        return self.lin(getattr(self, self.inner)(X))


@pytest.mark.parametrize("name", ["default", "gift_block", "gift_generators", "base_layer", "modules_to_save", "model"])
def test_a_module_may_be_called_like_the_adapter_or_like_a_part_of_peft(name, tmp_path):
    model = get_peft_model(Nested(name), make_config(target_modules=["lin0", "lin"], modules_to_save=["lin1"])).eval()
    perturb(model)
    frozen = {key: value.clone() for key, value in model.named_parameters() if not value.requires_grad}

    train(model)
    model.save_pretrained(tmp_path)

    assert len(frozen) == 6
    assert all(torch.equal(model.get_parameter(key), value) for key, value in frozen.items())
    assert_same(run(PeftModel.from_pretrained(Nested(name), tmp_path)), run(model))


def test_deleting_an_adapter_reaches_layers_inside_a_module_that_is_called_like_the_prefix():
    config = make_config(target_modules=["lin0", "lin"])
    model = perturb(get_peft_model(Nested("gift_block"), config).eval(), std=0.2)
    before = run(model)
    model.add_adapter("other", make_config(target_modules=["lin0", "lin"]))
    model.set_adapter("other")

    delete(model, "other")

    assert model.active_adapters == ["default"]
    assert all(layer.active_adapters == ["default"] for layer in gift_layers(model).values())
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("name", ["gift", "ift", "_"])
def test_an_adapter_whose_name_is_contained_in_the_prefix_warns_but_is_stored_and_loaded(name, tmp_path):
    with pytest.warns(UserWarning, match="should not be contained in the prefix"):
        model = adapt(adapter=name)

    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(make_base("mlp"), tmp_path / name)
    assert_same(run(loaded), run(model))


@pytest.mark.parametrize("name", ["test-adapter", "with space", "ümläut", "1", "a/b", "UPPER_case-1"])
def test_an_adapters_name_may_hold_special_characters(name, tmp_path):
    model = adapt(adapter=name)

    model.save_pretrained(tmp_path)

    assert_same(run(PeftModel.from_pretrained(make_base("mlp"), tmp_path / name)), run(model))


# ---- status ----------------------------------------------------------------------------------------------------------


@every_kind
def test_the_status_names_layers_type_and_adapters(kind):
    model = adapt_twice(kind)

    layers, status = model.get_layer_status(), model.get_model_status()

    assert [layer.name for layer in layers] == [f"model.{name}" for name in model.targeted_module_names]
    assert {layer.module_type for layer in layers} == {"gift.GiftLinear"}
    assert (status.base_model_type, status.adapter_model_type) == (type(make_base(kind)).__name__, "GiftModel")
    assert status.peft_types == {"default": "GIFT", "other": "GIFT"}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.available_adapters == ["default", "other"]
    assert status.num_adapter_layers == KINDS[kind].layers
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()


def test_the_status_says_which_adapters_are_trained_and_where_they_lie():
    model = adapt_twice()

    status = get_model_status(model)

    assert status.requires_grad == {"default": True, "other": False}
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert all(layer.requires_grad == status.requires_grad for layer in get_layer_status(model))


def test_the_status_follows_merging_disabling_and_activating():
    model = adapt_twice()

    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    model.unmerge_adapter()
    model.base_model.set_adapter(["default", "other"])
    assert model.get_model_status().active_adapters == ["default", "other"]
    model.base_model.disable_adapter_layers()
    assert model.get_model_status().enabled is False


def test_the_status_calls_layers_that_disagree_irregular():
    model = adapt_twice()
    layer = next(iter(gift_layers(model).values()))

    layer.enable_adapters(False)
    layer.set_adapter("other")

    status = model.get_model_status()
    assert (status.enabled, status.active_adapters) == ("irregular", "irregular")


# ---- when creating fails ---------------------------------------------------------------------------------------------


def test_a_failed_creation_leaves_the_backbone_as_it_was():
    base = make_base("mlp")

    with pytest.raises(ValueError, match="nothing"):
        get_peft_model(base, make_config(target_modules=["lin0", "nothing"]))

    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    assert not hasattr(base, "peft_config")
    assert not base._forward_hooks
    assert len(trainable(base)) == 4


def test_a_failed_addition_leaves_the_other_adapter_as_it_was():
    model = adapt()
    before, names = run(model), trainable(model)

    with pytest.raises(ValueError, match="nothing"):
        model.add_adapter("other", make_config(target_modules=["nothing"]))

    assert list(model.peft_config) == list(model.base_model.gift_generators) == ["default"]
    assert (trainable(model), model.active_adapters) == (names, ["default"])
    assert torch.equal(run(model), before)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_wrapping_a_wrapped_model_again_is_refused_and_leaves_it_as_it_was():
    base, config = make_base("mlp"), make_config()
    model = perturb(get_peft_model(base, config).eval())
    before = run(model)

    with pytest.raises(ValueError, match=r"already carries an adapter .*GiftLinear"):
        get_peft_model(base, make_config(r=2))

    assert model.peft_config["default"] is config
    assert torch.equal(run(model), before)


def test_an_adapter_of_another_method_cannot_be_added():
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        adapt().add_adapter("other", LoraConfig(target_modules=["lin0"]))


def test_an_adapters_name_can_be_given_only_once():
    model = adapt()
    config, before = model.peft_config["default"], run(model)

    with pytest.raises(ValueError, match="Adapter with name 'default' already exists"):
        model.add_adapter("default", make_config(r=2))

    assert model.peft_config["default"] is config
    assert torch.equal(run(model), before)


def test_inputs_of_any_leading_shape_are_accepted():
    model, base = adapt(), make_base("mlp")

    for shape in [(10,), (0, 10), (1, 10), (2, 3, 10), (2, 1, 3, 10)]:
        assert model(normal(*shape)).shape == base(normal(*shape)).shape
