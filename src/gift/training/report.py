"""What `gift train` prints at the end."""

from gift.training.metrics import Evaluation
from gift.training.options import TrainOptions
from gift.training.train import TrainResult


def describe_training(options: TrainOptions, result: TrainResult) -> str:
    """Return what was trained, how well it predicts, where everything lies, and what to try next."""
    metrics, run, is_gift = result.run.metrics, options.output_dir, options.method.startswith("gift")
    lines = [
        f"{options.method}: {metrics['trained_parameters']:,} numbers trained "
        f"({metrics['trained_parameters_without_head']:,} without the head), {metrics['seconds']:.0f} s, "
        f"{metrics['epochs']} epochs, {metrics['peak_memory_mb']:,} MB at most",
        *(_line(name, evaluation) for name, evaluation in result.evaluations.items()),
    ]
    if metrics["best_epoch"] is not None:
        lines.append(f"The epoch with the best validation accuracy was kept: {metrics['best_epoch']}.")
    lines += [f"Note: {note}" for note in result.notes]
    lines += [f"Left out: {reason}" for _, reason in result.skipped]
    lines += [
        f"Wrote {run}: {result.run.adapter_dir.name}/, metrics.json, evaluation.json, curves.png, config.yaml",
        "Next:",
        f"  gift predict {run} IMAGES           the class of every image of a folder, as a CSV",
        *([f"  gift explain --adapter {run} --images IMAGES --out explained    what it sees there"] * is_gift),
        f"  gift merge {run} merged-model       the model without adapter, for transformers, timm or ONNX",
    ]
    return "\n".join(lines)


def _line(name: str, evaluation: Evaluation) -> str:
    low, high = (100 * bound for bound in evaluation.interval)
    return f"{name}: {100 * evaluation.accuracy:.2f} % [{low:.1f}, {high:.1f}] of {evaluation.images:,} images"
