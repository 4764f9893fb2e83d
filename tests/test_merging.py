"""`gift merge`: the written model gives the adapter's logits in the library that it is for."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from gift import SMALL_BACKBONE, explain_images
from gift.adapters import load_adapter
from gift.cli import main
from gift.data.geometry import Preparation
from gift.explain.assignments import Assignments
from gift.explain.readings import Reading
from gift.merging import merge
from gift.training.options import TrainOptions
from gift.training.train import train
from tests.training.pictures import CLASSES, make_backbone, make_pictures

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return runs on the small backbone (of timm) by name, made when they are asked for."""
    folder = tmp_path_factory.mktemp("runs")
    pictures = make_pictures(folder / "pictures", per_class=3)

    def run(method, **options):
        where = Path(options.pop("output_dir", folder / f"{method}-{options.get('model', 'small').rpartition('/')[2]}"))
        given = {"epochs": 1, "batch_size": 8, "learning_rate": 0.01, "progress": False, "method": method}
        train(TrainOptions(data=str(pictures), output_dir=str(where), **(given | options)))
        return where

    return run


@torch.no_grad()
def logits_of(run, images=IMAGES):
    return load_adapter(run).model(pixel_values=images).logits


@pytest.mark.parametrize("method", ["gift", "lora", "bitfit", "linear-probe", "full"])
def test_transformers_loads_it_with_equal_logits_names_and_processor(method, runs, tmp_path):
    run = runs(method)
    assert merge(run, tmp_path / "merged") <= 1e-4
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    assert (model(IMAGES).logits - logits_of(run)).abs().max() < 1e-4
    assert [model.config.id2label[number] for number in range(3)] == list(CLASSES)
    assert AutoImageProcessor.from_pretrained(tmp_path / "merged").data_config["input_size"][-1] == 64
    assert load_adapter(tmp_path / "merged").classifier.class_names == CLASSES


@pytest.mark.parametrize("method", ["gift", "full"])
def test_timm_loads_it_with_equal_logits_and_its_clusters_are_found(method, runs, tmp_path):
    run = runs(method)
    merge(run, tmp_path / "merged", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
    assert (model(IMAGES) - logits_of(run)).abs().max() < 1e-4
    assert model.pretrained_cfg["label_names"] == list(CLASSES)
    if method == "gift":
        reading = Reading(assignments=Assignments.load(tmp_path / "merged"))
        maps, before = explain_images(model, IMAGES, reading=reading), explain_images(load_adapter(run).model, IMAGES)
        assert abs(maps.maps - before.maps).max() < 1e-4 * abs(before.maps).max()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gift", "bitfit"])
def test_onnxruntime_gives_equal_logits_for_any_batch(method, runs, tmp_path):
    run = runs(method)
    merge(run, tmp_path / "merged", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "merged" / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixel_values": IMAGES.numpy()})
    assert (torch.from_numpy(logits) - logits_of(run)).abs().max() < 1e-4
    assert json.loads((tmp_path / "merged" / "labels.json").read_text())["2"] == CLASSES[2]


def test_a_model_of_transformers_is_stored_with_its_processor_and_is_none_of_timms(runs, tmp_path):
    run = runs("gift", model=str(make_backbone(tmp_path / "vit")))
    merge(run, tmp_path / "merged")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "merged")
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (37, 32)
    with pytest.raises(ValueError, match="is no model of timm"):
        merge(run, tmp_path / "other", "timm")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("other")] == []


@pytest.mark.parametrize("method", ["vpt-deep", "toast-lite"])
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(method, runs, tmp_path):
    with pytest.raises(ValueError, match="cannot be merged"):
        merge(runs(method), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_touched(runs, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not an empty folder"):
        merge(runs("lora"), tmp_path / "merged")
    assert (tmp_path / "merged" / "mine.txt").read_text() == "mine"


def test_the_command_says_how_far_the_logits_are(runs, tmp_path, capsys):
    main(["merge", str(runs("lora")), str(tmp_path / "merged")])
    assert "its logits differ by" in capsys.readouterr().out
    assert "model.safetensors" in {path.name for path in (tmp_path / "merged").iterdir()}
    assert SMALL_BACKBONE.exists()


def test_info_says_method_size_classes_and_accuracy(runs, capsys):
    run = runs("gift")
    main(["info", str(run)])
    printed = capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text())
    assert "method      gift" in printed
    assert "r 16, generator paca, num_clusters 96" in printed
    assert (
        f"{metrics['trained_parameters']:,} ({metrics['trained_parameters_without_head']:,} without the head)"
        in printed
    )
    assert "3: across, down, plain" in printed
    assert "backbone    small" in printed


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("form", ["transformers", "timm"])
def test_merged_models_take_images_as_the_run_did(form, resize, runs, tmp_path):
    merge(runs("linear-probe", resize=resize, output_dir=str(tmp_path / "run")), tmp_path / "merged", form)
    smooth = np.linspace(0, 255, 90 * 60 * 3).reshape(90, 60, 3).astype(np.uint8)
    picture = Image.fromarray(smooth)
    preparation = Preparation(load_adapter(tmp_path / "run").classifier.geometry, train=False)
    expected = preparation.normalised(preparation.kept(picture))
    if form == "timm":
        config = timm.data.resolve_model_data_config(
            timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True)
        )
        got = timm.data.create_transform(**config, is_training=False)(picture)
    else:
        got = AutoImageProcessor.from_pretrained(tmp_path / "merged")(picture, return_tensors="pt")["pixel_values"][0]
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 0.1


def test_a_model_of_transformers_has_the_processor_of_its_run(tmp_path):
    pictures, backbone = make_pictures(tmp_path / "pictures", per_class=3), make_backbone(tmp_path / "vit")
    given = {"epochs": 1, "batch_size": 8, "progress": False, "method": "linear-probe", "resize": "squash"}
    train(TrainOptions(data=str(pictures), model=str(backbone), output_dir=str(tmp_path / "run"), **given))
    merge(tmp_path / "run", tmp_path / "merged")
    picture = Image.fromarray(np.linspace(0, 255, 50 * 40 * 3).reshape(50, 40, 3).astype(np.uint8))
    preparation = Preparation(load_adapter(tmp_path / "run").classifier.geometry, train=False)
    got = AutoImageProcessor.from_pretrained(tmp_path / "merged")(picture, return_tensors="pt")["pixel_values"][0]
    assert (got - preparation.normalised(preparation.kept(picture))).abs().max() < 0.1
