"""The command `gift`: every command parses, calls one function of the library, and prints."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from gift.checkpoints import convert_checkpoint


def convert(checkpoint: Path, out: Path) -> None:
    """Turn a checkpoint of the original authors into an adapter folder, e.g. `gift convert Flowers.pth.tar flowers`.

    The folder is loaded with `import gift` and `PeftModel.from_pretrained(backbone, "flowers")`.

    Args:
        checkpoint: The authors' file, a pickle; nothing in it is executed.
        out: Folder to write; must not exist or be empty.
    """
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
    from gift.demo import describe, run_demo  # noqa: PLC0415 - it takes seconds, which other commands need not wait

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
        shortcuts: Whether to list clusters outside the object whose removal moves a logit; the data need labels.
    """
    from gift.explain.command import score_adapter  # noqa: PLC0415 - it takes seconds, which other commands need not wait

    print(score_adapter(adapter, data, count, seed, backbone, out, shortcuts))


COMMANDS: dict[str, Any] = {"convert": convert, "demo": demo, "score": score}


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error ends it with one line and exit code 2, Ctrl-C with exit code 130."""
    try:
        auto_cli(COMMANDS, args=arguments, prog="gift", as_positional=True)
    except (ValueError, OSError) as error:
        print(f"gift: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        print("gift: stopped", file=sys.stderr)
        raise SystemExit(130) from error
