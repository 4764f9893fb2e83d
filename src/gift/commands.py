"""The commands of `gift`: each calls one function of the library, and prints."""

import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What commands import takes seconds, which other commands need not wait: hence the imports inside.


def train(options: Any) -> None:
    """Fine-tune on one's own images, e.g. `gift train --data flowers --method gift --output_dir runs/flowers`.

    Killed and started again with the same options, it goes on. Recipes: `--config recipes/fgvc/gift.yaml`.
    """
    from gift.training.report import describe_training  # noqa: PLC0415
    from gift.training.train import train as run  # noqa: PLC0415

    result = run(options)
    if int(os.environ.get("RANK", "0")) == 0:  # under torchrun one process speaks
        print(describe_training(options, result))


def methods() -> None:
    """List what `--method` can be, e.g. `gift methods`."""
    from gift.baselines.methods import METHODS, method_names  # noqa: PLC0415

    for name, description in METHODS.items():
        print(f"{name:<14}{description}")
    print(textwrap.fill(f"Further ones of PEFT: {', '.join(method_names()[len(METHODS) :])}", 100))


def evaluate(
    adapter: Path,
    data: str | None = None,
    split: str | None = None,
    backbone: str | None = None,
    root: Path = Path("data"),
    out: Path | None = None,
    skip_damaged: bool = False,
) -> None:
    """Measure a fine-tuned model on labelled images, e.g. `gift evaluate runs/flowers --data other-flowers`.

    Accuracy with its 95 % interval, top-5, every class, the likeliest confusions, calibration.

    Args:
        adapter: Folder of a run, an adapter or a model.
        data: Labelled images in any form that `gift train` takes; by default those of the run.
        split: `test`, `validation` or `train`; by default the first of these that there is.
        backbone: Name or folder of the backbone; by default what the adapter says.
        root: Folder where torchvision's sets are.
        out: File for all figures, as JSON.
        skip_damaged: Whether to leave out images that cannot be read, and say which; those of the run are left out
            anyway if it was trained so.
    """
    from gift.evaluation import describe_evaluation, evaluate_adapter  # noqa: PLC0415

    name, evaluation = evaluate_adapter(adapter, data, split, backbone, root, skip_damaged)
    if out is not None:
        evaluation.write(out)
    print(describe_evaluation(name, evaluation))


def predict(
    adapter: Path, images: str, out: Path = Path("predictions.csv"), top: int = 1, backbone: str | None = None
) -> None:
    """Write the predicted class of every image into a CSV, e.g. `gift predict runs/flowers holiday-photos`.

    Args:
        adapter: Folder of a run, an adapter or a model.
        images: An image, or a folder of images, with what its folders hold.
        out: The CSV: image, then class and probability as often as `top` says, then why an image was not read.
        top: How many of the likeliest classes.
        backbone: Name or folder of the backbone; by default what the adapter says.
    """
    from gift.evaluation import predict_images, write_predictions  # noqa: PLC0415

    out.parent.mkdir(parents=True, exist_ok=True)  # before the work is done
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name the file to write.")
    predictions = predict_images(adapter, Path(images), top, backbone)
    write_predictions(predictions, top, out)
    unread = sum(prediction.problem is not None for prediction in predictions)
    print(f"Wrote {out}: {len(predictions) - unread} images, {unread} that could not be read.")


def merge(adapter: Path, out: Path, format: str = "transformers", backbone: str | None = None) -> None:
    """Write the model without adapter, e.g. `gift merge runs/flowers merged --format onnx`.

    Args:
        adapter: Folder of a run, an adapter or a model.
        out: Folder to write; must not exist or be empty.
        format: `transformers`, `timm` or `onnx`.
        backbone: Name or folder of the backbone; by default what the adapter says.
    """
    from gift.merging import merge as merge_adapter  # noqa: PLC0415

    difference = merge_adapter(adapter, out, format, backbone)
    print(f"Wrote {out} for {format}; loaded there, its logits differ by {difference:.1e} at most.")


def info(adapter: Path) -> None:
    """Say what an adapter is, e.g. `gift info runs/flowers`.

    Args:
        adapter: Folder of a run, an adapter or a model.
    """
    from gift.description import describe_adapter  # noqa: PLC0415

    print(describe_adapter(adapter))


