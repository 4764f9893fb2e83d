import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.io import savemat

from gift.data.archives import Source, unpack
from gift.data.catalog import TASKS
from gift.data.official import read_official
from tests.data.official_archives import WRITERS, annotations, birds, lines, mat, tar, write_cub, write_flowers

SIZES = {"oxford_flowers": (2, 2, 4)}
OFFICIAL = {  # training part, before validation is drawn from it
    "cub": {f"images/{number:03}.Bird/{number}_{index}.jpg": number for number in (1, 2) for index in range(3)},
    "nabirds": {
        f"images/{number:03}.Bird/{number}_{index}.jpg": place
        for place, number in enumerate((295, 1010), start=1)
        for index in range(3)
    },
    "oxford_flowers": {"jpg/image_00001.jpg": 1, "jpg/image_00005.jpg": 2},
    "stanford_dogs": {
        f"Images/{breed}/{breed[:9]}_{index}.jpg": number
        for number, breed in enumerate(("n02085620-Chihuahua", "n02116738-African_hunting_dog"), start=1)
        for index in range(3)
    },
    "stanford_cars": {f"cars_train/{index:05}.jpg": 1 + index % 2 for index in range(1, 7)},
}


def tiny(name):
    train, validation, test = SIZES.get(name, (4, 2, 2))
    return replace(TASKS[name], classes=2, train=train, validation=validation, test=test, hashes={})


def read(name, tmp_path, path=None, seed=0):
    return read_official(tiny(name), Source(path or tmp_path, tmp_path / "scratch", {}), seed)


@pytest.mark.parametrize("name", list(WRITERS))
def test_parts_are_those_of_the_official_lists(name, tmp_path):
    WRITERS[name](tmp_path)
    images = read(name, tmp_path)
    train, validation, test = (images.splits[split] for split in ("train", "val", "test"))
    assert (len(train), len(validation), len(test)) == SIZES.get(name, (4, 2, 2))
    assert {*test.values()} == {*validation.values()} == {1, 2}
    assert all(file.read_bytes().startswith(b"\xff\xd8") for file in images.files.values())
    assert images.files.keys() == {*train, *validation, *test}
    if name == "oxford_flowers":
        assert (train, validation) == (OFFICIAL[name], {"jpg/image_00002.jpg": 1, "jpg/image_00006.jpg": 2})
        assert images.note == "Parts as in the official lists."
    else:
        assert train | validation == OFFICIAL[name]
        assert "drawn from train with seed 0" in images.note


@pytest.mark.parametrize("name", list(WRITERS))
def test_unpacked_archives_give_the_same(name, tmp_path):
    packed, unpacked = tmp_path / "packed", tmp_path / "unpacked"
    packed.mkdir()
    WRITERS[name](packed)
    for archive in packed.iterdir():
        target = unpacked / ("x" if archive.suffix == ".mat" else archive.name)
        if archive.suffix != ".mat":
            unpack(archive, target)
    merged = tmp_path / "merged"
    merged.mkdir()
    for place in (*unpacked.iterdir(), packed):
        for entry in place.iterdir():
            if place != packed or entry.suffix == ".mat":
                entry.rename(merged / entry.name)
    splits = read(name, tmp_path, merged).splits
    WRITERS[name](tmp_path / "packed")
    assert splits == read(name, tmp_path, packed).splits


def test_the_folder_of_a_data_set_itself_may_be_the_source(tmp_path):
    write_cub(tmp_path)
    unpack(tmp_path / "CUB_200_2011.tgz", tmp_path / "u")
    assert read("cub", tmp_path, tmp_path / "u/CUB_200_2011").splits == read("cub", tmp_path).splits


def test_validation_takes_an_equal_share_of_every_class_and_depends_on_the_seed(tmp_path):
    files = birds("CUB_200_2011", (1, 2), range(1, 9))
    many = [(key, f"{key}.jpg", 1 if key % 3 else 2, int(key < 90)) for key in range(99)]
    files = {f"CUB_200_2011/images/{name}": files["CUB_200_2011/README"] for _, name, _, _ in many}
    for name, column in (("images", 1), ("image_class_labels", 2), ("train_test_split", 3)):
        files[f"CUB_200_2011/{name}.txt"] = lines((row[0], row[column]) for row in many)
    tar(tmp_path / "CUB_200_2011.tgz", files)
    task = replace(tiny("cub"), validation=9)
    parts = [read_official(task, Source(tmp_path, tmp_path / "s", {}), seed).splits["val"] for seed in (0, 0, 1)]
    assert np.bincount([*parts[0].values()]).tolist() == [0, 6, 3]  # of 60 and 30
    assert parts[0] == parts[1] != parts[2]


def write_json(path, **splits):
    for name, labels in splits.items():
        path.joinpath(f"{name}.json").write_text(json.dumps(labels))


