"""What the paper reports on FGVC and VTAB-1k, to stand beside our own results.

Source: arXiv 2312.00700, second version, tables of FGVC and VTAB-1k. The backbone is ViT-B/16, pretrained on
ImageNet-21k (`vit_base_patch16_224.augreg_in21k`). GIFT there is the *linear* generator with r = 16, not PaCa. The mean
of VTAB-1k is over its 19 tasks, not over the three groups. No intervals are taken over from there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

SOURCE = "arXiv 2312.00700v2"
MODEL = "vit_base_patch16_224.augreg_in21k"
BACKBONE_PARAMETERS = 85_800_000


@dataclass(frozen=True)
class Published:
    """A row of a published table.

    Attributes:
        method: As the paper calls it.
        title: For our tables: the method, what form of it, and that it is published.
        percent: Trained parameters without the head, in % of the backbone.
        accuracies: In %, by task of FGVC or by group of VTAB-1k.
        mean: In %, over all tasks of the suite, as printed there.
    """

    method: str
    title: str
    percent: float
    accuracies: Mapping[str, float]
    mean: float

    @property
    def parameters(self) -> int:
        """Trained parameters without the head, from the rounded share."""
        return round(self.percent / 100 * BACKBONE_PARAMETERS)

    def accuracy(self, name: str, is_whole: bool) -> float | None:
        """Return the figure of a task or group, or of `mean`, if the paper gives it.

        Args:
            name: Of the task or group, or `mean`.
            is_whole: Whether all tasks of the suite or group are meant; otherwise the paper has no figure.
        """
        if not is_whole:
            return None
        return self.mean if name == "mean" else self.accuracies.get(name)


_PERCENT = {"VPT": 0.054, "BitFit": 0.097, "LoRA": 0.172, "GIFT": 0.029}

_NAMES = {
    "fgvc": ("cub", "nabirds", "oxford_flowers", "stanford_dogs", "stanford_cars"),
    "vtab1k": ("Natural", "Specialized", "Structured"),
}

# The last figure of a row is the mean.
_FIGURES = {
    "fgvc": {
        "VPT": (87.88, 84.79, 98.98, 84.51, 82.89, 87.81),
        "BitFit": (87.75, 84.61, 99.32, 85.23, 84.01, 88.18),
        "LoRA": (88.00, 84.94, 99.32, 85.36, 85.92, 88.71),
        "GIFT": (89.71, 86.28, 99.22, 87.44, 84.28, 89.39),
    },
    "vtab1k": {
        "VPT": (81.03, 85.65, 58.89, 72.68),
        "BitFit": (81.79, 85.15, 57.75, 72.37),
        "LoRA": (81.96, 85.89, 60.98, 73.95),
        "GIFT": (81.95, 86.30, 61.12, 74.09),
    },
}


def published_rows(suite: str) -> tuple[Published, ...]:
    """Return the published rows of a suite, none for suites other than `fgvc` and `vtab1k`."""
    return tuple(
        Published(
            method=method,
            title=f"{'GIFT linear r=16' if method == 'GIFT' else method} (published)",
            percent=_PERCENT[method],
            accuracies=MappingProxyType(dict(zip(_NAMES[suite], figures[:-1], strict=True))),
            mean=figures[-1],
        )
        for method, figures in _FIGURES.get(suite, {}).items()
    )


def is_published_model(model: str) -> bool:
    """Return whether the published rows are of that backbone, given by its name with or without an owner before it."""
    return model.rsplit("/", maxsplit=1)[-1] == MODEL


def published_notes(suite: str, model: str) -> list[str]:
    """Return what to say beneath a table of that suite and backbone about the published rows in it, if any."""
    if suite not in _FIGURES:
        return []
    notes = [
        f"Rows marked (published) are from {SOURCE}: {MODEL}, 100 epochs, without intervals. GIFT there is the linear "
        f"generator with r=16, not PaCa. Trained parameters do not count the head."
    ]
    if not is_published_model(model):
        notes.append(f"The backbone here is {model}, so published rows are no comparison: it is not theirs.")
    return notes
