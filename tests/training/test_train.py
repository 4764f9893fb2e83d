"""`gift train` on folders of pictures: what it leaves, every method, resuming, and what it refuses."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from gift.adapters import load_adapter
from gift.baselines.methods import METHODS
from gift.cli import main
from gift.data.feeding import FeedingOptions, ImageItems
from gift.data.geometry import Geometry
from gift.data.splits import SplitOptions, read_splits
from gift.evaluation import evaluate_adapter
from gift.training import train as train_file
from gift.training.options import TrainOptions
from gift.training.saver import CheckpointSaver
from gift.training.train import train
from tests.training.pictures import CLASSES, copy_of, make_backbone, make_pictures
from tests.training.test_finetune import Killed, interrupt

OPTIONS = {"epochs": 1, "batch_size": 8, "learning_rate": 0.01, "progress": False, "resize": "squash"}
SMALLER = {"gift": {"r": 4, "num_clusters": 6}}


def run(pictures, backbone, out, **changes):
    given = {"data": str(pictures), "model": str(backbone), "output_dir": str(out), **OPTIONS}
    return train(TrainOptions(**(given | {"method_options": SMALLER["gift"]} | changes)))


def logits_of(model, count=4):
    return model(pixel_values=torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))).logits


def test_one_folder_holds_all_there_is_to_know_of_a_run(pictures, backbone, tmp_path):
    result = run(pictures, backbone, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "adapter",
        "config.yaml",
        "curves.png",
        "evaluation.json",
        "log.jsonl",
        "metrics.json",
        "run.json",
        "run_of.json",
    }
    about = json.loads((tmp_path / "run" / "run_of.json").read_text())
    assert about["classes"] == list(CLASSES)
    assert about["images"] == {"train": 21, "validation": 3, "test": 24}
    assert {"torch", "peft", "gift-peft"} <= set(about["versions"])
    assert len(about["commit"].rstrip("+")) == 40
    stored = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert stored["test"]["accuracy"] == result.evaluations["test"].accuracy
    assert np.asarray(Image.open(tmp_path / "run" / "curves.png")).std() > 1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_what_it_stores_predicts_the_same(method, pictures, backbone, tmp_path):
    result = run(pictures, backbone, tmp_path / "run", method=method, method_options=SMALLER.get(method, {}))
    loaded = load_adapter(tmp_path / "run")
    assert torch.equal(logits_of(loaded.model), logits_of(result.run.model))
    assert loaded.classifier.class_names == CLASSES
    assert loaded.classifier.method == method
    assert not loaded.model.training
    metrics = result.run.metrics
    assert metrics["trained_parameters"] >= metrics["trained_parameters_without_head"] + 32 * 3 + 3


def test_any_other_method_of_peft_can_be_named(pictures, backbone, tmp_path):
    run(
        pictures,
        backbone,
        tmp_path / "run",
        method="ia3",
        method_options={"target_modules": ["attention.v_proj"], "feedforward_modules": []},
    )
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["peft_type"] == "IA3"


def test_training_learns_stripes_and_more_than_the_start_knows(pictures, backbone, tmp_path):
    start = run(pictures, backbone, tmp_path / "start", learning_rate=0.0, method="full", method_options={})
    learned = run(
        pictures,
        backbone,
        tmp_path / "run",
        epochs=8,
        method="full",
        method_options={},
        learning_rate=3e-3,
        augment="none",
    )
    assert learned.evaluations["test"].accuracy > max(0.8, start.evaluations["test"].accuracy)


def test_the_card_says_how_the_adapter_is_loaded_and_that_code_runs(backbone, pictures, tmp_path, monkeypatch):
    result = run(pictures, backbone, tmp_path / "run")
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "import gift" in card
    assert f"{100 * result.evaluations['test'].accuracy:.2f} %" in card
    (code,) = [part.partition("```")[0] for part in card.split("```python\n")[1:]]
    names = {}
    exec(code.replace("this/folder", str(tmp_path / "run" / "adapter")), names)
    assert torch.equal(logits_of(names["model"]), logits_of(result.run.model))


def test_an_adapter_of_the_small_backbone_names_no_path_of_this_machine(pictures, tmp_path):
    train(TrainOptions(data=str(pictures), output_dir=str(tmp_path / "run"), method="linear-probe", **OPTIONS))
    text = "".join(path.read_text() for path in (tmp_path / "run" / "adapter").glob("*.[jm][sd]*"))
    assert "vit_64px" not in text
    assert "site-packages" not in text
    assert json.loads((tmp_path / "run" / "adapter" / "classifier.json").read_text())["backbone"] == "small"
    assert load_adapter(tmp_path / "run").image_size_px == 64


def test_a_run_that_was_killed_before_its_last_files_gets_them(pictures, backbone, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("gift.training.train._write_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(pictures, backbone, tmp_path / "run")
    monkeypatch.setattr("gift.training.loop.AdapterTrainer.training_step", lambda *_, **__: pytest.fail("a step"))
    run(pictures, backbone, tmp_path / "run")
    assert (tmp_path / "run" / "adapter" / "classifier.json").exists()
    assert (tmp_path / "run" / "config.yaml").exists()


def test_a_complete_run_keeps_what_it_was_trained_with(pictures, backbone, tmp_path, monkeypatch):
    run(pictures, backbone, tmp_path / "run")
    about = (tmp_path / "run" / "run_of.json").read_text()
    monkeypatch.setattr(train_file, "package_commit", lambda: "of today")
    run(pictures, backbone, tmp_path / "run")
    assert (tmp_path / "run" / "run_of.json").read_text() == about
    run(pictures, backbone, tmp_path / "run", resume=False)
    assert json.loads((tmp_path / "run" / "run_of.json").read_text())["commit"] == "of today"


def test_the_processes_that_read_images_read_those_to_measure_on_too(pictures, backbone, tmp_path, monkeypatch):
    evaluate_model, workers = train_file.evaluate_model, []
    monkeypatch.setattr(train_file, "evaluate_model", lambda *given: workers.append(given[4]) or evaluate_model(*given))
    run(pictures, backbone, tmp_path / "run", workers=1)
    assert workers == [1, 1]


def test_a_head_for_other_classes_is_replaced_and_one_that_fits_is_kept(pictures, backbone, tmp_path):
    fitting = make_backbone(tmp_path / "fitting", num_labels=3)
    result = run(pictures, fitting, tmp_path / "run", learning_rate=0.0, method="full", method_options={})
    again = run(
        pictures, tmp_path / "run" / "model", tmp_path / "again", learning_rate=0.0, method="full", method_options={}
    )
    assert torch.equal(logits_of(again.run.model), logits_of(result.run.model))
    assert run(pictures, backbone, tmp_path / "other").run.model.config.num_labels == 3


def test_damaged_images_stop_training_or_are_left_out_and_named(pictures, backbone, tmp_path):
    data = copy_of(pictures, tmp_path / "data")
    (data / "train" / "down" / "3.png").write_bytes((data / "train" / "down" / "3.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"3\.png cannot be decoded"):
        run(data, backbone, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    result = run(data, backbone, tmp_path / "run", skip_damaged=True, validation_share=0)
    assert [name.endswith("down/3.png") for name, _ in result.skipped] == [True]
    assert "3.png" in json.loads((tmp_path / "run" / "run_of.json").read_text())["skipped"][0][0]


def spoil(data, case):
    down = data / "train" / "down"
    if case == "empty folder":
        shutil.rmtree(data)
        data.mkdir()
    elif case == "one class":
        for name in ("across", "plain"):
            shutil.rmtree(data / "train" / name)
            shutil.rmtree(data / "test" / name)
    elif case == "class only in the test set":
        shutil.rmtree(down)
    elif case == "unreadable":
        (down / "0.png").write_text("no image at all")
    elif case == "16-bit":
        Image.fromarray(np.zeros((36, 36), np.uint16)).save(down / "0.png")
    elif case == "animated":
        frames = [Image.new("RGB", (36, 36), color) for color in ("red", "blue")]
        (down / "0.png").unlink()
        frames[0].save(down / "0.gif", save_all=True, append_images=frames[1:])
    elif case == "huge":
        Image.new("1", (20_000, 20_000)).save(down / "0.png")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("empty folder", "holds no|no images"),
        ("one class", "one class"),
        ("class only in the test set", "down"),
        ("unreadable", r"0\.png cannot be decoded: it is no image"),
        ("16-bit", r"0\.png has more than 8 bits a channel"),
        ("animated", r"0\.gif is animated"),
        ("huge", r"0\.png is too large"),
    ],
)
def test_bad_data_are_refused_in_their_own_words_before_anything_is_written(
    case, message, pictures, backbone, tmp_path
):
    data = copy_of(pictures, tmp_path / "data")
    spoil(data, case)
    with pytest.raises(ValueError, match=message):
        run(data, backbone, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1", "LA"])
def test_pictures_of_other_kinds_are_taken_as_the_rgb_they_show(mode, pictures, tmp_path):
    data = copy_of(pictures, tmp_path / "data")
    for name in CLASSES:
        suffix = "tif" if mode == "CMYK" else "png"
        picture = Image.open(data / "train" / name / "0.png").convert("L").convert("RGB" if mode == "CMYK" else mode)
        (data / "train" / name / "0.png").unlink()
        picture.convert(mode).save(data / "train" / name / f"0.{suffix}")
    geometry = Geometry(32, (0.5,) * 3, (0.5,) * 3, augment="none")
    items = ImageItems(
        read_splits(str(data), SplitOptions(validation_share=0)).train, geometry, False, FeedingOptions()
    )
    kinds = [item["pixel_values"] for item in (items[index] for index in range(len(items)))]
    greys = [pixels for pixels in kinds if torch.allclose(pixels[0], pixels[2], atol=0.02)]
    assert len(greys) >= 3
    assert all(pixels.std() > 0.1 for pixels in greys)


def test_a_folder_that_cannot_be_written_is_said(pictures, backbone):
    with pytest.raises((OSError, ValueError), match="Nothing can be written into /sys/gift-run"):
        run(pictures, backbone, "/sys/gift-run")


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(pictures, backbone, tmp_path):
    words = ["train", "--data", str(pictures), "--model", str(backbone), "--method", "lora", "--progress", "false"]
    words += ["--epochs", "3", "--batch_size", "8", "--output_dir"]
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000));"
    code = f"import sys; from gift.cli import main; {limited} main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "could not be written" in done.stderr.splitlines()[-1]
    assert "Is the disk full?" in done.stderr.splitlines()[-1]
    main([*words, str(tmp_path / "run")])
    main([*words, str(tmp_path / "whole")])
    weights = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no/such-model-anywhere"}, "The model no/such-model-anywhere cannot be loaded"),
        ({"method": "lroa"}, "Did you mean 'lora'"),
        ({"method_options": {"rr": 3}}, "gift has no option 'rr'"),
        ({"drop_path": 0.1}, "has no drop path"),
        ({"augment": "all"}, "Unknown augment 'all'"),
        ({"validation_share": 1.5}, "validation_share must be less than 1"),
        ({"data": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_written(changes, message, pictures, backbone, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(pictures, backbone, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_validation_images_are_trained_on_only_when_told_to(pictures, backbone, tmp_path):
    both = run(pictures, backbone, tmp_path / "run", train_on_validation=True)
    assert set(both.evaluations) == {"test"}
    assert json.loads((tmp_path / "run" / "run_of.json").read_text())["images"]["train"] == 24


def test_a_zip_of_the_pictures_trains_to_the_same_bits(pictures, backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.make_archive(str(tmp_path / "stripes"), "zip", pictures)
    folder = run(pictures, backbone, tmp_path / "one")
    zipped = run(tmp_path / "stripes.zip", backbone, tmp_path / "two")
    assert torch.equal(logits_of(folder.run.model), logits_of(zipped.run.model))


def test_a_backbone_stored_by_timm_itself_can_be_trained(pictures, tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **sizes), str(tmp_path / "timm"), safe_serialization=True)
    result = run(pictures, tmp_path / "timm", tmp_path / "run", drop_path=0.1)
    assert result.run.model.config.num_labels == 3
    assert torch.equal(logits_of(load_adapter(tmp_path / "run").model), logits_of(result.run.model))


def test_options_of_a_run_are_written_so_that_a_recipe_repeats_it(pictures, backbone, tmp_path):
    result = run(pictures, backbone, tmp_path / "run")
    main(["train", "--config", str(tmp_path / "run" / "config.yaml"), "--output_dir", str(tmp_path / "again")])
    assert torch.equal(logits_of(load_adapter(tmp_path / "again").model), logits_of(result.run.model))


def test_pictures_for_the_tests_differ_by_their_seed(tmp_path):
    one, other = (make_pictures(tmp_path / str(seed), per_class=1, splits=(), seed=seed) for seed in (0, 1))
    assert (one / "down" / "0.png").read_bytes() != (other / "down" / "0.png").read_bytes()


def test_weights_that_are_missing_are_not_made_up(pictures, backbone, tmp_path):
    damaged = copy_of(backbone, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    lost = next(name for name in weights if "layer.0.attention" in name)
    save_file({name: weight for name, weight in weights.items() if name != lost}, damaged / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks weights of its own.*layers\.0\.attention"):
        run(pictures, damaged, tmp_path / "run")


def test_a_size_that_the_backbone_does_not_take_is_refused(pictures, backbone, tmp_path):
    with pytest.raises(ValueError, match="does not take images of 48 px"):
        run(pictures, backbone, tmp_path / "run", image_size_px=48)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes", [{"resize": "crop"}, {"drop_path": 0}, {"augment": "none"}, {"train_on_validation": True}], ids=str
)
def test_a_run_is_not_taken_for_one_of_other_data_options(changes, pictures, tmp_path):
    given = {"data": str(pictures), "method": "linear-probe", **OPTIONS, "drop_path": 0.1}
    train(TrainOptions(output_dir=str(tmp_path / "run"), **given))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a run of other options"):
        train(TrainOptions(output_dir=str(tmp_path / "run"), **(given | changes)))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("change", ["renamed classes", "another image"])
def test_a_run_is_not_taken_for_one_of_other_images(change, pictures, backbone, tmp_path):
    data = copy_of(pictures, tmp_path / "data")
    run(data, backbone, tmp_path / "run")
    for split in ("train", "test"):
        if change == "renamed classes":
            (data / split / "down").rename(data / split / "downwards")
        else:
            (data / split / "down" / "3.png").rename(data / split / "down" / "x.png")
    with pytest.raises(ValueError, match="holds a run of other options: data"):
        run(data, backbone, tmp_path / "run")
    assert load_adapter(tmp_path / "run").classifier.class_names == CLASSES
    with pytest.raises(ValueError, match="have changed since it was trained"):
        evaluate_adapter(tmp_path / "run")


def test_tensorboard_has_its_own_folder_and_the_run_ends_as_any_other(pictures, backbone, tmp_path):
    plain = run(pictures, backbone, tmp_path / "plain")
    result = run(pictures, backbone, tmp_path / "run", tensorboard=True)
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert torch.equal(logits_of(plain.run.model), logits_of(result.run.model))


@pytest.mark.parametrize(
    "changes", [{"method": "lora", "method_options": {}, "diversity": 1}, {"method_options": {"r": 2.5}}]
)
def test_what_cannot_be_trained_deletes_no_earlier_run(changes, pictures, backbone, tmp_path):
    run(pictures, backbone, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"no GIFT adapter|r must be|do not fit"):
        run(pictures, backbone, tmp_path / "run", resume=False, **changes)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_head_that_would_not_be_stored_is_refused(pictures, backbone, tmp_path):
    with pytest.raises(ValueError, match="modules_to_save must name the head, classifier"):
        run(pictures, backbone, tmp_path / "run", method_options={"modules_to_save": []})


def test_a_run_does_not_lie_among_its_images(pictures, backbone, tmp_path):
    data = copy_of(pictures, tmp_path / "data")
    with pytest.raises(ValueError, match="lies inside the data"):
        run(data, backbone, data / "run")


def test_options_of_a_wrong_type_are_an_error_of_the_options(pictures, backbone, tmp_path):
    with pytest.raises(ValueError, match="do not fit"):
        run(pictures, backbone, tmp_path / "run", method="lora", method_options={"r": "abc"})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_workers_draw_the_same_crops_in_a_run_that_was_killed(pictures, backbone, tmp_path, monkeypatch):
    options = {"epochs": 3, "workers": 2}
    run(pictures, backbone, tmp_path / "whole", **options)
    interrupt(monkeypatch, CheckpointSaver, "on_epoch_end", 1)
    with pytest.raises(Killed):
        run(pictures, backbone, tmp_path / "killed", **options)
    run(pictures, backbone, tmp_path / "killed", **options)
    weights = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("killed", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_two_processes_of_torchrun_train_one_run(pictures, backbone, tmp_path):
    """The same images per step as in one process: the same predictions but for rounding, written and told once."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said, logits, losses = {}, {}, {}
    for name, launcher in {"one": [], "two": torchrun}.items():
        options = {"data": pictures, "model": backbone, "output_dir": tmp_path / name} | OPTIONS
        options |= {"augment": "none", "train_on_validation": True, "epochs": 2}
        words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
        words += ["--method_options.r=4", "--method_options.num_clusters=6"]
        command = [sys.executable, *launcher, "-m", "gift", "train", *words]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        said[name] = finished.stdout.splitlines()
        logits[name] = logits_of(load_adapter(tmp_path / name).model)
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses[name] = [entry["loss"] for entry in log if "loss" in entry]
    assert torch.allclose(logits["one"], logits["two"], atol=1e-5)
    assert losses["one"] == pytest.approx(losses["two"], abs=1e-5)
    assert losses["two"][1] < losses["two"][0]
    assert len(said["one"]) == len(said["two"]) > 1


