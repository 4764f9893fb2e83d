import numpy as np
import pytest
import timm
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from gift import GiftConfig, explain_images
from gift.explain import Assignments, Reading, merge_and_save
from tests.models import make_adapted_vit, make_images, make_vit, perturb


def make_transformers_vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    backbone = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5))
    return perturb(get_peft_model(backbone, GiftConfig(r=4, num_clusters=6))).eval()


def assert_same_maps(found, expected):
    assert np.abs(found.maps - expected.maps).max() < 1e-4 * np.abs(expected.maps).max()
    assert np.allclose(found.assignments, expected.assignments)
    assert found.layer_names == expected.layer_names


def test_merged_in_place_the_maps_stay_the_same_and_the_weights_merged():
    model = make_adapted_vit()
    expected = explain_images(model, make_images())
    model.merge_adapter()
    weight = model.base_model.model.blocks[0].attn.proj.weight.clone()
    assert_same_maps(explain_images(model, make_images()), expected)
    assert torch.equal(model.base_model.model.blocks[0].attn.proj.weight, weight)
    with pytest.raises(ValueError, match="The adapter is merged, so the layers before adaptation are not there"):
        explain_images(model, make_images(), reading=Reading(adapted=False))


def test_a_merged_transformers_model_finds_its_clusters_beside_it(tmp_path):
    model = make_transformers_vit()
    expected = explain_images(model, make_images())
    merged = merge_and_save(model, tmp_path)
    assert_same_maps(
        explain_images(merged, make_images(), reading=Reading(assignments=Assignments.load(tmp_path))), expected
    )
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert_same_maps(explain_images(reloaded, make_images()), expected)


def test_a_merged_timm_model_is_told_its_clusters(tmp_path):
    torch.manual_seed(0)
    backbone = timm.create_model("test_vit", num_classes=5)
    model, images = (
        perturb(get_peft_model(backbone, GiftConfig(r=4, num_clusters=6))).eval(),
        torch.randn(2, 3, 160, 160),
    )
    expected = explain_images(model, images)
    merge_and_save(model, tmp_path)
    reloaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    reading = Reading(assignments=Assignments.load(tmp_path))
    assert_same_maps(explain_images(reloaded, images, reading=reading), expected)


def test_an_adapter_that_was_merged_before_is_not_merged_twice(tmp_path):
    model = make_transformers_vit()
    logits = model(make_images()).logits
    model.merge_adapter()
    merged = merge_and_save(model, tmp_path)
    assert torch.allclose(merged(make_images()).logits, logits, atol=1e-5)


def test_parts_of_fused_layers_are_stored_too(tmp_path):
    model = make_adapted_vit(target_modules=["attn.qkv[v]"])
    expected = explain_images(model, make_images())
    merged = model.merge_and_unload()
    Assignments(dict(zip(expected.layer_names, map(torch.from_numpy, expected.assignments), strict=True))).save(
        tmp_path
    )
    reading = Reading(assignments=Assignments.load(tmp_path))
    assert_same_maps(explain_images(merged, make_images(), reading=reading), expected)


def test_stored_clusters_of_other_weights_are_used_with_a_warning(tmp_path):
    merge_and_save(make_transformers_vit(), tmp_path)
    other = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        other.vit.layers[1].attention.o_proj.weight.mul_(1.1)
    with pytest.warns(UserWarning, match=r"vit.layers.1.attention.o_proj deviates by 0.1 .* those of other clusters"):
        explain_images(other, make_images())


@pytest.mark.parametrize(
    ("model", "block", "message"),
    [
        (lambda: timm.create_model("test_vit"), -1, r"of another model: there is no layer vit.layers.0"),
        (make_adapted_vit, -1, "has a GIFT adapter, which says what its clusters are"),
        (make_vit, 0, "stored clusters are of block -1, not of block 0"),
    ],
)
def test_stored_clusters_that_do_not_fit_are_refused(tmp_path, model, block, message):
    merge_and_save(make_transformers_vit(), tmp_path)
    with pytest.raises(ValueError, match=message):
        explain_images(model(), make_images(), block=block, reading=Reading(assignments=Assignments.load(tmp_path)))


def test_what_cannot_be_saved_is_not_merged_either(tmp_path):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = make_vit()

        def forward(self, images):
            return self.vit(images)

    model = perturb(get_peft_model(Own(), GiftConfig(r=4, num_clusters=6)))
    with pytest.raises(ValueError, match="Own is neither a transformers nor a timm model"):
        merge_and_save(model, tmp_path / "merged")
    assert not any(layer.merged for layer in model.base_model.gift_source.layers.values())
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{}              ", None])
def test_a_damaged_file_of_clusters_is_refused(tmp_path, content):
    path = tmp_path / "clusters.safetensors"
    if content is None:
        save_file({"layer": torch.ones(3, 2)}, path, {"format": "something else"})
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"clusters.safetensors holds no clusters of a model"):
        Assignments.load(tmp_path)


def test_clusters_that_are_not_finite_are_refused(tmp_path):
    Assignments({"layer": torch.full((3, 2), torch.nan)}).save(tmp_path)
    with pytest.raises(ValueError, match="is damaged: it must hold finite matrices"):
        Assignments.load(tmp_path)


def test_a_merge_that_fails_leaves_the_adapter_as_it_was(tmp_path):
    model = make_transformers_vit()
    generator = next(iter(model.base_model.gift_generators["default"].values()))
    with torch.no_grad():
        generator.recover.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaN or infinite weights"):
        merge_and_save(model, tmp_path)
    (tmp_path / "file").write_text("")
    with torch.no_grad():
        generator.recover.fill_(0.1)
    expected = explain_images(model, make_images())
    with pytest.raises(FileExistsError):
        merge_and_save(model, tmp_path / "file")
    assert_same_maps(explain_images(model, make_images()), expected)
    assert not any(layer.merged for layer in model.base_model.gift_source.layers.values())


def test_clusters_in_the_working_directory_are_not_those_of_any_model(tmp_path, monkeypatch):
    merge_and_save(make_transformers_vit(), tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"VisionTransformer has no GIFT adapter, and there is no clusters.safetensors"
    ):
        explain_images(make_vit(), make_images())
