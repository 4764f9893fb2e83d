"""`gift evaluate` and `gift predict` on stored classifiers."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gift.adapters import load_adapter
from gift.cli import main
from gift.data.decoding import open_upright
from gift.data.geometry import Preparation
from gift.evaluation import evaluate_adapter, predict_images
from gift.training.options import TrainOptions
from gift.training.train import train
from tests.training.pictures import CLASSES, copy_of, make_backbone, make_pictures


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the pictures and a run on them."""
    folder = tmp_path_factory.mktemp("trained")
    pictures, backbone = make_pictures(folder / "pictures"), make_backbone(folder / "backbone")
    options = {"epochs": 3, "batch_size": 8, "learning_rate": 0.01, "progress": False, "resize": "squash"}
    result = train(TrainOptions(data=str(pictures), model=str(backbone), output_dir=str(folder / "run"), **options))
    return pictures, folder / "run", result


def test_a_run_is_evaluated_again_to_the_same_figures(trained):
    _, run, result = trained
    name, evaluation = evaluate_adapter(run)
    assert name == "test"
    assert evaluation.confusion == result.evaluations["test"].confusion
    assert evaluate_adapter(run, split="validation")[1].confusion == result.evaluations["validation"].confusion


def test_a_folder_with_some_of_the_classes_is_scored_by_their_names(trained, tmp_path):
    pictures, run, result = trained
    for name in CLASSES[1:]:
        shutil.copytree(pictures / "test" / name, tmp_path / "some" / "test" / name)
        shutil.copytree(pictures / "train" / name, tmp_path / "some" / "train" / name)
    _, evaluation = evaluate_adapter(run, str(tmp_path / "some"))
    assert evaluation.confusion[0] == [0, 0, 0]
    assert evaluation.confusion[1:] == result.evaluations["test"].confusion[1:]


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"down": "sideways"}, "It does not know sideways"),
        ({"down": "0", "plain": "1", "across": "2"}, "does not know 0, 1, 2"),
    ],
)
def test_classes_that_the_head_does_not_know_are_refused(rename, message, trained, tmp_path):
    pictures, run, _ = trained
    data = copy_of(pictures, tmp_path / "data")
    for split in ("train", "test"):
        for old, new in rename.items():
            (data / split / old).rename(data / split / new)
    with pytest.raises(ValueError, match=message):
        evaluate_adapter(run, str(data))


@pytest.mark.parametrize(
    ("given", "message"),
    [({"split": "tset"}, "Unknown split 'tset'"), ({"adapter": "/nowhere"}, "/nowhere holds no adapter")],
)
def test_what_cannot_be_evaluated_is_said(given, message, trained):
    with pytest.raises(ValueError, match=message):
        evaluate_adapter(**({"adapter": trained[1]} | given))


def test_damaged_images_are_left_out_as_in_training_or_where_so_asked(trained, tmp_path, capsys):
    _, run, result = trained
    pictures = copy_of(trained[0], tmp_path / "pictures")
    (pictures / "test" / "down" / "0.png").write_bytes(b"")
    options = {"data": str(pictures), "model": str(make_backbone(tmp_path / "backbone")), "progress": False}
    own = train(TrainOptions(output_dir=str(tmp_path / "run"), epochs=1, skip_damaged=True, **options))
    assert evaluate_adapter(tmp_path / "run")[1].confusion == own.evaluations["test"].confusion
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--data", str(pictures)])
    assert "--skip_damaged true" in capsys.readouterr().err
    main(["evaluate", str(run), "--data", str(pictures), "--skip_damaged", "true"])
    assert "of 23 images" in capsys.readouterr().out
    assert result.evaluations["test"].images == 24


def test_an_adapter_alone_does_not_know_its_images(trained, tmp_path):
    alone = copy_of(trained[1] / "adapter", tmp_path / "alone")
    with pytest.raises(ValueError, match="no folder of `gift train`"):
        evaluate_adapter(alone)


def test_the_command_prints_every_class_and_writes_all_figures(trained, tmp_path, capsys):
    main(["evaluate", str(trained[1]), "--out", str(tmp_path / "figures.json")])
    printed = capsys.readouterr().out
    stored = json.loads((tmp_path / "figures.json").read_text())
    assert f"test: {100 * stored['accuracy']:.2f} %" in printed
    assert all(f"| {name} | 8 |" in printed for name in CLASSES)
    assert stored["images"] == 24


