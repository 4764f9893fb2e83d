"""Every case of PEFT's own test-suite for its methods, what GIFT does with it, and the cases that GIFT refuses.

The names of the cases are those of `tests/test_custom_models.py` and `tests/testing_common.py` in huggingface/peft
(main, after 0.21.2), without `test_`; `*` stands for any text. The tests are written anew, on the models of
`test_peft_cases_models.py`, and lie in the files `test_peft_cases_*.py` beside this one.
"""

from importlib import import_module

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from gift import GiftConfig
from tests.tuner.test_peft_cases_models import (
    KINDS,
    adapt,
    adapt_twice,
    every_kind,
    gift_layers,
    make_base,
    make_config,
    normal,
    run,
    trainable,
)

# Case -> the test that checks it for GIFT.
PASSES = {
    "active_adapter": "the_active_adapters_are_those_that_were_set",
    "adapter_dtype_autocast": "the_generators_keep_the_dtype_of_their_option_whatever_the_backbones",
    "adapter_name": "the_adapters_name_stands_exactly_once_in_the_names_of_its_parameters",
    "adapter_name_makes_no_difference": "the_name_of_the_adapter_makes_no_difference",
    "add_adapter_no_autocast_adapter_dtype": "the_generators_keep_the_dtype_of_their_option_whatever_the_backbones",
    "add_adapter_rejects_duplicate_name_without_mutation": "an_adapters_name_can_be_given_only_once",
    "attributes_parametrized": "a_wrapped_model_has_the_methods_of_a_peft_model",
    "default_target_modules_*": "a_model_of_an_unknown_family_needs_targets_and_the_error_lists_its_layers",
    "delete_adapter": "a_deleted_adapter_is_gone_without_trace",
    "delete_adapter (the last one)": "after_the_last_adapter_the_tuner_computes_what_the_backbone_does",
    "delete_adapter_fallback_*": "the_head_of_the_adapter_that_takes_over_is_trained_again",
    "delete_adapter_multiple_adapters_*": "deleting_adapters_with_and_without_head_switches_to_the_head_of_the_next",
    "delete_adapter_properly_cleans_up_after_itself": "a_deleted_adapter_is_gone_without_trace",
    "delete_adapter_with_multiple_adapters_works": "of_three_adapters_the_next_takes_over_an_inactive_goes_unnoticed",
    "delete_inactive_adapter": "a_deleted_adapter_is_gone_without_trace",
    "delete_merged_adapter_only_*": "an_adapter_that_is_not_merged_is_deleted_beside_a_merged_one",
    "delete_merged_adapter_raises_without_mutation": "a_merged_adapter_is_not_deleted_and_stays_as_it_was",
    "delete_unknown_adapter_raises": "deleting_an_adapter_that_does_not_exist_is_an_error",
    "disable_adapter_is_reentrant": "adapters_stay_disabled_until_the_outer_context_is_left",
    "disable_adapter*": "a_disabled_adapter_gives_the_backbones_output_and_comes_back",
    "disable_adapters_exiting_context_irregular_state": "a_single_disabled_layer_warns_and_is_enabled_with_the_others",
    "disable_adapters_exiting_context_restores_*": "leaving_the_context_restores_what_was_disabled_before",
    "disable_adapters_with_merging": "a_merged_adapter_can_be_disabled",
    "forward_*float16*": "a_backbone_in_half_precision_runs_with_the_adapter_merged_and_unmerged",
    "forward_output_finite": "a_new_adapter_changes_nothing_and_a_trained_one_does",
    "from_pretrained_config_construction": "a_given_config_is_used_as_it_is",
    "generate*": "text_is_generated_with_the_adapter",
    "generate_half_prec": "text_is_generated_in_half_precision_and_with_padding",
    "get_base_model_state_dict": "the_backbones_state_dict_can_be_read_and_written_under_its_own_names",
    "gpt2_dora_merge_and_unload* (for its Conv1D)": "merging_unmerging_and_unloading_keep_the_output",
    "ignore_mismatched_sizes_with_scalar_*": "a_scalar_in_a_trained_module_is_stored_and_loaded",
    "in_features_out_features_exposed": "a_layer_shows_the_features_weight_and_bias_of_the_layer_it_wraps",
    "inference_safetensors": "a_trained_adapter_is_stored_and_loaded_with_the_same_tensors_and_outputs",
    "load_model_low_cpu_mem_usage": "loading_with_little_memory_leaves_nothing_on_the_meta_device",
    "load_multiple_adapters": "several_copies_of_one_stored_adapter_can_be_loaded",
    "loading_adapter_preserves_custom_requires_grad": "loading_an_adapter_leaves_all_others_trained_as_they_were",
    "loading_model_*requires_grad_set_correctly": "loaded_adapters_are_trained_only_where_asked",
    "lora_conversion": "an_adapter_of_rank_four_is_converted_to_lora_without_loss",
    "merge_layers": "merging_unmerging_and_unloading_keep_the_output",
    "merge_layers_fp16": "a_model_that_was_cast_to_half_precision_is_merged",
    "merge_layers_is_deterministic_in_train_mode": "merging_in_train_mode_gives_the_same_weights_every_time",
    "merge_layers_is_idempotent": "merging_twice_changes_nothing_and_warns",
    "merge_layers_multi": "of_several_adapters_those_that_are_named_are_merged",
    "merge_layers_nan": "a_broken_adapter_is_not_merged_safely_and_leaves_the_weights_as_they_were",
    "mixed_adapter_batches_disabled": "disabling_takes_precedence_over_naming_adapters_for_samples",
    "multiple_active_adapters_*modules_to_save*": "two_adapters_are_active_together_unless_they_train_the_same_module",
    "multiple_active_adapters_forward": "adapters_on_the_same_and_on_different_layers_add_up_merged_or_not",
    "multiple_active_adapters_merge_and_unmerge": "adapters_on_the_same_and_on_different_layers_add_up_merged_or_not",
    "multiple_adapters_automatic_modules_to_save": "with_a_task_type_the_head_of_every_adapter_is_trained",
    "multiple_adapters_mixed_modules_to_save*": "adapters_with_and_without_a_head_can_be_switched",
    "multiple_adapters_no_needless_copy_modules_to_save": "each_adapter_copies_its_own_modules_only",
    "non_existing_model_card, existing_model_card": "an_existing_model_card_is_kept_and_a_missing_one_is_made",
    "only_params_are_updated": "training_changes_nothing_but_the_adapter_and_its_head",
    "parameters_after_loading_model": "a_trained_adapter_is_stored_and_loaded_with_the_same_tensors_and_outputs",
    "passing_input_embeds_works": "embedded_inputs_give_the_output_of_their_tokens",
    "peft_model_device_map": "a_device_map_of_one_device_is_accepted",
    "prepare_for_training": "a_backbone_that_was_prepared_for_training_in_few_bits_can_be_adapted",
    "repr_*": "the_repr_names_the_method_and_the_wrapped_layer",
    "requires_grad_*_same_targets, *_different_targets": "the_active_adapter_and_no_other_is_trained",
    "requires_grad_follows_inference_mode_*": "an_adapter_that_is_set_in_inference_mode_is_not_trained",
    "requires_grad_modules_to_save_*": "a_trained_head_follows_disabling_and_enabling",
    "safe_merge": "every_generator_and_sharing_is_merged",
    "safe_merge (stored)": "a_merged_model_can_be_stored",
    "safe_merge_broken_*": "a_broken_adapter_is_not_merged_safely_and_leaves_the_weights_as_they_were",
    "safe_merge_non_finite_bias_*": "a_bias_that_is_not_finite_is_none_of_the_adapters_business",
    "save_embedding_layers_*, load_*_sibling": "an_adapter_stored_together_with_the_embeddings_loads_them_too",
    "save_load_roundtrip": "every_generator_and_sharing_is_stored_and_loaded",
    "save_load_roundtrip_fsdp_wrapped": "the_adapter_of_a_model_in_fsdp_is_read_and_gives_the_same_output",
    "save_pretrained, *_pickle": "a_trained_adapter_is_stored_and_loaded_with_the_same_tensors_and_outputs",
    "save_pretrained_adapter_name_substring": "adapters_whose_names_contain_each_other_are_not_mixed_up_in_a_file",
    "save_pretrained_selected_adapters*": "only_the_selected_adapters_are_stored",
    "sequential_merge_matches_batch_merge": "merging_one_after_the_other_gives_what_merging_at_once_gives",
    "set_adapter_non_overlapping_modules": "setting_adapters_on_partly_the_same_layers_reaches_every_layer",
    "set_adapter_non_overlapping_modules_to_save": "a_head_of_one_adapter_is_active_with_that_adapter_only",
    "set_requires_grad": "gradients_can_be_asked_for_adapter_by_adapter",
    "training, training_custom_models": "every_generator_parameter_and_nothing_else_gets_a_gradient",
    "training_gradient_checkpointing": "gradients_with_checkpointing_are_those_without",
    "training_layer_indexing": "an_adapter_of_one_block_is_smaller_and_trained_and_stored_like_any",
    "unload_adapter": "unloading_gives_the_backbone_back",
    "unmerge_after_sequential_merge_restores_base": "merging_one_after_the_other_gives_what_merging_at_once_gives",
    "weight_bias_attributes": "a_layer_shows_the_features_weight_and_bias_of_the_layer_it_wraps",
}

