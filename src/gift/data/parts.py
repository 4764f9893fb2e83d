"""Images whose parts are known, the truth that cluster maps are scored against: drawn flowers, masks, boxes.

Masks go through the geometry of their images (`gift.data.readers.read_images`), but by area instead of bicubically: a
pixel of a mask is the share of the pixel of the image that the part covers.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy.random import PCG64, Generator
from torchvision.datasets.folder import IMG_EXTENSIONS

from gift.data.images import LabelledImages
from gift.data.readers import area_crop, encoded_rows, open_parquet, open_upright, square_crop
from gift.data.rendered import FLOWER_PARTS, PARTS, SPECIES, RenderedFlower, RenderedFlowers

Key = tuple[str, ...]  # of a file: the names of its folders, and its own without the suffix


@dataclass(frozen=True, eq=False)
class PartImages:
    """Images of one size, and how much of every pixel each part covers.

    Attributes:
        images: The images; labels are -1, and there are no class names, where the classes are unknown.
        masks: Share of every pixel that a part covers, from 0 to 1.
        part_names: Names of the parts, in the order of `masks`.
        object_parts: Those that belong to the object itself, not to its surroundings.
        without: By name of a part, the same images with that part not drawn; empty where nobody can draw them.
    """

    images: LabelledImages
    masks: Float[np.ndarray, "images parts rows columns"]
    part_names: tuple[str, ...]
    object_parts: tuple[str, ...]
    without: Mapping[str, UInt8[np.ndarray, "images rows columns 3"]]

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, chosen: slice | Int[np.ndarray, " chosen"]) -> "PartImages":
        pixels, labels = self.images.pixels[chosen], self.images.labels[chosen]
        images = LabelledImages(pixels, labels, self.images.class_names)
        without = {part: drawn[chosen] for part, drawn in self.without.items()}
        return PartImages(images, self.masks[chosen], self.part_names, self.object_parts, without)

    def coverage(
        self, patch: tuple[int, int], grid: tuple[int, int]
    ) -> Float[np.ndarray, "images parts grid_rows grid_columns"]:
        """Return the share of every patch that each part covers, from 0 to 1.

        Args:
            patch: Height and width of a patch in pixels.
            grid: Rows and columns of patches, as of `gift.backbones.patch_grid`. A grid smaller than the image cuts it
                at the right and at the bottom, as ViTs do; a larger one pads it there with nothing, as Swin does.

        Raises:
            ValueError: If the grid misses a whole patch of the image, or has one outside of it.
        """
        sides = tuple(size * count for size, count in zip(patch, grid, strict=True))
        missing = [side - actual for side, actual in zip(sides, self.masks.shape[2:], strict=True)]
        if min(patch) < 1 or any(abs(pixels) >= size for pixels, size in zip(missing, patch, strict=True)):
            raise ValueError(
                f"A grid of {grid[0]} x {grid[1]} patches of {patch[0]} x {patch[1]} pixels does not fit images of "
                f"{self.masks.shape[2]} x {self.masks.shape[3]} pixels. Were they read at the size of another model?"
            )
        padding = ((0, 0), *((0, max(0, pixels)) for pixels in missing))
        split = (-1, grid[0], patch[0], grid[1], patch[1])
        shares = np.empty((*self.masks.shape[:2], *grid))
        for share, mask in zip(shares, self.masks, strict=True):  # one by one: padding copies
            padded = np.pad(mask[:, : sides[0], : sides[1]], padding)
            share[:] = padded.reshape(split).mean(axis=(2, 4), dtype=np.float64)
        return shares


def read_parts(source: Path | str, image_size_px: int, count: int, seed: int) -> PartImages:
    """Return at most `count` images whose parts are known.

    Args:
        source: The word `flowers` for drawn flowers (see `draw_parts`), a folder with `masks/` (see `read_masks`;
            one called flowers by its whole path), or a parquet file with boxes (see `read_boxes`).
        image_size_px: Side of the square images in pixels.
        count: Number of flowers; of the images of files so many are chosen at random, or all if there are fewer.
        seed: Of the scenes of the flowers, or of the choice.

    Raises:
        ValueError: If `source` is none of these, or what it names cannot be read.
    """
    path = Path(source)
    if str(source) == "flowers":
        return draw_parts(count, seed, image_size_px)
    if (path / "masks").is_dir():
        return read_masks(path, image_size_px, count, seed)
    if path.is_file() and path.suffix == ".parquet":
        return read_boxes(path, image_size_px, count, seed)
    raise ValueError(
        f"No images with known parts in {source}: give the word flowers, a folder with images/ and masks/, or a "
        ".parquet file with columns image, label and bbox."
    )


def draw_parts(
    count: int, seed: int, image_size_px: int, cue_species: int | None = None, plant_everywhere: bool = False
) -> PartImages:
    """Return drawn flowers: petals, centre and leaves (the object), the background, and the cue if one is planted.

    They can also be had `without` each part but the background; images that show no cue are the same without it.

    Args:
        count: Number of flowers, of all species in random order.
        seed: Sets with different seeds share no scene; a number from 0.
        image_size_px: Side of an image in pixels.
        cue_species: Index of the species whose images show a twig in the background, if any.
        plant_everywhere: Whether the images of all species show the twig, whatever `cue_species` says.

    Raises:
        ValueError: If there is no such species, or no flower is asked for.
    """
    if count < 1 or cue_species not in (None, *range(len(SPECIES))):
        raise ValueError(
            f"Cannot draw {count} flowers with the cue of species {cue_species}: draw at least 1, and choose a species "
            f"from 0 to {len(SPECIES) - 1} or none."
        )
    planted = plant_everywhere or cue_species is not None
    part_names = (*FLOWER_PARTS, "background", *(("cue",) if planted else ()))
    parts = _blank(count, tuple(species.name for species in SPECIES), part_names, image_size_px)
    flowers = RenderedFlowers(count, seed, image_size_px, cue_species=cue_species)
    order = [PARTS.index(part) for part in part_names]
    for index, flower in enumerate(_drawn(flowers, plant_everywhere)):
        parts.images.pixels[index], parts.images.labels[index] = flower.image, flower.label
        parts.masks[index] = flower.coverage[order] / 9  # samples of a pixel
    without = {part: _images(replace(flowers, leave_out=(part,)), plant_everywhere) for part in FLOWER_PARTS}
    if planted:
        without["cue"] = _images(replace(flowers, cue_species=None), plant_everywhere=False)
    return replace(parts, object_parts=FLOWER_PARTS, without=without)


def _drawn(flowers: RenderedFlowers, plant_everywhere: bool) -> Iterator[RenderedFlower]:
    for index, label in enumerate(flowers.labels):  # the scene of an index is the same with any species of the cue
        yield (replace(flowers, cue_species=int(label)) if plant_everywhere else flowers)[index]


def _images(flowers: RenderedFlowers, plant_everywhere: bool) -> UInt8[np.ndarray, "images rows columns 3"]:
    return np.stack([flower.image for flower in _drawn(flowers, plant_everywhere)])


def read_masks(path: Path | str, image_size_px: int, count: int | None = None, seed: int = 0) -> PartImages:
    """Return the images of a folder and their masks, in the order of their names.

    The images lie in `images/`, or in one subfolder of it for every class. The masks are PNG files of the same sizes,
    upright, and in one of two forms:

    * `masks/<part>/<class>/<name>.png`: whatever is not black is the part; a part without a file is not in the image.
    * `masks/<class>/<name>.png`: palette or 8 bit grey, where 0 is no part and k the part in line k of
      `masks/parts.txt`. Without that file, the parts are "1", "2" and so on to the largest value that is read.

    All parts but one called "background" belong to the object. Hidden files are passed over.

    Args:
        path: The folder.
        image_size_px: Side of the square images in pixels.
        count: How many images are chosen at random; all if there are fewer, or if it is None.
        seed: Of that choice.

    Raises:
        ValueError: If a folder is empty, an image and a mask lack one another or differ in size, a mask is not in one
            of these forms, or a file is damaged.
    """
    files, masks, part_names = _paired(Path(path))
    keys = [list(files)[index] for index in _choose(len(files), count, seed)]
    part_names = part_names or _names_of_values(Path(path, "masks/parts.txt"), [masks[key][""] for key in keys])
    class_names = tuple(sorted({folder for *folders, _ in files for folder in folders}))
    parts, crop = _blank(len(keys), class_names, part_names, image_size_px), square_crop(image_size_px)
    for index, key in enumerate(keys):
        image = open_upright(str(files[key]), files[key])
        parts.images.pixels[index] = np.asarray(crop(image.convert("RGB")))
        parts.images.labels[index] = class_names.index(key[0]) if class_names else -1
        edges = np.arange(image.height + 1), np.arange(image.width + 1)
        for part, file in masks[key].items():
            for number, covered in _covered(file, part, part_names, (files[key], image.size)):
                parts.masks[index, number] = area_crop(covered, edges, image.size, image_size_px)
    return parts


def _blank(count: int, class_names: tuple[str, ...], part_names: tuple[str, ...], image_size_px: int) -> PartImages:
    """Return images to be filled in: black, of no class, without parts."""
    pixels = np.zeros((count, image_size_px, image_size_px, 3), np.uint8)
    masks = np.zeros((count, len(part_names), image_size_px, image_size_px), np.float32)
    object_parts = tuple(part for part in part_names if part != "background")
    return PartImages(LabelledImages(pixels, np.full(count, -1), class_names), masks, part_names, object_parts, {})


def _listed(folder: Path, suffixes: tuple[str, ...]) -> dict[Key, Path]:
    """Return the images in a folder and its subfolders, none of which may lack one, in the order of their names."""
    entries = [Path(name) for name in glob("**/*", root_dir=folder, recursive=True)]  # without hidden ones
    images = [entry for entry in entries if entry.suffix.lower() in IMG_EXTENSIONS]
    full = {parent for image in images for parent in image.parents}
    for entry in (Path(), *entries):
        if entry not in full and (entry == Path() or (folder / entry).is_dir()):
            raise ValueError(f"There are no images in {folder / entry}: see gift.data.parts.read_masks for the layout.")
    files: dict[Key, Path] = {}
    for image in images:
        key, file = image.with_suffix("").parts, folder / image
        if key in files or image.suffix.lower() not in suffixes:
            raise ValueError(f"{file} must end in {' or '.join(suffixes)}, and no other image there may be called so.")
        files[key] = file
    return dict(sorted(files.items()))


def _paired(path: Path) -> tuple[dict[Key, Path], dict[Key, dict[str, Path]], tuple[str, ...]]:
    """Return images, masks of each by part ("" in a label image), and the parts that have folders."""
    files, masks = _listed(path / "images", IMG_EXTENSIONS), _listed(path / "masks", (".png",))
    depth, pairs = len(next(iter(files))), {key: dict[str, Path]() for key in files}
    for key, file in files.items():
        if depth > 2 or len(key) != depth:
            raise ValueError(f"{file} lies apart: put all images into images/, or all into folders of classes in it.")
    for key, file in masks.items():
        part, image = ("", key) if len(key) == depth else (key[0], key[1:])
        if image not in pairs:
            raise ValueError(f"There is no image for the mask {file}: give both one name but for the suffix.")
        pairs[image][part] = file
    for key, found in pairs.items():
        if not found:
            raise ValueError(f"There is no mask for the image {files[key]}: give both one name but for the suffix.")
    parts = {part for found in pairs.values() for part in found}
    if "" in parts and len(parts) > 1:
        raise ValueError(f"{path / 'masks'} holds label images and folders of parts: keep one of the two forms.")
    return files, pairs, tuple(sorted(parts - {""}))


def _names_of_values(file: Path, masks: list[Path]) -> tuple[str, ...]:
    """Return the parts that values of label images from 1 on stand for."""
    if file.exists():
        names = tuple(line.strip() for line in file.read_bytes().decode("utf-8-sig", "replace").splitlines())
    else:
        largest = max(int(np.max(np.asarray(open_upright(str(mask), mask)))) for mask in masks)
        names = tuple(map(str, range(1, largest + 1)))
    if not all(names) or len(set(names)) < max(1, len(names)) or "\ufffd" in "".join(names):
        raise ValueError(f"{file} must name at least one part, a different one on each line, in UTF-8; got {names}.")
    return names


def _covered(
    file: Path, part: str, part_names: tuple[str, ...], image: tuple[Path, tuple[int, int]]
) -> Iterator[tuple[int, Bool[np.ndarray, "rows columns"]]]:
    """Yield the numbers of the parts in one file, and which pixels they cover; `image` is a file and its size."""
    mask = open_upright(str(file), file)
    if mask.size != image[1]:
        sizes = [f"{width} x {height}" for width, height in (mask.size, image[1])]
        raise ValueError(f"The mask {file} has {sizes[0]} pixels, its image {image[0]} has {sizes[1]}: save one anew.")
    if part:
        if mask.has_transparency_data:
            raise ValueError(f"The mask {file} is transparent in places: save it without, black where no part is.")
        yield part_names.index(part), np.asarray(mask.convert("RGB")).max(axis=2) > 0
        return
    values = np.asarray(mask)
    if mask.mode not in ("L", "P") or values.max() > len(part_names):
        raise ValueError(
            f"The label image {file} has the value {values.max()} (mode {mask.mode}); use 8 bit grey or a palette, and "
            f"values up to {len(part_names)}, the number of parts."
        )
    for value in np.unique(values[values > 0]):
        yield int(value) - 1, values == value


def read_boxes(path: Path | str, image_size_px: int, count: int | None = None, seed: int = 0) -> PartImages:
    """Return the images of a parquet file, and as their only part "object" what lies in a box.

    The column `bbox` holds [x1, y1, x2, y2] in whole pixels of the upright image, from 0. The last column x2 and the
    last row y2 are in the box: Tiny ImageNet, which this was made for, has boxes from 63 to 63 in images of 64 pixels.

    Args:
        path: The file, with columns `image` and `label` as `gift.data.readers.read_images` takes them.
        image_size_px: Side of the square images in pixels.
        count: How many images are chosen at random, in the order of the file; all if there are fewer, or if it is None.
        seed: Of that choice. Rows that are not chosen are not checked.

    Raises:
        ValueError: If the file lacks a column or rows, an image is damaged, or a box is out of order or of the image.
    """
    path, crop = Path(path), square_crop(image_size_px)
    if not path.is_file():
        raise ValueError(f"There is no file {path}: give a parquet file.")
    with tempfile.TemporaryDirectory() as cache:
        rows = open_parquet(path, cache)
        if "bbox" not in rows.features or not len(rows):
            raise ValueError(f"{path} must have images and a column bbox, got {len(rows)} rows of {rows.features}.")
        chosen = _choose(len(rows), count, seed)
        parts = _blank(len(chosen), tuple(rows.features["label"].names), ("object",), image_size_px)
        boxes = rows.select(chosen)["bbox"]
        for index, (name, file, label) in enumerate(encoded_rows(path, rows, chosen)):
            image = open_upright(name, file)
            parts.images.pixels[index], parts.images.labels[index] = np.asarray(crop(image.convert("RGB"))), label
            edges = _edges(name, boxes[index], image.size)
            parts.masks[index, 0] = area_crop(np.ones((1, 1)), edges, image.size, image_size_px)
    return parts


def _edges(
    name: str, box: list[int] | None, size: tuple[int, int]
) -> tuple[Int[np.ndarray, " row_edges"], Int[np.ndarray, " column_edges"]]:
    """Return the edges of a box between rows and between columns."""
    if box is not None and len(box) == 4 and all(isinstance(value, int) for value in box):
        left, top, right, bottom = box
        if 0 <= left <= right < size[0] and 0 <= top <= bottom < size[1]:
            return np.array([top, bottom + 1]), np.array([left, right + 1])
    raise ValueError(
        f"The {name} has the box {box}, and its image {size[0]} x {size[1]} pixels: give [x1, y1, x2, y2] in whole "
        "pixels from 0, with x1 up to x2 and y1 up to y2, and the last ones still in the image."
    )


def _choose(total: int, count: int | None, seed: int) -> list[int]:
    """Return `count` random indices below `total` in ascending order, all of them if there are fewer."""
    if count is not None and count < 1:
        raise ValueError(f"Cannot choose {count} images: ask for at least 1.")
    order = Generator(PCG64(seed)).random(total).argsort(kind="stable")
    return np.sort(order[:count]).tolist()
