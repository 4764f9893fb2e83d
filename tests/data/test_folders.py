import os

import pytest

from gift.data.folders import list_folder
from tests.data.image_files import CLASSES, fill, names, picture


def test_class_folders_are_one_pool_numbered_in_the_order_of_their_names(tmp_path):
    listing = list_folder(fill(tmp_path, ("b", "a", "C"), count=2))
    assert listing.class_names == ("C", "a", "b")
    assert list(listing.splits) == ["train"]
    assert names(listing.splits["train"]) == [(name, f"{index}.png") for name in ("C", "a", "b") for index in (0, 1)]


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train", "val", "test"),
        ("Train", "VALID", "eval"),
        ("training", "validation", "Test"),
        ("train", "dev", "test"),
    ],
)
def test_folders_of_splits_are_told_by_their_names(tmp_path, train, validation, test):
    for count, folder in enumerate((train, validation, test), 1):
        fill(tmp_path / folder, count=count)
    splits = list_folder(tmp_path).splits
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 3, "validation": 6, "test": 9}


def test_classes_may_be_called_train_and_test(tmp_path):
    listing = list_folder(fill(tmp_path, ("test", "train")))
    assert (list(listing.splits), listing.class_names) == (["train"], ("test", "train"))


def test_folders_inside_a_class_belong_to_it(tmp_path):
    fill(tmp_path)
    fill(tmp_path / "red" / "deep" / "deeper", ("deepest",), count=2)
    rows = list_folder(tmp_path).splits["train"]
    assert [name for name, _ in names(rows)].count("red") == 5


def test_a_class_called_train_with_folders_inside_is_no_split(tmp_path):
    fill(tmp_path, ("bus", "car"))
    fill(tmp_path / "train", ("steam", "electric"))
    listing = list_folder(tmp_path)
    assert (listing.class_names, len(listing.splits["train"])) == (("bus", "car", "train"), 12)


@pytest.mark.parametrize("name", [b"b/caf\xe9.png", b"caf\xe9/0.png"])
def test_a_name_that_is_not_utf_8_is_said(name, tmp_path):
    fill(tmp_path, ("a", "b"), count=1)
    path = os.path.join(os.fsencode(tmp_path), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        picture().save(file, "PNG")
    with pytest.raises(ValueError, match=r"The name of .*caf\ufffd.* is not UTF-8: rename the file, or its folder\."):
        list_folder(tmp_path)


def test_hidden_files_and_those_of_the_system_are_no_images(tmp_path):
    fill(tmp_path, ("a", "b"), count=1)
    for name in ("a/.hidden.png", "a/Thumbs.db", "b/desktop.ini", "__MACOSX/a/x.png", ".git/a/x.png", "a/.cache/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    listing = list_folder(tmp_path)
    assert names(listing.splits["train"]) == [("a", "0.png"), ("b", "0.png")]
    assert (listing.class_names, listing.notes) == (("a", "b"), ())


def test_what_is_left_out_is_noted(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train" / "red" / "captions.csv").write_text("0.png,red")
    picture().save(tmp_path / "train" / "stray.jpg")
    listing = list_folder(tmp_path)
    assert len(listing.splits["train"]) == 9
    assert len(listing.notes) == 3
    assert all(word in " ".join(listing.notes) for word in ("annotations", "captions.csv", "1 images that are in no"))


def test_a_test_folder_without_class_folders_is_left_out_with_a_note(tmp_path):
    fill(tmp_path / "train")
    (tmp_path / "test").mkdir()
    picture().save(tmp_path / "test" / "1.png")
    listing = list_folder(tmp_path)
    assert list(listing.splits) == ["train"]
    assert any("test has no class folders" in note for note in listing.notes)


def test_an_empty_class_folder_is_found_in_training_and_allowed_in_testing(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test", CLASSES[:2])
    (tmp_path / "test" / "red").mkdir()
    (tmp_path / "train" / "aquamarine").mkdir()
    findings = list_folder(tmp_path).findings
    assert [finding.paths for finding in findings] == [(str(tmp_path / "train" / "aquamarine"),)]
    assert "aquamarine" in findings[0].message


def test_a_broken_link_counts_as_an_image_and_a_link_to_a_folder_above_is_not_followed(tmp_path):
    fill(tmp_path, ("a", "b"), count=1)
    os.symlink(tmp_path / "nowhere.png", tmp_path / "a" / "broken.png")
    os.symlink(tmp_path, tmp_path / "b" / "up")
    assert names(list_folder(tmp_path).splits["train"]) == [("a", "0.png"), ("a", "broken.png"), ("b", "0.png")]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "holds nothing"),
        (["1.png", "2.png"], "one subfolder of images for every class.*1.png, 2.png"),
        (["val/a/1.png", "valid/a/1.png"], "several folders for one split: val, valid"),
    ],
)
def test_what_has_no_classes_or_two_folders_for_a_split_is_refused(tmp_path, paths, message):
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / path)
    with pytest.raises(ValueError, match=message):
        list_folder(tmp_path)
