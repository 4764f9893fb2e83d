"""The suites of `gift benchmark`: their tasks, and the protocol by which every method is searched and trained.

FGVC and VTAB-1k: what the paper reports (arXiv 2312.00700, section 4), as in `recipes/`. Where other papers search
otherwise (prompts, TOAST, full fine-tuning), the six learning rates are theirs or lie around theirs; every method has
as many tries. `offline` needs no download; its backbone is small and its trainings are short, so its rates lie ten
times higher.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gift.data.catalog import TASKS
from gift.pretrained import SMALL

VIT_B = "vit_base_patch16_224.augreg_in21k"
DECAYS = (1e-2, 1e-3, 1e-4, 0.0)
REDUCED = {"epochs": 4, "budget": 4}  # for a first look
SPRITES_TESTED = 1000  # offline: VTAB-1k tests on 73,728

_TOAST = {"optimizer": "sgd", "batch_size": 32, "method_options": {"init_head": True}}
_VPT = {"optimizer": "sgd", "drop_path": 0}  # the encoder stays in eval mode: there is no drop path


@dataclass(frozen=True)
class Protocol:
    """How the trainings of a suite are done.

    Attributes:
        options: Of `gift train`, for every method.
        of_methods: Further ones, by the name of the method.
        rates: Six learning rates to search, ascending, by the name of the method; under "" those of all others.
    """

    options: Mapping[str, Any]
    of_methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def rates_of(self, method: str) -> tuple[float, ...]:
        """Return the learning rates to search for a method."""
        return self.rates.get(method, self.rates[""])


@dataclass(frozen=True)
class Suite:
    """Tasks that are reported together; `drawn` ones are made here, with so many test images (None: all)."""

    tasks: tuple[str, ...]
    protocol: Protocol
    drawn: Mapping[str, int | None] = field(default_factory=dict)


_PAPER_METHODS: dict[str, dict[str, Any]] = {
    "linear-probe": {"drop_path": 0},
    "lora": {"method_options": {"lora_alpha": 1}},  # the paper's own baseline: scale 1 / r
    **dict.fromkeys(("vpt-deep", "vpt-shallow"), _VPT),
    **dict.fromkeys(("toast", "toast-lite"), _TOAST),
}
_PAPER_RATES = {
    "": (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3),
    "full": (2.5e-5, 5e-5, 1.25e-4, 2.5e-4, 5e-4, 1.25e-3),
    # VPT searches 5e-2 to 5e+1 times batch_size / 256.
    **dict.fromkeys(("vpt-deep", "vpt-shallow"), (2.5e-2, 6.25e-2, 2.5e-1, 6.25e-1, 2.5, 6.25)),
    **dict.fromkeys(("toast", "toast-lite"), (3e-3, 6e-3, 1e-2, 1.5e-2, 2e-2, 3e-2)),
}
_PAPER = {"model": VIT_B, "epochs": 100, "batch_size": 64, "drop_path": 0.1}
_SMALL_RATES = {
    "": (1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2),
    "linear-probe": (2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 1e-1),
    "full": (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3),
}


def _tasks_of(suite: str) -> tuple[str, ...]:
    return tuple(task.name for task in TASKS.values() if task.suite == suite)


SUITES: dict[str, Suite] = {
    "fgvc": Suite(_tasks_of("fgvc"), Protocol(_PAPER, _PAPER_METHODS, _PAPER_RATES)),
    "vtab1k": Suite(
        _tasks_of("vtab1k"), Protocol(_PAPER | {"resize": "squash", "augment": "none"}, _PAPER_METHODS, _PAPER_RATES)
    ),
    "offline": Suite(
        ("digits", "dsprites_loc", "dsprites_ori", "rendered_flowers"),
        Protocol({"model": SMALL, "epochs": 30, "batch_size": 16, "validation_share": 0.2}, {}, _SMALL_RATES),
        {
            "digits": None,
            "dsprites_loc": SPRITES_TESTED,
            "dsprites_ori": SPRITES_TESTED,
            "rendered_flowers": None,
        },
    ),
}
# Of drawn tasks; folders that are given are photos, prepared as `gift train` does.
DRAWN_OPTIONS = {"resize": "squash", "augment": "none"}


def tries(rates: tuple[float, ...], budget: int | None) -> list[tuple[float, float]]:
    """Return the pairs of learning rate and weight decay to try, the first of them if there is a budget.

    All pairs are a Latin square: each pass has every rate once, with a decay that moves on from pass to pass. A budget
    of less than one pass takes rates that are spread from the lowest to the highest.

    Raises:
        ValueError: If there are not so many pairs.
    """
    total = len(rates) * len(DECAYS)
    budget = total if budget is None else budget
    if not 1 <= budget <= total:
        raise ValueError(
            f"budget must be from 1 to {total}, the pairs of rates and decays that there are; got {budget}."
        )
    if budget < len(rates):
        chosen = [round(index * (len(rates) - 1) / max(budget - 1, 1)) for index in range(budget)]
        rates = tuple(rates[index] for index in (chosen if budget > 1 else [len(rates) // 2]))
    passes = range(len(DECAYS))
    pairs = [(rate, DECAYS[(i + p) % len(DECAYS)]) for p in passes for i, rate in enumerate(rates)]
    return pairs[:budget]
