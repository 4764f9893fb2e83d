"""What `gift score` does: an adapter and images with known parts in, tables and figures out."""

import json
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentError, ArgumentParser

from gift.adapters import Classifier, load_adapter
from gift.data.parts import PartImages, read_parts
from gift.explain.rows import ScoreOptions
from gift.explain.scoring import MethodScore, Scorer
from gift.explain.shortcuts import ShortcutOptions, check_truth, find_shortcuts
from gift.explain.tables import score_table, shortcut_table, verdicts


def read_scores(path: Path) -> dict[str, Any]:
    """Return what `gift score --out` wrote.

    Raises:
        ValueError: If the file holds anything else.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rows", type=list[MethodScore])
    for name, kind in {"adapter": str, "data": str, "images": int, "seed": int}.items():
        parser.add_argument(f"--{name}", type=kind)
    try:
        scores = json.loads(path.read_text(), parse_constant=_refuse)
        parser.parse_object(deepcopy({name: scores[name] for name in ("rows", "adapter", "data", "images", "seed")}))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ArgumentError) as error:
        raise ValueError(f"{path} holds no scores of `gift score --out`: {error!r}.") from error
    return scores


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number in JSON")


def score_adapter(
    adapter: Path,
    data: Path | str,
    count: int,
    seed: int,
    backbone: str | None = None,
    out: Path | None = None,
    shortcuts: bool = False,
) -> str:
    """Return the tables of an adapter's scores in words; the arguments are those of `gift score`.

    Raises:
        ValueError: If the adapter or the data cannot be read, there are fewer than 8 images, the adapter has no
            clusters, or shortcuts are asked for and it does not know a class of the data.
    """
    if out is not None and out.is_dir():
        raise ValueError(f"{out} is a folder: name a file for the figures.")
    loaded = load_adapter(adapter, backbone)
    truth = read_parts(data, loaded.image_size_px, count, seed)
    if shortcuts:  # before minutes are spent
        check_truth(truth)
        truth = _with_classes_of(loaded.classifier, truth, data)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    rows = Scorer(loaded.model, truth, loaded.normalise, ScoreOptions(seed=seed)).score()
    lines = [
        f"{len(truth)} images of {loaded.image_size_px} px: maps are chosen on one half and scored on the other. IoU "
        "with its 95 % interval over images; a star: no better than random clusters read alike.",
        *("", score_table(rows), "", *verdicts(rows)),
    ]
    record: dict[str, Any] = {"adapter": Path(adapter).name, "data": str(data), "images": len(truth), "seed": seed}
    record["rows"] = [asdict(row) for row in rows]
    if shortcuts:
        found = find_shortcuts(loaded.model, truth, loaded.normalise, ShortcutOptions(seed=seed))
        table = shortcut_table(found, truth.images.class_names) if found else "None was found."
        lines += ["", "Clusters outside the object whose removal moves a logit:", "", table]
        record["shortcuts"] = [asdict(one) for one in found]
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n")
    return "\n".join(lines)


def _with_classes_of(classifier: Classifier, truth: PartImages, data: Path | str) -> PartImages:
    """Return images whose labels are the numbers of the classifier's logits; classes are matched by name."""
    images = truth.images
    numbers = classifier.numbers_of(images.class_names, data)
    if numbers == list(range(len(numbers))):
        return truth  # and the data may have names where the classifier has none
    labels = np.array(numbers)[images.labels]
    return replace(truth, images=replace(images, labels=labels, class_names=classifier.class_names))
