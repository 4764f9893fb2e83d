"""Measure what the features of a backbone are worth: a linear probe and nearest neighbours on labelled images.

    python scripts/probe_backbone.py --train flowers/train cifar-train.parquet --test flowers/test cifar-test.parquet

A data set is a parquet file with the columns image and label, or a folder with one subfolder per class. The features
are those the backbone gives to its head. Linear probe: logistic regression on standardised features, its penalty chosen
on a fifth of the training images. Neighbours: the 20 nearest by cosine, each counting exp(similarity / 0.07).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoConfig, AutoModel

from gift.backbones import SMALL_BACKBONE
from gift.data.readers import LabelledImages, read_images

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C: the smaller, the stronger
NEIGHBOURS, TEMPERATURE = 20, 0.07


@torch.inference_mode()
def features(backbone: str, images: LabelledImages) -> np.ndarray:
    """Return the pooled features of all images, (images, channels)."""
    model = AutoModel.from_pretrained(backbone).eval()
    data = AutoConfig.from_pretrained(backbone).pretrained_cfg
    mean, std = (torch.tensor(data[name])[:, None, None] for name in ("mean", "std"))
    pixels = torch.from_numpy(images.pixels).permute(0, 3, 1, 2)
    batches = [model((batch.float() / 255 - mean) / std).pooler_output for batch in pixels.split(256)]
    return torch.cat(batches).numpy()


def linear_probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """Return the predicted classes of the test features, and the penalty chosen on a fifth of the training images."""

    def fitted(penalty: float, rows: np.ndarray) -> Pipeline:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000))
        return probe.fit(train[rows], labels[rows])

    rows, held_out = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    scores = [fitted(penalty, rows).score(train[held_out], labels[held_out]) for penalty in PENALTIES]
    best = PENALTIES[int(np.argmax(scores))]
    return fitted(best, np.arange(len(labels))).predict(test), best


def nearest_neighbours(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Return the classes of the test features by a vote of their nearest training features."""
    search = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(labels)), metric="cosine").fit(train)
    distances, indices = search.kneighbors(test)
    votes = np.zeros((len(test), int(labels.max()) + 1))
    np.add.at(votes, (np.arange(len(test))[:, None], labels[indices]), np.exp((1 - distances) / TEMPERATURE))
    return votes.argmax(axis=1)


def interval(correct: np.ndarray) -> list[float]:
    """Return the 95 % interval (Wilson) of the accuracy of these answers, in percent."""
    count, share = len(correct), float(correct.mean())
    z = 1.96
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return [round(100 * float(edge), 2) for edge in (middle - half, middle + half)]


def probe(
    train: list[Path], test: list[Path], backbone: str = str(SMALL_BACKBONE), seed: int = 0, out: Path | None = None
) -> None:
    """Print, and write as JSON, the accuracies on every pair of training and test images.

    Args:
        train: Training images of every data set.
        test: Test images of every data set, in the same order.
        backbone: Folder or hub id of a timm model of transformers; by default the one that comes with gift.
        seed: Of the split on which the penalty is chosen.
        out: JSON file to write.
    """
    if len(train) != len(test):
        raise ValueError(f"Got {len(train)} training and {len(test)} test sets: name as many of each.")
    names = [path.parent.name if path.name == "train" else path.stem for path in train]
    if len(set(names)) < len(names) or set(train) & set(test):
        raise ValueError(f"Every set must have a name of its own, and no test set be trained on; got {names}.")
    size = AutoConfig.from_pretrained(backbone).pretrained_cfg["input_size"][-1]
    results = {}
    for name, train_path, test_path in zip(names, train, test, strict=True):
        sets = read_images(train_path, size), read_images(test_path, size)
        if differing := set(sets[0].class_names) ^ set(sets[1].class_names):
            raise ValueError(f"{train_path} and {test_path} do not share the classes {sorted(differing)}.")
        results[name] = measure(backbone, *sets, seed)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"backbone": Path(backbone).name, "seed": seed, "data": results}, indent=2) + "\n")


def measure(backbone: str, train: LabelledImages, test: LabelledImages, seed: int) -> dict[str, Any]:
    """Return what both classifiers reach on the test images, in percent with 95 % intervals."""
    train_features, test_features = features(backbone, train), features(backbone, test)
    predicted, penalty = linear_probe(train_features, train.labels, test_features, seed)
    answers = {"linear probe": predicted, "k-NN": nearest_neighbours(train_features, train.labels, test_features)}
    row: dict[str, Any] = {"classes": len(train.class_names), "train": len(train.labels), "test": len(test.labels)}
    row["C"] = penalty
    for name, answer in answers.items():
        correct = answer == test.labels
        row[name] = {"accuracy": round(100 * float(correct.mean()), 2), "interval": interval(correct)}
    return row


def main(arguments: list[str] | None = None) -> None:
    """Read the options and measure."""
    parser = ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name in ("train", "test"):
        parser.add_argument(f"--{name}", type=Path, nargs="+", required=True, help=f"{name} images of every data set")
    parser.add_function_arguments(probe, skip={"train", "test"})
    probe(**parser.parse_args(arguments))


if __name__ == "__main__":
    main()
