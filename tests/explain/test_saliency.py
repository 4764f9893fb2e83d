import numpy as np
import pytest
import timm
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    IJepaConfig,
    IJepaForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from gift import GiftConfig
from gift.baselines.toast import ToastConfig
from gift.explain.saliency import attention_rollout, grad_cam
from tests.models import make_adapted_vit, make_images, make_vit, perturb

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZES = WIDTHS | {"image_size": 32, "patch_size": 8, "num_labels": 5}
TIMM_SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@torch.no_grad()
def lively(model):
    """Return the model in double precision, moved far from its start, where all attention is nearly the same."""
    torch.manual_seed(3)
    for parameter in model.double().parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def make_timm_vit(**changes):
    return lively(make_vit(**changes))


def make_transformers_vit(config=ViTConfig, model=ViTForImageClassification, **changes):
    torch.manual_seed(0)
    return lively(model(config(**(SIZES | {"attn_implementation": "sdpa"} | changes))))


def make_wrapped_vit():
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=5, model_args=TIMM_SIZES)
    return lively(TimmWrapperForImageClassification(config))


def adapted(backbone):
    return perturb(get_peft_model(backbone, GiftConfig(r=4, num_clusters=6, generator_dtype="float64"))).eval()


def images(batch=2):
    return make_images(batch).double()


def logits_of(answer):
    return answer if isinstance(answer, torch.Tensor) else answer.logits


def rollout(attentions):
    """The recursion of the paper, for attention of (batch, heads, tokens, tokens)."""
    identity = torch.eye(attentions[0].shape[-1], dtype=torch.float64)
    found = [0.5 * attentions[0].mean(dim=1) + 0.5 * identity]
    for attention in attentions[1:]:
        found.append(torch.einsum("bik,bkj->bij", 0.5 * attention.mean(dim=1) + 0.5 * identity, found[-1]))
    return torch.stack(found, dim=1).detach()


def attentions_by_hand(vit, images):
    """Softmax of query times key, from the input of each block's `qkv`."""
    inputs = []
    hooks = [block.attn.qkv.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in vit.blocks]
    vit(images)
    for hook in hooks:
        hook.remove()
    found = []
    for block, tokens in zip(vit.blocks, inputs, strict=True):
        query, key, _ = (tokens @ block.attn.qkv.weight.T + block.attn.qkv.bias).split(32, dim=2)
        query, key = (part.unflatten(2, (2, 16)).transpose(1, 2) for part in (query, key))  # [batch, heads, tokens, 16]
        found.append((query @ key.transpose(2, 3) / 16**0.5).softmax(dim=-1))
    return found


def test_rollout_of_a_timm_model_is_the_product_of_attentions_computed_by_hand():
    model = make_timm_vit()
    expected = rollout(attentions_by_hand(model, images()))[:, :, 0, 1:].reshape(2, 2, 4, 4)
    found = attention_rollout(model, images())
    assert found.shape == (2, 2, 4, 4)
    assert np.allclose(found, expected, atol=1e-6)
    assert found[:, 1].std(axis=(1, 2)).min() > 1e-4


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ((ViTConfig, ViTForImageClassification), 1),
        ((Dinov2Config, Dinov2ForImageClassification), 1),
        ((IJepaConfig, IJepaForImageClassification), 0),
    ],
)
def test_rollout_of_a_transformers_model_is_the_product_of_the_attentions_it_puts_out(kind, prefix):
    model = make_transformers_vit(*kind)
    eager = make_transformers_vit(*kind, attn_implementation="eager")
    of_tokens = rollout(eager(images(), output_attentions=True).attentions)
    expected = of_tokens[:, :, 0, 1:] if prefix else of_tokens.mean(dim=2)
    assert np.allclose(attention_rollout(model, images()), expected.reshape(2, 2, 4, 4), atol=1e-6)


def test_rollout_of_an_adapted_model_follows_the_adapted_attention():
    model = adapted(make_wrapped_vit())
    vit = model.base_model.model.timm_model
    expected = rollout(attentions_by_hand(vit, images()))[:, :, 0, 1:].reshape(2, 2, 4, 4)
    found = attention_rollout(model, images())
    assert np.allclose(found, expected, atol=1e-6)
    with model.disable_adapter():
        assert not np.allclose(found[:, 1], attention_rollout(model, images())[:, 1], atol=1e-3)


