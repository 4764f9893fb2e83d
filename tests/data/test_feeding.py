import logging

import pytest
import torch
from torch.utils.data import DataLoader

from gift.data.decoding import open_upright
from gift.data.feeding import FeedingOptions, ImageItems
from gift.data.geometry import Geometry, Preparation
from gift.data.listing import listed
from tests.data.image_files import encoded, picture

SIZES = [(20, 15), (15, 20), (9, 9), (40, 12), (16, 16), (20, 15)]
LARGE, NONE = FeedingOptions(), FeedingOptions(memory_bytes=0)
SKIP = {"skip_damaged": True}


def geometry(augment="crop-flip", resize="crop"):
    return Geometry(14, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), augment=augment, resize=resize)


def write(folder, damaged=(), sizes=SIZES):
    """Write images, some of them cut off or empty, of the classes 0, 1, 0, 1, ..."""
    paths = [folder / f"{index}.png" for index in range(len(sizes))]
    for index, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        data = encoded(picture(index, size))
        path.write_bytes({"cut off": data[:70], "empty": b""}[damaged[index]] if index in damaged else data)
    return listed(paths, [index % 2 for index in range(len(sizes))], ["even", "odd"])


def read(items, seed=0):
    torch.manual_seed(seed)
    return [item["pixel_values"] for item in (items[index] for index in range(len(items)))]


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("augment", ["none", "flip", "crop-flip", "resized-crop-flip"])
@pytest.mark.parametrize("train", [True, False])
def test_kept_images_are_those_read_from_disk_to_the_bit(tmp_path, resize, augment, train):
    rows, how = write(tmp_path), geometry(augment, resize)
    kept, decoded = (ImageItems(rows, how, train, feeding) for feeding in (LARGE, NONE))
    assert kept.kept is not None
    assert decoded.kept is None
    assert same(read(kept), read(decoded))
    assert same(read(kept), read(kept))
    assert same(read(kept), read(kept, seed=1)) == (not train or augment == "none")


def test_items_are_what_finetune_takes(tmp_path):
    rows = write(tmp_path)
    items = ImageItems(rows, geometry(), False, LARGE)
    steps = Preparation(geometry(), False)
    for index in range(6):
        pixels = steps.kept(open_upright("it", tmp_path / f"{index}.png"))
        assert torch.equal(items[index]["pixel_values"], steps.normalised(pixels))
        assert items[index]["labels"] == items.labels[index] == index % 2
    assert items[0]["pixel_values"].dtype == torch.float32
    assert torch.equal(items[-1]["pixel_values"], items[5]["pixel_values"])
    with pytest.raises(IndexError):
        items[6]


def test_images_turned_upright_by_their_exif_data_are_kept_as_they_are_read(tmp_path):
    exif = picture().getexif()
    exif[0x0112] = 6
    (tmp_path / "0.jpg").write_bytes(encoded(picture(0, (30, 20)), "JPEG", exif=exif))
    rows = listed([tmp_path / "0.jpg"], [0], ["only"])
    items = [ImageItems(rows, geometry(), True, feeding) for feeding in (LARGE, NONE)]
    assert same(*map(read, items))


def test_images_in_bytes_are_read_like_files(tmp_path):
    rows = write(tmp_path)
    images = [{"bytes": (tmp_path / f"{index}.png").read_bytes(), "path": f"row {index}"} for index in range(6)]
    in_bytes = listed(images, rows["label"][:], ["even", "odd"])
    assert same(*(read(ImageItems(it, geometry(), True, LARGE)) for it in (rows, in_bytes)))


def test_only_as_much_memory_is_used_as_is_allowed(tmp_path):
    rows = write(tmp_path)
    needed = 6 * 3 * 14 * 14  # cut out already where no crop is random
    fits = ImageItems(rows, geometry(), False, FeedingOptions(memory_bytes=needed))
    assert fits.kept.memory.numel() == needed
    assert ImageItems(rows, geometry(), False, FeedingOptions(memory_bytes=needed - 1)).kept is None


