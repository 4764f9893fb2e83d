import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BatchFeature, TimmWrapperConfig, TimmWrapperForImageClassification

from gift import GiftConfig
from gift.explain import ClusterMaps, Reading, explain_images
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


def make_timm_model(dynamic=False, **options):
    return perturb(
        get_peft_model(make_vit(dynamic_img_size=dynamic), GiftConfig(**({"r": 4, "num_clusters": 6} | options)))
    ).eval()


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


def disabled():
    model = make_timm_model()
    model.base_model.disable_adapter_layers()
    return model


def two_active():
    model = make_timm_model()
    model.add_adapter("other", GiftConfig(r=4, num_clusters=9, modules_to_save=[]))
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_vit, "VisionTransformer has no GIFT adapter, and there is no clusters.safetensors"),
        (lambda: get_peft_model(make_vit(), LoraConfig(target_modules=["attn.proj"])), "no GIFT adapter"),
        (lambda: make_timm_model().merge_and_unload(), "VisionTransformer has no GIFT adapter"),
        (disabled, "'default' is not in effect"),
        (two_active, r"\['default', 'other'\] are active"),
        (lambda: make_timm_model(generator="mlp"), "no block -1 with clusters: this generator has 0"),
        (lambda: make_timm_model(generator="mixer", num_mixed_tokens=4), "The kinds `paca` and `linear` have clusters"),
        (lambda: make_timm_model(target_modules=["patch_embed.proj"]), "GIFT adapts linear layers"),
    ],
)
def test_what_has_no_maps_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        explain_images(make(), make_images())


def test_a_block_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no block 3 with clusters: this generator has 1"):
        explain_images(make_timm_model(), make_images(), block=3)


def test_layers_and_clusters_are_chosen_by_number_or_name_and_keep_their_labels():
    model = make_model()
    everything = explain_images(model, images())
    some = explain_images(model, images(), layers=["timm_model.blocks.1.attn.proj"], clusters=[4, 1])
    assert np.array_equal(some.maps, everything.maps[:, [1]][:, :, [4, 1]])
    assert np.array_equal(some.assignments, everything.assignments[[1]][..., [4, 1]])
    assert str(some.ref(0, 1)) == "L1/C1"
    assert explain_images(model, images(), layers=[-1]).layer_names == everything.layer_names[1:]
    with_numpy = explain_images(model, images(), layers=np.arange(1, 2), clusters=np.array([4, 1]))
    assert np.array_equal(with_numpy.maps, some.maps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["blocks.7"]}, "There is no layer 'blocks.7'; there are 2: timm_model.blocks.0.attn.proj"),
        ({"layers": [2]}, "There is no layer 2"),
        ({"layers": []}, "at least one layer"),
        ({"clusters": [6]}, "There is no cluster 6; there are 6: 0 to 5"),
        ({"clusters": [1, -5]}, "each once"),
        ({"reading": "plane"}, "no reading 'plane'; choose one of plain"),
    ],
)
def test_what_is_not_there_cannot_be_chosen(arguments, message):
    with pytest.raises(ValueError, match=message):
        explain_images(make_model(), images(), **arguments)


def test_batches_of_any_kind_give_what_one_tensor_gives():
    model, batch = make_model(), images(5)
    whole = explain_images(model, batch)
    assert np.array_equal(explain_images(model, batch.float()).maps.shape, whole.maps.shape)
    for batches in (batch.split(2), [{"pixel_values": batch}], [[batch, torch.zeros(5)]]):
        assert np.allclose(explain_images(model, iter(batches)).maps, whole.maps, atol=1e-6)
    assert np.allclose(explain_images(model, BatchFeature({"pixel_values": batch})).maps, whole.maps, atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [[], torch.zeros(0, 3, 32, 32), [torch.zeros(3, 32, 32)], [torch.zeros(1, 3, 32, 32).byte()]]
)
def test_what_is_no_batch_of_images_is_refused(wrong):
    with pytest.raises(ValueError, match=r"no images|batches of normalised pixels"):
        explain_images(make_model(), wrong)


