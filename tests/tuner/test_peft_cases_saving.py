"""PEFT's cases about storing and loading adapters."""

import json

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import check_if_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from gift import GiftConfig
from tests.models import perturb
from tests.tuner.test_peft_cases_models import (
    adapt,
    adapt_twice,
    assert_same,
    differ,
    every_generator,
    every_kind,
    every_sharing,
    make_base,
    make_config,
    normal,
    run,
    train,
    trainable,
)

WEIGHTS = "adapter_model.safetensors"


def load(path, kind="mlp", **options) -> PeftModel:
    return PeftModel.from_pretrained(make_base(kind), path, **options)


@pytest.mark.parametrize("safe_serialization", [True, False])
@every_kind
def test_a_trained_adapter_is_stored_and_loaded_with_the_same_tensors_and_outputs(kind, safe_serialization, tmp_path):
    model = adapt(kind)
    train(model, kind)

    model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    loaded = load(tmp_path, kind)

    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        WEIGHTS if safe_serialization else "adapter_model.bin",
        "README.md",
    }
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    assert torch.equal(run(loaded, kind), run(model, kind))


@every_sharing
@every_generator
def test_every_generator_and_sharing_is_stored_and_loaded(generator, share, tmp_path):
    model = adapt("timm", generator=generator, share=share)

    model.save_pretrained(tmp_path)

    assert torch.equal(run(load(tmp_path, "timm"), "timm"), run(model, "timm"))


@pytest.mark.parametrize(("kind", "head"), [("mlp", ["lin1"]), ("timm", None), ("vit", None), ("llama", ["lm_head"])])
def test_a_trained_head_is_stored_and_loaded(kind, head, tmp_path):
    options = {"modules_to_save": head} | ({"target_modules": ["lin0"]} if kind == "mlp" else {})
    model = adapt(kind, **options)
    train(model, kind)

    model.save_pretrained(tmp_path)

    assert differ(run(model, kind), run(make_base(kind), kind))
    assert torch.equal(run(load(tmp_path, kind), kind), run(model, kind))


@every_kind
def test_the_stored_names_have_the_prefix_of_peft_and_no_adapters_name(kind):
    state = get_peft_model_state_dict(adapt(kind, adapter="some-name"), adapter_name="some-name")

    assert len(state) > 0
    assert all(key.startswith("base_model.gift_generators.") for key in state)
    assert not any("some-name" in key for key in state)


def test_a_state_dict_can_be_set_under_another_name():
    source = adapt(adapter="source")
    model = adapt(adapter="target", perturbed=False)

    result = set_peft_model_state_dict(model, get_peft_model_state_dict(source, adapter_name="source"), "target")

    assert result.unexpected_keys == []
    assert torch.equal(run(model), run(source))


# ---- several adapters ------------------------------------------------------------------------------------------------


@every_kind
def test_all_adapters_are_stored_apart_and_loaded_again(kind, tmp_path):
    model = adapt_twice(kind)

    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, kind)
    result = loaded.load_adapter(tmp_path / "other", "other")

    assert (result.missing_keys, loaded.active_adapters) == ([], ["default"])
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for adapter in ("other", "default"):
        model.set_adapter(adapter)
        loaded.set_adapter(adapter)
        assert torch.equal(run(loaded, kind), run(model, kind))


def test_only_the_selected_adapters_are_stored(tmp_path):
    adapt_twice().save_pretrained(tmp_path, selected_adapters=["default"])

    assert not (tmp_path / "other").exists()
    assert list(load(tmp_path).peft_config) == ["default"]
    with pytest.raises(ValueError, match="selected_adapters"):
        adapt().save_pretrained(tmp_path, selected_adapters=["nobody"])


def test_adapters_whose_names_contain_each_other_are_not_mixed_up_in_a_file(tmp_path):
    model = adapt()
    expected = get_peft_model_state_dict(model).keys()
    for name in ("default2", "other_default", "foodefault_bar", "efaul"):
        model.add_adapter(name, make_config())

    model.save_pretrained(tmp_path, selected_adapters=["default"])

    assert load_file(tmp_path / WEIGHTS).keys() == expected


