"""Folders of small pictures, and a small backbone with its image processor, for the tests of `gift train`."""

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

CLASSES = ("across", "down", "plain")


def draw(kind: int, noise: np.ndarray) -> Image.Image:
    """Return a picture with striped rows (0), columns (1) or neither (2)."""
    stripes = np.tile(np.repeat([90, -90], 4), 5)[: len(noise)]
    pattern = (stripes[:, None, None], stripes[None, :, None], 0)[kind]
    return Image.fromarray(np.clip(128 + pattern + noise, 0, 255).astype(np.uint8))


def make_pictures(folder: Path, per_class: int = 8, splits: tuple[str, ...] = ("train", "test"), seed: int = 0) -> Path:
    """Draw class folders, in split folders if there are any, as PNG of 36 px."""
    random = np.random.default_rng(seed)
    for split in splits or (".",):
        for kind, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(per_class):
                noise = random.normal(0, 30, (36, 36, 3))
                draw(kind, noise).save(folder / split / name / f"{number}.png")
    return folder


def make_backbone(folder: Path, **changes) -> Path:
    """Store an untrained ViT of width 32 with 2 blocks for images of 32 px."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(**(sizes | {"image_size": 32, "patch_size": 8, "num_labels": 4} | changes))
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))
