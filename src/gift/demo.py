"""The demo: the backbone that ships learns two small tasks by several methods, and shows what its clusters respond to.

Every run leaves its own folder (see `gift.training.finetune`), the demo `demo.json`, pictures, and what `gift explain`
makes of them.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, set_seed

from gift.adapters import Classifier
from gift.backbones import SMALL_BACKBONE, default_targets
from gift.data.geometry import Geometry
from gift.data.images import LabelledImages, NormalisedImages
from gift.data.offline import draw_flowers, part_coverage, read_digits
from gift.data.rendered import PARTS, RenderedFlower
from gift.explain.clusters import ClusterMaps, explain_images
from gift.explain.explanation import REPORT, explain_pictures
from gift.explain.scores import part_agreement
from gift.pretrained import SMALL, quiet_loading
from gift.training.arguments import FinetuneOptions, FinetuneResult, Surroundings
from gift.training.finetune import finetune
from gift.tuner.config import GiftConfig

IMAGE_SIZE_PX = 64
THREADS = 2  # fixed, because the order of a sum and so its last digits depend on it
IMAGES_TO_CHOOSE_ON, PICTURES_PER_CLASS = 300, 3
PARTS_SHOWN = ("petals", "centre", "leaves", "background")
RECORD, PICTURES, EXPLANATION = "demo.json", "pictures", "explained"


@dataclass(frozen=True, eq=False)
class Task:
    """What is learned, and in how many epochs; drawn flowers also as they were drawn, for their parts."""

    name: str
    train: LabelledImages
    test: LabelledImages
    epochs: int
    drawn_train: list[RenderedFlower]
    drawn_test: list[RenderedFlower]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune: its adapter, or None for a linear probe, and its peak learning rates by task."""

    name: str
    folder: str
    config: Callable[[PreTrainedModel], PeftConfig | None]
    rates: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Row:
    """One line of the demo's table.

    Attributes:
        task: Name of the task.
        method: Name of the method.
        accuracy: On the test images, from 0 to 1.
        trained_without_head: Trained parameters of the adapter.
        trained: Trained parameters with those of the head.
        seconds: Of training and testing.
        merging: Largest difference between logits of the test images before and after merging.
    """

    task: str
    method: str
    accuracy: float
    trained_without_head: int
    trained: int
    seconds: float
    merging: float


@dataclass(frozen=True)
class DemoResult:
    """The table; where each part of a flower shows best, in words; the folder of the demo."""

    rows: list[Row]
    parts: list[str]
    folder: Path

    @property
    def adapter(self) -> Path:
        """Folder of GIFT's adapter for the flowers."""
        return self.folder / "flowers" / EXPLAINED.folder / "adapter"


def _lora(backbone: PreTrainedModel) -> PeftConfig:
    # PEFT's scale is alpha / r, here 1.
    return LoraConfig(r=8, lora_alpha=8, target_modules=list(default_targets(backbone) or ()))


def _gift(backbone: PreTrainedModel) -> PeftConfig:
    # With r = 16 and M = 32 it has two fifths of LoRA's parameters. Two things keep the maps of a layer from becoming
    # one picture, as they do with the defaults on a model as narrow as this: layer norm, softmax and gain set the
    # clusters apart from the start, and scaling lets the last map learn ten times faster than what forms the clusters.
    return GiftConfig(
        generator="paca", r=16, num_clusters=32, norm="layer", assignment="softmax", assignment_gain=16, scaling=10
    )


# Rates of adapter and head: the best of as many tries for every method (results/demo.json).
METHODS = (
    Method("linear probe", "probe", lambda _: None, {"digits": (5e-2, 5e-2), "flowers": (2e-1, 2e-1)}),
    Method("LoRA r=8", "lora", _lora, {"digits": (1.2e-2, 2e-3), "flowers": (2.4e-2, 1e-2)}),
    Method("GIFT paca r=16 M=32", "gift", _gift, {"digits": (8e-3, 2e-3), "flowers": (4e-3, 1e-2)}),
)
EXPLAINED = METHODS[-1]


def digits_task() -> Task:
    """Return the digits: the first 1000 to train on, the other 797 to test on."""
    images = read_digits(IMAGE_SIZE_PX)
    return Task("digits", images[:1000], images[1000:], 10, [], [])


def flowers_task() -> Task:
    """Return drawn flowers: 800 to train on, 400 to test on."""
    train, drawn_train = draw_flowers(800, 0, IMAGE_SIZE_PX)
    test, drawn_test = draw_flowers(400, 1, IMAGE_SIZE_PX)
    return Task("flowers", train, test, 8, drawn_train, drawn_test)