@pytest.mark.parametrize("feeding", [LARGE, NONE])
def test_several_workers_read_the_same_images(tmp_path, feeding):
    items = ImageItems(write(tmp_path), geometry(), False, feeding)
    alone, two = (DataLoader(items, 4, num_workers=workers) for workers in (0, 2))
    assert same([it["pixel_values"] for it in alone], [it["pixel_values"] for it in two])


def test_every_damaged_image_is_named(tmp_path):
    rows = write(tmp_path, {1: "cut off", 4: "empty"})
    with pytest.raises(ValueError, match=r"(?s)4\.png cannot be decoded: the file is empty.*skip_damaged"):
        ImageItems(rows, geometry(), True, LARGE)
    with pytest.raises(ValueError, match=r"1\.png cannot be decoded: it is cut off"):
        ImageItems(write(tmp_path, {1: "cut off"}), geometry(), True, LARGE)


def test_a_cut_off_image_that_is_not_kept_is_named_when_it_is_read(tmp_path):
    items = ImageItems(write(tmp_path, {1: "cut off"}), geometry(), True, NONE)
    items[0]
    with pytest.raises(ValueError, match=r"1\.png cannot be decoded: it is cut off"):
        items[1]


@pytest.mark.parametrize("memory_bytes", [0, 2**31])
def test_damaged_images_are_left_out_if_so_asked(tmp_path, caplog, memory_bytes):
    rows = write(tmp_path, {1: "cut off", 4: "empty"})
    items = ImageItems(rows, geometry(), False, FeedingOptions(memory_bytes, skip_damaged=True))
    whole = ImageItems(write(tmp_path), geometry(), False, LARGE)
    assert items.labels == [0, 0, 1, 1]
    assert same(read(items), [read(whole)[index] for index in (0, 2, 3, 5)])
    assert sorted(name for name, _ in items.skipped) == [str(tmp_path / "1.png"), str(tmp_path / "4.png")]
    assert all(f"{name} is left out: {reason}" in caplog.text for name, reason in items.skipped)


def test_a_class_that_is_left_without_images_is_named(tmp_path):
    rows = write(tmp_path, {1: "cut off", 3: "cut off", 5: "empty"})
    with pytest.raises(ValueError, match="All training images of the classes odd are damaged"):
        ImageItems(rows, geometry(), True, FeedingOptions(**SKIP))


def test_a_class_without_images_to_measure_on_is_said_and_no_images_at_all_are_refused(tmp_path, caplog):
    rows = write(tmp_path, {1: "cut off", 3: "cut off", 5: "empty"})
    assert ImageItems(rows, geometry(), False, FeedingOptions(**SKIP)).labels == [0, 0, 0]
    assert "No image of the classes odd is left to measure on." in caplog.messages
    rows = write(tmp_path, dict.fromkeys(range(6), "empty"))
    with pytest.raises(ValueError, match=r"All images to measure on are damaged: .*the file is empty"):
        ImageItems(rows, geometry(), False, FeedingOptions(**SKIP))


def test_an_image_far_longer_than_wide_is_named(tmp_path):
    rows = write(tmp_path, sizes=[(1, 400_000), (9, 9)])
    with pytest.raises(ValueError, match=r"0\.png is too long: 1 x 400000 pixels"):
        ImageItems(rows, geometry(), True, LARGE)


def test_what_is_no_rgb_is_counted_in_the_log_once_per_kind(tmp_path, caplog):
    modes = ["L", "L", "RGBA", "1", "RGB"]
    for index, mode in enumerate(modes):
        picture(index).convert(mode).save(tmp_path / f"{index}.png")
    rows = listed([tmp_path / f"{index}.png" for index in range(5)], [0] * 5, ["only"])
    with caplog.at_level(logging.INFO, "gift"):
        ImageItems(rows, geometry(), True, LARGE)
    counts = [message.split(" and become")[0] for message in caplog.messages]
    assert counts == [
        "2 images are greyscale (L)",
        "1 images are transparent (RGBA)",
        "1 images are black-and-white (1)",
    ]


@pytest.mark.parametrize("options", [{"memory_bytes": -1}, {"threads": 0}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="must be a whole number of at least"):
        FeedingOptions(**options)