@pytest.mark.parametrize("prefix", ["", "images/"])
@pytest.mark.parametrize("where", [".", "CUB_200_2011"])
def test_json_files_that_lie_there_decide(tmp_path, prefix, where):
    write_cub(tmp_path)
    unpack(tmp_path / "CUB_200_2011.tgz", tmp_path / "u")
    paths = [f"{prefix}{number:03}.Bird/{number}_{index}.jpg" for index in range(4) for number in (1, 2)]
    labels = {path: 5 * (1 + index % 2) for index, path in enumerate(paths)}
    cuts = {"test": paths[:2], "val": paths[2:4], "train": paths[4:]}
    write_json(tmp_path / "u" / where, **{split: {path: labels[path] for path in cuts[split]} for split in cuts})
    images = read("cub", tmp_path, tmp_path / "u")
    assert images.splits["test"] == {"images/001.Bird/1_0.jpg": 1, "images/002.Bird/2_0.jpg": 2}
    assert "train.json" in images.note


def alike(labels):
    return dict.fromkeys(("train", "val", "test"), labels)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": {"001.Bird/1_0.jpg": 1}}, "has train.json; give"),
        ({"train": {}, "val": {}, "test": {}}, "class number for every path"),
        (alike({"001.Bird/1_0.jpg": "one"}), "the class 'one'"),
        (alike({"001.Bird/1_0.jpg": True}), "the class True"),
        (alike({"001.Bird/1_0.jpg": 1}), "have 1 classes, and there should be 2"),
        (alike({"001.Bird/1_0.jpg": 1, "x.jpg": 2}), r"image images/x.jpg, which"),
        (alike({"../README": 1, "images/../x": 2}), "which is not in"),
    ],
)
def test_json_files_that_do_not_fit_are_an_error(tmp_path, splits, message):
    write_cub(tmp_path)
    write_json(tmp_path, **splits)
    with pytest.raises(ValueError, match=message):
        read("cub", tmp_path)


def change(tmp_path, name, content, folder="CUB_200_2011"):
    """Unpack CUB and write one file anew."""
    write_cub(tmp_path)
    unpack(tmp_path / "CUB_200_2011.tgz", tmp_path / "u")
    (tmp_path / "u" / folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("images.txt", b"1 a.jpg\n2\n", "Line 2 of .*images.txt"),
        ("images.txt", b"1 a.jpg\n1 b.jpg\n", "Line 2 of .*images.txt must be a new name"),
        ("images.txt", b"1 a.jpg\n", "must name the same images"),
        ("image_class_labels.txt", lines((key, "x") for key in range(1, 9)), "must hold class numbers"),
        ("train_test_split.txt", lines((key, 2) for key in range(1, 9)), r"0 or 1, got \['2'\]"),
        ("images.txt", lines((key, f"../{key}.jpg") for key in range(1, 9)), "which is not in"),
    ],
)
def test_lists_of_birds_that_do_not_fit_are_an_error(tmp_path, name, content, message):
    change(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        read("cub", tmp_path, tmp_path / "u")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("setid.mat", b"no MATLAB", "setid.mat cannot be read"),
        ("setid.mat", b"", "setid.mat cannot be read"),
        ("setid.mat", mat(trnid=[1, 5], tstid=[3]), "no variable 'valid'"),
        ("setid.mat", mat(trnid=[1, 5], valid=[2, 6], tstid=[3, 9]), "names the image 9, and imagelabels.mat has 8"),
        ("imagelabels.mat", mat(labels=[1] * 8), "have 1 classes"),
    ],
)
def test_lists_of_flowers_that_do_not_fit_are_an_error(tmp_path, name, content, message):
    write_flowers(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read("oxford_flowers", tmp_path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_cut_matlab_file_is_an_error(tmp_path, compressed):
    write_flowers(tmp_path)
    file = tmp_path / "imagelabels.mat"
    savemat(file, {"labels": np.arange(8) // 4 + 1}, do_compression=compressed)
    whole = file.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"imagelabels.mat (cannot be read|has no variable)"):
            read("oxford_flowers", tmp_path)


def test_cars_need_the_labels_of_the_test_images(tmp_path):
    WRITERS["stanford_cars"](tmp_path)
    file = tmp_path / "cars_test_annos_withlabels.mat"
    file.write_bytes(annotations([(1, "00001.jpg")], with_class=False))
    with pytest.raises(ValueError, match="must have fields class and fname"):
        read("stanford_cars", tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"no cars_test_annos_withlabels.mat in"):
        read("stanford_cars", tmp_path)


def test_an_image_that_a_list_names_but_nobody_has_is_an_error(tmp_path):
    write_flowers(tmp_path)
    (tmp_path / "102flowers.tgz").unlink()
    tar(tmp_path / "102flowers.tgz", {"jpg/image_00001.jpg": b"x"})
    with pytest.raises(ValueError, match=r"image jpg/image_00005.jpg, which is not in"):
        read("oxford_flowers", tmp_path)
