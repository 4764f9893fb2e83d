"""One encoded image in, an upright image out; what a model must not be fed with is refused, each with its own words."""

import io
import threading
import warnings
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
KINDS = {  # what is not RGB and becomes it
    "1": "black-and-white",
    "L": "greyscale",
    "LA": "greyscale with transparency",
    "La": "greyscale with transparency",
    "P": "palette",
    "PA": "palette with transparency",
    "RGBA": "transparent",
    "RGBa": "transparent",
    "RGBX": "transparent",
    "CMYK": "CMYK",
    "YCbCr": "YCbCr",
    "LAB": "LAB",
    "HSV": "HSV",
}
_WARNING_FILTERS = threading.Lock()  # they are global, and images are read in threads


def encoded_image(rows: Dataset, index: int) -> tuple[str, Path | io.BytesIO]:
    """Return what to call the image of a row in messages, and its file.

    Args:
        rows: With a column `image` that is left encoded.
        index: Of the row.

    Raises:
        ValueError: If the row has no image.
    """
    image = rows[index]["image"]
    path, data = (None, None) if image is None else (image["path"], image["bytes"])
    if data is not None:
        return path or f"image {index}", io.BytesIO(data)
    if not path:
        raise ValueError(f"Row {index} has no image.")
    return path, Path(path)


def open_upright(name: str, file: Path | io.BytesIO, smallest_px: int | None = None) -> Image.Image:
    """Return an image in its own mode, turned upright as its EXIF data say.

    Args:
        name: What to call it in messages.
        file: Its file.
        smallest_px: If given, JPEG files may be read at a fraction of their size whose sides are no smaller, which is
            several times as fast.

    Raises:
        ValueError: If it is damaged or cut off, is animated, or has more than 8 bits a channel or 100 megapixels.
    """
    with _open(name, file) as image:
        _check_header(name, image)
        try:
            if smallest_px is not None:
                image.draft(None, (smallest_px, smallest_px))
            return ImageOps.exif_transpose(image)
        except Exception as error:  # the readers of Pillow raise whatever a damaged file leads them to
            raise ValueError(_reason(name, error)) from error


def read_header(name: str, file: Path | io.BytesIO) -> tuple[tuple[int, int], str]:
    """Return width and height in pixels (as stored, before an image is turned upright) and mode, without decoding.

    Raises:
        ValueError: As `open_upright` does, as far as the header shows it.
    """
    with _open(name, file) as image:
        _check_header(name, image)
        return image.size, image.mode


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB; transparency is dropped.

    Raises:
        ValueError: If Pillow does not know how.
    """
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # without this step Pillow warns
    return image.convert("RGB")


def _open(name: str, file: Path | io.BytesIO) -> Image.Image:
    try:
        with _WARNING_FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_check_header` says it
            return Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {error} Make it smaller than {MAX_PIXELS} pixels.") from error
    except Exception as error:  # as above
        raise ValueError(_reason(name, error, file)) from error


def _check_header(name: str, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} is too large: {width} x {height} pixels, and {MAX_PIXELS} are allowed in all.")
    if image.mode.startswith(("I", "F")) or any(_has_deep_samples(tile) for tile in getattr(image, "tile", ())):
        raise ValueError(f"{name} has more than 8 bits a channel ({image.mode}): convert it to 8 bits.")
    try:
        is_animated = image.format != "MPO" and getattr(image, "is_animated", False)  # MPO: a photo and its thumbnail
    except Exception as error:  # as above
        raise ValueError(_reason(name, error)) from error
    if is_animated:
        raise ValueError(f"{name} is animated or has several pages: save the one picture that is meant.")


def _has_deep_samples(tile: Any) -> bool:
    """Return whether Pillow would cut samples to 8 bits: colours of 16 bits have no mode of their own."""
    if tile.codec_name.startswith("ppm"):
        return isinstance(tile.args, tuple) and tile.args[-1] > 255
    return ";16" in str(tile.args)


def _reason(name: str, error: Exception, file: Path | io.BytesIO | None = None) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{name} cannot be read: there is no such file."
    is_empty = isinstance(error, UnidentifiedImageError) and (
        not file.getbuffer().nbytes if isinstance(file, io.BytesIO) else file is not None and not file.stat().st_size
    )
    if is_empty:
        return f"{name} cannot be decoded: the file is empty."
    if isinstance(error, UnidentifiedImageError):
        return f"{name} cannot be decoded: it is no image, or none of a kind that Pillow reads."
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return f"{name} cannot be decoded: it is cut off ({error})."
    return f"{name} cannot be decoded: it is damaged ({type(error).__name__}: {error})."