def check(data: str, validation: str | None = None, test: str | None = None, root: Path = Path("data")) -> None:
    """Look for what is wrong with labelled images, e.g. `gift data check flowers`; exit code 1 if something is.

    Damaged images, empty classes, the same or nearly the same image twice or in two splits, gaps in labels, sizes.

    Args:
        data: Labelled images in any form that `gift train` takes.
        validation: Other data to validate on.
        test: Other data to test on.
        root: Folder where torchvision's sets are.
    """
    from gift.data.check import check_data, describe  # noqa: PLC0415
    from gift.data.splits import SplitOptions  # noqa: PLC0415

    report = check_data(data, SplitOptions(validation=validation, test=test, root=root))
    print(describe(report))
    if report.findings:
        raise SystemExit(1)


def prepare(task: str, out: Path, source: Path | None = None, count: int | None = None, seed: int = 0) -> None:
    """Bring a benchmark task into the form to train on, e.g. `gift data prepare cub --from CUB --out fgvc/cub`.

    digits, rendered_flowers, dsprites_loc and dsprites_ori are made without `--from` and need no download.
    """
    from gift.data.prepare import prepare_task  # noqa: PLC0415

    print(f"Wrote {prepare_task(task, source, out, count, seed)}.")


def tasks() -> None:
    """List the benchmark tasks that are known, e.g. `gift data tasks`."""
    from gift.data.catalog import TASKS  # noqa: PLC0415

    for task in TASKS.values():
        sizes = f"{task.classes:>5} classes {task.train + task.validation:>8,} + {task.test:>6,} images"
        print(f"{task.name:<22}{task.suite:<10}{sizes}  {task.source}")


def convert(checkpoint: Path, out: Path) -> None:
    """Turn a checkpoint of the original authors into an adapter folder, e.g. `gift convert Flowers.pth.tar flowers`.

    The folder is loaded with `import gift` and `PeftModel.from_pretrained(backbone, "flowers")`.

    Args:
        checkpoint: The authors' file, a pickle; nothing in it is executed.
        out: Folder to write; must not exist or be empty.
    """
    from gift.checkpoints import convert_checkpoint  # noqa: PLC0415

    config = convert_checkpoint(checkpoint, out)
    targets = ", ".join(sorted(config.target_modules or ()))
    print(f"Wrote {out}: {config.generator} generator of rank {config.r} for {targets}.")
    print("What the file said of its model and training is in original.json there.")


def demo(out: Path = Path("gift-demo"), seed: int = 0) -> None:
    """Fine-tune a small ViT on two tasks by three methods and draw cluster maps, e.g. `gift demo --seed 1`.

    Takes a few minutes on two cores and needs no network.

    Args:
        out: Folder for the adapters, the picture and the figures; a complete demo in it is replaced.
        seed: Of new heads, adapters and the order of the images; the same seed gives the same figures.
    """
    from gift.demo import describe, run_demo  # noqa: PLC0415

    print(describe(run_demo(out, seed, report=print), seed, command=sys.argv[0]))


def score(
    adapter: Path,
    data: str = "flowers",
    count: int = 400,
    seed: int = 1,
    backbone: str | None = None,
    out: Path | None = None,
    shortcuts: bool = False,
) -> None:
    """Measure what the clusters of an adapter stand for, e.g. `gift score gift-demo/flowers/gift/adapter`.

    The best map of every part is chosen on one half of the images and scored on the other, beside controls: random and
    untrained clusters, the layers before adaptation, k-means, PCA, attention rollout, Grad-CAM.

    Args:
        adapter: Folder of a GIFT adapter with a classification head.
        data: Images whose parts are known: `flowers` (drawn, of eight species), a folder with `images/` and `masks/`,
            or a parquet file with columns image, label and bbox.
        count: How many images at most, chosen at random.
        seed: Of the images and of everything that is drawn.
        backbone: Name or folder of the backbone; by default what the adapter says.
        out: File for all figures, as JSON.
        shortcuts: Whether to list clusters outside the object whose removal moves a logit; the data need classes,
            which are matched by name.
    """
    from gift.explain.command import score_adapter  # noqa: PLC0415

    print(score_adapter(adapter, data, count, seed, backbone, out, shortcuts))


