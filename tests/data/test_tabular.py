import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value

from gift.data.decoding import encoded_image, open_upright
from gift.data.tabular import list_hub, list_parquet
from tests.data.image_files import encoded, picture

PETS = ClassLabel(names=["cat", "dog"])


def write(path, labels=(1, 0, 1), kind=PETS, columns=("image", "label"), images=None, image_kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if images is None:
        images = [{"bytes": encoded(picture(index)), "path": f"{index}.png"} for index in range(len(labels))]
    rows = dict(zip(columns, (images, list(labels)), strict=True))
    features = Features(dict(zip(columns, (image_kind or Image(), kind), strict=True)))
    Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


def test_one_file_is_the_images_to_train_on_whatever_it_is_called(tmp_path):
    listing = list_parquet(write(tmp_path / "pets[1]-test.parquet"))
    rows = listing.splits["train"]
    assert (list(listing.splits), listing.class_names, rows["label"][:]) == (["train"], ("cat", "dog"), [1, 0, 1])
    name, file = encoded_image(rows, 2)
    assert name == "row 2 of pets[1]-test.parquet (2.png)"
    assert np.array_equal(open_upright(name, file), picture(2))


@pytest.mark.parametrize("folder", ["", "data"])
def test_files_of_a_folder_are_splits_by_their_names_as_the_hub_has_them(tmp_path, folder):
    for name, count in {"train-00000-of-00002": 2, "train-00001-of-00002": 3, "pets_val": 1, "pets-Test": 2}.items():
        write(tmp_path / folder / f"{name}.parquet", [0, 1, 0][:count])
    listing = list_parquet(tmp_path)
    counts = {split: len(rows) for split, rows in listing.splits.items()}
    assert counts == {"train": 5, "validation": 1, "test": 2}
    assert encoded_image(listing.splits["train"], 4)[0] == f"row 4 of {tmp_path.name} (train) (2.png)"


def test_files_whose_names_say_no_split_are_one_pool_unless_others_do(tmp_path):
    for name in ("a", "trainer"):
        write(tmp_path / f"{name}.parquet")
    assert {split: len(rows) for split, rows in list_parquet(tmp_path).splits.items()} == {"train": 6}
    write(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, .*trainer\.parquet: the name of a file must say train"):
        list_parquet(tmp_path)


@pytest.mark.parametrize("columns", [("img", "labels"), ("image", "fine_label")])
def test_columns_may_have_other_names(tmp_path, columns):
    rows = list_parquet(write(tmp_path / "x.parquet", columns=columns)).splits["train"]
    assert (list(rows.features), rows["label"][:]) == (["image", "label"], [1, 0, 1])


@pytest.mark.parametrize("dtype", ["int64", "uint8"])
def test_numbers_without_names_are_their_own_names(tmp_path, dtype):
    write(tmp_path / "train.parquet", [10, 0, 2], Value(dtype))
    write(tmp_path / "test.parquet", [1, 2, 0], Value(dtype))
    listing = list_parquet(tmp_path)
    assert listing.class_names == tuple(str(number) for number in range(11))
    assert listing.splits["train"]["label"][:] == [10, 0, 2]
    assert listing.splits["test"]["label"][:] == [1, 2, 0]


def test_images_may_be_plain_bytes(tmp_path):
    images = [encoded(picture(index)) for index in range(3)]
    rows = list_parquet(write(tmp_path / "x.parquet", images=images, image_kind=Value("binary"))).splits["train"]
    name, file = encoded_image(rows, 1)
    assert (name, file.getvalue()) == ("row 1 of x.parquet", images[1])


def test_splits_with_other_orders_of_classes_are_matched_by_name(tmp_path):
    write(tmp_path / "train.parquet", [0, 1, 1])
    write(tmp_path / "test.parquet", [0, 1, 1], ClassLabel(names=["dog", "cat"]))
    listing = list_parquet(tmp_path)
    assert (listing.class_names, listing.splits["test"]["label"][:]) == (("cat", "dog"), [1, 0, 0])


def test_wrong_rows_are_named_and_left_out(tmp_path):
    images = [{"bytes": encoded(picture()), "path": None}, None, {"bytes": None, "path": "/x.png"}]
    images += [{"bytes": None, "path": "1.png"}, images[0], images[0]]
    kind = {"bytes": Value("binary"), "path": Value("string")}
    listing = list_parquet(write(tmp_path / "x.parquet", [0, 1, 0, 0, None, -1], images=images, image_kind=kind))
    [finding] = listing.findings
    assert finding.paths == (
        "row 1 of x.parquet has no image",
        "row 2 of x.parquet has no image",
        "row 3 of x.parquet has no image",
        "row 4 of x.parquet has no label, and there are 2 classes",
        "row 5 of x.parquet has the label -1, and there are 2 classes",
    )
    assert "x.parquet has 5 wrong rows" in finding.message
    assert listing.splits["train"]["label"][:] == [0]


def test_a_test_split_without_labels_is_left_out_with_a_note(tmp_path):
    write(tmp_path / "train.parquet")
    write(tmp_path / "test.parquet", [-1, -1])
    listing = list_parquet(tmp_path)
    assert (list(listing.splits), listing.findings) == (["train"], ())
    assert "test.parquet has no labels" in listing.notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ("picture", "label")}, "one column called image or img, it has picture, label"),
        ({"columns": ("image", "class")}, "one column called label or labels or fine_label, it has image, class"),
        ({"kind": Value("string"), "labels": ("a", "b")}, "column label .* must be class labels or whole numbers"),
        ({"kind": Value("float32"), "labels": (0.5, 1.0)}, "column label .* must be class labels or whole numbers"),
        ({"image_kind": Value("int64"), "images": [1, 2, 3]}, "column image .* must be images, got Value"),
        ({"image_kind": Sequence(Value("int64")), "images": [[1], [2], [3]]}, "column image .* must be images"),
    ],
)
def test_columns_that_are_no_labelled_images_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        list_parquet(write(tmp_path / "x.parquet", **options))


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read as parquet"):
        list_parquet(tmp_path / "x.parquet")


def test_a_dataset_of_the_hub_is_read_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, count in {"train": 3, "test": 2, "extra": 1}.items():
        write(tmp_path / "me" / "pets" / "data" / f"{split}-00000-of-00001.parquet", [0, 1, 0][:count])
    configs = "".join(f"  - split: {it}\n    path: data/{it}-*\n" for it in ("train", "test", "extra"))
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{configs}---\n"
    (tmp_path / "me" / "pets" / "README.md").write_text(card)
    listing = list_hub("me/pets")
    assert {split: len(rows) for split, rows in listing.splits.items()} == {"train": 3, "test": 2}
    assert encoded_image(listing.splits["test"], 1)[0] == "row 1 of me/pets (test) (1.png)"
    assert listing.notes == ("The splits extra of me/pets are left out.",)


def test_a_dataset_that_is_not_on_the_hub_is_an_error_with_a_reason():
    with pytest.raises(ValueError, match="no file or folder nobody/nothing, and it cannot be loaded from the hub"):
        list_hub("nobody/nothing")
