import copy
import math
import re

import pytest
import timm
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional

from gift.baselines.feedback import Passes
from gift.baselines.toast import ToastConfig, feedback_reconstruction
from tests.baselines.models import FAMILIES, WrittenOut, logits_of, make_family, make_float64_images
from tests.models import make_images, make_vit
from tests.training.killed_run import make_backbone


def make_steered(backbone=None, std=0.1, **options):
    """Return a model with TOAST, none of whose weights has its starting value, in eval mode."""
    model = get_peft_model(make_vit() if backbone is None else backbone, ToastConfig(**options)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".toast_" in name or ".modules_to_save." in name:
                weight.add_(std * torch.randn(weight.shape, generator=generator).to(weight))
    return model


def weights_of(model):
    """Return the weights of the feedback path by name, with LoRA added to the maps."""
    named = {name.split(".")[-2]: p for name, p in model.named_parameters() if ".toast_" in name}
    for name in ("toast_top_down", "toast_value"):
        if f"{name}_lora_in" in named:
            named[name] = named[name] + named[f"{name}_lora_out"] @ named[f"{name}_lora_in"] / 4
    return named


def written_signals(written, weights, images):
    tokens = written.tokens(images)
    for block in written.blocks:
        tokens = written.block(block, tokens)
    tokens, selection = written.norm(tokens), weights["toast_selection"]
    cosine = tokens @ selection / tokens.norm(dim=-1) / selection.norm()
    feedback = tokens * cosine.clamp(0, 1)[..., None]
    feedback = feedback @ weights.get("toast_channels", torch.eye(len(selection), dtype=feedback.dtype))
    signals = []
    for top_down, value in zip(reversed(weights["toast_top_down"]), reversed(weights["toast_value"]), strict=True):
        feedback = feedback @ top_down.T
        signals.append(feedback @ value.T)
    return signals[::-1]


@pytest.mark.parametrize("lite", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_second_pass_adds_the_values_of_what_the_first_one_feeds_back(name, lite):
    backbone = make_family(name)
    written = WrittenOut(backbone)
    model = make_steered(backbone, lite=lite, modules_to_save=[])
    images = make_float64_images()
    tokens = written.tokens(images)
    for block, signal in zip(written.blocks, written_signals(written, weights_of(model), images), strict=True):
        tokens = written.block(block, tokens, signal)
    torch.testing.assert_close(logits_of(model(images)), written.head(tokens))


@pytest.mark.parametrize(
    ("lite", "count"), [(False, 12 * 2 * 768**2 + 768), (True, 768 + 768**2 + 12 * 2 * 2 * 4 * 768)]
)
def test_as_many_weights_are_trained_as_published(lite, count):
    with torch.device("meta"):
        backbone = timm.create_model("vit_base_patch16_224", num_classes=100)
    model = get_peft_model(backbone, ToastConfig(lite=lite))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count + 100 * 769
    assert f"{count / 1e6:.2f}" == ("0.74" if lite else "14.16")


def test_the_path_starts_as_published():
    model = get_peft_model(make_vit(embed_dim=256), ToastConfig(lite=True))
    weights = {name.split(".")[-2]: p for name, p in model.named_parameters() if ".toast_" in name}
    assert torch.equal(weights["toast_channels"], torch.eye(256))
    assert abs(weights["toast_selection"].std() - 1) < 0.2
    for name in ("toast_top_down", "toast_value"):
        assert abs(weights[name].std() - 0.02) < 1e-3
        assert not weights[f"{name}_lora_out"].any()


@pytest.mark.parametrize("lite", [False, True])
def test_gradients_reach_exactly_what_is_trained_and_are_those_of_the_formula(lite):
    backbone = make_family("timm")
    written, model, images = WrittenOut(backbone), make_steered(backbone, lite=lite), make_float64_images()
    named = {name: p for name, p in model.named_parameters() if ".toast_" in name and p.requires_grad}
    model.train()(images).square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(reached) == (6 if lite else 3) + 2
    written.model.head = model.base_model.model.head
    tokens = written.tokens(images)
    for block, signal in zip(written.blocks, written_signals(written, weights_of(model), images), strict=True):
        tokens = written.block(block, tokens, signal)
    expected = torch.autograd.grad(written.head(tokens).square().sum(), list(named.values()))
    torch.testing.assert_close([p.grad for p in named.values()], list(expected))


def test_drop_path_is_active_in_both_passes_while_training():
    model, drops = make_steered(make_vit(drop_path_rate=0.5)), []
    model.base_model.model.blocks[1].drop_path1.register_forward_hook(lambda *args: drops.append(args[0].training))
    model.train()(make_images())
    assert drops == [True, True]


def test_disabled_feedback_leaves_the_plain_backbone_and_one_pass():
    plain, calls = make_vit(), []
    expected, model = plain(make_images()), make_steered()
    steered = model(make_images())
    model.base_model.model.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    with model.disable_adapter():
        assert torch.equal(model(make_images()), expected)
        assert torch.equal(model.base_model.model.blocks(torch.ones(1, 17, 32)), plain.blocks(torch.ones(1, 17, 32)))
    assert len(calls) == 1
    assert torch.equal(model(make_images()), steered)
    assert not torch.equal(steered, expected)


def test_unloading_gives_back_the_backbone_and_merging_is_refused():
    names = [name for name, _ in make_vit().named_modules()]
    model = make_steered(modules_to_save=[])
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="TOAST cannot be merged into the weights: it needs a second pass"):
            merge()
    unloaded = copy.deepcopy(model).unload()
    assert [name for name, _ in unloaded.named_modules()] == names
    assert torch.equal(unloaded(make_images()), make_vit()(make_images()))
    assert not unloaded._forward_hooks
    assert not unloaded._forward_pre_hooks


@pytest.mark.parametrize("lite", [False, True])
@pytest.mark.parametrize("few_memory", [False, True])
def test_a_stored_adapter_reloads_to_the_same_bits_under_any_name(lite, few_memory, tmp_path):
    model = make_steered(lite=lite)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(make_vit(), str(tmp_path), adapter_name="other", low_cpu_mem_usage=few_memory)
    assert torch.equal(again(make_images()), model(make_images()))
    assert not any(p.requires_grad for p in again.parameters())
    trained = PeftModel.from_pretrained(make_vit(), str(tmp_path), is_trainable=True)
    assert [n for n, p in trained.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


def test_an_adapter_with_missing_weights_is_refused_when_it_is_loaded(tmp_path):
    make_steered(lite=True).save_pretrained(str(tmp_path))
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace('"lite": true', '"lite": false'))
    with pytest.raises(ValueError, match=r"toast_channels is unexpected"):
        PeftModel.from_pretrained(make_vit(), str(tmp_path))


# ---- a feedback path of an earlier run -------------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("lite", [False, True])
def test_a_feedback_path_is_taken_over_with_the_lora_of_the_earlier_run(earlier, lite, tmp_path):
    pretrained = make_steered(lite=earlier)
    pretrained.save_pretrained(str(tmp_path / "earlier"))
    model = get_peft_model(make_vit(), ToastConfig(lite=lite, feedback=tmp_path / "earlier"))
    found, expected = weights_of(model), weights_of(pretrained)
    for name in ("toast_top_down", "toast_value"):
        torch.testing.assert_close(found[name], expected[name])
    assert not torch.equal(found["toast_selection"], expected["toast_selection"])


def test_a_stored_adapter_does_not_need_the_earlier_run_but_a_new_one_of_its_configuration_does(tmp_path):
    make_steered().save_pretrained(str(tmp_path / "earlier"))
    model = make_steered(feedback=str(tmp_path / "earlier"))
    model.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "earlier").rename(tmp_path / "gone")
    again = PeftModel.from_pretrained(make_vit(), str(tmp_path / "adapter"))
    assert torch.equal(again(make_images()), model(make_images()))
    for config in (ToastConfig.from_pretrained(str(tmp_path / "adapter")), again.peft_config["default"]):
        with pytest.raises(ValueError, match="feedback must be the folder of a TOAST adapter"):
            get_peft_model(make_vit(), config)