def test_several_copies_of_one_stored_adapter_can_be_loaded(tmp_path):
    model = adapt()
    model.save_pretrained(tmp_path)

    loaded = load(tmp_path)
    results = [loaded.load_adapter(tmp_path, name) for name in ("other", "yet-another")]

    assert all(result.missing_keys == [] for result in results)
    for name in ("other", "yet-another"):
        loaded.set_adapter(name)
        assert torch.equal(run(loaded), run(model))


def test_loading_under_the_name_of_an_adapter_replaces_its_weights(tmp_path):
    source, model = adapt(), adapt(perturbed=False)
    source.save_pretrained(tmp_path)

    model.load_adapter(tmp_path, "default")

    assert list(model.peft_config) == ["default"]
    assert torch.equal(run(model), run(source))


def test_an_adapter_can_be_loaded_from_a_subfolder(tmp_path):
    model = adapt_twice()
    model.save_pretrained(tmp_path)
    model.set_adapter("other")

    loaded = load(tmp_path, subfolder="other")

    assert torch.equal(run(loaded), run(model))


# ---- how it is loaded ------------------------------------------------------------------------------------------------


@every_kind
def test_loading_with_little_memory_leaves_nothing_on_the_meta_device(kind, tmp_path):
    model = adapt(kind)
    model.save_pretrained(tmp_path)

    loaded = load(tmp_path, kind, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    loaded.set_adapter("other")

    assert {tensor.device.type for tensor in [*loaded.parameters(), *loaded.buffers()]} == {"cpu"}
    assert torch.equal(run(loaded, kind), run(model, kind))


def test_an_adapter_added_with_little_memory_waits_on_the_meta_device():
    model = adapt()

    model.add_adapter("other", make_config(), low_cpu_mem_usage=True)

    assert {p.device.type for p in model.base_model.gift_generators["other"].parameters()} == {"meta"}
    assert {p.device.type for n, p in model.named_parameters() if ".other." not in n} == {"cpu"}


def test_a_given_config_is_used_as_it_is(tmp_path):
    model, config = adapt(), make_config()
    model.save_pretrained(tmp_path)

    loaded = load(tmp_path, config=config, is_trainable=False)

    assert loaded.peft_config["default"] is config
    assert config.inference_mode
    assert torch.equal(run(loaded), run(model))


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("head", [[], ["lin1"]])
def test_loaded_adapters_are_trained_only_where_asked(is_trainable, head, tmp_path):
    adapt(target_modules=["lin0"], modules_to_save=head).save_pretrained(tmp_path)

    model = load(tmp_path, is_trainable=is_trainable)
    model.load_adapter(tmp_path, "other", is_trainable=is_trainable)
    model.load_adapter(tmp_path, "opposite", is_trainable=not is_trainable)
    model.add_adapter("added", make_config(target_modules=["lin0"], modules_to_save=head))

    expected = ("default", "other") if is_trainable else ("opposite",)
    named = [name for name, _ in model.named_parameters() if any(f".{adapter}." in name for adapter in expected)]
    assert trainable(model) == named


def test_loading_an_adapter_leaves_all_others_trained_as_they_were(tmp_path):
    adapt().save_pretrained(tmp_path)
    model = adapt()
    model.base_model.model.lin0.base_layer.weight.requires_grad_(True)
    model.base_model.gift_generators["default"]["all-10"].recover.requires_grad_(False)
    before = trainable(model)

    model.load_adapter(tmp_path, "other", is_trainable=False)

    assert trainable(model) == before


def test_a_key_mapping_is_applied_to_the_head_and_leaves_the_generators_alone(tmp_path):
    model = adapt("mlp", target_modules=["lin0"], modules_to_save=["lin1"])
    model.save_pretrained(tmp_path)
    base = make_base("mlp")
    base.renamed = base.lin1
    del base.lin1
    base.forward = lambda X: base.renamed(base.act(base.lin0(X)))
    config = make_config(target_modules=["lin0"], modules_to_save=["renamed"])

    loaded = PeftModel.from_pretrained(base, tmp_path, config=config, key_mapping={"^lin1": "renamed"})

    assert torch.equal(run(loaded), run(model))


def test_a_device_map_of_one_device_is_accepted(tmp_path):
    model = adapt("llama")
    model.save_pretrained(tmp_path)

    assert torch.equal(run(load(tmp_path, "llama", device_map={"": "cpu"}), "llama"), run(model, "llama"))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    ("held", "dtype"), [("float32", torch.float16), ("float32", torch.bfloat16), ("bfloat16", torch.float32)]
)
def test_the_generators_keep_the_dtype_of_their_option_whatever_the_backbones(held, dtype, autocast, tmp_path):
    options = {"autocast_adapter_dtype": autocast}
    model = get_peft_model(make_base("mlp").to(dtype), make_config(generator_dtype=held), **options)
    model.add_adapter("other", make_config(generator_dtype=held), **options)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(make_base("mlp").to(dtype), tmp_path, **options)
    loaded.load_adapter(tmp_path / "other", "other", low_cpu_mem_usage=True, **options)

    for one in (model, loaded):
        assert {p.dtype for p in one.base_model.gift_generators.parameters()} == {getattr(torch, held)}


