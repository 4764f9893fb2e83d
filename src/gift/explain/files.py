"""Cluster maps on disk: written image by image, read without loading them.

A folder holds `maps.safetensors` (the maps alone), `arrays.safetensors` (what is small) and, written last,
`manifest.json`.
"""

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

MAPS, ARRAYS, MANIFEST = "maps.safetensors", "arrays.safetensors", "manifest.json"
FORMAT = "gift cluster maps 1"
HEADER_BYTES = 512  # kept free at the start: the number of images is known at the end


class MapsWriter:
    """Write maps one batch after another into one safetensors file; nothing is left behind after an error.

    Args:
        folder: Where to write; must not exist, be empty or hold cluster maps, which are replaced.

    Raises:
        ValueError: If the folder holds anything else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        taken = [entry.name for entry in folder.iterdir()] if folder.is_dir() else [folder.name] * folder.exists()
        own = {MAPS, ARRAYS, MANIFEST, f"{MAPS}.partial", f"{MANIFEST}.partial"}
        if foreign := sorted(set(taken) - own):
            raise ValueError(f"{folder} holds {foreign[0]}, which is no cluster map: choose another folder.")
        self._shape: list[int] = []

    def __enter__(self) -> "MapsWriter":
        self._existed = self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._partial = self.folder / f"{MAPS}.partial"
        self._file = self._partial.open("wb+")
        self._file.write(bytes(HEADER_BYTES))
        return self

    def add(self, maps: Float32[np.ndarray, "batch layers clusters rows columns"]) -> None:
        """Append the maps of some images.

        Raises:
            ValueError: If they have another shape than those before.
        """
        if self._shape and self._shape[1:] != list(maps.shape[1:]):
            raise ValueError(f"All maps must be of one size, got {maps.shape[1:]} after {tuple(self._shape[1:])}.")
        self._shape = [(self._shape or [0])[0] + len(maps), *maps.shape[1:]]
        self._file.write(np.ascontiguousarray(maps, "<f4").tobytes())

    @property
    def maps(self) -> Float32[np.ndarray, "batch layers clusters rows columns"]:
        """What was written, on disk."""
        self._file.flush()
        return np.memmap(self._partial, "<f4", "r", HEADER_BYTES, tuple(self._shape))

    def finish(self, arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
        """Write the rest, so that the folder can be loaded."""
        bytes_of_maps = 4 * int(np.prod(self._shape))
        description = {"maps": {"dtype": "F32", "shape": self._shape, "data_offsets": [0, bytes_of_maps]}}
        header = json.dumps(description).encode().ljust(HEADER_BYTES - 8)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.close()
        (self.folder / MANIFEST).unlink(missing_ok=True)
        self._partial.replace(self.folder / MAPS)
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, self.folder / ARRAYS)
        partial = self.folder / f"{MANIFEST}.partial"
        partial.write_text(json.dumps({"format": FORMAT} | manifest, indent=2) + "\n")
        partial.replace(self.folder / MANIFEST)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)
        if kind is not None and not self._existed:
            shutil.rmtree(self.folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what the manifest of a folder says.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest.pop("format") != FORMAT:
            raise ValueError("it is of another format")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder} holds no complete cluster maps: {error}.") from error
    return manifest


def read_arrays(folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the maps, which stay on disk, and the other arrays of a folder by name.

    Raises:
        ValueError: If a file is damaged, or they do not belong together.
    """
    try:
        arrays = load_file(folder / ARRAYS)
        with (folder / MAPS).open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            description = json.loads(file.read(min(header_bytes, 4 * HEADER_BYTES)))["maps"]
        if description["dtype"] != "F32" or description["shape"][0] != len(arrays["predictions"]):
            raise ValueError("the maps are of another number of images than the rest")
        maps = np.memmap(folder / MAPS, "<f4", "r", 8 + header_bytes, tuple(description["shape"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{folder} holds no complete cluster maps: {error}.") from error
    return maps, arrays
