import json
import re

import pytest
from PIL import Image

from gift.data.catalog import TASKS
from gift.data.lists import fgvc_files, list_fgvc, list_vtab, vtab_files
from tests.data.image_files import encoded, names, picture

VTAB = {"train800.txt": range(4), "val200.txt": range(4, 6), "train800val200.txt": range(6), "test.txt": range(6, 9)}


def write_images(folder, paths):
    for index, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(encoded(picture(index)))
    return folder


def write_vtab(folder, lines=None):
    write_images(folder, [f"images/{index}.png" for index in range(9)])
    for name, indices in VTAB.items():
        (folder / name).write_text("".join(f"images/{index}.png {index % 2}\n" for index in indices))
    if lines is not None:
        (folder / "train800.txt").write_text("\n".join(lines))
    return folder


def write_fgvc(folder, lists, paths=("a 1.png", "b.png", "ü.png")):
    write_images(folder, paths)
    for name, entries in lists.items():
        (folder / name).write_text(json.dumps(entries, indent=1))
    return folder


def test_the_lists_of_vtab_are_its_splits(tmp_path):
    listing = list_vtab(write_vtab(tmp_path))
    found = {split: [number for _, number in names(rows)] for split, rows in listing.splits.items()}
    expected = {"train": VTAB["train800.txt"], "validation": VTAB["val200.txt"], "test": VTAB["test.txt"]}
    expected["trainval"] = VTAB["train800val200.txt"]
    assert found == {split: [f"{index}.png" for index in indices] for split, indices in expected.items()}
    assert (listing.class_names, listing.findings) == (("0", "1"), ())
    assert [name for name, _ in names(listing.splits["train"])] == ["0", "1", "0", "1"]