# Case -> why it is refused, and the test that checks the error.
REFUSED = {
    "add_weighted_adapter_*, weighted_combination_*": (
        "no single generator gives a weighted sum of residuals; activating several adapters with set_scale does",
        "a_weighted_sum_of_adapters_is_refused",
    ),
    "adding_*_with_bias_raises, *_with_bias_warns": ("no biases", "an_option_that_gift_does_not_have_is_refused"),
    "all on Conv1d, Conv2d, Conv3d, Embedding, MHA": ("linear layers only", "a_layer_that_is_not_linear_is_refused"),
    "hotswap_*": ("PEFT swaps the weights of LoRA only", "hotswapping_is_refused"),
    "load_resized_embedding_*": ("half an adapter is none", "a_stored_tensor_of_another_shape_is_refused"),
    "*mixed_adapter_batches*": ("a batch shares the weights", "another_adapter_for_each_sample_is_refused"),
    "mixed_model_*": ("PEFT lists the methods that may be mixed", "mixing_methods_in_one_model_is_refused"),
    "multirank*": ("a generator has one rank", "ranks_that_differ_from_layer_to_layer_are_refused"),
    "rescale_adapter_scale_*": ("PEFT's helper is LoRA's", "rescaling_by_the_helper_is_refused_and_set_scale_does_it"),
    "*_direct_injection": ("generators live on the tuner", "injecting_an_adapter_without_a_tuner_is_refused"),
    "path_initial_model_*": ("the backbone is not changed", "converting_to_another_starting_point_is_refused"),
}

