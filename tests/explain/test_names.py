import json
import re
from pathlib import Path

import numpy as np
import pytest

from gift.explain.names import ClusterNames, ClusterRef, Combination, combined_map

RNG = np.random.default_rng(0)
BEAK, EYE, WING = ClusterRef(8, 28), ClusterRef(8, 3), ClusterRef(11, 0)
HEAD = Combination("intersection", (BEAK, EYE))
NAMES = ClusterNames({"L8/C28": "beak", "L11/C0": "Flügel"}, {"head": HEAD})


def test_a_cluster_is_written_and_read_as_its_label():
    assert str(BEAK) == "L8/C28"
    assert ClusterRef.parse("L8/C28") == BEAK
    assert ClusterRef.parse("L0/C0") == ClusterRef(0, 0)


def test_clusters_are_ordered_by_number_and_not_by_label():
    assert sorted([WING, BEAK, EYE]) == [EYE, BEAK, WING]


@pytest.mark.parametrize(
    "label", ["", "L8", "8/28", "L8/C", "L08/C1", "l8/c1", "L-1/C2", " L8/C28", "L8/C28\n", "L8/C28+C31", "L²/C1"]
)
def test_what_is_no_label_is_refused_with_an_example(label):
    with pytest.raises(ValueError, match=r"written like L8/C28 \(layer 8, cluster 28\), got '"):
        ClusterRef.parse(label)


def test_negative_numbers_are_no_cluster():
    with pytest.raises(ValueError, match="counted from 0, got layer 0, cluster -1"):
        ClusterRef(0, -1)


@pytest.mark.parametrize(
    ("how", "members", "message"),
    [
        ("mean", (BEAK, EYE), "one of sum, intersection, got 'mean'"),
        ("sum", (BEAK,), "at least two clusters, got L8/C28: add another"),
        ("sum", (), "at least two clusters, got none"),
        ("sum", (BEAK, EYE, BEAK), "must differ, got L8/C28, L8/C3, L8/C28"),
    ],
)
def test_a_combination_is_of_different_clusters_in_a_known_way(how, members, message):
    with pytest.raises(ValueError, match=message):
        Combination(how, members)


def test_a_named_cluster_is_called_by_its_name_and_its_label():
    assert NAMES.label(BEAK) == "beak (L8/C28)"
    assert NAMES.label(EYE) == "L8/C3"


def test_names_are_added_changed_and_removed_in_new_objects():
    named = ClusterNames().with_name(BEAK, " beak ").with_name(WING, "Flügel").with_combination(" head ", HEAD)
    assert named == NAMES
    assert named.with_name(BEAK, "bill").clusters == {"L8/C28": "bill", "L11/C0": "Flügel"}
    assert named.with_name(BEAK, "beak") == named
    assert named.without("head") == ClusterNames(NAMES.clusters)
    assert named.without("beak ") == ClusterNames({"L11/C0": "Flügel"}, {"head": HEAD})
    assert named == NAMES


def test_names_do_not_change_with_the_mapping_they_were_made_from():
    given = {"L8/C28": "beak"}
    named = ClusterNames(given)
    given["L8/C3"] = "beak"
    assert named.clusters == {"L8/C28": "beak"}


@pytest.mark.parametrize("name", ["", "   ", "two\nlines", "bell\a", "x" * 61, "half \ud800"])
def test_a_name_is_short_printable_text(name):
    with pytest.raises(ValueError, match=r"1 to 60 printable characters .* for L8/C3"):
        NAMES.with_name(EYE, name)
    with pytest.raises(ValueError, match=r"1 to 60 printable characters .* for a combination"):
        NAMES.with_combination(name, HEAD)


def test_the_longest_name_is_kept():
    assert NAMES.with_name(EYE, "x" * 60).label(EYE) == "x" * 60 + " (L8/C3)"


@pytest.mark.parametrize("name", ["L1/C2", "l1/c2", "L8/C28+C31", "beak (L8/C28)"])
def test_a_name_does_not_look_like_a_label(name):
    with pytest.raises(ValueError, match="looks like a label such as L1/C2, got"):
        NAMES.with_name(EYE, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: NAMES.with_name(EYE, "beak"), "'beak' cannot name L8/C3, for it names L8/C28"),
        (lambda: NAMES.with_name(EYE, "head"), "'head' cannot name a combination, for it names L8/C3"),
        (lambda: NAMES.with_combination("beak", HEAD), "'beak' cannot name a combination, for it names L8/C28"),
        (lambda: NAMES.with_combination("head", HEAD), "'head' already names a combination"),
        (lambda: NAMES.without("tail"), "no name 'tail' to remove; there are: Flügel, beak, head"),
        (lambda: ClusterNames().without("tail"), "there are: none"),
    ],
)
def test_a_name_that_is_taken_or_missing_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change()


