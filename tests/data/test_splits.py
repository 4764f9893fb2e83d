import shutil
from collections import Counter

import pytest
from datasets import Value

from gift.data.listing import Listing, listed
from gift.data.splits import SplitOptions, read_splits
from tests.data.image_files import CLASSES, fill, names
from tests.data.test_lists import write_vtab
from tests.data.test_tabular import write


def read(source, **options):
    return read_splits(str(source), SplitOptions(**options))


def test_a_pool_is_divided_by_class_into_training_and_validation(tmp_path):
    fill(tmp_path, ("a", "b"), count=10)
    fill(tmp_path, ("c",), count=4)
    splits = read(tmp_path, validation_share=0.3)
    assert (splits.class_names, splits.form, splits.test) == (("a", "b", "c"), "image folder", None)
    assert Counter(name for name, _ in names(splits.validation)) == {"a": 3, "b": 3, "c": 1}
    assert sorted(names(splits.train) + names(splits.validation)) == sorted(
        (name, f"{index}.png") for name, count in (("a", 10), ("b", 10), ("c", 4)) for index in range(count)
    )
    assert splits.notes == (
        "7 of the training images, 0.3 of each class, were made the validation split (seed 0); 17 are left.",
    )


def test_the_seed_decides_the_division(tmp_path):
    fill(tmp_path, count=10)
    first, again, other = (names(read(tmp_path, seed=seed).validation) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_small_classes_keep_an_image_to_train_on_and_give_one_if_they_have_two(tmp_path):
    fill(tmp_path, ("one",), count=1)
    fill(tmp_path, ("two",), count=2)
    for share in (0.001, 0.999):
        splits = read(tmp_path, validation_share=share)
        assert [name for name, _ in names(splits.train)] == ["one", "two"]
        assert [name for name, _ in names(splits.validation)] == ["two"]


@pytest.mark.parametrize("options", [{"validation_share": 0}, {"train_on_validation": True}])
def test_no_validation_split_is_made_unless_asked(tmp_path, options):
    splits = read(fill(tmp_path), **options)
    assert (len(splits.train), splits.validation, splits.notes) == (9, None, ())


def test_splits_that_a_source_has_are_taken_and_may_be_trained_on(tmp_path):
    for seed, split in enumerate(("train", "val", "test")):
        fill(tmp_path / split, count=seed + 1, seed=seed)
    splits = read(tmp_path)
    assert [len(it) for it in (splits.train, splits.validation, splits.test)] == [3, 6, 9]
    both = read(tmp_path, train_on_validation=True)
    assert (names(both.train), both.validation) == (names(splits.train) + names(splits.validation), None)


def test_a_class_may_be_missing_from_testing(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test", ("red",))
    assert Counter(name for name, _ in names(read(tmp_path).test)) == {"red": 3}


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_class_without_training_images_is_named(tmp_path, split):
    fill(tmp_path / "train")
    fill(tmp_path / split, (*CLASSES, "violet"))
    name = {"val": "validation"}.get(split, split)
    with pytest.raises(ValueError, match=f"classes of the {name} images have no training images: violet"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"train/a": 1}, "only one class, 'a'"),
        ({"a": 1, "b": 0, "c": 1}, "class folder .*/b holds no images"),
        ({"val/a": 1, "val/b": 1, "test/a": 1, "test/b": 1}, "no images to train on, only validation, test"),
        ({"train/a": 1, "train/b": 1, "test/a": 0}, "the test split holds no images"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path, folders, message):
    for folder, count in folders.items():
        (tmp_path / folder).mkdir(parents=True)
        if count:
            fill(tmp_path / folder, ("deep",), count)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_a_zip_archive_is_read_as_its_folder(tmp_path):
    folder = fill(tmp_path / "flowers" / "images" / "train").parent
    fill(folder / "test", count=1)
    archive = shutil.make_archive(str(tmp_path / "flowers"), "zip", tmp_path / "flowers", "images")
    splits = read(archive)
    assert splits.form == "zip archive, image folder"
    assert names(splits.test) == names(read(folder).test)


def test_other_sources_are_validated_and_tested_on_with_classes_matched_by_name(tmp_path):
    fill(tmp_path / "train", ("cat", "cow", "dog"), count=2)
    fill(tmp_path / "more" / "test", ("dog",), count=1)
    fill(tmp_path / "more" / "train", ("dog",), count=3)
    test = write(tmp_path / "pets.parquet", [0, 1, 1])
    splits = read(tmp_path / "train", test=str(test), validation=str(tmp_path / "more" / "test"))
    assert splits.test["label"][:] == [0, 2, 2]
    assert (len(splits.train), names(splits.validation)) == (6, [("dog", "0.png")])
    assert names(read(tmp_path / "train", test=str(tmp_path / "more")).test) == [("dog", "0.png")]
    with pytest.raises(ValueError, match="more has the splits train, test: give a source with one, or validation"):
        read(tmp_path / "train", validation=str(tmp_path / "more"))


def test_parquet_files_of_a_set_are_joined(tmp_path):
    train, test = write(tmp_path / "a-train.parquet", [0, 1] * 5), write(tmp_path / "a-test.parquet")
    splits = read(train, test=str(test))
    assert [len(it) for it in (splits.train, splits.validation, splits.test)] == [8, 2, 3]
    assert splits.form == "parquet"


def test_lists_of_vtab_are_trained_on_as_the_paper_does(tmp_path):
    splits = read(write_vtab(tmp_path))
    assert [len(it) for it in (splits.train, splits.validation, splits.test)] == [4, 2, 3]
    (tmp_path / "train800val200.txt").write_text("".join(f"{index}.png {index % 2}\n" for index in range(5, -1, -1)))
    both = read(tmp_path, train_on_validation=True)
    assert [file for _, file in names(both.train)] == [f"{index}.png" for index in range(5, -1, -1)]
    assert both.validation is None
    (tmp_path / "train800.txt").unlink()
    splits = read(tmp_path)
    assert sorted(names(splits.train) + names(splits.validation)) == sorted(names(both.train))


def test_a_class_of_vtab_that_only_test_images_show_is_noted(tmp_path):
    write_vtab(tmp_path)
    (tmp_path / "test.txt").write_text("0.png 3\n")
    splits = read(tmp_path)
    assert splits.class_names == ("0", "1", "2", "3")
    assert splits.notes == ("2 classes have no training images: 2, 3.",)


def test_a_gap_in_numbers_is_noted(tmp_path):
    splits = read(write(tmp_path / "x.parquet", [0, 2, 0, 2], Value("int64")))
    assert splits.notes[0] == "1 classes have no training images: 1."


def test_sets_of_torchvision_come_from_the_root(tmp_path, monkeypatch):
    def known(name, root):
        return Listing(f"{name} in {root}", ("a", "b"), {"train": listed(["1", "2", "3", "4"], [0, 1, 0, 1], "ab")})

    monkeypatch.setattr("gift.data.splits.list_torchvision", known)
    assert read("torchvision:DTD", root=tmp_path).form == f"DTD in {tmp_path}"


def test_what_is_no_path_and_looks_like_a_name_on_the_hub_is_loaded_from_there(monkeypatch):
    loaded = Listing("hub", ("a", "b"), {"train": listed(["1", "2", "3", "4"], [0, 1, 0, 1], "ab")})
    monkeypatch.setattr("gift.data.splits.list_hub", {"org/pets.v2": loaded}.__getitem__)
    assert read("org/pets.v2").form == "hub"


@pytest.mark.parametrize("source", ["nothing", "./a/b", "/a/b", "a/b/c", "torchvision:", "", "~/a b"])
def test_a_source_that_is_nothing_is_refused(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"There is no file or folder|torchvision has no set|must hold one subfolder"):
        read(source)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.tar is of no known form: give a folder, a \.zip archive or a \.parquet"):
        read(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_share": 1}, "validation_share must be less than 1"),
        ({"validation_share": -0.1}, "validation_share must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SplitOptions(**options)
