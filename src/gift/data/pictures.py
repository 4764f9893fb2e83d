"""Pictures without labels: which files there are, and each as it is shown and as a model takes it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from gift.data.decoding import open_upright
from gift.data.geometry import Geometry, Preparation

SHOWN_PX = 256  # the side, at least, at which a picture is shown: many a model takes smaller ones


@dataclass(frozen=True)
class PictureFile:
    """A picture on disk.

    Attributes:
        name: Its path below the folder that was asked for, or the name of the file; the whole path where two have one.
        path: Where it is.
    """

    name: str
    path: Path

    @property
    def group(self) -> str | None:
        """Name of the folder that it lies in, below the one that was asked for."""
        return Path(self.name).parent.name or None


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture, cut as the model sees it.

    Attributes:
        name: What to call it.
        group: Name of the folder that it lies in, which may be that of a class.
        shown: Its pixels, to be looked at.
        pixels: What the model takes.
    """

    name: str
    group: str | None
    shown: UInt8[np.ndarray, "height width 3"]
    pixels: Float[Tensor, "3 side side"]


def picture_files(paths: Sequence[Path]) -> list[PictureFile]:
    """Return the pictures among files and below folders, in the order of the paths, each file once.

    A file that is named is taken whatever it is called; below folders it must be called as pictures are.

    Raises:
        ValueError: If a path is neither a file nor a folder with pictures.
    """
    found: dict[Path, PictureFile] = {}
    names: set[str] = set()
    for path in paths:
        for file in [PictureFile(printable(path.name), path)] if path.is_file() else _below(path):
            if (place := file.path.resolve()) not in found:
                found[place] = file if file.name not in names else replace(file, name=printable(str(place)))
                names.add(found[place].name)
    return list(found.values())


def printable(name: str) -> str:
    """Return the name of a file as it can be shown: what is no text, or would end a line, becomes a question mark."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in text)


def _below(folder: Path) -> list[PictureFile]:
    suffixes = set(Image.registered_extensions())
    files = [path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file()]
    hidden = (".", "__MACOSX")
    files = [path for path in files if not any(part.startswith(hidden) for part in path.relative_to(folder).parts)]
    if not files:
        raise ValueError(f"{folder} is neither an image nor a folder with images.")
    return [PictureFile(printable(str(path.relative_to(folder))), path) for path in sorted(files)]


def some_of_every_group(files: Sequence[PictureFile], count: int) -> list[PictureFile]:
    """Return at most so many pictures, from all folders in turn, evenly spread over each, in their order."""
    groups: dict[Path, list[PictureFile]] = {}
    for file in files:
        groups.setdefault(file.path.parent, []).append(file)
    turns = zip_longest(*(_evenly(of_group, count) for of_group in groups.values()))
    chosen = [file for turn in turns for file in turn if file is not None][:count]
    kept = {file.path for file in chosen}
    return [file for file in files if file.path in kept]


def _evenly(files: list[PictureFile], count: int) -> list[PictureFile]:
    """Return the files in an order whose every beginning is spread over all of them."""
    few = [files[index * len(files) // count] for index in range(count)] if len(files) > count else files
    order = sorted(range(len(few)), key=lambda index: int(f"{index:032b}"[::-1], 2))
    return [few[index] for index in order]


def read_picture(file: PictureFile, geometry: Geometry) -> Picture:
    """Return a picture as it is shown and as a model takes it.

    Args:
        file: The file, which need not be a picture.
        geometry: How images become what the model takes.

    Raises:
        ValueError: If it is no picture that can be used; the message names it and says why.
        OSError: If it cannot be read.
    """
    image = open_upright(file.name, file.path)
    to_model = Preparation(geometry, train=False)
    to_screen = Preparation(replace(geometry, size_px=max(geometry.size_px, SHOWN_PX)), train=False)
    try:
        kept, shown = to_model.kept(image), to_screen.kept(image)
    except ValueError as error:
        raise ValueError(f"{file.name} {error}") from error
    return Picture(file.name, file.group, shown.permute(1, 2, 0).numpy(), to_model.normalised(kept))


def read_pictures(files: Iterable[PictureFile], geometry: Geometry) -> tuple[list[Picture], dict[str, str]]:
    """Return all pictures that can be used, and why the others cannot, by their names."""
    pictures: list[Picture] = []
    problems: dict[str, str] = {}
    for file in files:
        try:
            pictures.append(read_picture(file, geometry))
        except (ValueError, OSError) as error:
            problems[file.name] = str(error)
    return pictures, problems
