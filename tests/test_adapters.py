"""Loading a stored adapter onto its backbone, and the command `gift score` on it."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from timm.models import save_for_hf
from transformers import AutoModelForImageClassification
from transformers.utils import logging

from gift import SMALL_BACKBONE, GiftConfig
from gift.adapters import Classifier, load_adapter, normalised
from gift.cli import main
from gift.data.geometry import Geometry
from gift.explain import command
from gift.explain.rows import ScoreOptions
from tests.models import perturb

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture
def stored(tmp_path):
    backbone = AutoModelForImageClassification.from_pretrained(SMALL_BACKBONE, num_labels=8)
    model = perturb(get_peft_model(backbone, GiftConfig(r=4, num_clusters=6))).eval()
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter", model(IMAGES).logits


def rewrite(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_comes_back_with_its_head_and_what_its_backbone_takes(stored):
    folder, logits = stored
    loaded = load_adapter(folder)
    assert torch.equal(loaded.model(IMAGES).logits, logits)
    assert not loaded.model.training
    assert loaded.image_size_px == 64
    pixels = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    data = json.loads((SMALL_BACKBONE / "config.json").read_text())["pretrained_cfg"]
    expected = (pixels[1, 5, 6, 2].double() / 255 - data["mean"][2]) / data["std"][2]
    assert float(loaded.normalise(pixels.numpy())[1, 2, 5, 6]) == pytest.approx(float(expected), abs=1e-5)
    assert normalised(pixels.numpy(), (0.0,) * 3, (1.0,) * 3).shape == (2, 3, 64, 64)


def test_the_shipped_backbone_is_found_wherever_it_lay_when_the_adapter_was_made(stored):
    folder, logits = stored
    rewrite(folder, base_model_name_or_path=f"/elsewhere/{SMALL_BACKBONE.name}")
    assert torch.equal(load_adapter(folder).model(IMAGES).logits, logits)


@pytest.mark.parametrize(
    ("names", "expected"), [(["a", "b", "c"], ("a", "b", "c")), ([], ("LABEL_0", "LABEL_1", "LABEL_2"))]
)
def test_a_whole_model_of_timm_has_the_classes_of_its_configuration(names, expected, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(SMALL_BACKBONE, num_labels=3)
    model.config.label_names = names
    model.save_pretrained(tmp_path)
    assert load_adapter(tmp_path).classifier.class_names == expected


def test_models_for_timm_and_onnx_are_refused_with_what_to_do(tmp_path):
    model = AutoModelForImageClassification.from_pretrained(SMALL_BACKBONE, num_labels=3)
    save_for_hf(model.timm_model, str(tmp_path / "timm"), safe_serialization=True)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").touch()
    for form, kind in (("timm", "a model for timm"), ("onnx", "a model for ONNX")):
        with pytest.raises(ValueError, match=f"holds {kind}.*merge that with --format transformers"):
            load_adapter(tmp_path / form)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter that can be read"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"no"), "holds no adapter that can be read"),
        (lambda folder: rewrite(folder, base_model_name_or_path=None), "does not say which backbone"),
        (lambda folder: rewrite(folder, base_model_name_or_path="/elsewhere/other"), "backbone /elsewhere/other"),
    ],
)
def test_what_cannot_be_loaded_is_said(stored, damage, message):
    damage(stored[0])
    with pytest.raises(ValueError, match=message):
        load_adapter(stored[0])


def test_an_adapter_without_head_is_refused(tmp_path):
    backbone = AutoModelForImageClassification.from_pretrained(SMALL_BACKBONE, num_labels=8)
    get_peft_model(backbone, GiftConfig(r=4, modules_to_save=[])).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="with one classification head"):
        load_adapter(tmp_path)


def test_score_refuses_an_adapter_without_clusters(tmp_path, capsys):
    backbone = AutoModelForImageClassification.from_pretrained(SMALL_BACKBONE, num_labels=8)
    config = LoraConfig(target_modules=["attn.proj"], modules_to_save=["timm_model.head"])
    get_peft_model(backbone, config).save_pretrained(str(tmp_path))
    with pytest.raises(SystemExit):
        main(["score", str(tmp_path), "--count", "8"])
    assert "gift: " in capsys.readouterr().err


def make_parts(folder, class_names):
    """Write two images for every class, whose left half is an object."""
    half = Image.fromarray(np.repeat(np.array([255, 0], np.uint8), 32)[None].repeat(64, 0))
    for kind in ("images", "masks/thing"):
        for name in class_names:
            (folder / kind / name).mkdir(parents=True)
            for number in range(2):
                half.save(folder / kind / name / f"{number}.png")
    return folder


@pytest.fixture
def shortcuts_of(stored, tmp_path, monkeypatch):
    """Return a function that gives the labels and class names with which shortcuts are looked for."""
    seen = []
    monkeypatch.setattr(command.Scorer, "score", lambda scorer: seen.append("scored") or [])
    monkeypatch.setattr(command, "score_table", lambda rows: "")
    monkeypatch.setattr(command, "find_shortcuts", lambda model, truth, *_: seen.append(truth.images) or [])

    def shortcuts_of(class_names, data_classes=tuple("bcdefgh")):
        if class_names is not None:
            geometry = Geometry(size_px=64, mean=(0.5,) * 3, std=(0.5,) * 3)
            Classifier(str(SMALL_BACKBONE), "gift", class_names, geometry).write(stored[0])
        data = make_parts(tmp_path / "parts", data_classes)
        try:
            command.score_adapter(stored[0], data, 20, 0, shortcuts=True)
        except ValueError:
            assert seen == []  # nothing was scored in vain
            raise
        return seen[-1].labels[::2].tolist(), seen[-1].class_names

    return shortcuts_of


def test_shortcuts_are_those_of_the_class_of_that_name(shortcuts_of):
    assert shortcuts_of(tuple("abcdefgh")) == ([1, 2, 3, 4, 5, 6, 7], tuple("abcdefgh"))


def test_classes_without_names_are_those_of_the_same_number(shortcuts_of):
    assert shortcuts_of(None, tuple("ijklmnop")) == ([*range(8)], tuple("ijklmnop"))


def test_shortcuts_of_unknown_classes_are_refused_before_anything_is_scored(shortcuts_of):
    with pytest.raises(ValueError, match=r"has 7 classes, and the head was trained for 8 .* does not know h: give"):
        shortcuts_of(tuple("abcdefgx"))


@pytest.mark.slow
def test_score_prints_tables_and_writes_all_figures(stored, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "ScoreOptions", partial(ScoreOptions, random_draws=4, images_removed=2))  # or minutes
    out = tmp_path / "deep" / "score.json"
    main(["score", str(stored[0]), "--count", "8", "--shortcuts", "true", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "8 images of 64 px" in printed
    assert "| learned | plain | 48 |" in printed
    assert "own: better than random clusters for" in printed
    assert "Clusters outside the object whose removal moves a logit:" in printed
    record = json.loads(out.read_text())
    assert len(record["rows"]) == 21
    assert record["images"] == 8
    assert str(tmp_path) not in out.read_text()
