import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from gift import GiftConfig
from gift.explain.clusters import explain_images, without_common_part
from tests.models import make_images, make_vit, perturb

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def make_model(dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=3, model_args=SIZES)
    backbone = TimmWrapperForImageClassification(config).to(dtype)
    options = {"r": 4, "num_clusters": 6, "generator_dtype": str(dtype).removeprefix("torch.")} | options
    return perturb(get_peft_model(backbone, GiftConfig(**options))).eval()


def images(batch=2):
    return make_images(batch).double()


def state_of(model):
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    return hooks, {name: m.training for name, m in model.named_modules()}, [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_map_is_the_layers_output_times_the_assignment(blocks):
    model = make_model(num_blocks=blocks)
    found = explain_images(model, images())
    vit = model.base_model.model.timm_model
    layer = vit.blocks[1].attn.proj
    outputs = []
    layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = model(pixel_values=images()).logits
    generator = next(iter(model.base_model.gift_generators["default"].values()))
    assignment = generator([block.attn.proj.weight for block in vit.blocks]).assignments[1][-1]
    expected = torch.einsum("bpn,nm->bmp", outputs[0][:, 1:], assignment).reshape(2, 6, 4, 4)
    assert found.layer_names == ("timm_model.blocks.0.attn.proj", "timm_model.blocks.1.attn.proj")
    assert found.maps.shape == (2, 2, 6, 4, 4)
    assert np.allclose(found.maps[:, 1], expected.detach(), atol=1e-5)
    assert np.allclose(found.assignments[1], assignment.detach(), atol=1e-6)
    assert np.array_equal(found.predictions, logits.argmax(dim=1))


def test_the_clusters_of_the_linear_generator_are_the_reduced_weights():
    model = make_model(generator="linear")
    found = explain_images(model, images())
    generator = next(iter(model.base_model.gift_generators["default"].values()))
    weight = model.base_model.model.timm_model.blocks[0].attn.proj.weight
    assert np.allclose(found.assignments[0], (weight @ generator.reduce.weight.T).detach(), atol=1e-6)


def test_the_common_part_is_what_all_clusters_of_a_layer_or_all_patches_share():
    rng = np.random.default_rng(0)
    own, common, level = (
        rng.normal(size=(2, 3, 4, 5, 5)),
        rng.normal(size=(2, 3, 1, 5, 5)),
        rng.normal(size=(2, 3, 4, 1, 1)),
    )
    left = without_common_part(own)
    assert np.allclose(without_common_part(own + 100 * common + 10 * level), left)
    assert np.allclose(left.mean(axis=2), 0)
    assert np.allclose(left.mean(axis=(3, 4)), 0)
    taken = own - left
    shared = taken.mean(axis=2, keepdims=True)
    assert np.allclose(taken - shared, (taken - shared).mean(axis=(3, 4), keepdims=True))


def test_many_images_give_what_they_give_one_by_one():
    model, batch = make_model(), images(70)
    together = explain_images(model, batch)
    assert np.allclose(together.maps[66:67], explain_images(model, batch[66:67]).maps, atol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_also_after_an_error(fails):
    model = make_model().train()
    model.base_model.model.timm_model.blocks[0].eval()
    before = state_of(model)
    if fails:
        with pytest.raises(AssertionError):
            explain_images(model, torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    else:
        explain_images(model, images())
    assert state_of(model) == before


def make_timm_model(**options):
    return perturb(get_peft_model(make_vit(), GiftConfig(**({"r": 4, "num_clusters": 6} | options)))).eval()


def test_a_plain_timm_model_and_an_image_that_is_no_square_are_explained_too():
    model = perturb(get_peft_model(make_vit(dynamic_img_size=True), GiftConfig(r=4, num_clusters=6)))
    found = explain_images(model, torch.randn(2, 3, 16, 40))
    assert found.maps.shape == (2, 2, 6, 2, 5)


def test_the_active_adapter_is_explained():
    model = make_timm_model()
    model.add_adapter("other", GiftConfig(r=4, num_clusters=9))
    model.base_model.set_adapter("other")
    assert explain_images(model, make_images()).maps.shape[2] == 9


def test_maps_of_a_half_precision_backbone_are_close_to_those_in_single():
    model = make_timm_model()
    whole = explain_images(model, make_images()).maps
    half = explain_images(model.to(torch.bfloat16), make_images().bfloat16()).maps
    assert half.dtype == np.float32
    assert np.abs(half - whole).max() < 0.1 * np.abs(whole).max()


def merged():
    model = make_timm_model()
    model.merge_adapter()
    return model


def two_active():
    model = make_timm_model()
    model.add_adapter("other", GiftConfig(r=4, num_clusters=9, modules_to_save=[]))
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_vit, "need a PeftModel with a GIFT adapter, got VisionTransformer"),
        (lambda: get_peft_model(make_vit(), LoraConfig(target_modules=["attn.proj"])), "got LoraModel"),
        (lambda: make_timm_model().merge_and_unload(), "got VisionTransformer"),
        (merged, "'default' is disabled or merged"),
        (two_active, r"\['default', 'other'\] are active"),
        (lambda: make_timm_model(generator="mlp"), "no block -1 with clusters: this generator has 0"),
        (lambda: make_timm_model(target_modules=["attn.qkv[v]"]), "part of a fused layer"),
        (
            lambda: make_timm_model(target_modules=["attn.proj", "mlp.fc1"]),
            "one output width .*mlp.fc1': 128",
        ),
    ],
)
def test_what_has_no_maps_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        explain_images(make(), make_images())


def test_a_block_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no block 3 with clusters: this generator has 1"):
        explain_images(make_timm_model(), make_images(), block=3)
