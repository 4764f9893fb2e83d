"""Fine-tune a classifier on one's own images: data and backbone by name in, one folder out.

Beside what `gift.training.folder` lists, the folder holds

    adapter/classifier.json, adapter/README.md   classes and geometry of the images; the model card
    config.yaml      every option, for `gift train --config`
    evaluation.json  accuracy, classes, confusions and calibration on the validation and the test images
    curves.png       losses and accuracies by epoch
    run_of.json      versions and commit when it was trained, seed, what the data were
"""

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.compute
from accelerate import PartialState
from datasets import Dataset
from jsonargparse import ArgumentParser
from transformers import PreTrainedModel, set_seed

from gift.adapters import Classifier
from gift.backbones import classification_heads
from gift.baselines.methods import method_config
from gift.data.feeding import ImageItems
from gift.data.splits import Splits, read_splits
from gift.pretrained import check_takes, load_backbone, portable_name, read_geometry
from gift.training.arguments import FinetuneOptions, FinetuneResult, Surroundings
from gift.training.card import model_card
from gift.training.curves import draw_curves
from gift.training.finetune import PACKAGES, finetune
from gift.training.folder import write
from gift.training.metrics import Evaluation, evaluate_model
from gift.training.options import TrainOptions, add_train_arguments

ABOUT = "run_of.json"


@dataclass(frozen=True)
class TrainResult:
    """A run of `gift train`.

    Attributes:
        run: What `gift.finetune` returned.
        evaluations: By name of the split, `validation` and `test` where there are such images.
        skipped: Name of each image that was left out, and why.
        notes: What is to be known of the data, such as that validation images were set aside.
    """

    run: FinetuneResult
    evaluations: dict[str, Evaluation]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def train(options: TrainOptions, after_epoch: Callable[[int, float], None] | None = None) -> TrainResult:
    """Train on a data set, or go on with a run that was killed, and write its folder.

    Args:
        options: What to train on, and how.
        after_epoch: Called with the number of the epoch and the accuracy on the validation images, where every epoch
            ends with an evaluation.

    Raises:
        ValueError: If the data, the backbone or the method cannot be used, or the loss is not finite.
        OSError: If something cannot be written: start it again and it goes on from the last checkpoint.
    """
    _check_folders(options)
    splits = read_splits(options.data, options.splits)
    set_seed(options.seed)  # the head is new
    backbone = load_backbone(options.model, splits.class_names, options.drop_path)
    config = method_config(options.method, backbone, options.method_options)
    _check_head_is_trained(backbone, config)
    geometry = read_geometry(
        options.model, size_px=options.image_size_px, resize=options.resize, augment=options.augment
    )
    check_takes(backbone, geometry)
    items = {
        name: ImageItems(split, geometry, name == "train", options.feeding)
        for name, split in _named(splits).items()
        if split is not None and (name != "test" or options.evaluate_test)
    }
    classifier = Classifier(portable_name(options.model), options.method, splits.class_names, geometry)
    about = _about(options, splits, classifier)
    surroundings = Surroundings(about, lambda folder: _write_beside(folder, classifier), after_epoch)
    told, folder = finetune_options(options), Path(options.output_dir)
    was_complete = options.resume and (folder / "metrics.json").exists()
    run = finetune(backbone, config, items["train"], items.get("validation"), told, surroundings)
    if not PartialState().is_main_process:  # under torchrun one process tests and writes
        return TrainResult(run, {}, (), splits.notes)

    evaluations = {
        name: evaluate_model(run.model, items[name], splits.class_names, options.batch_size, options.workers)
        for name in ("validation", "test")
        if name in items
    }
    skipped = tuple(one for of_split in items.values() for one in of_split.skipped)
    result = TrainResult(run, evaluations, skipped, splits.notes)
    _write_folder(folder, options, splits, classifier, result)
    if not (was_complete and (folder / ABOUT).exists()):  # it says what the run was trained with
        write(folder / ABOUT, json.dumps(_describe(options, splits, result), indent=2))
    return result


def _named(splits: Splits) -> dict[str, Dataset | None]:
    return {"train": splits.train, "validation": splits.validation, "test": splits.test}


