"""PEFT's cases about running a model: training, disabling, half precision, checkpointing, generating."""

import copy
import inspect

import pytest
import torch
from peft import (
    PeftModelForCausalLM,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.helpers import disable_input_dtype_casting, update_signature

from tests.models import perturb
from tests.tuner.test_peft_cases_models import (
    KINDS,
    adapt,
    adapt_twice,
    assert_same,
    call,
    differ,
    every_generator,
    every_kind,
    every_sharing,
    gift_layers,
    gradients,
    make_base,
    make_config,
    run,
    train,
    trainable,
)

GENERATING = {"max_new_tokens": 4, "do_sample": False}
every_language_model = pytest.mark.parametrize("kind", ["llama", "gpt2"])


# ---- training --------------------------------------------------------------------------------------------------------


@every_kind
def test_every_generator_parameter_and_nothing_else_gets_a_gradient(kind):
    model = adapt(kind).train()

    call(model, kind).sum().backward()

    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("gift_generators" in name)


@every_sharing
@every_generator
def test_training_changes_every_number_of_the_generators_that_the_output_depends_on(generator, share):
    model = adapt(generator=generator, share=share)
    before = copy.deepcopy(model)

    train(model)

    same = [name for name in trainable(model) if torch.equal(model.get_parameter(name), before.get_parameter(name))]
    # What a bias of the keys adds to all logits of a query, the softmax takes away again.
    assert all(name.endswith("mixing.key.bias") for name in same)


@pytest.mark.parametrize(("kind", "head"), [*((kind, []) for kind in KINDS), ("timm", None), ("vit", None)])
def test_training_changes_nothing_but_the_adapter_and_its_head(kind, head):
    model = adapt(kind, modules_to_save=head)
    before = copy.deepcopy(model)

    train(model, kind)

    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before.get_parameter(name))]
    assert set(changed) <= set(trainable(model))
    assert any("gift_generators" in name for name in changed)
    assert any("modules_to_save.default" in name for name in changed) == (head is None)
    with model.disable_adapter():
        assert torch.equal(run(model, kind), run(make_base(kind), kind))


def test_an_inactive_adapter_is_not_changed_by_training():
    model = adapt_twice()
    before = copy.deepcopy(model.base_model.gift_generators["other"].state_dict())

    train(model)

    torch.testing.assert_close(model.base_model.gift_generators["other"].state_dict(), before, atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_gradients_with_checkpointing_are_those_without(kind, use_reentrant):
    model = adapt(kind).train()
    expected = gradients(model, kind)

    if hasattr(model, "get_input_embeddings"):
        model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients(model, kind)

    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_backbone_that_was_prepared_for_training_in_few_bits_can_be_adapted():
    base = prepare_model_for_kbit_training(make_base("llama"))
    assert trainable(base) == []

    model = perturb(get_peft_model(base, make_config("llama")))
    model.enable_input_require_grads()
    embedded = model.get_input_embeddings()(KINDS["llama"].inputs["input_ids"])

    assert embedded.requires_grad
    assert all(gradient.abs().sum() > 0 for gradient in gradients(model, "llama").values())


def test_an_adapted_embedding_output_needs_no_gradient_by_itself():
    model = adapt("llama")

    assert not model.get_input_embeddings()(KINDS["llama"].inputs["input_ids"]).requires_grad


# ---- disabling -------------------------------------------------------------------------------------------------------


@every_kind
def test_a_disabled_adapter_gives_the_backbones_output_and_comes_back(kind):
    model = adapt(kind)
    train(model, kind)
    enabled, names = run(model, kind), trainable(model)

    with model.disable_adapter():
        disabled = run(model, kind)
        assert trainable(model) == []

    assert differ(enabled, disabled)
    assert torch.equal(disabled, run(make_base(kind), kind))
    assert torch.equal(run(model, kind), enabled)
    assert trainable(model) == names


def test_a_disabled_head_is_the_original_head():
    model = adapt("timm", modules_to_save=None)
    train(model, "timm")

    with model.disable_adapter():
        assert torch.equal(run(model, "timm"), run(make_base("timm"), "timm"))


def states(model):
    return {layer.disable_adapters for layer in gift_layers(model).values()}


def test_leaving_the_context_restores_what_was_disabled_before():
    model = adapt()
    with model.disable_adapter():
        assert states(model) == {True}
    assert states(model) == {False}

    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        pass

    assert states(model) == {True}


def test_adapters_stay_disabled_until_the_outer_context_is_left():
    model = adapt()

    with model.disable_adapter():
        with model.disable_adapter():
            assert states(model) == {True}
        assert (states(model), model.has_active_enabled_adapter) == ({True}, False)

    assert (states(model), model.has_active_enabled_adapter) == ({False}, True)


def test_a_single_disabled_layer_warns_and_is_enabled_with_the_others():
    model = adapt()
    next(iter(gift_layers(model).values())).enable_adapters(False)

    message = "some adapter layers that are enabled and others that are disabled"
    with pytest.warns(UserWarning, match=message), model.disable_adapter():
        assert states(model) == {True}

    assert states(model) == {False}


def test_the_adapter_comes_back_after_an_error():
    model = adapt()

    with pytest.raises(RuntimeError, match="from outside"), model.disable_adapter():
        raise RuntimeError("from outside")

    assert states(model) == {False}


# ---- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float16, True), (torch.bfloat16, False)])
@every_kind
def test_a_backbone_in_half_precision_runs_with_the_adapter_merged_and_unmerged(kind, dtype, autocast):
    model = get_peft_model(make_base(kind).to(dtype), make_config(kind), autocast_adapter_dtype=autocast).eval()
    perturb(model)
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in KINDS[kind].inputs.items()
    }

    for safe_merge in (False, True):
        unmerged = model(**inputs)
        model.merge_adapter(safe_merge=safe_merge)
        merged = model(**inputs)
        model.unmerge_adapter()
        for output in (unmerged, merged):
            logits = getattr(output, "logits", output)
            assert logits.dtype == dtype
            assert torch.isfinite(logits).all()