def test_maps_on_disk_are_those_in_memory(tmp_path):
    model, batch = make_model(), images(5)
    whole = explain_images(model, batch)
    streamed = explain_images(model, batch.split(2), out=tmp_path / "streamed")
    whole.save(tmp_path / "saved")
    for found in (streamed, ClusterMaps.load(tmp_path / "streamed"), ClusterMaps.load(tmp_path / "saved")):
        assert isinstance(found.maps, np.memmap)
        for name, value in vars(whole).items():
            same = np.allclose(getattr(found, name), value, atol=1e-6) if isinstance(value, np.ndarray) else True
            assert same, name
            assert isinstance(value, np.ndarray) or getattr(found, name) == value, name


def test_a_stream_that_fails_leaves_nothing_and_what_was_there_before(tmp_path):
    model, out = make_model(), tmp_path / "maps"

    def batches():
        yield images(2)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        explain_images(model, batches(), out=out)
    assert not out.exists()
    explain_images(model, images(3), out=out)
    with pytest.raises(OSError, match="the disk is gone"):
        explain_images(model, batches(), out=out)
    assert len(ClusterMaps.load(out).maps) == 3


@pytest.mark.parametrize(
    "changes",
    [{"layer_names": None}, {"layer_names": ["a"]}, {"cluster_numbers": [1]}, {"unknown": 1}, {"reading": ...}],
)
def test_a_manifest_that_does_not_fit_the_maps_is_refused(tmp_path, changes):
    explain_images(make_model(), images()).save(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in manifest.items() if value is not ...}))
    with pytest.raises(ValueError, match="holds no complete cluster maps"):
        ClusterMaps.load(tmp_path)


def test_images_of_several_sizes_are_refused():
    model = make_timm_model(dynamic=True)
    with pytest.raises(ValueError, match=r"must be of one size, got \(16, 16\) after \(32, 32\)"):
        explain_images(model, [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 16, 16)])


def test_a_foreign_file_among_maps_is_the_one_that_is_named(tmp_path):
    found = explain_images(make_model(), images())
    found.save(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds notes.txt"):
        found.save(tmp_path)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis.tex, which is no cluster map"):
        explain_images(make_model(), images(), out=tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("damage", ["missing", "json", "format", "arrays", "maps", "count"])
def test_damaged_maps_are_not_loaded(tmp_path, damage):
    whole = explain_images(make_model(), images())
    whole.save(tmp_path)
    manifest = tmp_path / "manifest.json"
    if damage == "missing":
        manifest.unlink()
    elif damage == "json":
        manifest.write_text("{")
    elif damage == "format":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": "other"}))
    elif damage == "count":
        explain_images(make_model(), images(3), out=tmp_path / "other")
        (tmp_path / "other" / "maps.safetensors").replace(tmp_path / "maps.safetensors")
    else:
        path = tmp_path / f"{damage}.safetensors"
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="holds no complete cluster maps"):
        ClusterMaps.load(tmp_path)


def test_the_control_is_the_layer_before_adaptation_with_the_same_clusters():
    model = make_model()
    adapted = explain_images(model, images())
    found = explain_images(model, images(), reading=Reading(adapted=False))
    outputs, vit = [], model.base_model.model.timm_model
    with model.disable_adapter():
        vit.blocks[0].attn.proj.register_forward_hook(lambda module, args, output: outputs.append(output))
        model(pixel_values=images())
    expected = torch.einsum("bpn,nm->bmp", outputs[0][:, 1:], torch.from_numpy(found.assignments[0]).double())
    assert np.allclose(found.maps[:, 0], expected.detach().reshape(2, 6, 4, 4), atol=1e-5)
    assert np.array_equal(found.assignments, adapted.assignments)
    assert not np.allclose(found.maps, adapted.maps, atol=1e-3)
    assert np.array_equal(explain_images(model, images()).maps, adapted.maps)


def test_a_label_map_says_which_cluster_is_highest():
    found = explain_images(make_model(), images())
    segments = found.segment(1, clusters=[0, 3])
    assert segments.labels.shape == (2, 4, 4)
    assert set(segments.names) == {"L1/C0", "L1/C3"} or len(segments.names) == 1