def test_predictions_are_those_of_the_model_in_the_order_of_the_paths(trained):
    pictures, run, _ = trained
    predictions = predict_images(run, pictures / "test", top=2)
    loaded = load_adapter(run)
    preparation = Preparation(loaded.classifier.geometry, train=False)
    assert [prediction.image for prediction in predictions] == sorted(prediction.image for prediction in predictions)
    assert len(predictions) == 24
    path = pictures / "test" / predictions[5].image
    pixels = preparation.normalised(preparation.kept(open_upright(str(path), path)))[None]
    shares = loaded.model(pixel_values=pixels).logits.softmax(dim=1)[0]
    best = shares.argsort(descending=True)[:2]
    assert [name for name, _ in predictions[5].classes] == [CLASSES[number] for number in best]
    assert [share for _, share in predictions[5].classes] == pytest.approx(shares[best].tolist(), abs=1e-6)


def test_an_accelerator_is_used_where_there_is_one(trained, monkeypatch):
    pictures, run, result = trained
    loaded, moved = load_adapter(run), []
    monkeypatch.setattr("gift.evaluation.load_adapter", lambda *_: loaded)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(loaded.model, "to", moved.append)
    assert evaluate_adapter(run)[1].confusion == result.evaluations["test"].confusion
    assert len(predict_images(run, pictures / "test")) == 24
    assert moved == [torch.device("cuda")] * 2


def test_what_cannot_be_read_is_a_line_of_the_csv_that_says_why(trained, tmp_path, capsys):
    pictures, run, _ = trained
    folder = copy_of(pictures / "test" / "down", tmp_path / "mixed")
    (folder / "0.png").write_bytes(b"")
    Image.new("L", (50, 40)).save(folder / "grey.jpg")
    (folder / "notes.txt").write_text("no image")
    main(["predict", str(run), str(folder), "--out", str(tmp_path / "out.csv")])
    lines = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert "8 images, 1 that could not be read" in capsys.readouterr().out
    assert [line["image"] for line in lines if line["problem"]] == ["0.png"]
    assert "empty" in lines[0]["problem"]
    assert lines[0]["class"] == ""
    assert all(line["class"] in CLASSES for line in lines[1:])
    assert len(lines) == 9


def test_one_image_can_be_predicted_and_a_folder_without_any_is_refused(trained, tmp_path):
    pictures, run, _ = trained
    (prediction,) = predict_images(run, pictures / "test" / "down" / "1.png")
    assert prediction.classes[0][0] in CLASSES
    with pytest.raises(ValueError, match="neither an image nor a folder with images"):
        predict_images(run, tmp_path)


def test_a_whole_fine_tuned_model_predicts_from_its_own_folder(trained, tmp_path):
    pictures = trained[0]
    backbone = make_backbone(tmp_path / "backbone")
    options = {"epochs": 1, "batch_size": 8, "progress": False, "method": "full"}
    result = train(TrainOptions(data=str(pictures), model=str(backbone), output_dir=str(tmp_path / "run"), **options))
    shutil.rmtree(backbone)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_adapter(tmp_path / "run" / "model").model(images).logits, result.run.model(images).logits)
    assert evaluate_adapter(tmp_path / "run")[1].confusion == result.evaluations["test"].confusion


def test_images_are_found_wherever_the_folder_lies(trained, tmp_path, monkeypatch):
    pictures, run, _ = trained
    copy_of(pictures / "test" / "down", tmp_path / ".hidden" / "some pictures")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(predict_images(run, Path("../.hidden/some pictures"))) == 8


def test_an_image_that_is_far_too_long_is_a_line_that_says_so(trained, tmp_path):
    _, run, _ = trained
    (tmp_path / "long").mkdir()
    Image.new("L", (1, 90_000)).save(tmp_path / "long" / "long.png")
    loaded = load_adapter(run)
    geometry = replace(loaded.classifier.geometry, resize="crop")
    replace(loaded.classifier, geometry=geometry).write(copy_of(run, tmp_path / "run") / "adapter")
    (prediction,) = predict_images(tmp_path / "run", tmp_path / "long")
    assert "too long" in prediction.problem


def test_a_file_for_the_predictions_is_asked_for_before_the_work(trained, tmp_path, capsys):
    pictures, run, _ = trained
    with pytest.raises(SystemExit):
        main(["predict", str(run), str(pictures / "test"), "--out", str(tmp_path)])
    assert "is a folder" in capsys.readouterr().err
    main(["predict", str(run), str(pictures / "test"), "--out", str(tmp_path / "new" / "out.csv")])
    assert (tmp_path / "new" / "out.csv").exists()


def test_an_adapter_whose_head_is_lost_is_refused(trained, tmp_path):
    adapter = copy_of(trained[1] / "adapter", tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "classifier" not in name}
    save_file(kept, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="an adapter without a head"):
        load_adapter(adapter)