# Case -> why it has no meaning for GIFT.
DOES_NOT_APPLY = {
    "all cases with target_parameters": "GIFT adapts layers; the option does not exist",
    "all cases with trainable tokens": "the option does not exist",
    "boft_*, glora_*, gralora_*, ia3_*, kasa, lora_*, monteclora_*, osf, pvera_*, vera_*, *dora*": "of one method only",
    "custom_lora_layer_*, override_lora_linear (TestDynamicDispatch)": "LoRA's registry of layer classes",
    "save_load_roundtrip_fsdp_wrapped_learnable_bias": "GIFT trains no biases",
    "save_pretrained_targeting_lora_to_embedding_layer*": "embeddings cannot be adapted",
    "test_mixed_adapter_batches_lora_opt_timing": "mixed batches are refused",
    "training_prompt_learning_tasks": "GIFT learns no prompts",
}

FILES = ("", "_models", "_creating", "_saving", "_merging", "_adapters", "_training", "_whole_models")


def test_every_case_of_the_table_has_its_test():
    tests = {name for file in FILES for name in vars(import_module(f"tests.tuner.test_peft_cases{file}"))}

    named = [*PASSES.values(), *(test for _, test in REFUSED.values())]
    assert {f"test_{name}" for name in named} <= tests
    assert len(PASSES | REFUSED | DOES_NOT_APPLY) == len(PASSES) + len(REFUSED) + len(DOES_NOT_APPLY)


