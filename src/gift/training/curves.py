"""The course of a run as a picture."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Readable by colour-blind people, and in greyscale by their line styles.
STYLES = {"training": {"color": "#0072b2", "linestyle": "-"}, "validation": {"color": "#d55e00", "linestyle": "--"}}


def draw_curves(log: list[dict[str, Any]], path: Path) -> None:
    """Draw losses, accuracy and learning rate by epoch into a PNG.

    Args:
        log: Entries of log.jsonl.
        path: The picture.
    """
    figure = Figure(figsize=(10, 3))
    # Room for labels of five decimals; a layout engine would take as long again as the picture.
    figure.subplots_adjust(left=0.08, right=0.99, bottom=0.17, top=0.89, wspace=0.36)
    losses, accuracies, rates = figure.subplots(1, 3)
    _curve(losses, log, "loss", "training")
    _curve(losses, log, "eval_loss", "validation")
    _curve(accuracies, log, "eval_accuracy", "validation", scale=100)
    _curve(rates, log, "learning_rate", "training")
    for axes, title in ((losses, "loss"), (accuracies, "accuracy in %"), (rates, "learning rate")):
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
    losses.legend()
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, dpi=100, format="png")
    partial.rename(path)


def _curve(axes: Axes, log: list[dict[str, Any]], key: str, name: str, scale: int = 1) -> None:
    points = {entry["epoch"]: scale * entry[key] for entry in log if key in entry}  # the result is measured once more
    epochs = sorted(points)
    values = [points[epoch] for epoch in epochs]
    axes.plot(epochs, values, marker="." if len(points) < 30 else "", label=name, **STYLES[name])  # type: ignore[arg-type]
