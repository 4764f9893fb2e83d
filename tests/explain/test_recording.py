import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from peft import get_peft_model
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from gift import GiftConfig
from gift.explain import explain_images, recording_maps
from tests.models import make_images, make_vit, perturb

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SWIN = {"image_size": 48, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}


def adapt(backbone, **options):
    options = {"r": 4, "num_clusters": 6, "generator_dtype": "float64"} | options
    return perturb(get_peft_model(backbone.double(), GiftConfig(**options))).eval()


def dinov2():
    config = Dinov2WithRegistersConfig(**SMALL, image_size=32, patch_size=8, num_register_tokens=3, num_labels=3)
    return Dinov2WithRegistersForImageClassification(config)


def assignments_of(model, weights):
    generator = next(iter(model.base_model.gift_generators["default"].values()))
    return [of_layer[-1] for of_layer in generator(weights).assignments]


VITS = {
    "timm ViT": (make_vit, 1, (32, 32), (4, 4)),
    "transformers ViT": (
        lambda: ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=8)),
        1,
        (32, 32),
        (4, 4),
    ),
    "DINOv2 with registers": (dinov2, 4, (32, 32), (4, 4)),
    "DINOv2 with registers, not square": (
        dinov2,
        4,
        (24, 56),
        (3, 7),
    ),
    "timm ViT without class token, not square": (
        lambda: make_vit(dynamic_img_size=True, class_token=False, global_pool="avg"),
        0,
        (16, 40),
        (2, 5),
    ),
    "timm ViT with registers": (lambda: make_vit(reg_tokens=2), 3, (32, 32), (4, 4)),
}


@pytest.mark.parametrize("case", VITS)
def test_maps_are_the_outputs_of_a_plain_hook_times_the_assignment(case):
    make, prefix, size, grid = VITS[case]
    torch.manual_seed(0)
    model, pixels = adapt(make()), torch.randn(2, 3, *size, dtype=torch.float64)
    found = explain_images(model, pixels)
    assert [re.search(r"\.(\d+)\.", name)[1] for name in found.layer_names] == ["0", "1"]
    layers = [model.base_model.model.get_submodule(name) for name in found.layer_names]
    outputs = []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(pixels)
    for index, assignment in enumerate(assignments_of(model, [layer.weight for layer in layers])):
        expected = torch.zeros(2, 6, *grid, dtype=torch.float64)
        for row in range(grid[0]):
            for column in range(grid[1]):
                expected[:, :, row, column] = outputs[index][:, prefix + row * grid[1] + column] @ assignment
        assert torch.allclose(torch.from_numpy(found.maps[:, index]).double(), expected, atol=1e-5)


