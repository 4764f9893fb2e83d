"""The command `gift`: every command parses, calls one function of the library, and prints."""

import difflib
import logging
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from safetensors import SafetensorError

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


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error ends it with one line and exit code 2, Ctrl-C with exit code 130."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("gift").setLevel(logging.INFO)
    # PEFT 0.21.2 reads this of every model of transformers, which has renamed it.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        name, given = parse(words)
        COMMANDS[name](**given)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"gift: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        what = {"train": "training", "benchmark": "benchmark"}.get("".join(words[:1]))
        hint = f" A {what} goes on when the same command is given again." if what else ""
        print(f"gift: stopped.{hint}", file=sys.stderr)
        raise SystemExit(130) from error


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the name of a command and what it is called with; a wrong word ends the program with exit code 2."""
    name, words = _choose(words)
    parser = _Parser(prog=f"gift {name}", description=_described(COMMANDS[name]))
    return name, _add_arguments(parser, COMMANDS[name])(words)


class _Parser(ArgumentParser):
    """A parser that says in one line what it does not know, and what is near."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = {name for action in self._actions for name in (*action.option_strings, action.dest)}
        unknown = re.findall(r"(?:Option|Key) '([\w.]+)' is not|unrecognized arguments: (--[\w.]+)", str(message))
        near = [match for found in unknown for match in difflib.get_close_matches("".join(found), known, 1)]
        hint = f" Did you mean {near[0]}?" if near else ""
        said = " ".join(str(message).split()).rstrip(".")
        print(f"gift: {said}.{hint} `{self.prog} --help` lists the options.", file=sys.stderr)
        raise SystemExit(2)


def _choose(words: list[str]) -> tuple[str, list[str]]:
    """Return the name of the command and the words after it; without one, list the commands and end."""
    for length in (2, 1):
        if (name := " ".join(words[:length])) in COMMANDS:
            return name, words[length:]
    if not words or words in (["-h"], ["--help"], ["help"], ["data"], ["data", "--help"]):
        lines = [f"  gift {name:<14}{_described(command).splitlines()[0]}" for name, command in COMMANDS.items()]
        print("\n".join(["Fine-tune vision Transformers and see what they learned.", "", *lines]))
        raise SystemExit(0)
    wanted = " ".join(words[: 2 if words[0] == "data" else 1])
    near = difflib.get_close_matches(wanted, COMMANDS, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    print(f"gift: there is no command {wanted}.{hint} `gift --help` lists the commands.", file=sys.stderr)
    raise SystemExit(2)


def _described(command: Command) -> str:
    """Return what the docstring says before its arguments."""
    return (command.__doc__ or "").partition("Args:")[0].strip()


def _add_arguments(parser: ArgumentParser, command: Command) -> Callable[[list[str]], dict[str, Any]]:
    """Add the arguments of a command; return what makes words into what it is called with."""
    if command is train:
        from gift.training.options import TrainOptions, add_train_arguments  # noqa: PLC0415

        add_train_arguments(parser)
        return lambda words: {"options": TrainOptions(**_values(parser, words, leave={"config"}))}
    if command is benchmark:
        from gift.benchmark.options import BenchmarkOptions, add_benchmark_arguments  # noqa: PLC0415

        add_benchmark_arguments(parser)
        return lambda words: {"options": BenchmarkOptions(**_values(parser, words))}
    if command is prepare:  # `from` is no name in Python
        parser.add_argument("task", help="Its name in `gift data tasks`.")
        parser.add_argument(
            "--from", type=Path | None, help="Folder of archives or TFDS exports; none for digits and drawn tasks."
        )
        parser.add_argument("--out", type=Path, required=True, help="Folder to write; must not exist.")
        parser.add_argument("--count", type=int | None, help="Number of test images, where there is no --from.")
        parser.add_argument("--seed", type=int, default=0, help="Of what is drawn, images or a validation part.")
        return lambda words: {{"from": "source"}.get(key, key): value for key, value in _values(parser, words).items()}
    if command in (explain, explore):  # words after --images are a list
        parser.add_function_arguments(command, as_group=False, skip={"images"})
        options: dict[str, Any] = {"required": True} if command is explain else {"default": []}
        parser.add_argument("--images", nargs="+", type=Path, help="Pictures, or folders of them.", **options)
        return lambda words: _values(parser, words)
    parser.add_function_arguments(command, as_positional=True, as_group=False)
    return lambda words: _values(parser, words)


def _values(parser: ArgumentParser, words: list[str], leave: Iterable[str] = ()) -> dict[str, Any]:
    return {key: value for key, value in parser.parse_args(words).as_dict().items() if key not in leave}
