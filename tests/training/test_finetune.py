import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, ViTConfig, ViTModel

from gift import GiftConfig
from gift.training.arguments import FinetuneOptions
from gift.training.finetune import finetune, with_head
from gift.training.loop import make_optimizer
from gift.training.saver import CheckpointSaver
from tests.models import make_images
from tests.training import killed_operations, killed_run
from tests.training.killed_run import Stripes, make_backbone, train

GIFT = {"r": 4, "num_clusters": 6}
METHODS = {
    "GIFT": lambda: GiftConfig(**GIFT),
    "LORA": lambda: LoraConfig(r=2, target_modules=["attention.o_proj"]),
    "linear probe": lambda: None,
}


class Killed(Exception):
    """Stands for a kill inside one process."""


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Return the result of an uninterrupted run."""
    return train(tmp_path_factory.mktemp("runs") / "complete")


def options(folder, **changes):
    few = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "progress": False}
    return FinetuneOptions(folder, **(few | changes))


def adapter_bytes(folder):
    return (Path(folder) / "adapter" / "adapter_model.safetensors").read_bytes()


def interrupt(monkeypatch, place, method, at):
    """Raise Killed when a method is called for the time of number `at` (from 0); then restore it."""
    original, calls = getattr(place, method), iter(range(at + 1))

    def raise_later(*args, **kwargs):
        if next(calls) == at:
            monkeypatch.undo()
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(place, method, raise_later)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_its_adapter_reloads_to_the_same_bits(method, tmp_path):
    steps = options(tmp_path, epochs=15, head_learning_rate=0.03)
    result = finetune(make_backbone(), METHODS[method](), Stripes(noise=0.1), Stripes(9), steps)
    reloaded = PeftModel.from_pretrained(make_backbone(), str(result.adapter_dir)).eval()
    assert result.metrics["method"] == method
    assert result.metrics["accuracy"] > 0.6
    assert torch.equal(result.model(make_images()).logits, reloaded(make_images()).logits)


def test_a_timm_backbone_can_be_trained_and_its_checkpoint_continued(tmp_path, monkeypatch):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=3, model_args=sizes)

    def run(folder, adapter):
        torch.manual_seed(0)
        backbone = TimmWrapperForImageClassification(config)
        return finetune(backbone, adapter, Stripes(), None, options(folder))

    for name, adapter in {"gift": GiftConfig(**GIFT), "probe": None}.items():
        run(tmp_path / f"{name} whole", adapter)
        interrupt(monkeypatch, CheckpointSaver, "on_epoch_end", at=1)
        with pytest.raises(Killed):
            run(tmp_path / name, adapter)
        assert (tmp_path / name / "checkpoints" / "checkpoint-4" / "complete.json").exists()
        run(tmp_path / name, adapter)
        assert adapter_bytes(tmp_path / name) == adapter_bytes(tmp_path / f"{name} whole")


def test_metrics_say_what_was_trained_and_how_well(complete):
    metrics = json.loads((complete.adapter_dir.parent / "metrics.json").read_text())
    trained = sum(p.numel() for p in complete.model.parameters() if p.requires_grad)
    assert metrics == complete.metrics
    assert metrics["trained_parameters"] == trained
    assert metrics["trained_parameters_without_head"] == trained - 3 * 33
    assert (metrics["seed"], metrics["options"]["epochs"]) == (0, 4)
    assert 0 <= metrics["accuracy"] <= 1
    assert metrics["versions"]["torch"].startswith("2")


def test_a_finished_folder_holds_no_checkpoints_unless_they_are_wanted(complete, tmp_path):
    train(tmp_path, epochs=2, keep_checkpoints=True)
    finished = {"adapter", "log.jsonl", "metrics.json", "run.json"}
    assert set(os.listdir(complete.adapter_dir.parent)) == finished
    assert set(os.listdir(tmp_path)) == finished | {"checkpoints"}
    assert os.listdir(tmp_path / "checkpoints") == ["checkpoint-10"]


def test_the_log_holds_the_loss_of_every_epoch(complete):
    lines = (complete.adapter_dir.parent / "log.jsonl").read_text().splitlines()
    epochs = [entry["epoch"] for entry in map(json.loads, lines) if "loss" in entry]
    assert epochs == [1, 2, 3, 4]


def test_nothing_is_printed_without_progress(tmp_path, capfd):
    train(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_the_result_does_not_depend_on_what_ran_before_or_how_often_it_is_saved(complete, tmp_path):
    torch.manual_seed(7)
    train(tmp_path, save_every_epochs=3)
    assert adapter_bytes(tmp_path) == complete.adapter_dir.joinpath("adapter_model.safetensors").read_bytes()


def test_head_and_adapter_have_their_own_learning_rates_and_vectors_no_decay():
    model = get_peft_model(make_backbone(), with_head(make_backbone(), GiftConfig(**GIFT)))
    chosen = options("unused", learning_rate=0.1, head_learning_rate=0.2, weight_decay=0.3)
    groups = make_optimizer(model, chosen).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    expected = {
        id(p): (0.2 if "classifier" in name else 0.1, 0.3 if p.ndim > 1 else 0.0)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert found == expected
    assert set(found.values()) >= {(0.2, 0.3), (0.2, 0.0), (0.1, 0.3)}


def test_the_head_is_left_alone_if_the_configuration_says_so(tmp_path):
    config = LoraConfig(r=2, target_modules=["attention.o_proj"], modules_to_save=[])
    metrics = finetune(make_backbone(), config, Stripes(8), None, options(tmp_path, epochs=1)).metrics
    assert metrics["trained_parameters"] == metrics["trained_parameters_without_head"] == 2 * 2 * 2 * 32
    assert metrics["accuracy"] is None


# ---- continuing ------------------------------------------------------------------------------------------------------


def test_a_complete_run_is_not_repeated(complete, monkeypatch):
    interrupt(monkeypatch, killed_run.Stripes, "__getitem__", at=32 + 8)  # both datasets are checked once
    again = train(complete.adapter_dir.parent)
    assert again.metrics == complete.metrics
    assert torch.equal(again.model(make_images()).logits, complete.model(make_images()).logits)
    assert [p.requires_grad for p in again.model.parameters()] == [p.requires_grad for p in complete.model.parameters()]


def test_a_run_of_other_options_is_refused_until_it_may_be_deleted(tmp_path, monkeypatch):
    interrupt(monkeypatch, CheckpointSaver, "on_epoch_end", at=1)
    with pytest.raises(Killed):
        train(tmp_path)
    with pytest.raises(ValueError, match=r"options\.learning_rate was 0\.01, now 0\.5\. Choose another output_dir"):
        train(tmp_path, learning_rate=0.5)
    assert train(tmp_path, learning_rate=0.5, resume=False).metrics["options"]["learning_rate"] == 0.5


def test_other_frozen_weights_are_refused_but_a_new_head_is_not(complete):
    folder = complete.adapter_dir.parent
    chosen = FinetuneOptions(**(complete.metrics["options"] | {"output_dir": folder}))
    backbone = make_backbone()
    backbone.classifier.reset_parameters()
    result = finetune(backbone, GiftConfig(**GIFT), Stripes(), Stripes(8), chosen)
    assert torch.equal(result.model(make_images()).logits, complete.model(make_images()).logits)
    with pytest.raises(ValueError, match="frozen weights was"):
        finetune(make_backbone(seed=1), GiftConfig(**GIFT), Stripes(), Stripes(8), chosen)


def test_an_incomplete_checkpoint_is_deleted_and_the_run_continued_from_the_one_before(complete, tmp_path, monkeypatch):
    interrupt(monkeypatch, torch, "save", at=6)  # each checkpoint saves four files with it
    with pytest.raises(Killed):
        train(tmp_path)
    assert (tmp_path / "checkpoints" / "checkpoint-10" / "adapter_model.safetensors").exists()
    train(tmp_path)
    assert adapter_bytes(tmp_path) == complete.adapter_dir.joinpath("adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_end_with_the_same_adapter_to_the_bit(tmp_path):
    def start(folder, *operation):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, killed_run.__file__, str(folder), *map(str, operation)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    whole = start(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    operations = max(int(line) for line in whole.stdout.split() if line.isdigit())
    assert start(tmp_path / "killed", operations // 2).returncode != 0
    assert not (tmp_path / "killed" / "metrics.json").exists()
    assert list((tmp_path / "killed" / "checkpoints").glob("*/complete.json"))
    assert start(tmp_path / "killed").returncode == 0
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_killed_at_any_file_operation_ends_with_the_same_adapter_to_the_bit(tmp_path, repetitions):
    """Most of these write or delete checkpoints; `test_killed_train` kills at moments of the clock."""
    kills = repetitions(3, 6)
    command = [sys.executable, killed_operations.__file__, str(tmp_path), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, *[-9] * kills, 0]
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole")


# ---- errors ----------------------------------------------------------------------------------------------------------

IMAGE = torch.zeros(3, 32, 32)
WRONG_ITEMS = {
    "must be a mapping with the keys pixel_values and labels, got ['image', 'label']": {"image": IMAGE, "label": 0},
    "must be a mapping with the keys pixel_values and labels, got <class 'tuple'>": (IMAGE, 0),
    "got torch.uint8 (3, 32, 32)": {"pixel_values": IMAGE.byte(), "labels": 0},
    "got torch.float32 (32, 32)": {"pixel_values": IMAGE[0], "labels": 0},
    "others are torch.Size([3, 32, 32])": {"pixel_values": IMAGE[:, :16], "labels": 0},
    "labels must be an int from 0 to 2, as the backbone has 3 classes, got 3": {"pixel_values": IMAGE, "labels": 3},
    "got -1": {"pixel_values": IMAGE, "labels": -1},
    "got 1.0": {"pixel_values": IMAGE, "labels": 1.0},
}


@pytest.mark.parametrize("message", WRONG_ITEMS)
def test_a_wrong_item_is_named_before_training(message, tmp_path):
    items = [{"pixel_values": IMAGE, "labels": 0}, WRONG_ITEMS[message]]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        finetune(make_backbone(), None, Stripes(), items, options(tmp_path))
    assert "Item 1 of the dataset evaluation" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_trained_is_refused(tmp_path):
    headless = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
    with pytest.raises(ValueError, match="ViTModel has no classification head"):
        finetune(headless, None, Stripes(), None, options(tmp_path))
    with pytest.raises(ValueError, match="must be a transformers model"):
        with_head(torch.nn.Linear(2, 2), None)
    backbone = make_backbone()
    finetune(backbone, None, Stripes(8), None, options(tmp_path, epochs=1))
    with pytest.raises(ValueError, match="already has an adapter"):
        finetune(backbone, None, Stripes(8), None, options(tmp_path, epochs=1))


def test_an_empty_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset train is empty"):
        finetune(make_backbone(), None, [], None, options(tmp_path))


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"warmup_ratio": 1.0}, {"schedule": "step"}, {"learning_rate": -1.0}])
def test_an_option_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        options("unused", **wrong)


def test_files_of_others_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("precious")
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"holds no run of finetune \(run.json\)"):
            train(tmp_path, resume=resume)
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "precious"


def test_a_complete_run_is_not_taken_for_one_with_other_labels(tmp_path):
    class OtherStripes(Stripes):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"labels": 0}

    finetune(make_backbone(), None, Stripes(), None, options(tmp_path))
    with pytest.raises(ValueError, match="labels was"):
        finetune(make_backbone(), None, OtherStripes(), None, options(tmp_path))
