"""Applying, merging and unmerging residuals: values and gradients against W + dW written out in float64."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import RobertaConfig, RobertaForSequenceClassification

from gift import GiftConfig, GiftLinear
from gift.tuner.products import adapted_linear
from tests.models import Chain, make_adapted_vit, make_images, make_vit, perturb


class Shapes(TorchDispatchMode):
    """Records the shapes of all products."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "mm" in func.overloadpacket.__name__:
            self.shapes.add(tuple(result.shape))
        return result


def adapted_layers(model):
    return [module for module in model.modules() if isinstance(module, GiftLinear)]


def adapted_chain(transposed=False, widths=(6, 10, 6), **options):
    torch.manual_seed(3)
    config = GiftConfig(
        target_modules=["0", "1"], r=4, num_clusters=5, generator_dtype="float64", modules_to_save=[], **options
    )
    return perturb(get_peft_model(Chain(widths, transposed).double(), config), std=0.3)


@pytest.mark.parametrize("dense", [False, True])
def test_products_and_all_gradients_are_those_of_the_summed_weight(dense):
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 7, 6), (5, 6), (5,)))
    left, right = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 3), (3, 6)))
    inputs = [t.requires_grad_() for t in (x, left, right, bias)]
    direction = torch.randn(2, 7, 5, dtype=torch.float64)

    output = adapted_linear(x, weight, bias, left, right, dense)
    got = torch.autograd.grad((output * direction).sum(), inputs)
    expected_output = torch.einsum("bti,oi->bto", x, weight + left @ right) + bias
    expected = torch.autograd.grad((expected_output * direction).sum(), inputs)

    assert (output - expected_output).abs().max() < 1e-10
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() < 1e-10