@pytest.mark.parametrize("changes", [{"reg_tokens": 3}, {"reg_tokens": 3, "class_token": False, "global_pool": "avg"}])
def test_rollout_leaves_registers_out_and_takes_the_mean_of_all_patches_if_there_is_no_class_token(changes):
    model = make_timm_vit(**changes)
    prefix = model.num_prefix_tokens
    of_tokens = rollout(attentions_by_hand(model, images()))[:, :, :, prefix:]
    expected = of_tokens[:, :, 0] if prefix == 4 else of_tokens[:, :, prefix:].mean(dim=2)
    assert np.allclose(attention_rollout(model, images()), expected.reshape(2, 2, 4, 4), atol=1e-6)


@pytest.mark.parametrize(
    "architecture",
    ["eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_base_patch16_xp_224", "deit_tiny_distilled_patch16_224"],
)
def test_rollout_of_other_timm_families_says_what_the_class_token_has_of_each_patch(architecture):
    found = attention_rollout(timm.create_model(architecture, **TIMM_SIZES).eval(), make_images())
    assert found.shape == (2, 2, 4, 4)
    assert (found > 0).all()
    assert (found.sum(axis=(2, 3)) < 1).all()


def test_rollout_of_clip_is_that_of_its_vision_tower():
    vision = {key: size for key, size in SIZES.items() if key != "num_labels"}
    towers = {"vision_config": vision, "text_config": WIDTHS}
    model = make_transformers_vit(CLIPConfig, CLIPForImageClassification, **towers)
    eager = make_transformers_vit(CLIPConfig, CLIPForImageClassification, **towers, attn_implementation="eager")
    expected = rollout(eager(images(), output_attentions=True).attentions)[:, :, 0, 1:].reshape(2, 2, 4, 4)
    assert np.allclose(attention_rollout(model, images()), expected, atol=1e-6)


def cam_by_autograd(model, name, images, classes, prefix=1, grid=(4, 4)):
    """ReLU of the sum over channels of the mean over patches of dy/dA times A."""
    outputs = []
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = logits_of(model(images.clone().requires_grad_()))
    hook.remove()
    maps = []
    for index in classes:
        (gradient,) = torch.autograd.grad(logits[:, index].sum(), outputs[0], retain_graph=True)
        weights = gradient[:, prefix:].mean(dim=1)
        maps.append(torch.einsum("bpn,bn->bp", outputs[0][:, prefix:], weights).relu().unflatten(1, grid))
    return torch.stack(maps, dim=1).detach()


CASES = [
    (make_timm_vit, ["blocks.1.norm1", "blocks.0.attn.proj"]),
    (make_wrapped_vit, ["timm_model.blocks.1.norm1", "timm_model.blocks.0"]),
    (make_transformers_vit, ["vit.layers.1.layernorm_before", "vit.layers.0.attention.o_proj"]),
    (lambda: adapted(make_timm_vit()), ["base_model.model.blocks.1.norm1", "base_model.model.blocks.0.attn.proj"]),
    (lambda: adapted(make_transformers_vit()), ["base_model.model.vit.layers.0.attention.o_proj"]),
]


@pytest.mark.parametrize(("make", "names"), CASES)
def test_grad_cam_is_its_formula_for_every_layer_and_class(make, names):
    model = make()
    found = grad_cam(model, images(), names, [4, 0, 1])
    assert found.shape == (2, len(names), 3, 4, 4)
    for position, name in enumerate(names):
        expected = cam_by_autograd(model, name, images(), [4, 0, 1])
        assert expected.amax() > 0.01
        assert np.allclose(found[:, position], expected, atol=1e-6, rtol=1e-5)


def test_grad_cam_is_of_the_predicted_class_of_each_image_by_default():
    model, batch = make_timm_vit(), images(8)
    predicted = model(batch).argmax(dim=1)
    assert len(set(predicted.tolist())) > 1
    found = grad_cam(model, batch, ["blocks.1.norm1"])
    of_all = grad_cam(model, batch, ["blocks.1.norm1"], range(5))
    assert found.shape == (8, 1, 1, 4, 4)
    assert np.allclose(found[:, 0, 0], of_all[np.arange(8), 0, predicted])


