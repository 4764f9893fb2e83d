import numpy as np
import pytest
import torch
from PIL import Image

from gift.data.geometry import Geometry, Preparation
from gift.data.pictures import PictureFile, picture_files, read_picture, read_pictures, some_of_every_group

GEOMETRY = Geometry(16, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


def make_picture(path, size=(40, 30), colour=(200, 100, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def test_files_are_named_below_the_folder_that_was_asked_for_and_taken_once(tmp_path):
    for name in ("a/1.png", "a/2.jpg", "b/c/3.png", "a/.hidden.png", "__MACOSX/4.png"):
        make_picture(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    found = picture_files([tmp_path, tmp_path / "a" / "1.png"])
    assert [(file.name, file.group) for file in found] == [("a/1.png", "a"), ("a/2.jpg", "a"), ("b/c/3.png", "c")]
    assert [(file.name, file.group) for file in picture_files([tmp_path / "a" / "1.png"])] == [("1.png", None)]


def test_a_file_that_is_named_is_taken_whatever_it_is_called(tmp_path):
    path = tmp_path / "no-suffix"
    path.write_bytes(b"no picture")
    assert [file.path for file in picture_files([path])] == [path]
    _, problems = read_pictures(picture_files([path]), GEOMETRY)
    assert "no-suffix cannot be decoded" in problems["no-suffix"]


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_pictures_is_an_error(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{name} is neither an image nor a folder with images"):
        picture_files([tmp_path / name])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 12, 40])
def test_some_of_many_come_from_all_folders_and_are_spread_over_each(tmp_path, count):
    sizes = {"a": 1, "b": 30, "c": 6}
    files = [
        PictureFile(f"{group}/{number:02}", tmp_path / group / f"{number:02}")
        for group, size in sizes.items()
        for number in range(size)
    ]
    chosen = some_of_every_group(files, count)
    assert len(chosen) == min(count, 37)
    assert chosen == [file for file in files if file in chosen]
    taken = {group: sum(file.group == group for file in chosen) for group in sizes}
    fair = count / 3
    assert all(taken[group] >= min(size, int(fair)) for group, size in sizes.items())
    numbers = [int(file.name[2:]) for file in chosen if file.group == "b"]
    if len(numbers) >= 4:
        assert max(np.diff([-1, *numbers, 30])) <= 2 * 30 / len(numbers) + 1


def test_a_picture_is_shown_larger_than_the_model_takes_it_and_cut_alike(tmp_path):
    pixels = np.zeros((60, 120, 3), np.uint8)
    pixels[:, 60:] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "halves.png")
    picture = read_picture(PictureFile("x/halves.png", tmp_path / "halves.png"), GEOMETRY)
    assert (picture.name, picture.group) == ("x/halves.png", "x")
    assert picture.shown.shape == (256, 256, 3)
    assert picture.pixels.shape == (3, 16, 16)
    for half in (0, 1):
        columns = slice(0, 112) if half == 0 else slice(144, 256)
        assert (picture.shown[:, columns, 0] == 255 * half).all()
    red = picture.pixels[0, 8]
    assert torch.allclose(red[:6], torch.tensor((0 - 0.5) / 0.2))
    assert torch.allclose(red[10:], torch.tensor(0.5 / 0.2))


def test_what_the_model_takes_is_what_predictions_are_made_from(tmp_path):
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (50, 70, 3), np.uint8)).save(tmp_path / "noise.png")
    picture = read_picture(PictureFile("noise.png", tmp_path / "noise.png"), GEOMETRY)
    preparation = Preparation(GEOMETRY, train=False)
    with Image.open(tmp_path / "noise.png") as image:
        assert torch.equal(picture.pixels, preparation.normalised(preparation.kept(image)))


def test_what_cannot_be_read_is_said_and_the_others_are_read(tmp_path):
    files = [make_picture(tmp_path / name) for name in ("good.png", "cut.png", "long.png")]
    files[1].write_bytes(files[1].read_bytes()[:60])
    Image.new("RGB", (1, 400_000)).save(files[2])
    (tmp_path / "text.png").write_text("no picture")
    found, problems = read_pictures(
        [PictureFile(path.name, path) for path in (*files, tmp_path / "text.png")], GEOMETRY
    )
    assert [picture.name for picture in found] == ["good.png"]
    assert "cut.png cannot be decoded" in problems["cut.png"]
    assert problems["long.png"].startswith("long.png is too long: 1 x 400000 pixels")
    assert "text.png cannot be decoded: it is no image" in problems["text.png"]
