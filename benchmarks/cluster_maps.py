"""What cluster maps are worth: adapters trained on drawn flowers, scored against their parts, beside every control.

    python benchmarks/cluster_maps.py --out results/cluster_maps.json --write-docs docs/reading-cluster-maps.md

takes about an hour on one core. Every training and every scoring is kept in `--runs`, so that a stopped run goes on.
"""

import argparse
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cluster_tables import write_tables
from interleaved import environment, write_json
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification, set_seed
from transformers.utils import logging

from gift import SMALL_BACKBONE, FinetuneOptions, GiftConfig, finetune
from gift.data.images import LabelledImages, NormalisedImages
from gift.data.parts import PartImages, draw_parts
from gift.data.rendered import SPECIES
from gift.explain.rows import ScoreOptions
from gift.explain.scoring import Scorer
from gift.explain.shortcuts import ShortcutOptions, find_shortcuts

SIZE_PX, TRAINING, TESTING, EPOCHS = 64, 800, 400, 8
CUE_SPECIES = 2
IMAGES_PER_CLASS = 10  # that regions are removed of


@dataclass(frozen=True)
class Variant:
    """A way to train an adapter; what differs between variants is what sets clusters apart.

    Attributes:
        config: Of the adapter.
        rates: Peak learning rates of adapter and head.
        diversity: Weight of the term that keeps clusters apart.
        blocks: Blocks whose assignments are scored.
        seeds: How many.
        whole: Whether every control and measure is a row.
    """

    config: dict[str, Any]
    rates: tuple[float, float]
    diversity: float = 0.0
    blocks: tuple[int, ...] = (-1,)
    seeds: int = 3
    whole: bool = False

    @property
    def draws(self) -> int:
        """How many sets of random maps say what chance can do."""
        return 10 if self.whole else 6


PACA = {"generator": "paca", "r": 16, "num_clusters": 32}
APART = PACA | {"norm": "layer", "assignment": "softmax", "assignment_gain": 16, "scaling": 10}
VARIANTS = {
    "apart": Variant(APART, (4e-3, 1e-2), seeds=5, whole=True),
    "default": Variant(PACA, (1e-2, 1e-2)),
    "gain 8": Variant(PACA | {"assignment_gain": 8}, (1e-2, 1e-2)),
    "apart, 2 blocks": Variant(APART | {"num_blocks": 2}, (4e-3, 1e-2), blocks=(0, -1)),
    "apart, diversity 1": Variant(APART, (4e-3, 1e-2), diversity=1.0),
    "default, diversity 1": Variant(PACA, (1e-2, 1e-2), diversity=1.0),
    "linear": Variant({"generator": "linear", "r": 16}, (1e-2, 1e-2), seeds=5),
}


@cache
def pixel_statistics() -> tuple[Tensor, Tensor]:
    data = AutoConfig.from_pretrained(SMALL_BACKBONE).pretrained_cfg
    mean, std = (torch.tensor(data[name]) for name in ("mean", "std"))
    return mean, std


def normalise(pixels: np.ndarray) -> Tensor:
    mean, std = (values[:, None, None] for values in pixel_statistics())
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


@cache
def flowers(count: int, seed: int, cue: bool, everywhere: bool = False) -> PartImages:
    return draw_parts(count, seed, SIZE_PX, CUE_SPECIES if cue else None, everywhere)


def items(images: LabelledImages) -> NormalisedImages:
    mean, std = pixel_statistics()
    return NormalisedImages(images, mean.tolist(), std.tolist())


def train(variant: Variant, seed: int, cue: bool, folder: Path) -> tuple[PeftModel, float]:
    """Return the adapter of a seed, trained on flowers that show the cue or not, and its test accuracy."""
    set_seed(seed)  # the head is new
    backbone = AutoModelForImageClassification.from_pretrained(SMALL_BACKBONE, num_labels=len(SPECIES))
    rate, head_rate = variant.rates
    options = FinetuneOptions(
        folder,
        epochs=EPOCHS,
        batch_size=32,
        learning_rate=rate,
        head_learning_rate=head_rate,
        diversity=variant.diversity,
        seed=seed,
        progress=False,
    )
    train_items, test_items = (
        items(flowers(count, index, cue).images) for index, count in enumerate((TRAINING, TESTING))
    )
    result = finetune(backbone, GiftConfig(**variant.config), train_items, test_items, options)
    return result.model, result.metrics["accuracy"]


