"""How much of the images per second of a loop over ready batches is left when images are fed from files.

    python benchmarks/feeding.py --data flowers --out results/feeding.json

Steps of GIFT on the backbone that ships, batches of 32: over batches that lie in memory as tensors, and over what
`gift train` feeds (decoded once, cropped and mirrored at random, normalised, collated), in turn.
"""

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from peft import get_peft_model
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.interleaved import environment, estimate, interleave, ratio, write_json
from gift import GiftConfig
from gift.data.feeding import FeedingOptions, ImageItems
from gift.data.splits import SplitOptions, read_splits
from gift.pretrained import load_backbone, read_geometry

BATCH = 32


def timed_loop(model: Any, batches: Callable[[], Iterable[dict[str, Any]]], steps: int) -> Callable[[], float]:
    """Return what trains for some steps and gives images per second."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def run() -> float:
        started = time.perf_counter()
        for _, batch in zip(range(steps), batches(), strict=False):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return steps * BATCH / (time.perf_counter() - started)

    return run


def main(data: str, out: Path, rounds: int = 15, steps: int = 25) -> None:
    """Measure and write.

    Args:
        data: Folder of images.
        out: JSON file to write.
        rounds: How often both loops are run.
        steps: Of each loop.
    """
    splits = read_splits(data, SplitOptions())
    items = ImageItems(splits.train, read_geometry("small"), True, FeedingOptions())
    model = get_peft_model(load_backbone("small", splits.class_names), GiftConfig()).train()
    loader = DataLoader(items, BATCH, shuffle=True, drop_last=True)
    ready = [batch for _, batch in zip(range(steps), loader, strict=False)]
    loops = {"in memory": timed_loop(model, lambda: ready, steps), "fed": timed_loop(model, lambda: loader, steps)}
    values = interleave(loops, rounds)
    share = ratio(values["fed"], values["in memory"])
    speeds = {name: estimate(of_loop)._asdict() for name, of_loop in values.items()}
    write_json(out, {"images per second": speeds, "fed / in memory": share._asdict(), "environment": environment()})
    print(f"fed / in memory: {share}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
