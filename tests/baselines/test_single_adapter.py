"""What the baselines of this package have in common as tuners of PEFT."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from gift.backbones import plain_vit
from gift.baselines.bitfit import BitFitConfig
from gift.baselines.toast import ToastConfig
from gift.baselines.vpt import VptConfig
from tests.models import make_images, make_vit

CONFIGS = {"VPT": VptConfig, "TOAST": ToastConfig, "BITFIT": BitFitConfig}
TOKENS = ("VPT", "TOAST")  # which change tokens, so that only plain ViTs will do
OTHER_MODELS = {
    "timm Swin": "swin_tiny_patch4_window7_224",
    "timm BEiT": "beit_base_patch16_224",
    "timm EVA-02, DINOv3": "vit_small_patch16_dinov3",
    "timm ViT with relative positions": "vit_relpos_small_patch16_224",
    "BEiT": "BeitForImageClassification",
    "DINOv3": "DINOv3ViTModel",
    "Swin": "SwinForImageClassification",
    "BERT, RoBERTa, ELECTRA": "BertForSequenceClassification",
}


def make_other(name):
    if name[0].islower():
        return timm.create_model(name)
    build = getattr(transformers, name)
    return build(build.config_class())


@pytest.mark.parametrize("method", TOKENS)
@pytest.mark.parametrize("family", OTHER_MODELS)
def test_models_whose_attention_depends_on_places_are_refused_and_left_as_they_were(family, method):
    with torch.device("meta"):
        model = make_other(OTHER_MODELS[family])
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=f"holds {family}. .* works with these families: timm ViT, DeiT"):
        get_peft_model(model, CONFIGS[method]())
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("method", TOKENS)
def test_a_model_of_no_or_of_two_backbones_is_refused(method):
    with pytest.raises(ValueError, match="Sequential holds no known backbone"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), CONFIGS[method]())
    with pytest.raises(ValueError, match=r"ModuleList holds timm ViT.*, timm ViT"):
        get_peft_model(nn.ModuleList([make_vit(), make_vit()]), CONFIGS[method]())


def test_a_plain_vit_inside_a_custom_model_is_found():
    model = nn.ModuleDict({"body": make_vit(), "more": nn.Linear(5, 5)})
    found = plain_vit(model)
    assert found.blocks == ("body.blocks.0", "body.blocks.1")
    assert (found.encoder, found.norm, found.width, found.is_fused) == ("body", "body.norm", 32, True)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_custom_model_around_a_plain_vit_is_trained_like_any_other(method):
    model = nn.Sequential()
    model.body, model.last = make_vit(num_classes=0), nn.Linear(32, 3)
    adapted = get_peft_model(model, CONFIGS[method](modules_to_save=["last"]))
    adapted(make_images()).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in adapted.parameters())


@pytest.mark.parametrize("method", CONFIGS)
def test_a_second_adapter_is_refused_and_the_first_goes_on(method):
    model = get_peft_model(make_vit(), CONFIGS[method]()).eval()
    expected = model(make_images())
    with pytest.raises(ValueError, match=f"{method} allows one adapter per model, and there is 'default'"):
        model.add_adapter("second", CONFIGS[method]())
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(make_images()), expected)
    with pytest.raises(ValueError, match="'default' is the only adapter of this model"):
        model.delete_adapter("default")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("method", CONFIGS)
def test_a_model_that_carries_another_adapter_is_refused(method):
    model = get_peft_model(make_vit(), LoraConfig(target_modules=["proj"], exclude_modules=["patch_embed.proj"]))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.proj already carries an adapter \(Linear\)"):
        get_peft_model(model.base_model.model, CONFIGS[method]())


@pytest.mark.parametrize("method", CONFIGS)
def test_the_head_is_trained_unless_the_configuration_says_otherwise(method):
    for modules_to_save, count in ((None, 2), ([], 0)):
        model = get_peft_model(make_vit(), CONFIGS[method](modules_to_save=modules_to_save))
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert sum("head" in name for name in trained) == count
        assert len(trained) > count


@pytest.mark.parametrize("method", CONFIGS)
def test_a_module_to_save_that_is_not_there_is_refused(method):
    with pytest.raises(ValueError, match="modules_to_save names 'classifier', but no module of VisionTransformer"):
        get_peft_model(make_vit(), CONFIGS[method](modules_to_save=["classifier"]))
    config = CONFIGS[method]()
    config.modules_to_save = "head"
    with pytest.raises(ValueError, match="modules_to_save must be a list of names, got 'head'"):
        get_peft_model(make_vit(), config)


@pytest.mark.parametrize(("method", "part"), [("VPT", "blocks.1.mlp"), ("VPT", "norm1"), ("TOAST", "norm")])
def test_a_module_to_save_inside_a_wrapped_part_is_refused_and_the_model_left_as_it_was(method, part):
    backbone = make_vit()
    with pytest.raises(ValueError, match=f"modules_to_save names '{part}', but .* lies in a part that this method"):
        get_peft_model(backbone, CONFIGS[method](modules_to_save=["head", part]))
    assert [name for name, _ in backbone.named_modules()] == [name for name, _ in make_vit().named_modules()]


@pytest.mark.parametrize("method", CONFIGS)
def test_the_adapter_can_be_frozen_and_freed(method):
    model = get_peft_model(make_vit(), CONFIGS[method]())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    model.set_requires_grad("default", False)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("default", True)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    with model.disable_adapter():
        pass
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", CONFIGS)
def test_the_configuration_is_stored_as_json(method, tmp_path):
    config = CONFIGS[method]()
    get_peft_model(make_vit(), config).save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["peft_type"], stored["modules_to_save"]) == (method, ["head"])
    again = CONFIGS[method].from_pretrained(str(tmp_path)).to_dict()
    assert again | {"auto_mapping": None} == config.to_dict() | {"inference_mode": True}


@pytest.mark.slow
def test_stored_adapters_reload_to_the_same_bits_in_another_process(tmp_path):
    for method, make in CONFIGS.items():
        model = get_peft_model(make_vit(), make()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * parameter.requires_grad * torch.randn_like(parameter))
            torch.save(model(make_images()), tmp_path / f"{method}.pt")
        model.save_pretrained(str(tmp_path / method))
    code = (
        "import sys, torch, gift; from pathlib import Path; from peft import PeftModel\n"
        "from tests.models import make_images, make_vit\n"
        "torch.set_num_threads(1)\n"
        "for folder in map(Path, sys.argv[1:]):\n"
        "    model = PeftModel.from_pretrained(make_vit(), str(folder))\n"
        "    print(torch.equal(model(make_images()), torch.load(f'{folder}.pt')))\n"
    )
    folders = [str(tmp_path / method) for method in CONFIGS]
    command, root = [sys.executable, "-c", code, *folders], Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split() == ["True"] * len(CONFIGS)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_peft_model_of_it_can_be_moved_and_pickled(method, tmp_path):
    model = get_peft_model(make_vit(), CONFIGS[method]()).eval()
    expected = model(make_images())
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert isinstance(again, PeftModel)
    assert torch.equal(again(make_images()), expected)
    torch.testing.assert_close(model.double()(make_images().double()).float(), expected)