def explain(
    adapter: Path,
    images: list[Path],
    out: Path,
    backbone: str | None = None,
    count: int = 50,
    colours: str = "viridis",
    scores: Path | None = None,
) -> None:
    """Show what an adapter sees, e.g. `gift explain --adapter runs/flowers --images holiday-photos --out explained`.

    Writes report.html, which opens from disk, and sheets of all layers and classes, overlays and label maps.

    Args:
        adapter: Folder of a run or an adapter of GIFT.
        images: Pictures, or folders of them.
        out: Folder to write; must not exist, be empty or hold an explanation, which is replaced.
        backbone: Name or folder of the backbone; by default what the adapter says.
        count: How many pictures at most; of more, some of every folder are taken.
        colours: Of the sheets: `viridis`, `cividis`, or `jet` as in the paper. The report has all three.
        scores: What `gift score --out` wrote of this adapter, to be shown in the report.
    """
    from gift.explain.explanation import describe_explanation, explain_pictures  # noqa: PLC0415
    from gift.explain.render import Look  # noqa: PLC0415

    look = Look(colours)
    print(describe_explanation(explain_pictures(adapter, images, out, backbone, count, look, scores, report=print)))


def explore(
    adapter: Path,
    images: list[Path],
    compare: Path | None = None,
    backbone: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    user: str | None = None,
) -> None:
    """Look through an adapter at pictures in the browser, e.g. `gift explore --adapter runs/flowers`.

    Drop a picture, move through the layers, click clusters, name and combine them, scan a folder for one.

    Args:
        adapter: Folder of a run or an adapter of GIFT.
        images: Folders of pictures to scale clusters by and to scan; by default those that the run was trained on.
        compare: Folder of another adapter to look through at the same pictures.
        backbone: Name or folder of the backbone; by default what the adapters say.
        host: Address to listen on.
        port: Port to listen on; by default the first free one from 7860 on.
        user: Name to log in with; the password is in GIFT_EXPLORER_PASSWORD, or is asked for.
    """
    from gift.explain.exploring import open_explorer  # noqa: PLC0415

    try:
        from gift.serving import check_address  # noqa: PLC0415
        from gift.serving import explore as serve  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ValueError(f"The explorer needs {error.name}: pip install 'gift-peft[explorer]'.") from error
    check_address(host, port, user)  # before the adapter is loaded
    serve(open_explorer(adapter, images, compare, backbone), host, port, user)


def benchmark(options: Any) -> None:
    """Compare methods on the tasks of a suite, e.g. `gift benchmark offline --out benchmarks/offline --reduced true`.

    Learning rate and weight decay are searched on validation images, then every seed trains on all and is tested once.
    Stopped and started again with the same --out, it goes on. `--plan true` says first how long it would take.
    """
    from gift.benchmark.benchmark import run_benchmark  # noqa: PLC0415
    from gift.benchmark.outcome import OUTCOME  # noqa: PLC0415
    from gift.benchmark.plan import describe_plan, plan_benchmark  # noqa: PLC0415

    if options.plan:
        print(describe_plan(plan_benchmark(options)))
        return
    run_benchmark(options, report=lambda text: print(text, flush=True))
    names = ("runs.jsonl", "validation.md", *(() if options.search_only else OUTCOME))
    written = [name for name in names if (options.out / name).exists()]
    print((options.out / ("table.md" if "table.md" in written else "validation.md")).read_text())
    print(f"Wrote {options.out}: {', '.join(written)}")


def table(results: Path, reference: str | None = None, out: Path | None = None, validation: bool = False) -> None:
    """Write the table of a benchmark, e.g. `gift benchmark table runs/offline --out table.csv`.

    Args:
        results: Folder of a benchmark, or its runs.jsonl.
        reference: Method that differences are taken to; by default `lora` if it is there, else the first.
        out: File to write, .md or .csv; by default the table is printed.
        validation: Whether to show the best of every search on validation images, to choose between configurations,
            and not the tests.
    """
    from gift.benchmark.outcome import write_table  # noqa: PLC0415

    print(write_table(results, reference, out, validation))


def plot(results: Path, out: Path = Path("pareto.png")) -> None:
    """Draw accuracy against trained parameters, e.g. `gift benchmark plot runs/offline --out pareto.svg`.

    Args:
        results: Folder of a benchmark, or its runs.jsonl.
        out: File to write, .png or .svg.
    """
    from gift.benchmark.outcome import write_plot  # noqa: PLC0415

    print(write_plot(results, out))


Command = Callable[..., None]
COMMANDS: dict[str, Command] = {
    **{"train": train, "evaluate": evaluate, "predict": predict, "merge": merge, "info": info, "methods": methods},
    **{"data check": check, "data prepare": prepare, "data tasks": tasks},
    **{"benchmark table": table, "benchmark plot": plot, "benchmark": benchmark},
    **{"explain": explain, "explore": explore, "score": score, "convert": convert, "demo": demo},
}