def finetune_options(options: TrainOptions) -> FinetuneOptions:
    """Return the options of the run itself."""
    own = FinetuneOptions.__dataclass_fields__
    return FinetuneOptions(**{name: getattr(options, name) for name in own})


def _write_folder(
    folder: Path, options: TrainOptions, splits: Splits, classifier: Classifier, result: TrainResult
) -> None:
    weights = result.run.adapter_dir
    write(weights / "README.md", model_card(options, classifier, result.run, result.evaluations))
    write(folder / "config.yaml", _as_yaml(options))
    evaluations = {name: asdict(evaluation) for name, evaluation in result.evaluations.items()}
    write(folder / "evaluation.json", json.dumps(evaluations, indent=2))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    draw_curves(log, folder / "curves.png")


def _check_folders(options: TrainOptions) -> None:
    """Raise ValueError if the run would lie among its images, where its files would be taken for some of them."""
    data, out = Path(options.data).absolute(), Path(options.output_dir).absolute()
    if data.is_dir() and out.is_relative_to(data):
        raise ValueError(f"output_dir {options.output_dir} lies inside the data {options.data}: choose another.")


def _check_head_is_trained(backbone: PreTrainedModel, config: Any) -> None:
    """Raise ValueError if a new head would stay random and not be stored."""
    trained = getattr(config, "modules_to_save", None)
    missing = [
        head for head in classification_heads(backbone) if not any(head.endswith(name) for name in trained or ())
    ]
    if trained is not None and missing:
        raise ValueError(f"modules_to_save must name the head, {', '.join(missing)}, got {trained}: or leave it out.")


def _about(options: TrainOptions, splits: Splits, classifier: Classifier) -> dict[str, Any]:
    """Return what decides the result of a run and is none of the options of `finetune`."""
    about = {"classes": splits.class_names, "drop_path": options.drop_path, "geometry": asdict(classifier.geometry)}
    return {f"data.{name}": value for name, value in (about | digests(splits)).items()}


def digests(splits: Splits) -> dict[str, str | None]:
    """Return, by name of the split, a digest of the names and labels of its images, in their order."""
    return {name: None if split is None else _digest(split) for name, split in _named(splits).items()}


def _digest(split: Dataset) -> str:
    found = hashlib.sha256()
    for part in split.with_format("arrow").iter(1000):
        paths = pyarrow.compute.struct_field(part["image"], "path").to_pylist()  # type: ignore[index]
        for path, label in zip(paths, part["label"].to_pylist(), strict=True):  # type: ignore[index]
            found.update(f"{'/'.join(Path(path or '').parts[-2:])}\t{label}\n".encode(errors="surrogateescape"))
    return found.hexdigest()


def _write_beside(folder: Path, classifier: Classifier) -> None:
    """Write the classes and the geometry, and a name of the backbone that holds on other machines, where it can."""
    classifier.write(folder)
    config_file, backbone = folder / "adapter_config.json", classifier.backbone
    if config_file.exists():
        write(
            config_file,
            json.dumps(json.loads(config_file.read_text()) | {"base_model_name_or_path": backbone}, indent=2),
        )


def _as_yaml(options: TrainOptions) -> str:
    parser = add_train_arguments(ArgumentParser())
    data = {
        name: str(Path(path).absolute()) if path and Path(path).exists() else path
        for name, path in (("data", options.data), ("validation", options.validation), ("test", options.test))
    }
    return parser.dump(
        parser.parse_object(asdict(options) | data | {"output_dir": str(options.output_dir)}), skip_unset=False
    )


def _describe(options: TrainOptions, splits: Splits, result: TrainResult) -> dict[str, Any]:
    """Return what the run was made with and from."""
    return {
        "versions": package_versions(),
        "python": platform.python_version(),
        "commit": package_commit(),
        "seed": options.seed,
        "form": splits.form,
        "notes": splits.notes,
        "classes": splits.class_names,
        "digests": digests(splits),
        "images": {name: 0 if split is None else len(split) for name, split in _named(splits).items()},
        "skipped": result.skipped,
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {package: version(package) for package in (*PACKAGES, "datasets", "torchvision")}


def package_commit() -> str | None:
    """Return the commit of this package if it runs from a git checkout, with `+` if its files were changed since."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        commit, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", "."))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}{'+' if changes else ''}"