@every_kind
def test_under_autocast_the_output_is_close_to_that_in_full_precision(kind):
    model = adapt(kind)
    expected = run(model, kind)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(model, kind)

    assert (output - expected).norm() < 0.05 * expected.norm()


def test_input_casting_can_be_switched_off_although_gift_casts_none():
    model = adapt()
    before = run(model)

    with disable_input_dtype_casting(model):
        assert torch.equal(run(model), before)


# ---- language models -------------------------------------------------------------------------------------------------


@every_language_model
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_text_is_generated_with_the_adapter(kind, task_type):
    model = adapt(kind, task_type=task_type)
    tokens = KINDS[kind].inputs["input_ids"]

    by_name = model.generate(**KINDS[kind].inputs, **GENERATING)
    by_position = model.generate(tokens, **GENERATING)
    merged = model.merge_and_unload().generate(tokens, **GENERATING)

    assert by_name.shape == (2, 11)
    assert torch.equal(by_name, by_position)
    assert torch.equal(by_name, merged)


@every_language_model
def test_the_scores_of_generated_text_follow_the_adapter_and_its_disabling(kind):
    options = {"return_dict_in_generate": True, "output_scores": True} | KINDS[kind].inputs | GENERATING
    model = adapt(kind)

    enabled = model.generate(**options).scores[0]
    with model.disable_adapter():
        disabled = model.generate(**options).scores[0]

    assert differ(enabled, disabled)
    assert_same(disabled, make_base(kind).generate(**options).scores[0])
    assert_same(model.generate(**options).scores[0], enabled)


@every_language_model
def test_text_is_generated_in_half_precision_and_with_padding(kind):
    model = perturb(get_peft_model(make_base(kind).to(torch.bfloat16), make_config(kind)).eval())
    inputs = {"input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}

    assert model.generate(**inputs, **GENERATING).shape == (2, 7)


@every_language_model
def test_embedded_inputs_give_the_output_of_their_tokens(kind):
    model = adapt(kind)
    embedded = model.get_input_embeddings()(KINDS[kind].inputs["input_ids"])

    with torch.no_grad():
        output = model(inputs_embeds=embedded).logits

    assert_same(output, run(model, kind))


def test_the_task_chooses_the_class_which_can_show_the_signature_of_the_backbone():
    model = adapt("llama", task_type="CAUSAL_LM")

    update_signature(model)

    assert isinstance(model, PeftModelForCausalLM)
    assert "input_ids" in inspect.signature(model.forward).parameters


@pytest.mark.parametrize("block", [0, 1])
def test_an_adapter_of_one_block_is_smaller_and_trained_and_stored_like_any(block, tmp_path):
    everywhere = adapt("llama", share="layer")
    model = adapt("llama", share="layer", layers_to_transform=[block])
    assert len(trainable(model)) == len(trainable(everywhere)) // 2
    assert all(gradient.abs().sum() > 0 for gradient in gradients(model, "llama").values())

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(make_base("llama"), tmp_path)

    assert loaded.targeted_module_names == model.targeted_module_names
    assert torch.equal(run(loaded, "llama"), run(model, "llama"))


def test_the_loss_of_a_language_model_falls_when_its_adapter_is_trained():
    torch.manual_seed(0)
    model = adapt("llama", perturbed=False, task_type="CAUSAL_LM").train()
    tokens = KINDS["llama"].inputs["input_ids"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)

    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(model(input_ids=tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()

    assert losses[-1] < 0.9 * losses[0]