def test_grad_cam_needs_no_parameter_that_requires_gradients_and_no_gradients_switched_on():
    model = make_timm_vit()
    expected = grad_cam(model, images(), ["blocks.0.attn.proj"], [2])
    with torch.no_grad():
        assert np.array_equal(grad_cam(model.requires_grad_(False), images(), ["blocks.0.attn.proj"], [2]), expected)


def test_many_images_give_what_they_give_one_by_one():
    model, batch = make_timm_vit(), images(35)
    rollouts, maps = attention_rollout(model, batch), grad_cam(model, batch, ["blocks.1.norm1"], [3])
    assert np.allclose(rollouts[33:34], attention_rollout(model, batch[33:34]), atol=1e-6)
    assert np.allclose(maps[33:34], grad_cam(model, batch[33:34], ["blocks.1.norm1"], [3]), atol=1e-6)


def test_images_that_are_no_squares_are_laid_out_by_rows():
    batch = torch.randn(2, 3, 16, 40, dtype=torch.float64)
    model = make_timm_vit(dynamic_img_size=True)
    expected = rollout(attentions_by_hand(model, batch))[:, :, 0, 1:].reshape(2, 2, 2, 5)
    assert np.allclose(attention_rollout(model, batch), expected, atol=1e-6)
    expected = cam_by_autograd(model, "blocks.1.norm1", batch, [2], grid=(2, 5))
    assert np.allclose(grad_cam(model, batch, ["blocks.1.norm1"], [2])[:, 0], expected, atol=1e-6)


def test_half_precision_is_close_to_single():
    model, images = make_adapted_vit(), make_images()
    name = "base_model.model.blocks.1.norm1"
    whole = attention_rollout(model, images), grad_cam(model, images, [name], [0])
    model.to(torch.bfloat16)
    half = attention_rollout(model, images.bfloat16()), grad_cam(model, images.bfloat16(), [name], [0])
    for first, second in zip(whole, half, strict=True):
        assert second.dtype == np.float32
        assert np.abs(first - second).max() < 0.1 * np.abs(first).max()


def test_grad_cam_of_a_model_that_checkpoints_its_blocks_is_the_same():
    model = make_timm_vit()
    expected = grad_cam(model, images(), ["blocks.0", "blocks.1.norm1"], [1, 2])
    model.set_grad_checkpointing()
    assert np.allclose(grad_cam(model, images(), ["blocks.0", "blocks.1.norm1"], [1, 2]), expected, atol=1e-6)


class ScalesInPlace(nn.Module):
    def forward(self, x):
        return x.mul_(3.0)


class Divides(nn.Module):
    def forward(self, x):
        return x / 3.0


def test_grad_cam_takes_what_the_layer_put_out_though_the_next_one_writes_into_it():
    model = make_timm_vit().float()
    expected = grad_cam(model, make_images(), ["blocks.0.attn.proj"], [1])
    model.blocks[0].attn.proj_drop = ScalesInPlace()
    model.blocks[0].drop_path1 = Divides()
    assert np.allclose(grad_cam(model, make_images(), ["blocks.0.attn.proj"], [1]), expected, rtol=1e-3, atol=1e-5)


def test_a_model_in_training_is_explained_without_dropout():
    model = make_timm_vit(attn_drop_rate=0.5, proj_drop_rate=0.5)
    expected = attention_rollout(model, images()), grad_cam(model, images(), ["blocks.1.norm1"])
    model.train()
    assert np.allclose(attention_rollout(model, images()), expected[0])
    assert np.allclose(grad_cam(model, images(), ["blocks.1.norm1"]), expected[1])


def state_of(model):
    modules = dict(model.named_modules())
    return {
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for n, m in modules.items()
        },
        "modes": {name: module.training for name, module in modules.items()},
        "fused": {name: module.fused_attn for name, module in modules.items() if hasattr(module, "fused_attn")},
        "implementations": [m.config._attn_implementation for m in modules.values() if hasattr(m, "config")],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
    }