@pytest.mark.parametrize("dense", [False, True])
def test_backward_forms_no_gradient_of_the_weights_shape_and_only_the_input_is_kept(dense):
    weight, left, right = torch.randn(50, 40), torch.randn(50, 3, requires_grad=True), torch.randn(3, 40)
    x, kept = torch.randn(7, 40, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = adapted_linear(x, weight, None, left, right, dense)
    pointers = {t.untyped_storage().data_ptr() for t in kept}
    assert pointers <= {t.untyped_storage().data_ptr() for t in (x, weight, left, right)}
    with Shapes() as formed:
        output.sum().backward()
    assert (7, 40) in formed.shapes
    assert not formed.shapes & {(50, 40), (40, 50)}


@pytest.mark.parametrize("apply", ["factored", "dense", "auto"])
@pytest.mark.parametrize("generator", ["paca", "linear", "transformer", "mlp", "mixer"])
@pytest.mark.parametrize("widths", [(6, 6, 6), (6, 10, 6)])
def test_a_model_computes_with_the_summed_weights_whatever_way_they_are_applied(apply, generator, widths):
    model = adapted_chain(apply=apply, generator=generator, widths=widths)
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    expected = x
    for layer in adapted_layers(model):
        weight = layer.base_layer.weight + layer.get_delta_weight("default")
        expected = nn.functional.gelu(expected @ weight.T + layer.base_layer.bias)
    parameters = [x, *model.base_model.gift_generators.parameters()]
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    got = torch.autograd.grad(model(x).square().sum(), parameters)
    assert (model(x) - expected).abs().max() < 1e-10
    assert max((one - other).abs().max() for one, other in zip(got, wanted, strict=True)) < 1e-10


def test_a_transposed_layer_equals_the_same_linear_layer():
    plain, transposed = adapted_chain(), adapted_chain(transposed=True)
    transposed.base_model.gift_generators.load_state_dict(plain.base_model.gift_generators.state_dict())
    x = torch.randn(9, 6, dtype=torch.float64)
    outputs = [model(x) for model in (plain, transposed)]
    assert (outputs[0] - outputs[1]).abs().max() < 1e-10
    gradients = [
        torch.autograd.grad(output.square().sum(), list(model.base_model.gift_generators.parameters()))
        for output, model in zip(outputs, (plain, transposed), strict=True)
    ]
    assert max((one - other).abs().max() for one, other in zip(*gradients, strict=True)) < 1e-10
    for one, other in zip(adapted_layers(plain), adapted_layers(transposed), strict=True):
        assert torch.allclose(one.get_delta_weight("default"), other.get_delta_weight("default").T, atol=1e-12)
    transposed.merge_adapter()
    assert (transposed(x) - outputs[0]).abs().max() < 1e-10


@pytest.mark.parametrize("parts", [["q"], ["q", "v"], ["k"], ["q", "k", "v"]])
def test_parts_of_a_fused_layer_change_only_their_own_rows(parts):
    model = make_adapted_vit(target_modules=[f"attn.qkv[{part}]" for part in parts])
    whole = make_adapted_vit(target_modules=["attn.qkv"])
    for layer, other in zip(adapted_layers(model), adapted_layers(whole), strict=True):
        delta = layer.get_delta_weight("default")
        for part, rows in zip("qkv", delta.chunk(3), strict=True):
            assert (rows.abs().max() > 0) == (part in parts)
        assert other.get_delta_weight("default").shape == delta.shape
    images = make_images()
    before = model(images)
    model.merge_adapter()
    assert (model(images) - before).abs().max() < 1e-5


def test_at_the_start_the_logits_are_bitwise_the_backbones():
    images = make_images()
    for generator in ("paca", "linear", "transformer", "mlp", "mixer"):
        for apply in ("factored", "dense"):
            backbone = make_vit()
            expected = backbone(images)
            model = get_peft_model(backbone, GiftConfig(generator=generator, apply=apply)).eval()
            assert torch.equal(model(images), expected)


@pytest.mark.parametrize("apply", ["factored", "dense"])
def test_merged_and_unmerged_agree_and_unmerging_restores_every_bit(apply):
    model, images = make_adapted_vit(apply=apply), make_images()
    originals = [layer.base_layer.weight.clone() for layer in adapted_layers(model)]
    before = model(images)
    model.merge_adapter()
    assert not torch.equal(adapted_layers(model)[0].base_layer.weight, originals[0])
    assert (model(images) - before).abs().max() < 1e-5
    model.unmerge_adapter()
    for layer, original in zip(adapted_layers(model), originals, strict=True):
        assert torch.equal(layer.base_layer.weight, original)
    assert torch.equal(model(images), before)


def test_adapters_merged_apart_are_generated_from_the_original_weight_and_unmerge_bit_exactly():
    model = make_adapted_vit()
    model.add_adapter("second", GiftConfig(r=2, num_clusters=3))
    perturb(model, "second", seed=7)
    layer = adapted_layers(model)[0]
    original = layer.base_layer.weight.clone()
    deltas = [layer.get_delta_weight(name) for name in ("default", "second")]
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        model.merge_adapter(["second"])
    assert (layer.base_layer.weight - (original + deltas[0] + deltas[1])).abs().max() < 1e-6
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_unmerging_is_bit_exact_and_merging_costs_no_more_than_rounding_the_weights(dtype):
    model, images = make_adapted_vit(dtype=dtype), make_images().to(dtype)
    originals = [layer.base_layer.weight.clone() for layer in adapted_layers(model)]
    unmerged = model(images).float()
    model.merge_adapter()
    merged = model(images).float()
    # Merging rounds W + dW to the backbone's dtype: a relative error of eps/2 in every weight, beside the eps/2 of
    # every activation that both models have anyway. Two layers and a few roundings each: 8 eps of the logits' size.
    tolerance = 8 * torch.finfo(dtype).eps * unmerged.abs().max()
    assert (merged - unmerged).abs().max() < tolerance
    model.unmerge_adapter()
    for layer, original in zip(adapted_layers(model), originals, strict=True):
        assert torch.equal(layer.base_layer.weight, original)


@pytest.mark.parametrize("apply", ["auto", "dense"])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_half_precision_keeps_residuals_that_adding_to_the_weight_would_round_away(apply, needs_gradient):
    model = make_adapted_vit(dtype=torch.bfloat16, apply=apply)
    layer = adapted_layers(model)[0]
    layer.base_layer.weight.data.fill_(1.0)
    layer.base_layer.bias.data.zero_()
    model.base_model.set_scale("default", 1e-3 / layer.get_delta_weight("default").abs().max().item())
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    x[0, 1::2] = -1.0  # the frozen product is zero, so that the output is the residual's alone
    expected = x.double() @ layer.get_delta_weight("default").detach().double().T
    with torch.set_grad_enabled(needs_gradient):
        output = layer(x).double()
    rounded = (layer.base_layer.weight.float() + layer.get_delta_weight("default")).bfloat16()
    assert torch.equal(rounded, layer.base_layer.weight)
    assert expected.abs().max() > 0
    assert (output - expected).abs().max() < 0.03 * expected.abs().max()


def test_merging_safely_refuses_weights_that_are_not_finite_and_changes_no_layer():
    model = make_adapted_vit(share="layer")
    originals = [layer.base_layer.weight.clone() for layer in adapted_layers(model)]
    with torch.no_grad():
        model.base_model.gift_generators["default"]["blocks:1:attn:proj-32"].recover.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite weights: not merged"):
        model.merge_adapter(safe_merge=True)
    for layer, original in zip(adapted_layers(model), originals, strict=True):
        assert torch.equal(layer.base_layer.weight, original)
        assert not layer.merged


def test_merge_and_unload_leaves_a_plain_model_without_hooks():
    model, images = make_adapted_vit(), make_images()
    before = model(images)
    plain = model.merge_and_unload()
    assert not adapted_layers(plain)
    assert not plain._forward_hooks
    assert not plain._forward_pre_hooks
    assert (plain(images) - before).abs().max() < 1e-5


def test_merging_keeps_the_original_weights_and_no_other_copy():
    model, images = make_adapted_vit(), make_images()
    with torch.no_grad():
        model(images)
    layers, source = adapted_layers(model), model.base_model.gift_source
    assert source._kept
    model.merge_adapter()
    assert not source._kept
    assert all(layer.gift_original_weight is not None for layer in layers)
    model.unmerge_adapter()
    model.merge_and_unload()
    assert all(layer.gift_original_weight is None for layer in layers)
    assert not source._kept


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_weight_that_is_computed_from_others_cannot_be_merged_into(norm):
    backbone = make_vit()
    norm(backbone.blocks[1].attn.proj)
    model = perturb(get_peft_model(backbone, GiftConfig(r=4, num_clusters=6))).eval()
    with torch.no_grad():
        before = model(make_images())
        with pytest.raises(ValueError, match=r"blocks\.1\.attn\.proj is computed from others"):
            model.merge_adapter()
        assert torch.equal(model(make_images()), before)
    assert not any(layer.merged for layer in adapted_layers(model))


def test_heads_of_several_layers_are_unloaded_too():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    backbone = RobertaForSequenceClassification(RobertaConfig(vocab_size=30, **sizes)).eval()
    model = perturb(get_peft_model(backbone, GiftConfig(r=2))).eval()
    tokens = torch.tensor([[5, 6, 7]])
    before = model(input_ids=tokens).logits
    plain = model.merge_and_unload()
    assert type(plain.classifier).__name__ == "RobertaClassificationHead"
    assert (plain(input_ids=tokens).logits - before).abs().max() < 1e-5


def test_hooks_on_the_frozen_layer_are_called_and_do_not_change_the_output():
    model, images = make_adapted_vit(apply="factored"), make_images()
    before, seen = model(images), []
    adapted_layers(model)[0].base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    after = model(images)
    assert len(seen) == 1
    assert (after - before).abs().max() < 1e-6


def test_a_frozen_weight_that_is_trained_after_all_gets_its_gradient():
    model, images = make_adapted_vit(), make_images()
    weight = adapted_layers(model)[0].base_layer.weight.requires_grad_()
    model(images).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


def test_under_autocast_the_generator_stays_in_its_own_dtype():
    model, images = make_adapted_vit(), make_images()
    expected = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images)
        factors = adapted_layers(model)[0].gift_source.generate(adapted_layers(model))
    assert {of_layer.left.dtype for of_layer in factors.values()} == {torch.float32}
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_set_scale_multiplies_the_residual_and_starts_from_the_configured_scaling():
    model = make_adapted_vit(scaling=2.0)
    layer = adapted_layers(model)[0]
    delta = layer.get_delta_weight("default")
    model.base_model.set_scale("default", 0.5)
    model.base_model.set_scale("default", 0.5)
    assert torch.allclose(layer.get_delta_weight("default"), 0.5 * delta)
