import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from gift.explain.segments import OKABE_ITO, LabelMaps, group_duplicates, label_maps

RNG = np.random.default_rng(0)
SIZES = ((4, 6), (5, 3))


def names(count):
    return [f"L8/C{cluster}" for cluster in range(count)]


def make_labels(batch=2):
    """Return label maps on a grid of 2 x 3 patches: label 0 above, 1 below, 2 in the last column of odd images."""
    labels = np.array([[[0, 0, 0], [1, 1, 1]], [[0, 0, 2], [1, 1, 2]]])[np.arange(batch) % 2]
    return LabelMaps(labels, ("L8/C28", "L8/C3+C31", "beak (L8/C5)"), SIZES[:batch])


def standardised(values):
    return (values - values.mean()) / values.std()


def correlated(first, correlation):
    """Return a map with exactly this correlation with another."""
    first = standardised(first)
    rest = RNG.normal(size=first.shape)
    rest = standardised(rest - rest.mean() - (rest * first).mean() * first)
    return correlation * first + np.sqrt(1 - correlation**2) * rest


def turned(degrees):
    """Return maps any two of which correlate by the cosine of the angle between them."""
    first = standardised(RNG.normal(size=(5, 4, 4)))
    second = correlated(first, 0)
    return np.stack([np.cos(angle) * first + np.sin(angle) * second for angle in np.radians(degrees)], axis=1)


def decoded(segmentation):
    """Return the mask of COCO's run lengths: 5 bits a character from 48 on, then differences to the run before last."""
    height, width = segmentation["size"]
    runs, place, text = [], 0, segmentation["counts"]
    while place < len(text):
        value, shift, more = 0, 0, True
        while more:
            bits = ord(text[place]) - 48
            value |= (bits & 31) << shift
            more, place, shift = bool(bits & 32), place + 1, shift + 5
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    values = np.repeat(np.arange(len(runs)) % 2, runs)
    return values.reshape(width, height).T.astype(bool)  # down the columns


def read(path):
    with Image.open(path) as picture:
        return picture.mode, np.asarray(picture), np.array(picture.getpalette()).reshape(-1, 3)


def test_a_patch_gets_the_cluster_that_responds_most_in_its_own_range():
    maps = RNG.normal(size=(3, 4, 2, 5))
    scaled = maps * np.array([1, 1e4, 1e-4, 1])[:, None, None] + np.array([0, -1e6, 3, 7])[:, None, None]
    expected = np.stack([standardised(maps[:, cluster]) for cluster in range(4)], axis=1).argmax(axis=1)
    found = label_maps(scaled, names(4), [(10, 10)] * 3)
    assert np.array_equal(found.labels, expected)
    assert found.names == ("L8/C0", "L8/C1", "L8/C2", "L8/C3")
    assert found.sizes == ((10, 10),) * 3


def test_a_known_winner_of_every_patch():
    maps = np.array([[[[9, 0, 0]], [[0, 0.2, 0]], [[-5, -5, 5]]]])
    assert label_maps(maps, names(3), [(1, 3)]).labels.tolist() == [[[0, 1, 2]]]


def test_of_too_many_clusters_those_that_win_most_patches_stay():
    """The last cluster wins two patches, every other one."""
    maps = np.random.default_rng(2).normal(0, 0.01, (1, 301, 1, 302))
    maps[0, np.arange(300), 0, np.arange(2, 302)] += 1
    maps[0, 300, 0, [0, 1]] += 1
    found = label_maps(maps, names(301), [(1, 302)])
    responses = np.stack([standardised(of_cluster) for of_cluster in maps[0, :, 0]])
    kept = [*range(255), 300]
    assert found.names == tuple(f"L8/C{cluster}" for cluster in kept)
    assert np.array_equal(found.labels[0, 0], responses[kept].argmax(axis=0))


