import hashlib
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from gift.data import prepare
from gift.data.catalog import TASKS
from gift.data.dsprites import choose_sprites, draw_sprite, sprite_labels
from gift.data.offline import OFFLINE_TASKS
from gift.data.prepare import prepare_task
from gift.data.splits import SplitOptions, read_splits
from tests.data.official_archives import WRITERS, tar, zipped
from tests.data.tfds_exports import encoded, write_export


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def shrink(monkeypatch, name, **changes):
    monkeypatch.setitem(TASKS, name, replace(TASKS[name], hashes={}, **changes))


@pytest.fixture
def dtd(tmp_path, monkeypatch):
    """An export of the task dtd with 5 + 3 images for training and validation and 4 for testing; labels 0 to 4."""
    shrink(monkeypatch, "dtd", train=4, validation=2, test=4)
    forms = {"train": (5, "PNG"), "validation": (3, "JPEG"), "test": (4, "PNG")}
    splits = {
        split: [
            {"image": [encoded(20 * i, form=form, mode="RGB")], "label": [i], "file_name": [b"x"]} for i in range(count)
        ]
        for split, (count, form) in forms.items()
    }
    return write_export(("dtd", "3.0.1"), splits, root=tmp_path / "tfds")


def test_an_export_becomes_images_and_lists_in_the_order_of_its_records(dtd, tmp_path):
    out = prepare_task("dtd", dtd, tmp_path / "vtab-1k" / "dtd")
    made = contents(out)
    assert made["train800.txt"] == b"".join(b"images/train800/00000%d.png %d\n" % (i, i) for i in range(4))
    assert made["val200.txt"] == b"images/val200/000000.jpg 0\nimages/val200/000001.jpg 1\n"
    assert made["train800val200.txt"] == made["train800.txt"] + made["val200.txt"]
    assert made["test.txt"].decode().splitlines()[3] == "images/test/000003.png 3"
    assert made["images/test/000003.png"] == encoded(60, mode="RGB")
    assert len(made) == 10 + 4 + 2
    assert [path.name for path in out.parent.iterdir()] == ["dtd"]


def test_hashes_are_those_of_every_other_file_and_a_second_run_gives_the_same_bytes(dtd, tmp_path):
    made = contents(prepare_task("dtd", dtd, tmp_path / "one"))
    lines = dict(line.split("  ")[::-1] for line in made["sha256.txt"].decode().splitlines())
    assert lines == {path: hashlib.sha256(made[path]).hexdigest() for path in made if path != "sha256.txt"}
    assert made == contents(prepare_task("dtd", dtd.parent.parent, tmp_path / "two"))


def test_the_readme_says_what_was_made_from_what(dtd, tmp_path):
    text = (prepare_task("dtd", dtd, tmp_path / "one") / "README.md").read_text()
    for part in (
        "DTD",
        "47 classes, numbered from 0",
        "train800 4, val200 2, test 4",
        "TFDS dtd/3.0.1",
        "not verified",
    ):
        assert part in text


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_damaged_export_leaves_nothing_behind(dtd, tmp_path, part):
    file = dtd / f"dtd-{part}.tfrecord-00000-of-00002"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cut off"):
        prepare_task("dtd", dtd, tmp_path / "made" / "dtd")
    assert list((tmp_path / "made").iterdir()) == []


def test_an_interrupted_run_leaves_nothing_behind(dtd, tmp_path, monkeypatch):
    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_hash_files", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_task("dtd", dtd, tmp_path / "made" / "dtd")
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": 5}, r"0 images|and 5 for testing, and the source gives .*'test': 4"),
        ({"train": 6}, "has 5 examples, too few"),
        ({"classes": 3}, r"record . of .*label 3, and dtd has 3 classes"),
    ],
)
def test_a_source_that_does_not_fit_the_catalogue_is_refused(dtd, tmp_path, monkeypatch, changes, message):
    shrink(monkeypatch, "dtd", **changes)
    with pytest.raises(ValueError, match=message):
        prepare_task("dtd", dtd, tmp_path / "dtd")
    assert not (tmp_path / "dtd").exists()


