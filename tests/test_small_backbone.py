"""The backbone that comes with the package."""

import json

import torch
from safetensors.torch import load_file
from sklearn.linear_model import RidgeClassifier
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from gift import SMALL_BACKBONE
from gift.backbones import default_targets, find_family, patch_grid, prefix_tokens
from gift.data.images import NormalisedImages
from gift.data.offline import read_digits

CONFIG = json.loads((SMALL_BACKBONE / "config.json").read_text())


def test_it_is_small_and_stored_in_half_precision():
    tensors = load_file(SMALL_BACKBONE / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) <= 3_000_000
    assert (SMALL_BACKBONE / "model.safetensors").stat().st_size <= 6_000_000
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_it_loads_like_any_other_image_classifier_in_float32():
    model = AutoModelForImageClassification.from_pretrained(SMALL_BACKBONE, num_labels=5)
    images = torch.zeros(2, 3, 64, 64)
    assert model(pixel_values=images).logits.shape == (2, 5)
    assert next(model.parameters()).dtype == torch.float32
    assert find_family(model)[1].name.startswith("timm ViT")
    assert default_targets(model) == ("attn.proj",)
    assert (prefix_tokens(model), patch_grid(model, 64, 64)) == (1, (8, 8))


def test_its_processor_gives_what_it_was_trained_on():
    processor = AutoImageProcessor.from_pretrained(SMALL_BACKBONE)
    image = read_digits(64).pixels[0]
    normalised = NormalisedImages(
        read_digits(64)[:1], CONFIG["pretrained_cfg"]["mean"], CONFIG["pretrained_cfg"]["std"]
    )
    assert (processor(image)["pixel_values"][0] - normalised[0]["pixel_values"]).abs().max() < 1e-5


def test_its_features_tell_real_digits_apart():
    items = NormalisedImages(read_digits(64)[:400], CONFIG["pretrained_cfg"]["mean"], CONFIG["pretrained_cfg"]["std"])
    with torch.no_grad():
        features = AutoModel.from_pretrained(SMALL_BACKBONE).eval()(items.pixel_values).pooler_output.numpy()
    probe = RidgeClassifier().fit(features[:250], items.labels[:250])
    assert probe.score(features[250:], items.labels[250:]) > 0.7


def test_its_card_and_licence_lie_beside_it():
    card, licence = ((SMALL_BACKBONE / name).read_text() for name in ("README.md", "LICENSE"))
    for word in ("CIFAR-10", "Tiny-ImageNet", "Research use", "scripts/pretrain_backbone.py"):
        assert word in card
    assert "research" in licence
    assert "CIFAR-10" in licence