def test_a_feedback_path_of_another_backbone_is_refused_before_the_model_is_changed(tmp_path):
    make_steered(make_vit(depth=3)).save_pretrained(str(tmp_path))
    backbone = make_vit()
    names = [name for name, _ in backbone.named_modules()]
    with pytest.raises(ValueError, match=re.escape("this backbone needs two of shape (2, 32, 32)")):
        get_peft_model(backbone, ToastConfig(feedback=str(tmp_path)))
    assert [name for name, _ in backbone.named_modules()] == names


def test_the_reconstruction_term_rebuilds_what_each_block_was_given():
    backbone = make_family("timm")
    written, model, images = WrittenOut(backbone), make_steered(backbone, reconstruct=True), make_float64_images()
    model.train()(images)
    term = feedback_reconstruction(model)
    before, expected = written.tokens(images), 0
    for block, top_down in zip(written.blocks, weights_of(model)["toast_top_down"], strict=True):
        after = written.block(block, before)
        expected = expected + functional.mse_loss(after.detach() @ top_down.T, before.detach())
        before = after
    torch.testing.assert_close(term, expected)
    term.backward()
    reached = [name for name, p in model.named_parameters() if p.grad is not None]
    assert [name.split(".")[-2] for name in reached] == ["toast_top_down"]