# ---- ways to create an adapter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@every_kind
def test_injecting_an_adapter_without_a_tuner_is_refused(kind, low_cpu_mem_usage):
    base = make_base(kind)

    with pytest.raises(ValueError, match=r"uses shared state.*Please use `get_peft_model` instead"):
        inject_adapter_in_model(make_config(kind), base, low_cpu_mem_usage=low_cpu_mem_usage)

    assert not gift_layers(base)


def test_injecting_from_a_state_dict_is_refused():
    with pytest.raises(ValueError, match="cannot be injected from a state_dict: pass a GiftConfig"):
        type(adapt().base_model)(make_base("mlp"), make_config(), "default", state_dict={})


def test_mixing_methods_in_one_model_is_refused():
    base = make_base("mlp")

    with pytest.raises(ValueError, match=r"`peft_type` .*GIFT.* is not compatible"):
        get_peft_model(base, make_config(), mixed=True)
    with pytest.raises(ValueError, match=r"`peft_type` .*GIFT.* is not compatible"):
        get_peft_model(base, LoraConfig(target_modules=["lin0"]), mixed=True).add_adapter("gift", make_config())


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_layer_with_an_adapter_of_another_method_is_refused():
    lora = get_peft_model(make_base("mlp"), LoraConfig(target_modules=["lin0"]))

    with pytest.raises(ValueError, match=r"lin0 already carries an adapter .*lora"):
        get_peft_model(lora.get_base_model(), make_config(), adapter_name="second")


class Layers(nn.Module):
    """One of each kind of layer that other methods adapt."""

    def __init__(self):
        super().__init__()
        self.conv1d, self.conv2d, self.conv3d = nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1)
        self.emb, self.norm, self.gru = nn.Embedding(4, 2), nn.LayerNorm(2), nn.GRU(2, 2)
        self.mha = nn.MultiheadAttention(2, 1)


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "emb", "norm", "gru", "mha"])
def test_a_layer_that_is_not_linear_is_refused(name):
    model = Layers()

    with pytest.raises(
        ValueError, match=rf"selects {name}, a {type(getattr(model, name)).__name__}: GIFT adapts linear"
    ):
        get_peft_model(model, make_config(target_modules=[name]))


def test_a_layer_whose_weight_is_read_without_calling_it_is_refused():
    with pytest.raises(ValueError, match=r"reads the weight of mha.out_proj without calling the layer"):
        get_peft_model(Layers(), make_config(target_modules=["out_proj"]))


@pytest.mark.parametrize(("option", "value"), [("rank_pattern", 2), ("alpha_pattern", 2.0)])
def test_ranks_that_differ_from_layer_to_layer_are_refused(option, value):
    with pytest.raises(ValueError, match="all layers that share a generator have its rank"):
        make_config(**{option: {"lin0": value}})


@pytest.mark.parametrize("name", ["gift_generators", "blocks", "reduce", "all-10"])
def test_an_adapter_called_like_a_part_of_the_generators_is_refused(name):
    model = adapt()

    for act in (lambda: adapt(adapter=name), lambda: model.add_adapter(name, make_config())):
        with pytest.raises(ValueError, match="names a part of the generators"):
            act()

    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["lin1", "model"])
def test_an_adapter_called_like_a_module_on_the_way_to_a_trained_one_is_refused(name):
    model = adapt(target_modules=["lin0"], modules_to_save=["lin1"])

    with pytest.raises(ValueError, match="cannot be called"):  # PEFT could not save `default` any more
        model.add_adapter(name, make_config(target_modules=["lin0"]))

    assert list(model.peft_config) == ["default"]


def test_a_dot_in_the_name_of_an_adapter_is_refused_and_changes_nothing():
    model = adapt()
    before = run(model)

    with pytest.raises(KeyError, match=r'can\\\'t contain "\."'):
        model.add_adapter("a.b", make_config())

    assert list(model.peft_config) == list(model.base_model.gift_generators) == ["default"]
    assert torch.equal(run(model), before)


