"""Storing and loading: bit-exact, every trained tensor once, and nothing loaded from what does not fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from gift import GiftConfig
from gift.tuner.saving import FINGERPRINT_SIDE, fingerprint
from tests.models import make_adapted_vit, make_images, make_vit, perturb


def stored_tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("generator", ["paca", "linear", "transformer", "mlp", "mixer"])
def test_a_stored_adapter_gives_the_same_logits_to_the_bit(tmp_path, generator, low_cpu_mem_usage):
    model = make_adapted_vit(generator=generator, share="kind", target_modules=["attn.proj", "attn.qkv[v]"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(make_images()), model(make_images()))
    assert not [name for name, p in loaded.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("share", ["all", "kind", "layer"])
def test_every_trained_number_is_stored_exactly_once_and_no_other(tmp_path, share):
    model = make_adapted_vit(share=share)
    model.save_pretrained(tmp_path)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(tensor.numel() for tensor in stored_tensors(tmp_path).values()) == trained
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "GIFT"


def test_an_adapter_can_be_stored_while_it_is_merged(tmp_path):
    model = make_adapted_vit()
    model.save_pretrained(tmp_path / "unmerged")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    first, second = (stored_tensors(tmp_path / name) for name in ("unmerged", "merged"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in ("unmerged", "merged")]
    assert configs[0] == configs[1]


def test_a_config_without_head_stays_without_head(tmp_path):
    model = perturb(get_peft_model(make_vit(), GiftConfig(modules_to_save=[]))).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path)
    assert torch.equal(loaded(make_images()), model(make_images()))


def test_an_auto_model_finds_the_backbone_by_itself(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=3, **sizes)).eval()
    backbone.save_pretrained(tmp_path / "backbone")
    backbone = ViTForImageClassification.from_pretrained(tmp_path / "backbone")
    model = perturb(get_peft_model(backbone, GiftConfig(r=4))).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(make_images()).logits, model(make_images()).logits)


def test_several_adapters_are_stored_and_loaded_apart(tmp_path):
    model = make_adapted_vit()
    model.add_adapter("second", GiftConfig(r=2, num_clusters=3))
    perturb(model, "second", std=0.3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path / "second", adapter_name="other")
    loaded.load_adapter(tmp_path, "first")
    for name, original in (("first", "default"), ("other", "second")):
        loaded.set_adapter(name)
        model.set_adapter(original)
        assert torch.equal(loaded(make_images()), model(make_images()))


def test_loading_onto_other_weights_warns_with_the_relative_deviation(tmp_path):
    make_adapted_vit().save_pretrained(tmp_path)
    other = make_vit()
    with torch.no_grad():
        weight = other.blocks[1].attn.proj.weight
        weight.add_(0.1 * weight.norm() * torch.nn.functional.normalize(torch.randn_like(weight), dim=None))
    with pytest.warns(UserWarning, match=r"saved with other frozen weights: .*most in blocks.1.attn.proj: 0.\d+"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.filterwarnings("ignore:This adapter was saved with other frozen weights")
def test_loading_for_other_layers_than_it_was_saved_for_warns(tmp_path):
    make_adapted_vit().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="saved for other layers; .*blocks.2.attn.proj"):
        PeftModel.from_pretrained(make_vit(depth=3), tmp_path)


def test_loading_onto_the_same_weights_in_half_precision_does_not_warn(tmp_path):
    make_adapted_vit().save_pretrained(tmp_path)
    PeftModel.from_pretrained(make_vit().to(torch.bfloat16), tmp_path)


def test_fingerprints_estimate_the_deviation_of_weights():
    ratios = []
    for _ in range(40):
        weight, noise = torch.randn(64, 48), 0.05 * torch.randn(64, 48)
        first, second = (torch.tensor(fingerprint(w)) for w in (weight, weight + noise))
        ratios.append(((second - first).norm() / first.norm() / (noise.norm() / weight.norm())).item())
    assert len(first) == FINGERPRINT_SIDE**2
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.15)


def test_a_stored_configuration_can_be_used_for_a_new_adapter(tmp_path):
    make_adapted_vit().save_pretrained(tmp_path)
    config = GiftConfig.from_pretrained(tmp_path)
    model = get_peft_model(make_vit(num_classes=9), config)
    assert (config.r, config.num_clusters) == (4, 6)
    assert model.eval()(make_images()).shape == (2, 9)


def test_a_stored_configuration_that_is_set_to_train_makes_a_new_adapter_too(tmp_path):
    make_adapted_vit().save_pretrained(tmp_path)
    config = GiftConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    model = get_peft_model(make_vit(num_classes=9), config)
    assert any("gift_generators" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("wrong", ['"x"', "[1]", '{"a": 5}', '{"a": [null]}', '{"a": [NaN]}'])
def test_a_damaged_fingerprint_is_refused_before_the_model_is_touched(tmp_path, wrong):
    make_adapted_vit().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"fingerprint": json.loads(wrong)}))
    backbone = make_vit()
    with pytest.raises((ValueError, TypeCheckError), match="fingerprint"):
        PeftModel.from_pretrained(backbone, tmp_path)
    assert type(backbone.blocks[0].attn.proj) is torch.nn.Linear


def test_a_backbone_of_another_width_is_refused_and_stays_as_it_was(tmp_path):
    make_adapted_vit().save_pretrained(tmp_path)
    other = make_vit(embed_dim=64)
    before = {name: type(module) for name, module in other.named_modules()}
    with pytest.raises(ValueError, match="does not fit this model and configuration; no tensor was loaded"):
        PeftModel.from_pretrained(other, tmp_path)
    assert {name: type(module) for name, module in other.named_modules()} == before


@pytest.mark.parametrize("tensor", ["recover", "head.weight"])
def test_loading_a_damaged_adapter_into_a_model_changes_none_of_its_adapters(tmp_path, tensor):
    model = make_adapted_vit()
    model.save_pretrained(tmp_path)
    tensors = stored_tensors(tmp_path)
    name = next(name for name in tensors if name.endswith(tensor))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for adapter in ("default", "new"):
        with pytest.raises(ValueError, match="NaN or infinite"):
            model.load_adapter(tmp_path, adapter)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
def test_of_mutated_adapter_folders_each_is_refused_clearly_or_loaded_right(tmp_path, repetitions):
    count = repetitions(66, 200)  # six of each mutation, or more
    script = Path(__file__).parents[1] / "mutate_adapters.py"
    done = subprocess.run([sys.executable, script, tmp_path, str(count)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} mutated folders, 0 not" in done.stdout


def test_a_head_that_was_replaced_after_adapting_is_not_silently_left_out(tmp_path):
    model = make_adapted_vit()
    model.base_model.model.reset_classifier(7)
    with pytest.raises(ValueError, match="head was replaced after the adapter was made"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_head_that_was_replaced_before_adapting_is_saved_with_its_new_classes(tmp_path):
    backbone = make_vit()
    backbone.reset_classifier(7)
    perturb(get_peft_model(backbone, GiftConfig(r=2, num_clusters=3))).save_pretrained(tmp_path)
    assert stored_tensors(tmp_path)["base_model.model.head.weight"].shape == (7, 32)