def pixel_of_window(window, shift, grid, size, pads_first):
    """Return for every window and token the row and column it stands for, or None in the padding."""
    rows, columns = grid
    padded = [-(-side // size) * size for side in grid]
    places = []
    for top in range(0, padded[0], size):
        for left in range(0, padded[1], size):
            for row in range(top, top + size):
                for column in range(left, left + size):
                    if pads_first:
                        place = (row + shift) % padded[0], (column + shift) % padded[1]
                        places.append(place if place[0] < rows and place[1] < columns else None)
                    else:
                        inside = row < rows and column < columns
                        places.append(((row + shift) % rows, (column + shift) % columns) if inside else None)
    return places


def swins():
    timm_sizes = {"img_size": 48, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
    return {
        "timm Swin": (
            timm.create_model("swin_tiny_patch4_window7_224", **timm_sizes),
            "layers.{}.blocks.{}",
            "attn.proj",
            0,
        ),
        "timm Swin v2": (
            timm.create_model("swinv2_tiny_window8_256", **timm_sizes),
            "layers.{}.blocks.{}",
            "attn.proj",
            0,
        ),
        "Swin": (
            SwinForImageClassification(SwinConfig(**SWIN)),
            "swin.encoder.layers.{}.blocks.{}",
            "attention.o_proj",
            1,
        ),
        "Swin v2": (
            Swinv2ForImageClassification(Swinv2Config(**SWIN)),
            "swinv2.encoder.layers.{}.blocks.{}",
            "attention.output.dense",
            1,
        ),
    }


@pytest.mark.parametrize("case", ["timm Swin", "timm Swin v2", "Swin", "Swin v2"])
def test_shifted_windows_of_swin_are_laid_back_onto_the_image(case):
    torch.manual_seed(0)
    backbone, block_name, layer_name, pads_first = swins()[case]
    model, pixels = adapt(backbone), torch.randn(2, 3, 48, 48, dtype=torch.float64)
    found, inner = explain_images(model, pixels), model.base_model.model
    assert found.maps.shape == (2, 4, 6, 12, 12)
    for index, (stage, block) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        module = inner.get_submodule(block_name.format(stage, block))
        outputs = []
        layer = module.get_submodule(layer_name)
        layer.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output))
        model(pixels)
        size, shift = (one if isinstance(one, int) else one[0] for one in (module.window_size, module.shift_size))
        side = 12 // 2**stage
        assignment = torch.from_numpy(found.assignments[index][: 16 * 2**stage]).double()
        responses = (outputs[0] @ assignment).reshape(2, -1, 6)
        for token, place in enumerate(pixel_of_window(size, shift, (side, side), size, pads_first)):
            if place is not None:
                row, column = (2**stage * one for one in place)
                patch = torch.from_numpy(found.maps[:, index, :, row : row + 2**stage, column : column + 2**stage])
                assert torch.allclose(patch.double(), responses[:, token, :, None, None].expand_as(patch), atol=1e-4)


def test_a_part_of_a_fused_layer_has_its_own_columns():
    model = adapt(make_vit(), target_modules=["attn.qkv[q]", "attn.qkv[v]"])
    found, pixels = explain_images(model, make_images().double()), make_images().double()
    layer, outputs = model.base_model.model.blocks[1].attn.qkv, []
    layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(pixels)
    assert found.layer_names[2:] == ("blocks.1.attn.qkv[q]", "blocks.1.attn.qkv[v]")
    for index, columns in ((2, slice(0, 32)), (3, slice(64, 96))):
        expected = outputs[0][:, 1:, columns] @ torch.from_numpy(found.assignments[index]).double()
        expected = expected.transpose(1, 2).reshape(2, 6, 4, 4)
        assert torch.allclose(torch.from_numpy(found.maps[:, index]).double(), expected, atol=1e-5)


def test_layers_of_several_widths_are_read_together():
    found = explain_images(adapt(make_vit(), target_modules=["attn.proj", "mlp.fc1"]), make_images().double())
    assert found.assignments.shape == (4, 128, 6)
    assert not found.assignments[0, 32:].any()
    assert found.assignments[1, 32:].all()


def test_ones_own_loop_is_recorded_in_its_own_mode_and_with_gradients():
    model, pixels = adapt(make_vit()).train(), make_images().double()
    with recording_maps(model, layers=[1], clusters=[2], reading="own") as recorded:
        with pytest.raises(RuntimeError, match=r"no maps yet of blocks.1.attn.proj"):
            recorded.maps  # noqa: B018
        for batch in (pixels, pixels[:1]):
            model(batch).sum().backward()
            assert recorded.maps.shape == (len(batch), 1, 1, 4, 4)
            assert model.training
    expected = explain_images(model, pixels[:1], layers=[1], clusters=[2], reading="own").maps
    assert torch.allclose(recorded.maps.float(), torch.from_numpy(expected), atol=1e-5)
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_a_layer_that_does_not_see_every_patch_has_no_maps():
    model = adapt(
        timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=5
        ),
        target_modules=["head"],
        modules_to_save=[],
    )
    with pytest.raises(ValueError, match=r"head gave an output of shape \(2, 5\) .* it has no maps"):
        explain_images(model, make_images().double())


def test_a_pass_that_fails_leaves_no_maps_of_an_earlier_image():
    model = adapt(make_vit())
    with recording_maps(model) as recorded:
        model(make_images().double())
        with pytest.raises(AssertionError):
            model(torch.zeros(1, 3, 64, 64, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="no maps yet"):
            recorded.maps  # noqa: B018


def test_a_part_of_the_model_has_no_maps_neither_before_nor_after_a_call_of_the_whole():
    model, pixels = adapt(make_vit()), make_images().double()
    inner = model.base_model.model
    with recording_maps(model) as recorded:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"blocks.0.attn.proj ran outside a call of the model.*call the model"):
                inner.forward_features(pixels)
            model(pixels)
            assert recorded.maps.shape == (2, 2, 6, 4, 4)


def test_a_head_that_is_adapted_is_still_said_to_have_no_maps():
    backbone = ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=8))
    model = adapt(backbone, target_modules=["classifier"], modules_to_save=[])
    with pytest.raises(ValueError, match=r"classifier gave an output of shape .* it has no maps"):
        explain_images(model, make_images().double())


def test_maps_of_a_pass_whose_blocks_are_recomputed_are_those_of_the_pass():
    model, pixels = adapt(make_vit()).train(), make_images().double()
    expected = explain_images(model, pixels).maps
    model.base_model.model.set_grad_checkpointing()
    with recording_maps(model) as recorded:
        model(pixels).sum().backward()
    assert torch.allclose(recorded.maps.float(), torch.from_numpy(expected), atol=1e-5)


def test_maps_are_computed_in_single_precision_under_autocast():
    model = adapt(make_vit(), generator_dtype="float32").float()
    with torch.autocast("cpu", torch.bfloat16), recording_maps(model) as recorded, torch.no_grad():
        model(make_images())
    assert recorded.maps.dtype == torch.float32


COMPILED = """
import numpy, torch
from gift import explain_images
from tests.models import make_adapted_vit, make_images
model = make_adapted_vit()
expected = explain_images(model, make_images()).maps
for block in model.base_model.model.blocks:
    block.compile(backend="eager")
with torch.no_grad():
    model(make_images())
assert numpy.allclose(explain_images(model, make_images()).maps, expected, atol=1e-6)
"""


@pytest.mark.slow
def test_blocks_that_were_compiled_before_have_maps_too():
    # In a process of its own: checks of shapes break the graphs that are compiled.
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=Path(__file__).parents[2])
