import dataclasses
import shutil

import numpy as np
import pytest

from gift.data.check import check_data, describe
from gift.data.splits import SplitOptions
from tests.data.image_files import encoded, fill, picture
from tests.data.test_decoding import FILES, REFUSED
from tests.data.test_lists import write_vtab
from tests.data.test_tabular import write

BIG = (64, 48)


def check(source, near=6, **options):
    return check_data(str(source), SplitOptions(**options), near)


def kinds(report):
    return [finding.kind for finding in report.findings]


def test_counts_sizes_and_kinds_of_every_split_are_reported(tmp_path):
    fill(tmp_path / "train", ("a", "b"), count=3)
    fill(tmp_path / "test", ("b",), count=1, seed=1)
    picture(77, (40, 10)).convert("L").save(tmp_path / "train" / "a" / "long.png")
    report = check(tmp_path)
    train, test = report.splits["train"], report.splits["test"]
    assert (train.counts, test.counts) == ({"a": 4, "b": 3}, {"a": 0, "b": 1})
    assert (train.shorter_px, train.longer_px, train.aspect) == ((10, 10, 10), (12, 12, 40), (1.2, 1.2, 4))
    assert train.modes == {"RGB": 6, "L": 1}
    assert (report.form, report.findings) == ("image folder", ())
    assert "train: 7 images of 2 classes, 3 to 4 of each" in describe(report)
    assert "6 RGB, 1 greyscale" in describe(report)
    assert describe(report).endswith("Nothing is wrong.")


def test_all_damaged_images_are_listed_with_reasons(tmp_path):
    fill(tmp_path, ("a", "b"))
    for kind in REFUSED:
        (tmp_path / "a" / f"{kind}.png").write_bytes(FILES[kind])
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    report = check(tmp_path)
    damaged = [finding for finding in report.findings if finding.kind == "damaged image"]
    assert {finding.paths[0] for finding in damaged} == {
        *(str(tmp_path / "a" / f"{kind}.png") for kind in REFUSED),
        str(tmp_path / "b" / "gone.png"),
    }
    assert all(finding.message in describe(report) for finding in damaged)
    assert report.splits["train"].modes == {"RGB": 6}


def test_problems_of_classes_are_found_all_at_once(tmp_path):
    fill(tmp_path / "train", ("a", "b"))
    fill(tmp_path / "train", ("single",), count=1, seed=1)
    fill(tmp_path / "test", ("a", "new"), seed=2)
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "broken").mkdir()
    (tmp_path / "train" / "broken" / "1.png").write_bytes(b"")
    expected = ["empty class", "class without training images", "damaged image", "label gap"]
    report = check(tmp_path)
    assert kinds(report) == [*expected, "damaged class", "class of one image"]
    assert [finding.paths for finding in report.findings if finding.kind == "label gap"] == [("empty",)]


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        ("train/a/copy.png", "duplicate"),
        ("test/a/copy.png", "duplicate in another split"),
        ("train/b/copy.png", "duplicate with another label"),
        ("test/b/copy.png", "duplicate with another label"),
    ],
)
@pytest.mark.parametrize("is_near", [False, True])
def test_images_that_are_there_twice_are_found(tmp_path, other, kind, is_near):
    fill(tmp_path / "train", ("a", "b"))
    fill(tmp_path / "test", ("a", "b"), seed=1)
    photo = picture(99, BIG)
    photo.save(tmp_path / "train" / "a" / "photo.png")
    copy = encoded(photo.resize((32, 24)), "JPEG", quality=60) if is_near else encoded(photo)
    (tmp_path / other).write_bytes(copy)
    [finding] = check(tmp_path).findings
    assert finding.kind == ("near " if is_near else "") + kind
    assert set(finding.paths) == {str(tmp_path / "train/a/photo.png"), str(tmp_path / other)}
    assert "train/a/photo.png" in finding.message
    assert kinds(check(tmp_path, near=-1)) == ([] if is_near else [kind])


def test_an_image_like_two_equal_ones_is_found_with_both(tmp_path):
    fill(tmp_path, ("a", "b"))
    photo = picture(99, BIG)
    for name in ("1.x.png", "2.x.png"):
        photo.save(tmp_path / "a" / name)
    photo.save(tmp_path / "b" / "x.jpg")
    report = check(tmp_path)
    assert kinds(report) == ["near duplicate with another label", "duplicate"]
    assert len(report.findings[0].paths) == 3
    assert "classes a, b" in report.findings[0].message


def test_wrong_lists_and_rows_are_findings_beside_the_others(tmp_path):
    write_vtab(tmp_path / "vtab", ["images/0.png 0", "images/1.png 1", "gone.png 1", "images/1.png x"])
    (tmp_path / "vtab" / "images" / "0.png").write_bytes(b"")
    report = check(tmp_path / "vtab")
    assert kinds(report)[:2] == ["list", "damaged image"]
    assert "has 2 wrong entries" in report.findings[0].message
    rows = check(write(tmp_path / "x.parquet", [0, 1, -1, 0]))
    assert kinds(rows) == ["rows", "class of one image"]


@pytest.mark.parametrize("name", ["nothing", "x.zip", "x.parquet", "x.txt"])
def test_a_source_that_cannot_be_read_is_a_finding(tmp_path, name):
    if name != "nothing":
        (tmp_path / name).write_bytes(b"no")
    report = check(tmp_path / name)
    assert kinds(report) == ["unreadable source"]
    assert name in describe(report)


def test_a_source_without_training_images_is_checked_too(tmp_path):
    fill(tmp_path / "test", ("a", "b"))
    fill(tmp_path / "val", ("a", "b"), seed=1)
    (tmp_path / "test" / "a" / "0.png").write_bytes(b"")
    report = check(tmp_path)
    assert kinds(report) == ["no training images", "damaged image"]
    assert list(report.splits) == ["validation", "test"]


def test_ten_findings_of_a_kind_are_shown(tmp_path):
    fill(tmp_path, ("a", "b"))
    for index in range(12):
        picture(100 + index, BIG).save(tmp_path / "a" / f"one{index}.png")
        shutil.copy(tmp_path / "a" / f"one{index}.png", tmp_path / "a" / f"two{index}.png")
    text = describe(check(tmp_path))
    assert "duplicate (12)" in text
    assert text.count("are the same file") == 10
    assert "and 2 more" in text


def test_a_report_cannot_be_changed(tmp_path):
    report = check(fill(tmp_path))
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.findings = ()
    with pytest.raises(ValueError, match="near must be a whole number of at least -1"):
        check(tmp_path, near=-2)


def test_large_photos_are_looked_at_in_a_fraction_of_their_size(tmp_path, monkeypatch):
    fill(tmp_path, ("a", "b"))
    (tmp_path / "a" / "big.jpg").write_bytes(encoded(picture(5, (1600, 1200)), "JPEG"))
    seen = []
    monkeypatch.setattr(
        "gift.data.check.look", lambda image: seen.append(image.size) or (0, np.zeros((8, 8, 3), np.uint8))
    )
    report = check(tmp_path, near=-1)
    assert (200, 150) in seen
    assert report.splits["train"].longer_px[2] == 1600