def run_demo(out: Path, seed: int = 0, report: Callable[[str], None] | None = None) -> DemoResult:
    """Train every method on both tasks, check and compare the adapters, show what GIFT's clusters see in flowers.

    A demo that was stopped goes on if the seed is the same; one that is complete, or of another seed, is run anew.

    Args:
        out: Folder of the demo; must not exist, be empty or hold a demo.
        seed: Of new heads, adapters and the order of the images; the images are always the same.
        report: Called with the name of each run before it starts; progress bars are shown then, too.

    Raises:
        ValueError: If `out` holds anything but a demo, or the seed is no number from 0 to 2^32 - 2.
        RuntimeError: If a reloaded or merged adapter predicts anything else than the trained one.
    """
    _prepare(out, seed)
    rows, parts = [], []
    with _threads(THREADS), quiet_loading():
        for task in (digits_task(), flowers_task()):
            for method in METHODS:
                options = demo_options(task, method, seed, out / task.name / method.folder, report is not None)
                if report is not None:
                    report(f"{task.name}: {method.name}")
                result = train(task, method, options)
                rows.append(_row(task, method, result, check_adapter(task, result)))
                if method is EXPLAINED and task.drawn_test:
                    parts = compare_parts(task, result)
                    write_pictures(task.test, out / PICTURES)
        explain_pictures(DemoResult(rows, parts, out).adapter, [out / PICTURES], out / EXPLANATION)
    _write(out, demo_description(seed) | {"rows": [asdict(row) for row in rows], "parts": parts})
    return DemoResult(rows, parts, out)


def demo_description(seed: int) -> dict[str, Any]:
    """Return what `demo.json` says of a demo from the start; `rows` and `parts` are added once it is complete."""
    rates = {method.name: {task: list(pair) for task, pair in method.rates.items()} for method in METHODS}
    return {"seed": seed, "rates": rates}


def _prepare(out: Path, seed: int) -> None:
    """Make `out` the folder of this demo, emptied unless the same demo was stopped there."""
    if not 0 <= seed < 2**32 - 1:
        raise ValueError(f"The seed must be a number from 0 to {2**32 - 2}, got {seed}.")
    record = _read_record(out / RECORD)
    if record is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and holds no demo. Choose another folder: a demo clears its own.")
    if record != demo_description(seed):
        for task, method in product(("digits", "flowers"), METHODS):
            shutil.rmtree(out / task / method.folder, ignore_errors=True)
        for name in (PICTURES, EXPLANATION):
            shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    _write(out, demo_description(seed))