def test_the_reconstruction_term_is_that_of_the_last_call():
    model = make_steered(reconstruct=True).train()
    model(make_images())
    expected = feedback_reconstruction(model)
    model(2 * make_images())
    model(make_images())
    assert torch.equal(feedback_reconstruction(model), expected)
    model(make_images())
    model.eval()(make_images())
    assert not model.base_model.toast_passes.inputs


def test_the_reconstruction_term_of_the_lite_form_reaches_the_lora():
    model = make_steered(make_backbone(), lite=True, reconstruct=True).train()
    model(make_images())
    feedback_reconstruction(model).backward()
    reached = [name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None]
    assert sorted(reached) == ["toast_top_down_lora_in", "toast_top_down_lora_out"]


def test_tokens_are_kept_only_for_a_reconstruction_term_that_is_wanted():
    model = make_steered(reconstruct=True)
    for call in (model, make_steered().train(), model.eval()):
        call(make_images())
        with pytest.raises(ValueError, match="Set reconstruct=True in ToastConfig"):
            feedback_reconstruction(call)
    model.train()(make_images())
    copy.deepcopy(model)
    feedback_reconstruction(model)
    with pytest.raises(ValueError, match="ask once after every call"):
        feedback_reconstruction(model)
    with pytest.raises(ValueError, match="VisionTransformer has no TOAST adapter"):
        feedback_reconstruction(make_vit())


# ---- the head --------------------------------------------------------------------------------------------------------


def test_the_head_may_start_as_published_and_the_original_stays():
    plain = make_vit(num_classes=400)
    expected = plain(make_images())
    model = get_peft_model(plain, ToastConfig(init_head=True))
    head = model.base_model.model.head.modules_to_save["default"]
    assert torch.equal(head.bias, torch.full((400,), -math.log(99)))
    assert abs(head.weight.std() - (2 / 400) ** 0.5) < 2e-3
    with model.disable_adapter():
        assert torch.equal(model(make_images()), expected)


def test_a_head_that_is_not_there_cannot_be_started():
    for backbone, options in ((make_vit(num_classes=0), {}), (make_vit(), {"modules_to_save": []})):
        with pytest.raises(ValueError, match="init_head needs a linear head that is trained"):
            get_peft_model(backbone, ToastConfig(init_head=True, **options))