def test_near_duplicates_are_merged_and_named_together_before_the_winner_is_found():
    first, second = RNG.normal(size=(2, 4, 3, 3))
    twin = correlated(first, 0.95)
    found = label_maps(np.stack([first, second, twin], axis=1), names(3), [(3, 3)] * 4)
    together = standardised(standardised(first) + twin)
    assert found.names == ("L8/C0+C2", "L8/C1")
    assert np.array_equal(found.labels, np.where(together > standardised(second), 0, 1))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (("L8/C28", "L8/C31"), "L8/C28+C31"),
        (("L8/C28", "L9/C31"), "L8/C28+L9/C31"),
        (("beak (L8/C28)", "L8/C31"), "beak (L8/C28)+L8/C31"),
        (("left/wing", "left/leg"), "left/wing+left/leg"),
    ],
)
def test_merged_clusters_keep_the_names_of_all(given, name):
    first = RNG.normal(size=(1, 2, 2))
    assert label_maps(np.stack([first, 2 * first], axis=1), given, [(2, 2)]).names == (name,)


def test_what_correlates_by_more_than_the_limit_is_a_group_numbered_by_its_first_cluster():
    first, second = RNG.normal(size=(2, 6, 4, 4))
    near, far = correlated(first, 0.92), correlated(first, 0.88)
    maps = np.stack([second, first, -first, far, near, 3 * second + 1], axis=1)
    assert group_duplicates(maps, 0.9).tolist() == [0, 1, 2, 3, 1, 0]
    assert group_duplicates(maps, 0.93).tolist() == [0, 1, 2, 3, 4, 0]
    assert group_duplicates(maps, 1).tolist() == [0, 1, 2, 3, 4, 5]


def test_maps_that_each_resemble_only_the_next_are_not_chained_into_one_group():
    assert np.cos(np.radians(41 - 20)) > 0.9  # the second and the third
    assert group_duplicates(turned([0, 20, 41, 62]), 0.9).tolist() == [0, 0, 1, 1]


def test_the_mean_correlation_with_all_members_decides_whether_a_cluster_joins_a_group():
    mean = np.cos(np.radians([28, 28 - 10, 28 + 12])).mean()
    for limit, expected in ((mean - 1e-6, [0, 0, 0, 0]), (mean + 1e-6, [0, 0, 0, 1])):
        assert group_duplicates(turned([0, 10, -12, 28]), float(limit)).tolist() == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_map_that_does_not_vary_is_a_group_of_its_own_and_wins_nowhere(dtype):
    constant = np.full((3, 2, 2), 0.1)
    maps = np.stack([constant, RNG.normal(size=(3, 2, 2)), 7 * constant], axis=1).astype(dtype)
    assert group_duplicates(maps, 0).tolist() == [0, 1, 2]
    found = label_maps(maps, names(3), [(2, 2)] * 3)
    assert np.array_equal(found.labels, np.ones((3, 2, 2)))
    assert label_maps(maps[:, ::2], names(2), [(2, 2)] * 3).labels.max() == 0


def test_every_pixel_has_the_label_of_the_patch_in_which_its_middle_lies():
    labels = np.array([[[0, 1, 2], [2, 1, 0]]])
    assert LabelMaps(labels, ("a", "b", "c"), ((3, 4),)).of_pixels(0).tolist() == [
        [0, 1, 1, 2],
        [2, 1, 1, 0],
        [2, 1, 1, 0],
    ]
    assert LabelMaps(labels, ("a", "b", "c"), ((4, 6),)).of_pixels(0)[1:3].tolist() == [
        [0, 0, 1, 1, 2, 2],
        [2, 2, 1, 1, 0, 0],
    ]


def test_pictures_have_the_sizes_of_their_images_and_labels_as_indices_into_the_palette(tmp_path):
    found = make_labels()
    found.save(tmp_path / "new" / "folder")
    for image, name in enumerate(["00000.png", "00001.png"]):
        mode, pixels, palette = read(tmp_path / "new" / "folder" / name)
        assert mode == "P"
        assert pixels.shape == SIZES[image]
        assert np.array_equal(pixels, found.of_pixels(image))
        assert np.array_equal(palette[:3], found.palette)
    assert pixels.tolist() == [[0, 0, 2]] * 2 + [[1, 1, 2]] * 3


