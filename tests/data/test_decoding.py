import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from gift.data.decoding import MAX_PIXELS, as_rgb, encoded_image, open_upright, read_header
from gift.data.listing import listed
from tests.data.image_files import encoded, picture


def png_of_size(width, height, depth=8, colour=2):
    """Return a PNG file whose header tells of a size, with nothing in it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def animation(form):
    frames = [picture(seed) for seed in range(3)]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:])


LONG_PNG = encoded(Image.effect_noise((64, 64), 90))
FILES = {
    "empty": b"",
    "cut off jpeg": encoded(picture(), "JPEG")[:-40],
    "cut off png": LONG_PNG[: len(LONG_PNG) // 2],
    "text": b"label,file\n1,a.png\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'></svg>",
    "damaged png": LONG_PNG[:60] + bytes(20) + LONG_PNG[80:],
    "16 bits grey": encoded(Image.fromarray(np.zeros((4, 4), np.uint16))),
    "16 bits colour": png_of_size(4, 4, depth=16),
    "16 bits ppm": b"P6 1 1 65535\n" + bytes(6),
    "32 bits": encoded(Image.new("I", (4, 4)), "TIFF"),
    "floats": encoded(Image.new("F", (4, 4)), "TIFF"),
    "gif": animation("GIF"),
    "webp": animation("WEBP"),
    "apng": animation("PNG"),
    "tiff": animation("TIFF"),
    "large": png_of_size(10_000, 10_001),
    "larger": png_of_size(20_000, 20_000),
}
REFUSED_BY_HEADER = {
    "empty": "cannot be decoded: the file is empty",
    "text": "cannot be decoded: it is no image, or none of a kind that Pillow reads",
    "svg": "cannot be decoded: it is no image, or none of a kind that Pillow reads",
    "16 bits grey": r"has more than 8 bits a channel \(I;16\)",
    "16 bits colour": r"has more than 8 bits a channel \(RGB\)",
    "16 bits ppm": r"has more than 8 bits a channel \(RGB\)",
    "32 bits": r"has more than 8 bits a channel \(I\)",
    "floats": r"has more than 8 bits a channel \(F\)",
    "gif": "is animated or has several pages",
    "webp": "is animated or has several pages",
    "apng": "is animated or has several pages",
    "tiff": "is animated or has several pages",
    "large": "is too large: 10000 x 10001 pixels, and 100000000 are allowed",
    "larger": "is too large",
}
REFUSED = REFUSED_BY_HEADER | {
    "cut off jpeg": "cannot be decoded: it is cut off",
    "cut off png": "cannot be decoded: it is cut off",
    "damaged png": "cannot be decoded: it is damaged",
}


@pytest.mark.parametrize(("kind", "message"), REFUSED.items())
@pytest.mark.parametrize("on_disk", [True, False])
def test_what_a_model_must_not_be_fed_with_is_refused_with_its_own_words(tmp_path, kind, message, on_disk):
    (tmp_path / "file").write_bytes(FILES[kind])
    with pytest.raises(ValueError, match=f"^the file {message}"):
        open_upright("the file", tmp_path / "file" if on_disk else io.BytesIO(FILES[kind]))


@pytest.mark.parametrize("kind", FILES)
def test_the_header_shows_all_but_damage_further_down(kind):
    if kind in REFUSED_BY_HEADER:
        with pytest.raises(ValueError, match=REFUSED_BY_HEADER[kind]):
            read_header("it", io.BytesIO(FILES[kind]))
    else:
        assert read_header("it", io.BytesIO(FILES[kind]))[0] in [(12, 10), (64, 64)]


def test_an_image_of_the_largest_size_is_not_refused_and_nobody_is_warned():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_header("it", io.BytesIO(png_of_size(10_000, MAX_PIXELS // 10_000))) == ((10_000, 10_000), "RGB")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^x\.png cannot be read: there is no such file"):
        open_upright("x.png", tmp_path / "x.png")


def test_a_photo_with_its_thumbnail_in_one_file_is_no_animation():
    photo = encoded(picture(0), "MPO", save_all=True, append_images=[picture(1)])
    with Image.open(io.BytesIO(photo)) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    assert open_upright("it", io.BytesIO(photo)).size == (12, 10)


def test_a_photo_is_turned_upright():
    image, exif = Image.new("RGB", (16, 8)), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 8, 8))  # the left half
    exif[0x0112] = 6  # turn it by 90 degrees clockwise to see it
    upright = np.asarray(open_upright("it", io.BytesIO(encoded(image, "PNG", exif=exif))))
    assert upright.shape == (16, 8, 3)
    assert upright[:8].min() == 255
    assert upright[8:].max() == 0


def test_a_jpeg_may_be_read_at_a_fraction_of_its_size():
    data = encoded(picture(size=(800, 640)), "JPEG")
    assert open_upright("it", io.BytesIO(data), smallest_px=64).size == (100, 80)
    assert open_upright("it", io.BytesIO(data)).size == (800, 640)


def transparent_palette():
    image = Image.new("P", (3, 2), 1)
    image.putpalette([9, 9, 9, 10, 20, 30])
    image.info["transparency"] = bytes([255, 0])
    return image


@pytest.mark.parametrize(
    ("image", "form", "colour"),
    [
        (Image.new("1", (3, 2), 1), "PNG", (255, 255, 255)),
        (Image.new("L", (3, 2), 77), "PNG", (77, 77, 77)),
        (Image.new("LA", (3, 2), (77, 0)), "PNG", (77, 77, 77)),
        (Image.new("RGBA", (3, 2), (10, 20, 30, 0)), "PNG", (10, 20, 30)),
        (Image.new("RGB", (3, 2), (10, 20, 30)).quantize(4), "PNG", (10, 20, 30)),
        (transparent_palette(), "PNG", (10, 20, 30)),
        (Image.new("CMYK", (3, 2), (255, 0, 255, 0)), "TIFF", (0, 255, 0)),
    ],
)
def test_images_of_other_kinds_become_rgb(image, form, colour):
    decoded = as_rgb(open_upright("it", io.BytesIO(encoded(image, form))))
    assert decoded.mode == "RGB"
    assert np.all(np.asarray(decoded) == colour)


def test_the_image_of_a_row_has_a_name():
    rows = listed([{"bytes": b"x", "path": "row 7"}, {"bytes": b"y", "path": None}, "/a/b.png"], [0, 0, 0], ["only"])
    assert [encoded_image(rows, index)[0] for index in range(3)] == ["row 7", "image 1", "/a/b.png"]
    assert encoded_image(rows, 1)[1].getvalue() == b"y"
    with pytest.raises(ValueError, match="Row 0 has no image"):
        encoded_image(Dataset.from_dict({"image": [None], "label": [0]}, features=rows.features), 0)
