import json
import shlex
from dataclasses import MISSING, fields
from itertools import product
from pathlib import Path

import pytest
import timm
import yaml
from jsonargparse import ArgumentParser
from timm.models import save_for_hf

from gift.baselines.methods import method_config
from gift.cli import main
from gift.pretrained import SMALL, load_backbone
from gift.training.options import TrainOptions, add_train_arguments
from tests.training.pictures import make_pictures

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("recipes/*/*.yaml"))
METHODS = (
    "gift",
    "gift-paca",
    "lora",
    "bitfit",
    "linear-probe",
    "full",
    "vpt-deep",
    "vpt-shallow",
    "toast",
    "toast-lite",
)
OURS = {"fgvc": {"resize": "crop", "augment": "crop-flip"}, "vtab": {"resize": "squash", "augment": "none"}}


def parse(recipe, monkeypatch):
    """The options that the command in the first line of a recipe gives."""
    monkeypatch.chdir(ROOT)
    program, command, *words = shlex.split(recipe.read_text().splitlines()[0].removeprefix("# "))
    assert (program, command) == ("gift", "train")
    values = add_train_arguments(ArgumentParser(exit_on_error=False)).parse_args(words).as_dict()
    assert [Path(str(path)) for path in values.pop("config")] == [recipe.relative_to(ROOT)]
    return TrainOptions(**values)


def test_there_is_one_recipe_per_method_and_suite():
    found = [(file.parent.name, file.stem) for file in RECIPES]
    assert sorted(found) == sorted(product(OURS, METHODS))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_the_first_line_of_a_recipe_runs_it(recipe, monkeypatch):
    options = parse(recipe, monkeypatch)
    assert options.method == ("gift" if recipe.stem == "gift-paca" else recipe.stem)
    assert options.model == "vit_base_patch16_224.augreg_in21k"
    assert {"resize": options.resize, "augment": options.augment} == OURS[recipe.parent.name]
    assert (options.epochs, options.schedule, options.warmup_ratio) == (100, "cosine", 0.1)
    assert options.data.split("/")[0] in ("fgvc", "vtab-1k")
    assert str(options.output_dir) == f"runs/{options.data.split('/')[1]}-{recipe.stem}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_recipe_is_the_difference_from_the_defaults_in_15_lines(recipe):
    values = yaml.safe_load(recipe.read_text())
    known = {one.name: one for one in fields(TrainOptions)}
    for name, value in values.items():
        default = known[name].default
        assert value != ({} if default is MISSING else default), name
    assert len(recipe.read_text().splitlines()) <= 15
    assert all(len(line) <= 120 for line in recipe.read_text().splitlines())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_the_method_of_a_recipe_takes_its_options(recipe, monkeypatch):
    options = parse(recipe, monkeypatch)
    config = method_config(options.method, load_backbone(SMALL, ["a", "b"]), options.method_options)
    if recipe.stem.startswith("gift"):
        assert (config.generator, config.r) == ({"gift": "linear", "gift-paca": "paca"}[recipe.stem], 16)
    if recipe.stem == "lora":
        assert config.lora_alpha / config.r == 1 / 8
    if recipe.stem.startswith("vpt"):
        assert (config.num_prompts, config.deep) == (5, recipe.stem == "vpt-deep")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the folder of a tiny ViT of timm, which has drop path as the backbone of the recipes has, and pictures."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    folder = tmp_path_factory.mktemp("recipes")
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **sizes), str(folder / "vit"), safe_serialization=True)
    return folder / "vit", make_pictures(folder / "pictures", per_class=6)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_recipe_starts_and_ends_on_a_tiny_backbone(recipe, tiny, tmp_path):
    model, pictures = (str(path) for path in tiny)
    words = ["--model", model, "--data", pictures, "--output_dir", str(tmp_path / "run"), "--epochs", "1"]
    main(["train", "--config", str(recipe), *words, "--progress", "false"])
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"] == 1