@pytest.mark.parametrize("content", [b"GIF89a...", b"\x89PNG\r\n\x1a\nrest", encoded(1)[:20]])
def test_an_image_that_is_no_image_is_refused(tmp_path, monkeypatch, content):
    shrink(monkeypatch, "dtd", train=1, validation=1, test=1)
    good = {"image": [encoded(1)], "label": [0]}
    splits = {"train": [good], "validation": [good], "test": [{"image": [content], "label": [0]}]}
    write_export(("dtd", "3.0.1"), splits, shards=1, root=tmp_path)
    with pytest.raises(ValueError, match=r"neither PNG nor JPEG|images/test/000000.png cannot be read"):
        prepare_task("dtd", tmp_path, tmp_path / "made")


def test_an_output_that_exists_is_refused_and_left_alone(dtd, tmp_path):
    (tmp_path / "dtd").mkdir()
    with pytest.raises(ValueError, match="exists: remove it"):
        prepare_task("dtd", dtd, tmp_path / "dtd")
    assert list((tmp_path / "dtd").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cifar100", None), "no task 'cifar100'"),
        (("dtd", "nowhere"), "no file or folder .*nowhere"),
        (("dtd", None), "dtd needs a source: only dsprites_loc, dsprites_ori, digits, rendered_flowers are made"),
        (("imagenet", "."), "imagenet needs no preparing"),
        (("imagenet", None), "imagenet needs no preparing"),
        (("digits", "."), "digits is made without a source: leave it out"),
        (("dtd", ".", 5), "count is of test images that are made without a source"),
        (("dsprites_loc", None, 0), "at least 1"),
        (("digits", None, 798), "digits has at most 797 images for testing, got a count of 798"),
        (("dsprites_ori", None, 737280), "dsprites_ori has at most 736280 images"),
        (("rendered_flowers", None, 5, -1), "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_what_cannot_be_prepared_is_refused(tmp_path, arguments, message):
    task, source, *count = arguments
    with pytest.raises(ValueError, match=message):
        prepare_task(task, source and tmp_path / source, tmp_path / "made", *count)


def write_folder(folder, test_lines=None):
    """The usual form, 2 + 1 images for training and validation and 2 for testing, under other names than ours."""
    listings = {"train800": [("images/a b.png", 0), ("images/deep/1.png", 1)], "val200": [("images/v.png", 1)]}
    listings |= {"train800val200": listings["train800"] + listings["val200"]}
    listings |= {"test": [("images/t0.png", 0), ("images/t1.png", 1)]}
    files = {path: encoded(3) for listing in listings.values() for path, _ in listing}
    files |= {f"{part}.txt": "".join(f"{p} {n}\n" for p, n in listings[part]).encode() for part in listings}
    files["test.txt"] = files["test.txt"] if test_lines is None else test_lines.encode()
    return {f"{folder}{path}": content for path, content in files.items()}


def write_all(root, files):
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


@pytest.mark.parametrize("form", ["vtab-1k.tar.gz", "vtab-1k.zip", "folder", "task"])
def test_the_usual_form_is_checked_and_taken_over(tmp_path, monkeypatch, form):
    shrink(monkeypatch, "cifar", train=2, validation=1, test=2)
    files = write_folder("vtab-1k/cifar/") | write_folder("vtab-1k/dtd/", "other")
    source = tmp_path / (form if "." in form else "vtab-1k/cifar" if form == "task" else "vtab-1k")
    if "." in form:
        (zipped if form.endswith("zip") else tar)(source, files)
    else:
        write_all(tmp_path, files)
    made = contents(prepare_task("cifar", source, tmp_path / "made"))
    assert {path: made.pop(path) for path in ("README.md", "sha256.txt")}
    assert made == write_folder("")


@pytest.mark.parametrize(
    ("test_lines", "message"),
    [
        ("images/t0.png 0\nimages/t1.png x\n", r"Line 2 of .*test.txt"),
        ("images/t0.png 0\n../t1.png 1\n", r"Line 2 of .*test.txt must be a path in its folder"),
        ("images/t0.png 0\nimages/t2.png 1\n", r"no image .*t2.png"),
        ("images/t0.png 0\nimages/t0.png 0\n", r"images/t0.png is listed twice"),
        ("images/t0.png 0\nimages/v.png 1\n", r"images/v.png is listed twice, the second time in test"),
        ("images/t0.png 0\n", r"'test': 1"),
        ("images/t0.png 0\nimages/t1.png 100\n", r"label 100, and there are 100 classes"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, monkeypatch, test_lines, message):
    shrink(monkeypatch, "cifar", train=2, validation=1, test=2)
    write_all(tmp_path / "source", write_folder("", test_lines))
    with pytest.raises(ValueError, match=message):
        prepare_task("cifar", tmp_path / "source", tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_lists_with_a_mark_blank_lines_and_the_line_ends_of_windows_are_read(tmp_path, monkeypatch):
    shrink(monkeypatch, "cifar", train=2, validation=1, test=2)
    write_all(tmp_path / "source", write_folder("", "\ufeffimages/t0.png 0\r\n\r\nimages/t1.png\t1 \r\n"))
    made = contents(prepare_task("cifar", tmp_path / "source", tmp_path / "made"))
    assert made["test.txt"] == b"images/t0.png 0\nimages/t1.png 1\n"


def test_the_list_of_all_1000_must_be_the_sum_of_the_two(tmp_path, monkeypatch):
    shrink(monkeypatch, "cifar", train=2, validation=1, test=2)
    write_all(tmp_path / "source", write_folder("") | {"train800val200.txt": b"images/v.png 1\n"})
    with pytest.raises(ValueError, match=r"train800val200.txt must hold"):
        prepare_task("cifar", tmp_path / "source", tmp_path / "made")


def test_an_archive_without_the_task_and_a_file_that_is_none_are_refused(tmp_path):
    tar(tmp_path / "vtab-1k.tar.gz", write_folder("vtab-1k/cifar/"))
    with pytest.raises(ValueError, match=r"one dtd/train800.txt, found 0"):
        prepare_task("dtd", tmp_path / "vtab-1k.tar.gz", tmp_path / "made")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="a folder or an archive"):
        prepare_task("dtd", tmp_path / "a.txt", tmp_path / "made")


@pytest.mark.parametrize("name", list(WRITERS))
def test_official_archives_become_images_and_json_files(tmp_path, monkeypatch, name):
    sizes = (2, 2, 4) if name == "oxford_flowers" else (4, 2, 2)
    shrink(monkeypatch, name, classes=2, **dict(zip(("train", "validation", "test"), sizes, strict=True)))
    (tmp_path / "source").mkdir()
    WRITERS[name](tmp_path / "source")
    made = contents(prepare_task(name, tmp_path / "source", tmp_path / "made"))
    labels = {split: json.loads(made[f"{split}.json"]) for split in ("train", "val", "test")}
    assert tuple(len(labels[split]) for split in labels) == sizes
    images = {path for split in labels.values() for path in split}
    assert made.keys() == images | {"train.json", "val.json", "test.json", "README.md", "sha256.txt"}
    assert {number for split in labels.values() for number in split.values()} == {1, 2}
    assert made == contents(prepare_task(name, tmp_path / "source", tmp_path / "again"))


def test_an_archive_with_another_hash_than_the_published_one_is_refused(tmp_path):
    WRITERS["cub"](tmp_path)
    with pytest.raises(ValueError, match="not the published file"):
        prepare_task("cub", tmp_path, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_part_without_one_of_the_classes_is_refused(tmp_path, monkeypatch):
    shrink(monkeypatch, "cub", classes=2, train=2, validation=1, test=1)
    write_all(tmp_path, {f"images/{name}.jpg": encoded(1) for name in "abcd"})
    parts = {"train": {"a.jpg": 1, "b.jpg": 2}, "val": {"c.jpg": 1}, "test": {"d.jpg": 2}}
    write_all(tmp_path, {f"{split}.json": json.dumps(labels).encode() for split, labels in parts.items()})
    with pytest.raises(ValueError, match="Not all of the 2 classes of cub are in test"):
        prepare_task("cub", tmp_path, tmp_path / "made")


def test_sprites_are_drawn_without_a_source(tmp_path):
    out = prepare_task("dsprites_ori", None, tmp_path / "dsprites_ori", count=30, seed=3)
    factors = choose_sprites(1030, 3)
    labels = sprite_labels("dsprites_ori", factors)
    first = [line.split() for line in (out / "test.txt").read_text().splitlines()]
    assert [int(label) for _, label in first] == labels[1000:].tolist()
    pixels = np.asarray(Image.open(out / first[7][0]))
    np.testing.assert_array_equal(pixels, draw_sprite(factors[1007]))
    assert len((out / "train800val200.txt").read_text().splitlines()) == 1000
    assert "not DeepMind's file" in (out / "README.md").read_text()


@pytest.mark.parametrize(("name", "classes", "note"), [("digits", 10, "writer"), ("rendered_flowers", 8, "scene")])
def test_digits_and_flowers_are_made_without_a_source_and_to_the_same_bytes(tmp_path, monkeypatch, name, classes, note):
    shrink(monkeypatch, name, train=20, validation=10)
    out = prepare_task(name, None, tmp_path / name, count=15, seed=3)
    splits = read_splits(str(out), SplitOptions())
    parts = (splits.train, splits.validation, splits.test)
    labels = [label for _, label in OFFLINE_TASKS[name].examples(45, 3)]
    assert [list(part["label"]) for part in parts] == [labels[:20], labels[20:30], labels[30:]]
    assert splits.class_names == tuple(map(str, range(classes)))
    assert note in (out / "README.md").read_text()
    assert contents(out) == contents(prepare_task(name, None, tmp_path / "again", count=15, seed=3))


def test_fewer_test_images_are_the_first_and_change_nothing_else(tmp_path, monkeypatch):
    shrink(monkeypatch, "rendered_flowers", train=3, validation=2, test=6)
    more = contents(prepare_task("rendered_flowers", None, tmp_path / "more"))
    fewer = contents(prepare_task("rendered_flowers", None, tmp_path / "fewer", count=4))
    assert more["test.txt"].startswith(fewer["test.txt"])
    assert more.keys() - fewer.keys() == {"images/test/000004.png", "images/test/000005.png"}
    changed = {"test.txt", "README.md", "sha256.txt"}
    assert {path: more[path] for path in fewer if path not in changed} == {
        path: fewer[path] for path in fewer if path not in changed
    }


def test_the_images_without_a_source_are_those_that_are_drawn(tmp_path, monkeypatch):
    shrink(monkeypatch, "rendered_flowers", train=2, validation=1, test=2)
    out = prepare_task("rendered_flowers", None, tmp_path / "made", seed=5)
    written = "train800/000000 train800/000001 val200/000000 test/000000 test/000001"
    for path, (pixels, _) in zip(written.split(), OFFLINE_TASKS["rendered_flowers"].examples(5, 5), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(out / f"images/{path}.png")), pixels)


def test_the_images_of_an_export_of_dsprites_are_made_visible(tmp_path, monkeypatch):
    shrink(monkeypatch, "dsprites_loc", train=1, validation=1, test=1)
    file = io.BytesIO()
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(file, "PNG")
    rows = [{"image": [file.getvalue()], "label_x_position": [31], "label_orientation": [0]}] * 10
    write_export(("dsprites", "2.0.0"), {"train": rows}, root=tmp_path)
    out = prepare_task("dsprites_loc", tmp_path, tmp_path / "made")
    assert (out / "test.txt").read_text() == "images/test/000000.png 15\n"
    np.testing.assert_array_equal(np.asarray(Image.open(out / "images/test/000000.png")), np.eye(4) * 255)


def test_nothing_of_the_source_is_changed(dtd, tmp_path):
    shutil.copytree(dtd.parent.parent, tmp_path / "copy")
    prepare_task("dtd", dtd, tmp_path / "made")
    assert contents(dtd.parent.parent) == contents(tmp_path / "copy")


@pytest.mark.parametrize("name", list(WRITERS))
def test_what_was_prepared_of_fgvc_is_read_as_splits(tmp_path, monkeypatch, name):
    sizes = (2, 2, 4) if name == "oxford_flowers" else (4, 2, 2)
    shrink(monkeypatch, name, classes=2, **dict(zip(("train", "validation", "test"), sizes, strict=True)))
    (tmp_path / "source").mkdir()
    WRITERS[name](tmp_path / "source")
    splits = read_splits(str(prepare_task(name, tmp_path / "source", tmp_path / name)), SplitOptions())
    assert (len(splits.train), len(splits.validation), len(splits.test)) == sizes
    assert {*splits.train["label"]} == {*splits.test["label"]} == {0, 1}
    assert len(splits.class_names) == 2


def test_what_was_prepared_of_vtab_is_read_as_splits(dtd, tmp_path):
    out = str(prepare_task("dtd", dtd, tmp_path / "vtab-1k" / "dtd"))
    splits, both = read_splits(out, SplitOptions()), read_splits(out, SplitOptions(train_on_validation=True))
    assert [list(part["label"]) for part in (splits.train, splits.validation, splits.test)] == [
        [0, 1, 2, 3],
        [0, 1],
        [0, 1, 2, 3],
    ]
    assert list(both.train["label"]) == [0, 1, 2, 3, 0, 1]
    assert len(splits.class_names) == 47