def in_training(model):
    """Return the model in the middle of a training step, one block evaluating."""
    logits_of(model.train()(images())).sum().backward()
    next(module for name, module in model.named_modules() if name.endswith("s.0")).eval()
    return model


@pytest.mark.parametrize(("make", "names"), CASES)
def test_the_model_is_left_as_it_was(make, names):
    model, batch = in_training(make()), images()
    before = state_of(model)
    assert any(gradient is not None for gradient in before["gradients"])
    attention_rollout(model, batch)
    grad_cam(model, batch, names, [0, 1])
    assert state_of(model) == before
    assert not batch.requires_grad


@pytest.mark.parametrize(("make", "names"), CASES)
def test_the_model_is_left_as_it_was_after_an_error(make, names):
    model = in_training(make())
    before = state_of(model)
    too_large = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    with pytest.raises((AssertionError, ValueError)):
        attention_rollout(model, too_large)
    with pytest.raises((AssertionError, ValueError)):
        grad_cam(model, too_large, names)
    with pytest.raises(ValueError, match=r"some of the classes 0 to 4, got \[5\]"):
        grad_cam(model, images(), names, [5])
    assert state_of(model) == before


def make_swin():
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    return SwinForImageClassification(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_swin, r"SwinForImageClassification \(Swin\) attends inside windows"),
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=32, embed_dim=16, depths=(1, 1)),
            r"SwinTransformer \(timm Swin\) attends inside windows",
        ),
        (lambda: nn.Linear(2, 2), "does not hold exactly one kind of known backbone"),
    ],
)
def test_models_without_one_grid_of_patches_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        attention_rollout(make(), make_images())
    with pytest.raises(ValueError, match=message):
        grad_cam(make(), make_images(), ["layers"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: timm.create_model("vit_small_patch16_18x2_224", **TIMM_SIZES),
            "one attention per block; .*attns.1.attn",
        ),
        (lambda: make_vit(attn_layer="diff"), "DiffAttention does not give one attention per head"),
        (lambda: make_vit(depth=0), "one attention per block; VisionTransformer has \\[\\]"),
    ],
)
def test_models_without_one_attention_per_block_have_no_rollout(make, message):
    with pytest.raises(ValueError, match=message):
        attention_rollout(make(), make_images())


@pytest.mark.parametrize(
    ("names", "classes", "message"),
    [
        (["blocks.1.norm3"], None, r"no layers \['blocks.1.norm3'\]: .*'blocks.1.norm1'"),
        ([], None, "name at least one"),
        (["blocks.1"], [], r"some of the classes 0 to 4, got \[\]"),
        (["blocks.1"], [-1], r"some of the classes 0 to 4, got \[-1\]"),
        (["head"], None, r"1 prefix and 4 x 4 patch tokens, got a Tensor of shape \(2, 5\)"),
        (["blocks.0.attn.q_norm"], None, r"got a Tensor of shape \(2, 2, 17, 16\)"),
        (["head_drop"], None, r"got a Tensor of shape \(2, 32\)"),
        (["shared"], None, r"2 gradients in this layer instead of one: GELU\("),
        (["unused"], None, r"0 gradients in this layer instead of one: Identity\(\)"),
    ],
)
def test_layers_and_classes_that_have_no_map_are_refused(names, classes, message):
    model = make_vit()
    model.shared = model.blocks[0].drop_path1 = model.blocks[1].drop_path1 = nn.GELU()
    model.unused = nn.Identity()
    with pytest.raises(ValueError, match=message):
        grad_cam(model, make_images(), names, classes)


def test_a_model_without_logits_has_no_grad_cam():
    with pytest.raises(ValueError, match="gives logits; got BaseModelOutputWithPooling"):
        grad_cam(make_transformers_vit().vit.float(), make_images(), ["layers.0"])


@pytest.mark.parametrize("explain", [attention_rollout, lambda model, images: grad_cam(model, images, ["blocks.1"])])
def test_a_model_that_runs_its_backbone_twice_has_no_map(explain):
    with pytest.raises(ValueError, match="TOAST runs the backbone twice"):
        explain(get_peft_model(make_vit(), ToastConfig()), make_images())
