"""The images of a run, checked when they are read."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from gift.training.arguments import check

ITEMS_CHECKED_FIRST = 256  # of each dataset, before training starts


@runtime_checkable
class Items(Protocol):
    """A dataset with a length whose items are `{"pixel_values": float tensor, "labels": int}`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class CheckedItems(Dataset):
    """The items of a dataset, each checked when it is read; some of them at once.

    Args:
        name: What to call the dataset in messages.
        items: The dataset.
        classes: Number of classes that the backbone's head knows.

    Raises:
        ValueError: If an item is not what the backbone needs.
    """

    def __init__(self, name: str, items: Items, classes: int) -> None:
        self.name, self.items, self.classes = name, items, classes
        check(len(items), f"The dataset {name} is empty.")
        self.shape = None
        self.first_labels: list[int] = []  # of the items that are checked now
        for index in np.unique(np.linspace(0, len(items) - 1, ITEMS_CHECKED_FIRST, dtype=int)):
            item = self[int(index)]
            self.shape = item["pixel_values"].shape
            self.first_labels.append(item["labels"])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, where = self.items[index], f"Item {index} of the dataset {self.name}"
        check(
            isinstance(item, Mapping) and {"pixel_values", "labels"} <= set(item),
            f"{where} must be a mapping with the keys pixel_values and labels, got "
            f"{list(item) if isinstance(item, Mapping) else type(item)}.",
        )
        pixels, label = item["pixel_values"], item["labels"]
        is_image = isinstance(pixels, Tensor) and pixels.ndim == 3 and pixels.is_floating_point()
        got = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels)
        check(is_image, f"{where}: pixel_values must be a float tensor (channels, rows, columns), got {got}.")
        check(self.shape in (None, pixels.shape), f"{where} is {got}, others are {self.shape}: resize the images.")
        is_class = isinstance(label, (int, np.integer)) and 0 <= label < self.classes
        check(
            is_class,
            f"{where}: labels must be an int from 0 to {self.classes - 1}, as the backbone has {self.classes} classes, "
            f"got {label!r}. Load the backbone with num_labels set to the number of classes.",
        )
        return {"pixel_values": pixels, "labels": int(label)}
