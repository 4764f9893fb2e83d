import json

import pytest

from gift.data.tfds import open_export
from tests.data.tfds_exports import framed, write_export


def numbered(count):
    return [{"label": [index]} for index in range(count)]


def labels(export, split, chosen):
    return [features["label"][0] for _, features in export.examples(split, chosen)]


def rewrite(folder, **changes):
    file = folder / "dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def folder(tmp_path):
    return write_export(("toys", "3.0.2"), {"train": numbered(10), "test": numbered(4)}, shards=3, root=tmp_path)


def test_an_export_is_found_from_its_folder_from_that_of_the_data_set_and_from_that_of_all(folder):
    for source in (folder, folder.parent, folder.parent.parent):
        assert open_export(source, "toys/3.0.1").folder == folder.resolve()


def test_a_configuration_is_part_of_the_path(tmp_path):
    folder = write_export(("toys", "big", "1.0.0"), {"train": numbered(2)}, root=tmp_path)
    for source in (tmp_path, tmp_path / "toys", folder.parent, folder):
        assert open_export(source, "toys/big/1.0.0").count("train") == 2
    with pytest.raises(ValueError, match=r"one export toys/small/1"):
        open_export(tmp_path, "toys/small/1.0.0")
    with pytest.raises(ValueError, match=r"export of toys/big/1\.0\.0, and toys/small/1\.0\.0"):
        open_export(folder, "toys/small/1.0.0")


def test_examples_count_in_the_order_of_the_files(folder):
    export = open_export(folder, "toys/3.0.0")
    for chosen in (range(10), range(2, 5), range(3, 3), range(6, 10), range(9, 10)):
        assert labels(export, "train", chosen) == list(chosen)
    assert (export.count("train"), export.count("test")) == (10, 4)


def test_records_are_counted_where_the_information_has_no_lengths(folder):
    rewrite(folder, splits=[{"name": "train", "numShards": "3"}])
    assert labels(open_export(folder, "toys/3.0.0"), "train", range(2, 8)) == list(range(2, 8))


def test_an_example_is_called_by_its_number_in_its_file(folder):
    names = [name for name, _ in open_export(folder, "toys/3.0.0").examples("train", range(3, 5))]
    assert [name[: name.index(" of ")] for name in names] == ["record 0", "record 1"]
    assert names[0].endswith("toys-train.tfrecord-00001-of-00003")


@pytest.mark.parametrize("chosen", [range(9, 11), range(-1, 2)])
def test_more_examples_than_there_are_is_an_error(folder, chosen):
    with pytest.raises(ValueError, match="has 10 examples, too few"):
        list(open_export(folder, "toys/3.0.0").examples("train", chosen))


def test_another_data_set_or_version_is_not_taken(folder):
    with pytest.raises(ValueError, match="found none"):
        open_export(folder.parent, "toys/2.0.0")
    with pytest.raises(ValueError, match=r"export of toys/3\.0\.2, and toys/2\.0\.0 is needed"):
        open_export(folder, "toys/2.0.0")
    with pytest.raises(ValueError, match="export of toys"):
        open_export(folder, "games/3.0.0")
    with pytest.raises(ValueError, match="no split 'validation', only"):
        open_export(folder, "toys/3.0.0").count("validation")


def test_two_versions_side_by_side_have_to_be_chosen_from(folder, tmp_path):
    write_export(("toys", "3.1.0"), {"train": numbered(1)}, root=tmp_path)
    with pytest.raises(ValueError, match=r"must hold one export .*3\.0\.2.*3\.1\.0"):
        open_export(tmp_path, "toys/3.0.0")


def test_a_missing_file_of_a_split_is_an_error(folder):
    (folder / "toys-train.tfrecord-00002-of-00003").unlink()
    with pytest.raises(ValueError, match="must have 3 files"):
        open_export(folder, "toys/3.0.0")


def test_a_file_with_more_or_fewer_records_than_announced_is_an_error(folder):
    file = folder / "toys-test.tfrecord-00002-of-00003"
    whole = file.read_bytes()
    for content in (whole + framed(b""), whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"has [13] records, and dataset_info.json says 2"):
            list(open_export(folder, "toys/3.0.0").examples("test", range(4)))


def test_a_record_that_is_no_example_is_named(folder):
    (folder / "toys-test.tfrecord-00000-of-00003").write_bytes(framed(b"\x0a\x7f"))
    with pytest.raises(ValueError, match=r"record 0 of .*toys-test.tfrecord-00000-of-00003 cannot be read"):
        list(open_export(folder, "toys/3.0.0").examples("test", range(4)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("[]", "list of splits"),
        ('{"splits": [{}]}', "that have names"),
        ('{"splits": [], "fileFormat": "array_record"}', "array_record"),
    ],
)
def test_information_that_cannot_be_used_is_an_error(folder, content, message):
    (folder / "dataset_info.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_export(folder, "toys/3.0.0")