def test_the_accuracy_of_every_epoch_is_told_once(pictures, backbone, tmp_path):
    told = []
    given = {"data": str(pictures), "model": str(backbone), "output_dir": str(tmp_path / "run")} | OPTIONS
    options = TrainOptions(**given | {"epochs": 3, "evaluate_every_epoch": True, "method": "linear-probe"})
    result = train(options, lambda *of_epoch: told.append(of_epoch))
    assert [epoch for epoch, _ in told] == [1, 2, 3]
    assert told[-1][1] == result.run.metrics["accuracy"]


def test_test_images_are_not_looked_at_if_they_are_not_to_be(pictures, backbone, tmp_path):
    copy = copy_of(pictures, tmp_path / "pictures")
    (copy / "test" / "down" / "0.png").write_bytes(b"damaged")
    given = {"method": "linear-probe", "method_options": {}}
    assert list(run(copy, backbone, tmp_path / "run", evaluate_test=False, **given).evaluations) == ["validation"]
    with pytest.raises(ValueError, match=r"0.png"):
        run(copy, backbone, tmp_path / "other", **given)


def test_the_commit_is_marked_if_files_of_the_package_were_changed(monkeypatch):
    answers = {"rev-parse": "abc\n", "status": ""}
    monkeypatch.setattr(train_file.subprocess, "run", lambda words, **named: SimpleNamespace(stdout=answers[words[3]]))
    assert train_file.package_commit() == "abc"
    answers["status"] = " M src/gift/cli.py\n"
    assert train_file.package_commit() == "abc+"
