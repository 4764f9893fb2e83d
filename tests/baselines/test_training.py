"""The baselines through `gift.finetune`: they learn, survive being killed, and reload."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from gift.baselines.methods import method_config
from gift.training.arguments import FinetuneOptions
from gift.training.finetune import finetune
from gift.training.saver import CheckpointSaver
from tests.models import make_images
from tests.training.killed_run import Stripes, make_backbone

OPTIONS = {"lora": {"r": 2}, "dora": {"r": 2}, "vera": {"r": 8}}
METHODS = ("bitfit", "lora", "dora", "vera", "vpt-shallow", "vpt-deep", "toast", "toast-lite")
TYPES = {"vpt-shallow": "VPT", "vpt-deep": "VPT", "toast": "TOAST", "toast-lite": "TOAST", "dora": "LORA"}


class Killed(Exception):
    """Stands for a kill inside one process."""


def make_timm_backbone():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "drop_path_rate": 0.3}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=3, model_args=sizes)
    return TimmWrapperForImageClassification(config)


BACKBONES = {"ViT": make_backbone, "timm": make_timm_backbone}


def run(folder, method, make, **changes):
    few = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "progress": False}
    backbone = make()
    config = method_config(method, backbone, OPTIONS.get(method, {}))
    return finetune(backbone, config, Stripes(), Stripes(9), FinetuneOptions(folder, **(few | changes)))


def adapter_bytes(folder):
    return (Path(folder) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_with_the_same_bits_and_its_adapter_reloads_to_them(method, backbone, tmp_path, monkeypatch):
    make, original, calls = BACKBONES[backbone], CheckpointSaver.on_epoch_end, []
    result = run(tmp_path / "whole", method, make)

    def raise_in_the_second_epoch(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(CheckpointSaver, "on_epoch_end", raise_in_the_second_epoch)
    with pytest.raises(Killed):
        run(tmp_path / "killed", method, make)
    monkeypatch.undo()
    assert list((tmp_path / "killed" / "checkpoints").glob("*/complete.json"))
    run(tmp_path / "killed", method, make)
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole")
    reloaded = PeftModel.from_pretrained(make(), str(result.adapter_dir)).eval()
    assert torch.equal(result.model(make_images()).logits, reloaded(make_images()).logits)
    assert result.metrics["method"] == TYPES.get(method, method.upper())


@pytest.mark.parametrize("method", METHODS)
def test_every_baseline_learns(method, tmp_path):
    rates = {"epochs": 15, "learning_rate": 0.02, "head_learning_rate": 0.03}
    assert run(tmp_path, method, make_backbone, **rates).metrics["accuracy"] > 0.6


def test_the_trained_weights_are_counted_without_the_head(tmp_path):
    metrics = run(tmp_path, "vpt-deep", make_backbone, epochs=1).metrics
    assert metrics["trained_parameters_without_head"] == 2 * 5 * 32
    assert metrics["trained_parameters"] == 2 * 5 * 32 + 3 * 33


def test_a_complete_run_is_loaded_and_not_repeated(tmp_path):
    first = run(tmp_path, "toast-lite", make_backbone)
    again = run(tmp_path, "toast-lite", make_backbone)
    assert again.metrics == first.metrics
    assert torch.equal(again.model(make_images()).logits, first.model(make_images()).logits)


@pytest.mark.slow
def test_no_weight_is_unused_when_two_processes_train(tmp_path):
    """DDP with `find_unused_parameters=False` raises in the second step if one is."""
    methods = ["bitfit", "vpt-shallow", "vpt-deep", "toast", "toast-lite"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "tests.baselines.test_training", str(tmp_path), *methods]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / method / "metrics.json").exists() for method in methods)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        run(Path(sys.argv[1]) / name, name, make_backbone)