# ---- what is beside the weights --------------------------------------------------------------------------------------


def test_an_existing_model_card_is_kept_and_a_missing_one_is_made(tmp_path):
    card = tmp_path / "README.md"
    adapt().save_pretrained(tmp_path)
    assert "library_name: peft" in card.read_text()
    card.write_text("---\nmeta: hello\n---\nThis is a model card\n")

    adapt().save_pretrained(tmp_path)

    assert all(text in card.read_text() for text in ("library_name: peft", "meta: hello", "This is a model card"))


def test_the_stored_config_holds_every_option_and_can_be_found_by_peft(tmp_path):
    model = adapt(generator="mlp", scaling=0.5, share="kind", revision="abc")

    model.save_pretrained(tmp_path)

    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    config = PeftConfig.from_pretrained(tmp_path)
    assert (stored["peft_type"], stored["inference_mode"]) == ("GIFT", True)
    assert isinstance(config, GiftConfig)
    assert (config.generator, config.scaling, config.share, config.revision) == ("mlp", 0.5, "kind", "abc")
    assert config.target_modules == {"lin0", "lin1"}
    assert not model.peft_config["default"].inference_mode
    assert check_if_peft_model(tmp_path)
    assert not check_if_peft_model(tmp_path / "nothing")


def test_a_scalar_in_a_trained_module_is_stored_and_loaded(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8))

    config = make_config(target_modules=["0"], modules_to_save=["1"])
    model = get_peft_model(make(), config)
    model(normal(6, 10))
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(make(), tmp_path, ignore_mismatched_sizes=True)

    assert loaded.base_model.model[1].modules_to_save["default"].num_batches_tracked.item() == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_stored_together_with_the_embeddings_loads_them_too(kind, tmp_path):
    model = adapt(kind)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)

    model.save_pretrained(tmp_path, save_embedding_layers=True)

    assert_same(run(load(tmp_path, kind), kind), run(model, kind))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_an_adapter_of_a_backbone_with_new_tokens_is_stored_and_loaded(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "backbone")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "backbone")
    base.resize_token_embeddings(70)
    model = perturb(get_peft_model(base, make_config("llama")).eval())

    model.save_pretrained(tmp_path / "adapter")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "backbone")
    base.resize_token_embeddings(70)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")

    assert_same(run(loaded, "llama"), run(model, "llama"))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_an_auto_class_finds_backbone_and_adapter(task_type, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "backbone")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "backbone")
    model = perturb(get_peft_model(base, make_config("llama", task_type=task_type)).eval())
    model.save_pretrained(tmp_path / "adapter")

    loaded = (AutoPeftModelForCausalLM if task_type else AutoPeftModel).from_pretrained(tmp_path / "adapter")

    assert type(loaded) is type(model)
    assert torch.equal(run(loaded, "llama"), run(model, "llama"))