def run_folder(name: str, seed: int, runs: Path) -> Path:
    return runs / name.replace(" ", "-").replace(",", "").replace("=", "") / str(seed)


def score(name: str, seed: int, runs: Path) -> Iterator[dict[str, Any]]:
    """Yield the scores of every block of a variant for one seed, from the file of an earlier run if there is one."""
    variant, folder = VARIANTS[name], run_folder(name, seed, runs)
    for block in variant.blocks:
        file = folder / f"scores{block}.json"
        if not file.exists():
            model, accuracy = train(variant, seed, False, folder / "run")
            options = ScoreOptions(seed=seed, block=block, whole=variant.whole, random_draws=variant.draws)
            rows = Scorer(model, flowers(TESTING, 1, False), normalise, options).score()
            described = {"variant": name, "seed": seed, "block": block, "accuracy": accuracy}
            write_json(file, described | {"rows": [asdict(row) for row in rows]})
        yield json.loads(file.read_text())


def look_for_cue(seed: int, runs: Path) -> dict[str, Any]:
    """Return the shortcuts of an adapter trained with the cue and of one trained without, on the same test images.

    In these the cue stands in all images of its species, so that both models see it; `importance` is how far the logit
    of that species falls when it is not drawn, which needs no cluster.
    """
    file = run_folder("cue", seed, runs) / "shortcuts.json"
    if not file.exists():
        truth, found = flowers(TESTING, 1, True), {}
        folders = {True: file.parent / "run", False: run_folder("apart", seed, runs) / "run"}
        for cue, folder in folders.items():
            model, _ = train(VARIANTS["apart"], seed, cue, folder)
            options = ShortcutOptions(seed=seed, images_per_class=IMAGES_PER_CLASS)
            listed = find_shortcuts(model, truth, normalise, options)
            found["trained with it" if cue else "trained without it"] = {
                "importance": importance_of_cue(model, truth),
                "shortcuts": [asdict(one) for one in listed],
            }
        write_json(file, {"seed": seed, "species": CUE_SPECIES} | found)
    return json.loads(file.read_text())


@torch.no_grad()
def importance_of_cue(model: PeftModel, truth: PartImages) -> float:
    of_species = np.flatnonzero(truth.images.labels == CUE_SPECIES)
    drawn, left_out = (
        model(normalise(pixels[of_species])).logits[:, CUE_SPECIES].mean()
        for pixels in (truth.images.pixels, truth.without["cue"])
    )
    return float(drawn - left_out)


def run(runs: Path, seeds: int | None) -> dict[str, Any]:
    """Train and score everything that is not there yet, the variant with all controls first."""
    torch.set_num_threads(1)  # the order of a sum depends on it
    scores, cues = [], []
    for name, variant in VARIANTS.items():
        for seed in range(variant.seeds if seeds is None else min(seeds, variant.seeds)):
            scores += score(name, seed, runs)
            print(f"{name}, seed {seed}: accuracy {scores[-1]['accuracy']:.3f}", flush=True)
            if name == "apart":
                cues.append(look_for_cue(seed, runs))
                print(f"cue, seed {seed}", flush=True)
    return {"environment": environment(), "variants": scores, "cue": cues}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/cluster-maps"), help="folder of trainings and scorings")
    parser.add_argument("--out", type=Path, help="write all figures here, as JSON")
    parser.add_argument("--write-docs", type=Path, help="write the tables into this document")
    parser.add_argument("--seeds", type=int, help="at most so many seeds of each variant")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    results = run(arguments.runs, arguments.seeds)
    if arguments.out:
        write_json(arguments.out, results)
    if arguments.write_docs:
        write_tables(arguments.write_docs, results)


if __name__ == "__main__":
    main()