def _read_record(path: Path) -> dict[str, Any] | None:
    """Return what a demo wrote of itself, or None if there is no such file or it is somebody else's."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"seed", "rates"} <= record.keys() else None


def _write(out: Path, record: dict[str, Any]) -> None:
    """Write what the demo is, and once it is complete what it found, whole or not at all."""
    partial = out / f"{RECORD}.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(out / RECORD)


def describe(result: DemoResult, seed: int, command: str = "gift") -> str:
    """Return the table in Markdown, what was found and written, and what to try next with the command `gift`."""
    lines = [
        "| task | method | test accuracy | trained (without head) | trained (with head) | seconds | merging |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result.rows:
        numbers = f"{row.trained_without_head:,} | {row.trained:,} | {row.seconds:.0f} | {row.merging:.1e}"
        lines.append(f"| {row.task} | {row.method} | {100 * row.accuracy:.1f} % | {numbers} |")
    return "\n".join(
        [
            *("", *lines, ""),
            f"Seed {seed}. merging: largest difference of a test image's logits before and after merging the adapter.",
            "Every adapter was saved, reloaded and merged; all predictions stayed the same.",
            *(
                "",
                "The cluster that follows a part of the flowers best, chosen on training images; correlation of its",
            ),
            "map with the share of a patch that the part covers, on test images:",
            *(f"  {line}" for line in result.parts),
            *("", f"What the clusters see: open {result.folder / EXPLANATION / REPORT} in a browser.", "", "Next:"),
            f"  {command} explore --adapter {result.adapter} --images {result.folder / PICTURES}    the same live",
            f"  {command} demo --seed {seed + 1} --out another-demo    how much depends on the seed",
            f"  {command} convert CHECKPOINT FOLDER        the original authors' weights as an adapter",
            f"  {command} --help",
        ]
    )


def demo_options(task: Task, method: Method, seed: int, folder: Path, progress: bool = False) -> FinetuneOptions:
    """Return how a method is trained on a task."""
    rate, head_rate = method.rates[task.name]
    return FinetuneOptions(
        folder,
        epochs=task.epochs,
        batch_size=32,
        learning_rate=rate,
        head_learning_rate=head_rate,
        seed=seed,
        progress=progress,
    )


def train(task: Task, method: Method, options: FinetuneOptions) -> FinetuneResult:
    """Return the run of a method on a task, on a fresh backbone whose head is made from the seed."""
    backbone = _fresh_backbone(task, options.seed)
    train_items, test_items = _items(task.train), _items(task.test)
    mean, std = _normalisation()
    geometry = Geometry(IMAGE_SIZE_PX, mean, std, resize="squash", augment="none")
    classifier = Classifier(SMALL, method.folder, task.train.class_names, geometry)
    surroundings = Surroundings(write_beside=classifier.write)
    return finetune(backbone, method.config(backbone), train_items, test_items, options, surroundings)


def check_adapter(task: Task, result: FinetuneResult) -> float:
    """Reload an adapter onto a fresh backbone and merge it; return the largest difference of logits from merging.

    Raises:
        RuntimeError: If the reloaded or the merged model predicts another class for any test image.
    """
    images = _items(task.test).pixel_values
    trained = _logits(result.model, images)
    device = next(result.model.parameters()).device
    other_seed = result.metrics["seed"] + 1  # the reloaded head must come from the folder
    reloaded = PeftModel.from_pretrained(_fresh_backbone(task, other_seed), str(result.adapter_dir)).eval().to(device)
    before = _logits(reloaded, images)
    after = _logits(reloaded.merge_and_unload(), images)
    for kind, logits in (("reloaded", before), ("merged", after)):
        if changed := int((logits.argmax(dim=1) != trained.argmax(dim=1)).sum()):
            raise RuntimeError(f"The {kind} adapter of {result.adapter_dir} predicts {changed} images differently.")
    return float((after - before).abs().max())


def compare_parts(task: Task, result: FinetuneResult) -> list[str]:
    """Return in words how well the best cluster of each part of flowers agrees with it, before training and after.

    The clusters are chosen on training images, the figures are of test images.
    """
    chosen_on, seen = _maps(task, result.model)
    return _compare_with_start(task, _best_of_parts(task, chosen_on), seen, result.metrics["seed"])


def write_pictures(images: LabelledImages, folder: Path) -> None:
    """Write the first pictures of every class as PNG into folders of classes."""
    for label, name in enumerate(images.class_names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(images.pixels[images.labels == label][:PICTURES_PER_CLASS]):
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def _maps(task: Task, model: torch.nn.Module) -> tuple[ClusterMaps, ClusterMaps]:
    """Return what the clusters respond to more than others, in training and in test images."""
    images = (_items(images).pixel_values for images in (task.train[:IMAGES_TO_CHOOSE_ON], task.test))
    train, test = (explain_images(model, pixels, reading="own") for pixels in images)
    return train, test


def _agreement(maps: ClusterMaps, drawn: list[RenderedFlower]) -> Float[np.ndarray, "layers clusters parts"]:
    """Return how well every cluster agrees with each of `PARTS_SHOWN`."""
    rows, columns = maps.maps.shape[3:]
    coverage = part_coverage(drawn[: len(maps.maps)], (rows, columns))
    return part_agreement(maps.maps, coverage[:, [PARTS.index(part) for part in PARTS_SHOWN]])


def _best_of_parts(task: Task, maps: ClusterMaps) -> list[tuple[int, int]]:
    """Return (layer, cluster) that agrees best with each part on training images."""
    agreement = _agreement(maps, task.drawn_train)
    best = (np.unravel_index(agreement[..., part].argmax(), agreement.shape[:2]) for part in range(len(PARTS_SHOWN)))
    return [(int(layer), int(cluster)) for layer, cluster in best]


def _compare_with_start(task: Task, clusters: list[tuple[int, int]], seen: ClusterMaps, seed: int) -> list[str]:
    """Return for every part how well its cluster agrees with it, and how well the best did before training.

    Without the second figure the first says nothing about what was learned: of so many maps of a pretrained backbone
    some agree with any part.
    """
    backbone = _fresh_backbone(task, seed)
    set_seed(seed)  # as the run itself started
    start: Any = get_peft_model(backbone, EXPLAINED.config(backbone))  # type: ignore[arg-type]
    chosen_on, seen_before = _maps(task, start)
    after, before = (_agreement(maps, task.drawn_test) for maps in (seen, seen_before))
    words = []
    for part, (name, now, then) in enumerate(zip(PARTS_SHOWN, clusters, _best_of_parts(task, chosen_on), strict=True)):
        figures = f"{after[now][part]:.2f} (before training the best was {_label(then)}, {before[then][part]:.2f})"
        words.append(f"{name}: {_label(now)}, {figures}")
    return words


def _label(cluster: tuple[int, int]) -> str:
    return f"L{cluster[0]}/C{cluster[1]}"


def _row(task: Task, method: Method, result: FinetuneResult, merging: float) -> Row:
    metrics = result.metrics
    without_head, trained = metrics["trained_parameters_without_head"], metrics["trained_parameters"]
    return Row(task.name, method.name, metrics["accuracy"], without_head, trained, metrics["seconds"], merging)


def _fresh_backbone(task: Task, seed: int) -> PreTrainedModel:
    set_seed(seed)  # the head is new
    return AutoModelForImageClassification.from_pretrained(SMALL_BACKBONE, num_labels=len(task.train.class_names))


def _items(images: LabelledImages) -> NormalisedImages:
    return NormalisedImages(images, *_normalisation())


def _normalisation() -> tuple[tuple[float, ...], tuple[float, ...]]:
    data = AutoConfig.from_pretrained(SMALL_BACKBONE).pretrained_cfg
    return tuple(data["mean"]), tuple(data["std"])


@torch.no_grad()
def _logits(model: torch.nn.Module, images: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return torch.cat([model(pixel_values=batch.to(device)).logits for batch in images.split(128)])


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
