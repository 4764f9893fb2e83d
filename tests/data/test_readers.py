import io

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PillowImage

from gift.data.readers import read_images

COLOURS = {"blue": (0, 0, 200), "red": (200, 0, 0)}  # by class, in the order of the classes


def make_folder(folder, sizes=((20, 12), (12, 20)), classes=COLOURS, names="{}.png"):
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for index, size in enumerate(sizes):
            PillowImage.new("RGB", size, colour).save(folder / name / names.format(index))
    return folder


def png(value=77, size=(8, 8)):
    file = io.BytesIO()
    PillowImage.new("L", size, value).save(file, "PNG")
    return file.getvalue()


def make_parquet(path, images=None, labels=(1, 0, 1), label=None):
    images = [png()] * 3 if images is None else images
    rows = {"image": [{"bytes": data, "path": None} for data in images], "label": list(labels)}
    features = Features({"image": Image(), "label": label or ClassLabel(names=["cat", "dog"])})
    Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


# Names by which libraries guess splits must not decide anything here.
@pytest.mark.parametrize("names", ["{}.png", "test_{}.png", "val_{}.PNG"])
@pytest.mark.parametrize("classes", [COLOURS, {"test": (0, 0, 200), "train": (200, 0, 0)}])
def test_a_folder_of_class_folders_is_read_whatever_its_files_are_called(tmp_path, names, classes):
    images = read_images(make_folder(tmp_path / "validation", classes=classes, names=names), 8)
    assert images.class_names == tuple(classes)
    assert images.pixels.shape == (4, 8, 8, 3)
    assert images.labels.tolist() == [0, 0, 1, 1]
    for pixels, label in zip(images.pixels, images.labels, strict=True):
        assert np.all(pixels == list(classes.values())[label])


def test_a_parquet_file_is_read_and_grey_images_become_rgb(tmp_path):
    images = read_images(make_parquet(tmp_path / "images[1].parquet"), 4)
    assert (images.class_names, images.labels.tolist()) == (("cat", "dog"), [1, 0, 1])
    assert images.pixels.shape == (3, 4, 4, 3)
    assert np.all(images.pixels == 77)


def test_the_shorter_side_is_resized_and_the_middle_cut_out(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255  # the middle third is all that is left
    (tmp_path / "only").mkdir()
    PillowImage.fromarray(wide).save(tmp_path / "only" / "wide.png")
    pixels = read_images(tmp_path, 20).pixels[0]
    assert np.all(pixels[:, 3:17] > 250)


def test_a_photograph_is_turned_upright(tmp_path):
    picture = PillowImage.new("RGB", (16, 16))
    picture.paste((255, 255, 255), (0, 0, 16, 8))  # stored with the bright half on top
    exif = picture.getexif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise to see it
    (tmp_path / "only").mkdir()
    picture.save(tmp_path / "only" / "turned.jpg", exif=exif)
    pixels = read_images(tmp_path, 16).pixels[0]
    assert pixels[:, 10:].min() > 240
    assert pixels[:, :6].max() < 15


def damaged(folder, what):
    """Write one input that cannot be read."""
    path = folder / "images.parquet"
    if what == "no class folders":
        path.mkdir()
        (path / "1.png").write_bytes(png())
    elif what == "an empty class":
        (make_folder(path) / "aquamarine").mkdir()
    elif what == "a damaged image":
        (make_folder(path) / "blue" / "0.png").write_bytes(png()[:45])
    elif what == "sixteen bits":
        PillowImage.fromarray(np.zeros((8, 8), np.uint16)).save(make_folder(path) / "blue" / "0.png")
    elif what == "no class labels":
        make_parquet(path, label=Value("int64"))
    elif what == "no rows":
        make_parquet(path, images=[], labels=[])
    elif what == "an unknown label":
        make_parquet(path, labels=(1, -1, 0))
    elif what == "a damaged row":
        make_parquet(path, images=[png(), b"no image", png()])
    elif what == "no parquet":
        path.write_bytes(b"PAR0")
    return path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", "no file or folder"),
        ("no class folders", "one subfolder of images for every class"),
        ("an empty class", "aquamarine"),
        ("a damaged image", r"0\.png cannot be decoded"),
        ("sixteen bits", r"0\.png has more than 8 bits"),
        ("no class labels", "column label of class labels"),
        ("no rows", "no images|no data"),
        ("an unknown label", "row 1 .*label -1"),
        ("a damaged row", "row 1 .*cannot be decoded"),
        ("no parquet", "cannot be read as a parquet file"),
    ],
)
def test_what_holds_no_labelled_images_is_refused_by_name(tmp_path, what, message):
    with pytest.raises(ValueError, match=message) as refused:
        read_images(damaged(tmp_path, what), 8)
    assert "images.parquet" in str(refused.value)