def test_a_path_may_hold_blanks_and_lie_in_the_folder_images(tmp_path):
    write_images(tmp_path, ["images/my photo  1.png"])
    lines = ["images/0.png\t1 ", "", "my photo  1.png 0\r"]
    listing = list_vtab(write_vtab(tmp_path, lines))
    assert names(listing.splits["train"]) == [("1", "0.png"), ("0", "my photo  1.png")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/0.png", r"line 2: must be a path, a blank and the number of a class, got 'images/0.png'"),
        ("images/0.png cat", "line 2: the class must be a whole number from 0, got 'cat'"),
        ("images/0.png -1", "line 2: the class must be a whole number from 0, got '-1'"),
        ("images/0.png 1.0", "line 2: the class must be a whole number from 0, got '1.0'"),
        ("images/0.png \N{SUPERSCRIPT TWO}", "line 2: the class must be a whole number from 0"),
        ("images/99.png 1", r"line 2: there is no image 'images/99\.png' in "),
        ("images 1", "line 2: there is no image 'images' in "),
        ("../0.png 1", r"line 2: the path '\.\./0\.png' leads out of the folder"),
        ("images/../../x/0.png 1", r"line 2: the path .* leads out of the folder"),
        ("/etc/passwd 1", "line 2: the path '/etc/passwd' leads out of the folder"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    (tmp_path / "0.png").write_bytes(encoded(picture()))
    [finding] = list_vtab(write_vtab(tmp_path / "set", ["images/0.png 0", line, "images/1.png 1"])).findings
    assert finding.message.startswith(f"{tmp_path}/set/train800.txt has 1 wrong entry:\n  ")
    assert re.search(message, finding.message)


def test_all_problems_of_a_list_are_counted_and_five_shown(tmp_path):
    listing = list_vtab(write_vtab(tmp_path, ["images/0.png 0", *(f"gone{index}.png 1" for index in range(7))]))
    [finding] = listing.findings
    assert "has 7 wrong entries" in finding.message
    assert finding.message.count("there is no image") == 5
    assert finding.message.endswith("and 2 more")
    assert len(finding.paths) == 7
    assert len(listing.splits["train"]) == 1


def test_a_label_that_the_task_of_that_name_does_not_have_is_named(tmp_path):
    task = next(task for task in TASKS.values() if task.suite == "vtab1k")
    folder = write_vtab(tmp_path / task.name, ["images/0.png 0", f"images/1.png {task.classes}"])
    listing = list_vtab(folder)
    [finding] = listing.findings
    assert f"line 2: the class must be from 0 to {task.classes - 1}" in finding.message
    assert len(listing.class_names) == task.classes


def test_a_folder_is_of_vtab_only_if_it_lists_images_to_train_on(tmp_path):
    (tmp_path / "test.txt").write_text("notes")
    assert vtab_files(tmp_path) == {}


def test_numbers_of_fgvc_classes_are_ranked_over_all_lists(tmp_path):
    lists = {"train.json": {"a 1.png": 7, "b.png": 3}, "test.json": {"ü.png": 5}}
    listing = list_fgvc(write_fgvc(tmp_path, lists))
    assert listing.class_names == ("3", "5", "7")
    assert listing.splits["train"]["label"][:] == [2, 0]
    assert listing.splits["test"]["label"][:] == [1]


@pytest.mark.parametrize("root", ["", "images", "Images", "jpg"])
def test_images_of_fgvc_are_found_in_the_folder_or_in_its_folder_of_images(tmp_path, root):
    write_images(tmp_path / root, ["001.Bird/a.png"])
    (tmp_path / "train.json").write_text('{"001.Bird/a.png": 1}')
    [row] = list_fgvc(tmp_path).splits["train"]
    assert row["image"]["path"] == str(tmp_path / root / "001.Bird/a.png")


def test_lists_of_fgvc_may_bear_a_name_and_lie_beside_the_folder(tmp_path):
    folder = write_fgvc(tmp_path / "birds", {"birds.train.json": {"b.png": 1}})
    (tmp_path / "birds.test.json").write_text('{"b.png": 1}')
    assert fgvc_files(folder) == {"train": folder / "birds.train.json", "test": tmp_path / "birds.test.json"}
    (folder / "train.json").write_text("{}")
    with pytest.raises(ValueError, match=r"several lists of one split, .*birds\.train\.json, .*train\.json"):
        fgvc_files(folder)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ("cat", "line 3 (key 'ü.png'): the class must be a whole number from 0, got 'cat'"),
        (-1, "line 3 (key 'ü.png'): the class must be a whole number from 0, got -1"),
        (1.0, "got 1.0"),
        (True, "got True"),
        (None, "got None"),
        ([1], "got [1]"),
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_wrong_entry_of_fgvc_is_named_with_its_line(tmp_path, number, message, ascii_only):
    folder = write_fgvc(tmp_path, {})
    entries = {"b.png": 1, "ü.png": number, "a 1.png": 2}
    (folder / "train.json").write_text(json.dumps(entries, indent=1, ensure_ascii=ascii_only), encoding="utf-8")
    listing = list_fgvc(folder)
    assert f"{folder}/train.json has 1 wrong entry:" in listing.findings[0].message
    assert message in listing.findings[0].message
    assert len(listing.splits["train"]) == 2


def test_an_image_that_stands_twice_in_a_list_of_fgvc_is_named(tmp_path):
    folder = write_fgvc(tmp_path, {})
    (folder / "train.json").write_text('{"b.png": 1,\n"b.png": 2}')
    assert "line 2 (key 'b.png'): stands there twice" in list_fgvc(folder).findings[0].message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'["b.png", 1]', "must be an object"),
        (b"5", "must be an object"),
        (b'{"b.png": 1', "cannot be read"),
        (b'{"b.png": {"class": 1}}', "has objects inside"),
        (b'{"\xff": 1}', "utf-8"),
        (b"", "cannot be read"),
    ],
)
def test_a_list_that_is_no_object_is_named_and_the_others_are_read(tmp_path, data, message):
    folder = write_fgvc(tmp_path, {"train.json": {"b.png": 1}})
    (folder / "test.json").write_bytes(data)
    listing = list_fgvc(folder)
    [finding] = listing.findings
    assert "test.json" in finding.message
    assert message in finding.message
    assert len(listing.splits["train"]) == 1


def test_more_classes_than_the_task_of_that_name_has_are_found(tmp_path):
    task = min((task for task in TASKS.values() if task.suite == "fgvc"), key=lambda task: task.classes)
    paths = [f"{index}.png" for index in range(task.classes + 1)]
    entries = {path: index for index, path in enumerate(paths)}
    [finding] = list_fgvc(write_fgvc(tmp_path / task.name, {"train.json": entries}, paths)).findings
    assert f"{task.classes + 1} classes, and the task {task.name} has {task.classes}" in finding.message


def test_a_class_number_that_no_task_has_is_wrong_before_memory_is_asked_for(tmp_path):
    folder = tmp_path / "mine"
    (folder / "images").mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(folder / "images" / f"{name}.png")
    (folder / "train800.txt").write_text("images/a.png 0\nimages/b.png 200000\n")
    (finding,) = list_vtab(folder).findings
    assert "line 2: the class must be less than 25000, got 200000" in finding.message
