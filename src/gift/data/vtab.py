"""Which examples of a TFDS export make a VTAB-1k task, and how their labels are made.

As in google-research/task_adaptation, `task_adaptation/data/*.py` (commit ed9b417), splits train800, val200 and test.
"""

import io
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from gift.data.catalog import Task
from gift.data.tfds import TfdsExport
from gift.data.tfrecord import Value

Features = Mapping[str, Value]
Part = tuple[str, range]  # a split of the export, and the examples in it


@dataclass(frozen=True)
class Slicing:
    """Where validation and test lie in an export; training is always the first of `train`.

    Attributes:
        train_percent: If validation lies in the split `train`: after so many per cent of it. Else None.
        validation: Else the split that validation is the start of.
        test: The split for testing, or `train` for what follows training and validation.
        validation_percent: Where the test part lies in `train` too: how much of it validation is.
        test_from_percent: How much of the split for testing comes before the test part.
    """

    train_percent: int | None = None
    validation: str = "validation"
    test: str = "test"
    validation_percent: int = 0
    test_from_percent: int = 0

    def parts(self, export: TfdsExport, task: Task) -> dict[str, Part]:
        """Return the parts `train800`, `val200` and `test`."""
        total = export.count("train")
        begin = 0 if self.train_percent is None else self.train_percent * total // 100
        split = self.validation if self.train_percent is None else "train"
        if self.test == "train":
            test = range(begin + self.validation_percent * total // 100, total)
        else:
            count = export.count(self.test)
            test = range(self.test_from_percent * count // 100, count)
        validation = range(begin, begin + task.validation)
        return {"train800": ("train", range(task.train)), "val200": (split, validation), "test": (self.test, test)}


_OWN_VALIDATION = Slicing()
_NINE_TENTHS = Slicing(train_percent=90)
_FIFTHS = Slicing(train_percent=60, test="train", validation_percent=20)
_TENTHS = Slicing(train_percent=80, test="train", validation_percent=10)
_HALF_OF_TEST = Slicing(validation="test", test_from_percent=50)

SLICINGS: dict[str, Slicing] = {
    "caltech101": _NINE_TENTHS,
    "cifar": _NINE_TENTHS,
    "dtd": _OWN_VALIDATION,
    "oxford_flowers102": _OWN_VALIDATION,
    "oxford_iiit_pet": Slicing(train_percent=80),
    "svhn": _NINE_TENTHS,
    "sun397": _OWN_VALIDATION,
    "patch_camelyon": _OWN_VALIDATION,
    "eurosat": _FIFTHS,
    "resisc45": _FIFTHS,
    "diabetic_retinopathy": _OWN_VALIDATION,
    "clevr_count": Slicing(train_percent=90, test="validation"),
    "clevr_dist": Slicing(train_percent=90, test="validation"),
    "dmlab": _OWN_VALIDATION,
    "kitti": _OWN_VALIDATION,
    "dsprites_loc": _TENTHS,
    "dsprites_ori": _TENTHS,
    "smallnorb_azi": _HALF_OF_TEST,
    "smallnorb_ele": _HALF_OF_TEST,
}


def _one(features: Features, name: str) -> int:
    values = features[name]
    if len(values) != 1 or not isinstance(values[0], int):
        raise ValueError(f"the feature {name} must be one whole number, got {values}")
    return values[0]


def _depths(features: Features, name: str) -> list[float]:
    """Return the third coordinates of a list of points that are stored one after the other."""
    values = [float(value) for value in features[name]]
    if len(values) % 3 or not all(map(math.isfinite, values)):
        raise ValueError(f"the feature {name} must be points of three finite coordinates, got {len(values)} numbers")
    return values[2::3]


def _bin(distance: float, thresholds: tuple[float, ...]) -> int:
    """Return how many thresholds after the first lie below a distance."""
    return sum(threshold < distance for threshold in thresholds) - 1


def clevr_count(features: Features) -> int:
    """Return the number of objects less 3."""
    return len(features["objects/size"]) - 3


def clevr_distance(features: Features) -> int:
    """Return the bin of the closest object, by the third of its pixel coordinates."""
    closest = min(_depths(features, "objects/pixel_coords"), default=math.inf)
    return _bin(closest, (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0))


def kitti_distance(features: Features) -> int:
    """Return the bin of the closest car, van or truck (types 0 to 2) in metres ahead; 3 if there is none."""
    kinds, depths = features["objects/type"], _depths(features, "objects/location")
    vehicles = [depth for kind, depth in zip(kinds, depths, strict=True) if isinstance(kind, int) and kind < 3]
    return _bin(min([*vehicles, 1000.0]), (-100.0, 8.0, 20.0, 999.0))


def dsprites_label(factor: str, positions: int) -> Callable[[Features], int]:
    """Return what puts neighbouring values of a factor into 16 bins: the floor of value * 16 / positions."""
    return lambda features: _one(features, factor) * 16 // positions


_LABELS: dict[str, Callable[[Features], int]] = {
    "clevr_count": clevr_count,
    "clevr_dist": clevr_distance,
    "kitti": kitti_distance,
    "dsprites_loc": dsprites_label("label_x_position", 32),
    "dsprites_ori": dsprites_label("label_orientation", 40),
    "smallnorb_azi": lambda features: _one(features, "label_azimuth"),
    "smallnorb_ele": lambda features: _one(features, "label_elevation"),
}


def labelled_examples(export: TfdsExport, task: Task, part: Part) -> Iterator[tuple[str, bytes, int]]:
    """Yield what to call an example in messages, its encoded image and its label.

    Images are passed on as they were stored; those of dSprites, whose pixels are 0 and 1 there, become 0 and 255.

    Raises:
        ValueError: If an example is damaged, lacks a feature or has a label that the task does not know.
    """
    label_of = _LABELS.get(task.name, lambda features: _one(features, "label"))
    for name, features in export.examples(*part):
        try:
            image, label = features["image"], label_of(features)
        except KeyError as error:
            raise ValueError(f"The {name} has no feature {error}, only {sorted(features)}.") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"The {name} does not fit the task {task.name}: {error}.") from error
        if len(image) != 1 or not isinstance(image[0], bytes):
            raise ValueError(f"The {name} must have one encoded image, got {len(image)} values.")
        if not 0 <= label < task.classes:
            raise ValueError(f"The {name} has the label {label}, and {task.name} has {task.classes} classes.")
        yield name, _whiten(name, image[0]) if task.name.startswith("dsprites") else image[0], label


def _whiten(name: str, encoded: bytes) -> bytes:
    """Return an image of zeros and ones as one of black and white."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            pixels = np.asarray(image.convert("L"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"The image of the {name} cannot be decoded: {error}.") from error
    if pixels.max() > 1:
        raise ValueError(f"The image of the {name} must have pixels of 0 and 1, got {pixels.max()}.")
    file = io.BytesIO()
    Image.fromarray(pixels * np.uint8(255)).save(file, "PNG")
    return file.getvalue()