def save_and_read(found, folder):
    found.save(folder)
    return json.loads((folder / "segments.json").read_text())


def test_the_record_lists_images_names_and_the_labels_that_each_image_has(tmp_path):
    found = make_labels()
    record = save_and_read(found, tmp_path)
    assert record["images"][1] == {"id": 1, "file_name": "00001.png", "height": 5, "width": 3}
    assert record["categories"] == [{"id": index, "name": name} for index, name in enumerate(found.names, start=1)]
    assert [(each["image_id"], each["category_id"]) for each in record["annotations"]] == [
        *((0, 1), (0, 2)),
        *((1, 1), (1, 2), (1, 3)),
    ]
    assert [each["id"] for each in record["annotations"]] == [1, 2, 3, 4, 5]


def test_annotations_decode_to_the_label_map(tmp_path):
    found = make_labels()
    for annotation in save_and_read(found, tmp_path)["annotations"]:
        expected = found.of_pixels(annotation["image_id"]) == annotation["category_id"] - 1
        rows, columns = np.nonzero(expected)
        corner, far = (columns.min(), rows.min()), (columns.max(), rows.max())
        assert np.array_equal(decoded(annotation["segmentation"]), expected)
        assert annotation["area"] == expected.sum()
        assert annotation["bbox"] == [*corner, far[0] - corner[0] + 1, far[1] - corner[1] + 1]
        assert annotation["iscrowd"] == 1


def test_large_and_ragged_regions_survive_the_run_lengths(tmp_path):
    labels = RNG.integers(0, 3, size=(1, 14, 14))
    found = LabelMaps(labels, ("a", "b", "c"), ((375, 500),))
    for annotation in save_and_read(found, tmp_path)["annotations"]:
        expected = found.of_pixels(0) == annotation["category_id"] - 1
        assert np.array_equal(decoded(annotation["segmentation"]), expected)


# pycocotools 2.0.11 decodes into an array of the kind that numpy 2 warns of.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_the_tools_of_coco_read_the_annotations(tmp_path):
    found = make_labels()
    found.save(tmp_path)
    stored = COCO(str(tmp_path / "segments.json"))
    again = np.full(SIZES[1], 9)
    for annotation in stored.imgToAnns[1]:
        again[stored.annToMask(annotation) == 1] = annotation["category_id"] - 1
    assert np.array_equal(again, found.of_pixels(1))


def test_an_earlier_save_is_replaced_by_what_a_save_into_a_new_folder_gives(tmp_path):
    make_labels(2).save(tmp_path / "old")
    make_labels(1).save(tmp_path / "old")
    make_labels(1).save(str(tmp_path / "new"))
    old, new = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("old", "new"))
    assert old == new
    assert sorted(new) == ["00000.png", "segments.json"]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("00000.png", "a photograph"),
        ("segments.json", '{"info": {"description": "mine"}, "images": []}'),
        ("segments.json", "[]"),
        ("segments.partial", "a file"),
        ("notes.txt", ""),
    ],
)
def test_a_folder_with_files_of_others_is_refused_and_left_alone(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=f"holds files of others \\({file}\\): give a new"):
        make_labels().save(tmp_path)
    assert contents(tmp_path) == {(tmp_path / file).relative_to(tmp_path): text.encode()}
    with pytest.raises(ValueError, match="is a file: give a folder"):
        make_labels().save(tmp_path / file)


def test_a_file_added_to_an_earlier_save_is_not_lost(tmp_path):
    make_labels(1).save(tmp_path)
    (tmp_path / "00001.png").write_text("a photograph")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds files of others \(00001.png\)"):
        make_labels(2).save(tmp_path)
    assert contents(tmp_path) == before


