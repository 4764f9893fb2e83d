import copy

import pytest
import timm
import torch
from peft import PeftModel, get_peft_model
from peft.utils.save_and_load import load_peft_weights
from torch import nn

from gift.baselines.bitfit import BitFitConfig
from tests.models import make_images, make_vit
from tests.training.killed_run import make_backbone


def make_fitted(backbone=None, **options):
    """Return a model whose biases and head have moved, in eval mode."""
    model = get_peft_model(make_vit() if backbone is None else backbone, BitFitConfig(**options)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def trained_names(model):
    return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}


def test_all_biases_are_trained_but_those_of_the_replaced_head():
    backbone = make_vit()
    biases = {name for name, _ in backbone.named_parameters() if name.endswith(".bias")} - {"head.bias"}
    heads = {f"head.modules_to_save.default.{part}" for part in ("weight", "bias")}
    model = get_peft_model(backbone, BitFitConfig())
    assert trained_names(model) == biases | heads
    assert len(biases) == 2 * 6 + 2  # of qkv, proj, two norms and an MLP per block; of the last norm, of the patches


def test_biases_that_no_layer_applies_are_trained_too():
    with torch.device("meta"):
        model = get_peft_model(timm.create_model("beit_base_patch16_224"), BitFitConfig())
    assert {f"blocks.0.attn.{part}_bias" for part in "qv"} <= trained_names(model)


@pytest.mark.parametrize("make", [make_vit, make_backbone])
def test_gradients_reach_exactly_what_is_trained(make):
    model = get_peft_model(make(), BitFitConfig())
    output = model(make_images())
    getattr(output, "logits", output).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_the_model_computes_what_one_with_these_biases_does():
    model, plain = make_fitted(), make_vit()
    for name, parameter in plain.named_parameters():
        kept = name if not name.startswith("head.") else name.replace("head.", "head.modules_to_save.default.")
        parameter.data = model.base_model.model.get_parameter(kept).data
    assert torch.equal(model(make_images()), plain(make_images()))
    assert not torch.equal(model(make_images()), make_vit()(make_images()))


def test_an_adapter_holds_every_trained_tensor_once_and_nothing_else(tmp_path):
    model = make_fitted()
    model.save_pretrained(str(tmp_path))
    stored = load_peft_weights(str(tmp_path), device="cpu")
    expected = {f"base_model.model.{name.replace('modules_to_save.default.', '')}" for name in trained_names(model)}
    assert set(stored) == expected


@pytest.mark.parametrize("few_memory", [False, True])
def test_a_stored_adapter_reloads_to_the_same_bits_also_if_it_was_off_when_stored(few_memory, tmp_path):
    model = make_fitted()
    with model.disable_adapter():
        model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(make_vit(), str(tmp_path), low_cpu_mem_usage=few_memory)
    assert torch.equal(again(make_images()), model(make_images()))
    assert not trained_names(again)
    with again.disable_adapter():
        assert torch.equal(again(make_images()), make_vit()(make_images()))


@pytest.mark.parametrize("options", [{}, {"modules_to_save": []}])
def test_disabled_biases_leave_the_plain_backbone_and_come_back_also_after_an_error(options):
    model = make_fitted(**options)
    fitted = model(make_images())

    def fail_while_disabled():
        with model.disable_adapter():
            with model.disable_adapter():
                assert torch.equal(model(make_images()), make_vit()(make_images()))
            assert torch.equal(model(make_images()), make_vit()(make_images()))
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        fail_while_disabled()
    assert torch.equal(model(make_images()), fitted)


def test_weights_are_not_loaded_into_an_adapter_that_is_off(tmp_path):
    model = make_fitted()
    model.save_pretrained(str(tmp_path))
    with model.disable_adapter(), pytest.raises(ValueError, match="The adapter is switched off"):
        model.load_adapter(str(tmp_path), "default")
    model.load_adapter(str(tmp_path), "default")


def test_merging_keeps_the_biases_and_unloading_takes_them_out():
    model = make_fitted(modules_to_save=[])
    expected = model(make_images())
    twin = copy.deepcopy(model)
    assert torch.equal(twin.merge_and_unload()(make_images()), expected)
    assert torch.equal(model(make_images()), expected)
    assert torch.equal(model.unload()(make_images()), make_vit()(make_images()))


def test_a_model_without_biases_is_refused():
    with pytest.raises(ValueError, match="Sequential has no biases outside of its head"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3, bias=False)), BitFitConfig())