def test_what_is_saved_is_loaded(tmp_path):
    NAMES.save(tmp_path / "adapter")
    assert ClusterNames.load(tmp_path / "adapter") == NAMES
    assert json.loads((tmp_path / "adapter" / "cluster_names.json").read_bytes()) == {
        "clusters": {"L8/C28": "beak", "L11/C0": "Flügel"},
        "combinations": {"head": {"how": "intersection", "members": ["L8/C28", "L8/C3"]}},
    }
    NAMES.without("beak").save(str(tmp_path / "adapter"))
    assert ClusterNames.load(str(tmp_path / "adapter")) == NAMES.without("beak")
    assert [file.name for file in (tmp_path / "adapter").iterdir()] == ["cluster_names.json"]


def test_a_folder_without_the_file_has_no_names(tmp_path):
    assert ClusterNames.load(tmp_path) == ClusterNames()


def test_a_save_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch):
    NAMES.save(tmp_path)

    def full(path, text, **options):
        path.write_bytes(text.encode()[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        NAMES.without("beak").save(tmp_path)
    assert ClusterNames.load(tmp_path) == NAMES
    assert [file.name for file in tmp_path.iterdir()] == ["cluster_names.json"]


def stored(clusters="{}", combinations="{}"):
    return f'{{"clusters": {clusters}, "combinations": {combinations}}}'.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (stored()[:-1], "delimiter"),
        (b"\xff\xfe", "can't decode"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "Expected a JSON object for the file, got list"),
        (b'{"clusters": {}}', "Expected 'clusters', 'combinations' in the file, got 'clusters'"),
        (stored()[:-1] + b', "extra": 1}', "got 'clusters', 'combinations', 'extra'"),
        (stored("[]"), "object for clusters, got list"),
        (stored('{"L8/C28": 3}'), "name of L8/C28 must be text, got 3"),
        (stored('{"beak": "beak"}'), "written like L8/C28 .* got 'beak'"),
        (stored('{"L8/C28": " beak"}'), "no space at its ends, got ' beak' for L8/C28"),
        (stored('{"L8/C28": "L1/C2"}'), "looks like a label"),
        (stored('{"L8/C28": "beak", "L8/C3": "beak"}'), "'beak' cannot name L8/C3"),
        (stored('{"L8/C28": "beak", "L8/C28": "bill"}'), "'L8/C28' stands there twice"),
        (stored(combinations='{"head": []}'), "object for the combination 'head', got list"),
        (stored(combinations='{"head": {}}'), "'how', 'members' in the combination 'head', got nothing"),
        (stored(combinations='{"head": {"how": null, "members": []}}'), "'how' of .* must be text, got None"),
        (
            stored(combinations='{"head": {"how": "sum", "members": "L8/C28"}}'),
            "must be a list of labels, got 'L8/C28'",
        ),
        (stored(combinations='{"head": {"how": "sum", "members": [8, 28]}}'), r"list of labels, got \[8, 28\]"),
        (stored(combinations='{"head": {"how": "sum", "members": ["L8/C28"]}}'), "at least two clusters"),
        (stored(combinations='{"head": {"how": "mean", "members": ["L8/C28", "L8/C3"]}}'), "got 'mean'"),
    ],
)
def test_a_damaged_file_is_refused_with_its_path_and_kept(tmp_path, content, message):
    path = tmp_path / "cluster_names.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} holds no valid names; .*: .*{message}"):
        ClusterNames.load(tmp_path)
    assert path.read_bytes() == content


def test_members_count_alike_in_a_sum_and_all_of_them_in_an_intersection():
    maps = RNG.normal(size=(3, 2, 4, 4))
    first, second = ((maps[:, member] - maps[:, member].mean()) / maps[:, member].std() for member in (0, 1))
    scaled = maps * np.array([1e3, 1])[:, None, None] + 5
    assert np.allclose(combined_map(scaled, "sum"), first + second)
    assert np.allclose(combined_map(scaled, "intersection"), np.minimum(first, second))
    assert np.allclose(combined_map(scaled.astype(np.float32), "sum"), first + second, atol=1e-4)


def test_a_known_combination_of_two_patches():
    maps = np.array([[[[0.0, 2.0]], [[5.0, 3.0]], [[7.0, 7.0]]]])  # up, down, and a member that does not vary
    assert combined_map(maps[:, :2], "sum").tolist() == [[[0, 0]]]
    assert combined_map(maps[:, ::2], "sum").tolist() == [[[-1, 1]]]
    assert combined_map(maps, "intersection").tolist() == [[[-1, -1]]]


def test_maps_that_cannot_be_combined_are_refused():
    maps = RNG.normal(size=(2, 3, 2, 2))
    with pytest.raises(ValueError, match="one of sum, intersection, got 'product'"):
        combined_map(maps, "product")
    with pytest.raises(ValueError, match=r"got maps of shape \(2, 0, 2, 2\)"):
        combined_map(maps[:, :0], "sum")
    maps[1, 2, 0, 0] = np.inf
    with pytest.raises(ValueError, match=r"members 2 \(from 0\) have NaN or infinite values"):
        combined_map(maps, "sum")