def test_a_save_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    make_labels(1).save(tmp_path)
    before = contents(tmp_path)

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(LabelMaps, "_write_record", full)
    with pytest.raises(OSError, match="No space left"):
        make_labels(2).save(tmp_path)
    assert contents(tmp_path) == before
    assert not (tmp_path / "segments.partial").exists()


@pytest.mark.parametrize("left", [("segments.partial/00000.png",), ("00000.png", "segments.partial/segments.json")])
def test_a_save_that_was_killed_is_made_good_by_the_next(tmp_path, left):
    (tmp_path / "segments.partial").mkdir()
    for file in left:
        (tmp_path / file).write_text("{")
    make_labels(2).save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00000.png", "00001.png", "segments.json"]


def linear(colours):
    values = np.asarray(colours) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def test_colours_are_distinct_and_begin_with_okabe_and_ito():
    many = LabelMaps(np.zeros((1, 1, 1), int), tuple(f"n{index}" for index in range(256)), ((1, 1),)).palette
    assert many.shape == (256, 3)
    assert len({tuple(colour) for colour in many.tolist()}) == 256
    assert {tuple(colour) for colour in many[:8].tolist()} == set(OKABE_ITO)
    assert np.array_equal(many[:3], make_labels().palette)


def test_the_first_colours_stay_apart_without_green_receptors():
    sixteen = LabelMaps(np.zeros((1, 1, 1), int), tuple(f"n{index}" for index in range(16)), ((1, 1),)).palette
    # F. Vienot, H. Brettel, J. Mollon (1999): linear RGB to receptors; the green one follows from the other two.
    receptors = np.array([[17.8824, 43.5161, 4.1194], [3.4557, 27.1554, 3.8671], [0.02996, 0.18431, 1.4670]])
    loss = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    seen = np.clip(linear(sixteen) @ (np.linalg.inv(receptors) @ loss @ receptors).T, 0, 1) ** (1 / 2.2)
    distances = np.abs(seen[:, None] - seen).max(axis=2)
    assert distances[~np.eye(16, dtype=bool)].min() > 0.06


def test_a_palette_may_be_changed_without_changing_the_next_one():
    make_labels().palette[:] = 7
    assert make_labels().palette.max() > 7


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_maps_that_are_not_finite_are_refused_by_the_name_of_the_cluster(value):
    maps = RNG.normal(size=(2, 3, 2, 2))
    maps[1, 2, 0, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite values, those of cluster L8/C2:"):
        label_maps(maps, names(3), [(2, 2)] * 2)
    with pytest.raises(ValueError, match="those of cluster 2:"):
        group_duplicates(maps, 0.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": names(2)}, "one name for each of the 3 clusters, got 2"),
        ({"names": ["a", "b", "a"]}, "different names, got a more than once"),
        ({"sizes": [(2, 2)]}, "one size for each of the 2 images, got 1"),
        ({"sizes": [(2, 2), (0, 2)]}, r"at least one pixel .* got sizes \(\(2, 2\), \(0, 2\)\)"),
        ({"maps": np.zeros((0, 3, 2, 2))}, r"got maps of shape \(0, 3, 2, 2\)"),
        ({"maps": np.zeros((2, 0, 2, 2)), "names": []}, r"got maps of shape \(2, 0, 2, 2\)"),
        ({"largest_correlation": -0.1}, "between 0 and 1, got -0.1"),
        ({"largest_correlation": float("nan")}, "between 0 and 1, got nan"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(change, message):
    given = {"maps": RNG.normal(size=(2, 3, 2, 2)), "names": names(3), "sizes": [(2, 2)] * 2} | change
    with pytest.raises(ValueError, match=message):
        label_maps(**given)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[[0, 2]]], "2 names are of labels from 0, got labels from 0 to 2"),
        ([[[-1, 0]]], "got labels from -1 to 0"),
        (np.zeros((1, 0, 2), int), r"got labels of shape \(1, 0, 2\)"),
    ],
)
def test_labels_without_a_name_and_no_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        LabelMaps(np.array(labels), ("a", "b"), ((2, 2),))
