"""Fine-tune a tiny ViT in a process that may be killed: `python killed_run.py OUTPUT_DIR [OPERATION]`.

With OPERATION the process kills itself just before its file operation of that number inside OUTPUT_DIR: Python reports
every one, so that a moment in the middle of writing a checkpoint can be named. At the end their number is printed.
"""

import os
import signal
import sys

import torch
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTForImageClassification

from gift import GiftConfig
from gift.training.arguments import FinetuneOptions, FinetuneResult
from gift.training.finetune import finetune

FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"}


class Stripes(Dataset):
    """Images with striped rows (class 0), columns (1) or neither (2), and noise from torch's global generator."""

    def __init__(self, count=32, noise=0.3):
        self.count, self.noise = count, noise

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        stripes = torch.tensor([1.0, -1.0]).repeat_interleave(4).repeat(4)  # [rows]
        image = (stripes[:, None].expand(32, 32), stripes[None].expand(32, 32), torch.zeros(32, 32))[index % 3]
        return {"pixel_values": image.expand(3, 32, 32) + self.noise * torch.randn(3, 32, 32), "labels": index % 3}


def make_backbone(seed=0, **changes):
    """Return an untrained ViT of width 32 with 2 blocks, dropout and 3 classes."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"image_size": 32, "patch_size": 8, "num_labels": 3, "hidden_dropout_prob": 0.1}
    return ViTForImageClassification(ViTConfig(**(sizes | changes)))


def train(output_dir, **changes) -> FinetuneResult:
    """Train 4 epochs of 5 steps (of 4 in two processes)."""
    options = {
        "epochs": 4,
        "batch_size": 8 if "WORLD_SIZE" in os.environ else 7,
        "learning_rate": 0.01,
        "head_learning_rate": 0.02,
        "progress": False,
    }
    return finetune(
        make_backbone(),
        GiftConfig(r=4, num_clusters=6),
        Stripes(),
        Stripes(8),
        FinetuneOptions(output_dir, **(options | {"evaluate_every_epoch": True} | changes)),
    )


def kill_at(output_dir, operation):
    """Kill this process at a file operation inside a folder; count them if that is None."""

    def watch(event, args) -> None:
        if event in FILE_OPERATIONS and str(args[0]).startswith(output_dir):
            watch.count += 1
            if watch.count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    watch.count = 0
    sys.addaudithook(watch)
    return watch


if __name__ == "__main__":
    torch.set_num_threads(1)
    watch = kill_at(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
    train(sys.argv[1])
    if os.environ.get("RANK", "0") == "0":  # which writes; two numbers could come in one line
        print(watch.count)