# ---- calls -----------------------------------------------------------------------------------------------------------


def is_clean(model):
    passes = model.base_model.toast_passes
    return vars(passes) == vars(Passes())


@pytest.mark.parametrize("at", [1, 2])
def test_an_error_in_either_pass_leaves_nothing_behind(at):
    model, calls = make_steered(reconstruct=True), iter(range(1, 9))
    expected = model(make_images())

    def fail(*_):
        if next(calls) == at:
            raise OSError("broken")

    handle = model.base_model.model.blocks[1].register_forward_hook(fail)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(OSError, match="broken"):
        model(make_images())
    assert is_clean(model)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    handle.remove()
    assert torch.equal(model(make_images()), expected)


def test_nothing_is_left_behind_by_calls_of_any_kind():
    model = make_steered(make_family("timm in transformers", torch.float32))
    expected = model(make_images()).logits
    with torch.no_grad():
        assert torch.equal(model(pixel_values=make_images()).logits, expected)
    with torch.inference_mode():
        assert torch.equal(model.base_model.model(make_images()).logits, expected)
    assert torch.equal(model.get_base_model()(make_images(), labels=torch.tensor([0, 1])).logits, expected)
    assert torch.equal(copy.deepcopy(model)(make_images()).logits, expected)
    assert is_clean(model)


def test_hidden_states_are_those_of_the_second_pass():
    model = make_steered(make_backbone())
    output = model(make_images(), output_hidden_states=True)
    assert len(output.hidden_states) == 3
    encoder = model.base_model.model.vit
    logits = model.base_model.model.classifier(encoder.layernorm.base_layer(output.hidden_states[-1])[:, 0])
    assert torch.equal(logits, output.logits)


def test_a_part_of_the_model_cannot_be_called_by_itself():
    model = make_steered()
    with pytest.raises(ValueError, match=r"called by itself, so there was no first pass\. Call the whole model"):
        model.base_model.model.blocks[0](torch.zeros(1, 17, 32))
    with pytest.raises(ValueError, match="called by itself"):
        model.base_model.model.norm(torch.zeros(1, 17, 32))


def test_checkpointing_is_refused_where_it_would_be_wrong():
    in_timm, in_transformers = make_steered(), make_steered(make_backbone())
    in_timm.base_model.model.set_grad_checkpointing(True)
    in_transformers.base_model.model.activation_checkpointing_enable()
    for model in (in_timm, in_transformers):
        with pytest.raises(ValueError, match="TOAST does not work with gradient checkpointing"):
            model.train()(make_images())
        with torch.no_grad():
            model(make_images())


def test_a_module_trained_beside_the_head_gets_gradients_under_autocast():
    model = make_steered(modules_to_save=["head", "blocks.1.mlp"]).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(make_images())
    output.float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_path_is_trained_in_full_precision_beside_a_backbone_in_half():
    model = make_steered(make_vit().to(torch.bfloat16))
    assert {p.dtype for name, p in model.named_parameters() if ".toast_" in name} == {torch.float32}
    assert model(make_images().to(torch.bfloat16)).dtype == torch.bfloat16


# ---- what it does not work on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["vit_base_patch16_xp_224", "vit_small_patch16_18x2_224"])
def test_blocks_without_a_layer_of_values_are_refused(architecture):
    with torch.device("meta"):
        backbone = timm.create_model(architecture)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv is not there, not a plain linear layer"):
        get_peft_model(backbone, ToastConfig())


def test_patch_dropout_is_refused():
    with pytest.raises(ValueError, match="Patch dropout keeps other patches in each pass"):
        get_peft_model(make_vit(patch_drop_rate=0.5), ToastConfig())


def test_options_that_make_no_sense_are_refused():
    config = ToastConfig()
    config.lite = 1
    with pytest.raises(ValueError, match="lite must be True or False, got 1"):
        config.__post_init__()
