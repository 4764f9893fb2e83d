"""The model card of a run, in the form that the hub and PEFT read."""

from collections.abc import Mapping
from pathlib import Path

from gift.adapters import Classifier
from gift.pretrained import SMALL
from gift.training.arguments import FinetuneResult
from gift.training.metrics import Evaluation
from gift.training.options import TrainOptions

CARD = """\
---
{front}
---

# {title}

{what}

| images | number | accuracy | 95 % interval | calibration error |
|---|---|---|---|---|
{rows}

Trained: {trained:,} numbers, {without_head:,} of them without the head, in {epochs} epochs and {seconds:.0f} s,
seed {seed}. Images: {size} px, `{resize}`, mean {mean}, standard deviation {std}.
Classes, in the order of the logits: {classes}.

## Use

```python
{use}
```

`gift predict` and `gift evaluate` take this folder as it is.
"""
LOAD_ADAPTER = """\
{imports}from peft import PeftModel
from transformers import AutoModelForImageClassification

backbone = AutoModelForImageClassification.from_pretrained(
    {backbone}, num_labels={classes}, ignore_mismatched_sizes=True
)
model = PeftModel.from_pretrained(backbone, "this/folder").eval()"""
LOAD_MODEL = """\
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("this/folder").eval()"""
REGISTERED_BY_GIFT = ("gift", "vpt", "toast", "bitfit")  # what PEFT knows after `import gift` only


def model_card(
    options: TrainOptions, classifier: Classifier, run: FinetuneResult, evaluations: Mapping[str, Evaluation]
) -> str:
    """Return the card: what was trained on what, how well it predicts, how it is loaded."""
    metrics, names = run.metrics, classifier.class_names
    return CARD.format(
        front="\n".join(_front(options, classifier)),
        title=f"{Path(options.output_dir).name}: {classifier.backbone} fine-tuned with {options.method}",
        what=f"A classifier of {len(names)} classes, trained with the package of [GIFT](https://arxiv.org/abs/2312.00700).",
        rows="\n".join(_row(name, of_split) for name, of_split in evaluations.items()) or "| none | 0 | | | |",
        trained=metrics["trained_parameters"],
        without_head=metrics["trained_parameters_without_head"],
        epochs=metrics["epochs"],
        seconds=metrics["seconds"],
        seed=options.seed,
        size=classifier.geometry.size_px,
        resize=classifier.geometry.resize,
        mean=list(classifier.geometry.mean),
        std=list(classifier.geometry.std),
        classes=", ".join(" ".join(name.split()) for name in names),
        use=_use(options, classifier),
    )


def _front(options: TrainOptions, classifier: Classifier) -> list[str]:
    is_on_hub = classifier.backbone != SMALL and not Path(classifier.backbone).exists()
    lines = [f"base_model: {classifier.backbone}"] if is_on_hub else []
    library = "transformers" if options.method == "full" else "peft"
    tags = ", ".join(dict.fromkeys(("gift", options.method)))
    return [*lines, f"library_name: {library}", "pipeline_tag: image-classification", f"tags: [{tags}]"]


def _row(name: str, score: Evaluation) -> str:
    low, high = (100 * bound for bound in score.interval)
    shown = f"{100 * score.accuracy:.2f} % | {low:.1f} to {high:.1f} % | {score.calibration_error:.3f}"
    return f"| {name} | {score.images:,} | {shown} |"


def _use(options: TrainOptions, classifier: Classifier) -> str:
    if options.method == "full":
        return LOAD_MODEL
    is_small = classifier.backbone == SMALL
    if is_small:
        imports = "from gift import SMALL_BACKBONE  # importing gift makes its methods known to PEFT\n"
    elif options.method.startswith(REGISTERED_BY_GIFT):
        imports = "import gift  # makes its methods known to PEFT\n"
    else:
        imports = ""
    backbone = "SMALL_BACKBONE" if is_small else repr(classifier.backbone)
    return LOAD_ADAPTER.format(imports=imports, backbone=backbone, classes=len(classifier.class_names))