# ---- ways to run and to combine adapters -----------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["default", "other"], ["__base__", "default"], ["nobody"]])
@pytest.mark.parametrize("state", ["plain", "train", "merged"])
def test_another_adapter_for_each_sample_is_refused(names, state):
    model = adapt_twice("llama")
    model.train(state == "train")
    if state == "merged":
        model.merge_adapter()

    for act in (model.forward, model.generate, lambda **inputs: model.generate(num_beams=2, **inputs)):
        with pytest.raises(ValueError, match=r"another adapter for each sample.*Call the model once per adapter"):
            act(**KINDS["llama"].inputs, adapter_names=names)


def test_disabling_takes_precedence_over_naming_adapters_for_samples():
    model = adapt_twice()

    with model.disable_adapter():
        output = model(**KINDS["mlp"].inputs, adapter_names=["default"] * 6)

    assert torch.equal(output, make_base("mlp")(**KINDS["mlp"].inputs))


@pytest.mark.parametrize("combination_type", ["svd", "linear", "cat", "ties"])
def test_a_weighted_sum_of_adapters_is_refused(combination_type):
    model = adapt_twice()

    with pytest.raises(ValueError, match=r"no add_weighted_adapter.*Activate several adapters.*set_scale"):
        model.add_weighted_adapter(["default", "other"], [0.5, -1.5], "sum", combination_type=combination_type)

    assert list(model.peft_config) == ["default", "other"]


def test_what_the_refusal_of_weighted_sums_recommends_gives_the_weighted_sum():
    model = adapt_twice(target_modules=["lin0"])
    layer = model.base_model.model.lin0
    expected = layer.weight + 0.5 * layer.get_delta_weight("default") - 1.5 * layer.get_delta_weight("other")

    model.base_model.set_adapter(["default", "other"])
    model.base_model.set_scale("default", 0.5)
    model.base_model.set_scale("other", -1.5)
    model.merge_adapter()

    torch.testing.assert_close(layer.weight, expected, atol=1e-6, rtol=1e-5)


def test_rescaling_by_the_helper_is_refused_and_set_scale_does_it():
    model = adapt(target_modules=["lin0"])
    layer, delta = model.base_model.model.lin0, model.base_model.model.lin0.get_delta_weight("default")

    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(model, 0.5),
    ):
        pass
    assert torch.equal(layer.get_delta_weight("default"), delta)
    model.base_model.set_scale("default", 0.5)

    torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * delta)


def test_a_layer_that_the_model_never_calls_is_an_error():
    base = make_base("mlp")
    base.unused = nn.Linear(10, 10)
    model = get_peft_model(base, make_config(target_modules=["lin0", "unused"]))

    with pytest.raises(
        RuntimeError, match=r"did not call these adapted layers: unused\. An adapter there does nothing"
    ):
        model(normal(6, 10))


# ---- ways to store and load ------------------------------------------------------------------------------------------


def test_hotswapping_is_refused(tmp_path):
    model = adapt()
    model.save_pretrained(tmp_path)
    before = run(model)

    with pytest.raises(ValueError, match="Hotswapping only supports LORA but GIFT was passed"):
        hotswap_adapter(model, tmp_path, adapter_name="default")

    assert torch.equal(run(model), before)


def test_converting_to_another_starting_point_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`path_initial_model_for_weight_conversion`.*not supported for GiftModel"):
        adapt().save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))


@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
def test_a_stored_tensor_of_another_shape_is_refused(ignore_mismatched_sizes, tmp_path):
    adapt(target_modules=["lin0"], modules_to_save=["lin1"]).save_pretrained(tmp_path)
    base = make_base("mlp")
    base.lin1 = nn.Linear(20, 7)

    with pytest.raises(ValueError, match=r"lin1.bias has shape \(4,\), this model needs \(7,\)"):
        PeftModel.from_pretrained(base, tmp_path, ignore_mismatched_sizes=ignore_mismatched_sizes)

    assert not gift_layers(base)
    assert len(trainable(base)) == 4


def test_an_adapter_of_another_method_is_not_read_as_one_of_gift(tmp_path):
    get_peft_model(make_base("mlp"), LoraConfig(target_modules=["lin0"])).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"holds an adapter of type .*LORA, not of GIFT"):
        GiftConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        adapt().load_adapter(tmp_path, "other")
