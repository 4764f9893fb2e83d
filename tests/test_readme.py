"""The README's example runs as it stands there, and what it stores can be loaded again."""

import re
from pathlib import Path

import timm
import torch
from peft import PeftModel

README = (Path(__file__).parents[1] / "README.md").read_text()
SMALL = {"patch_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}  # the README's ViT is large and pretrained


def make_small(create, **options):
    torch.manual_seed(0)
    return create("vit_base_patch16_224", **(options | SMALL | {"pretrained": False}))


def test_the_example_runs_and_what_it_stores_gives_the_merged_models_logits(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: make_small(create, **options))
    monkeypatch.chdir(tmp_path)
    example = {}
    exec(compile(code, "README.md", "exec"), example)

    merged, images = example["plain_vit"].eval(), example["images"]
    backbone = make_small(create, num_classes=102)
    assert not torch.equal(backbone.eval()(images), merged(images))
    loaded = PeftModel.from_pretrained(backbone, tmp_path / "flowers-adapter")
    assert (loaded(images) - merged(images)).abs().max() < 1e-5


def test_the_readme_and_its_example_stay_short():
    assert len(README.splitlines()) <= 120
    assert len(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1].splitlines()) <= 14
