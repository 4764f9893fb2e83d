import numpy as np
from PIL import Image

from gift.explain.render import Sheet, _enlarged, draw_sheets


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def make_sheet(columns=2, images=3):
    """Return a sheet of black images; the response is 1 in the upper left patch and 0 elsewhere."""
    maps = np.zeros((images, columns, 4, 4))
    maps[:, :, 0, 0] = 1
    names, pixels = tuple(f"c{index}" for index in range(columns)), np.zeros((images, 32, 32, 3), np.uint8)
    return Sheet("title", pixels, maps, np.array([[0.0, 1.0]] * columns), names)


def test_one_picture_holds_every_image_beside_its_maps(tmp_path):
    draw_sheets([make_sheet(2), make_sheet(3)], tmp_path / "sheet.png")
    pixels = read(tmp_path / "sheet.png")
    yellow = (pixels[..., 0] > 180) & (pixels[..., 1] > 170) & (pixels[..., 2] < 90)
    columns = np.flatnonzero(np.diff(np.concatenate([[0], yellow.any(axis=0), [0]])))
    rows = np.flatnonzero(np.diff(np.concatenate([[0], yellow.any(axis=1), [0]])))
    assert len(columns) // 2 == 2 + 3  # a strong response in every column of maps, in none of images
    assert len(rows) // 2 == 3


def test_the_scale_of_a_column_decides_what_is_strong(tmp_path):
    sheet = make_sheet(1, 1)
    weak = Sheet(sheet.title, sheet.images, 0.01 * sheet.maps, sheet.ranges, sheet.columns)
    shown = []
    for index, each in enumerate((sheet, weak)):
        draw_sheets([each], tmp_path / f"{index}.png")
        shown.append(np.ptp(read(tmp_path / f"{index}.png"), axis=2).max())
    assert shown[0] > 100
    assert shown[1] < 30


def test_maps_are_enlarged_bilinearly():
    assert np.allclose(_enlarged(np.array([[0.0, 1.0]]), (1, 4)), [[0, 0.25, 0.75, 1]])
