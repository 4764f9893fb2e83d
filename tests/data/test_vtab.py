import io

import numpy as np
import pytest
from PIL import Image

from gift.data.catalog import TASKS
from gift.data.tfds import TfdsExport
from gift.data.vtab import SLICINGS, labelled_examples
from tests.data.tfds_exports import encoded, write_export

# As the release notes of TFDS have them, and where task_adaptation cuts: train800, val200, test.
EXPORTS = {
    "caltech101": ({"train": 3060, "test": 6084}, "train[2754:2954]", "test[0:6084]"),
    "cifar": ({"train": 50000, "test": 10000}, "train[45000:45200]", "test[0:10000]"),
    "dtd": ({"train": 1880, "validation": 1880, "test": 1880}, "validation[0:200]", "test[0:1880]"),
    "oxford_flowers102": ({"train": 1020, "validation": 1020, "test": 6149}, "validation[0:200]", "test[0:6149]"),
    "oxford_iiit_pet": ({"train": 3680, "test": 3669}, "train[2944:3144]", "test[0:3669]"),
    "svhn": ({"train": 73257, "test": 26032, "extra": 531131}, "train[65931:66131]", "test[0:26032]"),
    "sun397": ({"train": 76128, "validation": 10875, "test": 21750}, "validation[0:200]", "test[0:21750]"),
    "patch_camelyon": ({"train": 262144, "validation": 32768, "test": 32768}, "validation[0:200]", "test[0:32768]"),
    "eurosat": ({"train": 27000}, "train[16200:16400]", "train[21600:27000]"),
    "resisc45": ({"train": 31500}, "train[18900:19100]", "train[25200:31500]"),
    "diabetic_retinopathy": (
        {"sample": 10, "train": 35126, "validation": 10906, "test": 42670},
        "validation[0:200]",
        "test[0:42670]",
    ),
    "clevr_count": ({"train": 70000, "validation": 15000, "test": 15000}, "train[63000:63200]", "validation[0:15000]"),
    "clevr_dist": ({"train": 70000, "validation": 15000, "test": 15000}, "train[63000:63200]", "validation[0:15000]"),
    "dmlab": ({"train": 65550, "validation": 22628, "test": 22735}, "validation[0:200]", "test[0:22735]"),
    "kitti": ({"train": 6347, "validation": 423, "test": 711}, "validation[0:200]", "test[0:711]"),
    "dsprites_loc": ({"train": 737280}, "train[589824:590024]", "train[663552:737280]"),
    "dsprites_ori": ({"train": 737280}, "train[589824:590024]", "train[663552:737280]"),
    "smallnorb_azi": ({"train": 24300, "test": 24300}, "test[0:200]", "test[12150:24300]"),
    "smallnorb_ele": ({"train": 24300, "test": 24300}, "test[0:200]", "test[12150:24300]"),
}


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.suite == "vtab1k"])
def test_a_task_is_cut_from_its_export_as_vtab_cuts_it_and_has_the_size_of_the_catalogue(name, tmp_path):
    counts, validation, test = EXPORTS[name]
    export = TfdsExport(tmp_path, {split: ((tmp_path, count),) for split, count in counts.items()})
    parts = SLICINGS[name].parts(export, TASKS[name])
    assert [f"{split}[{chosen.start}:{chosen.stop}]" for split, chosen in parts.values()] == [
        "train[0:800]",
        validation,
        test,
    ]
    assert list(parts) == ["train800", "val200", "test"]
    assert len(parts["test"][1]) == TASKS[name].test


def read(tmp_path, task, **features):
    """Labels of the examples of a task, one for each value of the features."""
    rows = [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]
    examples = [{"image": [encoded(1)]} | {name.replace("__", "/"): row[name] for name in row} for row in rows]
    folder = write_export(("toys", "1.0.0"), {"train": examples}, shards=1, root=tmp_path)
    export = TfdsExport(folder, {"train": ((folder / "toys-train.tfrecord-00000-of-00001", len(rows)),)})
    return [label for _, _, label in labelled_examples(export, TASKS[task], ("train", range(len(rows))))]


def test_clevr_counts_objects_from_3_on(tmp_path):
    assert read(tmp_path, "clevr_count", objects__size=[[0] * 3, [1] * 10]) == [0, 7]


def test_clevr_bins_the_third_coordinate_of_the_closest_object(tmp_path):
    depths = (7.0, 8.0, 8.25, 8.5, 9.0, 9.25, 10.0, 10.5, 50.0)
    points = [[100.0, 3.0, 40.0 + depth, 1.0, 2.0, depth] for depth in depths]
    assert read(tmp_path, "clevr_dist", objects__pixel_coords=points) == [0, 0, 1, 1, 2, 3, 4, 5, 5]


def test_kitti_bins_the_closest_car_van_or_truck_and_knows_images_without_one(tmp_path):
    kinds = [[0, 3], [1, 3], [2, 0], [3, 4], []]  # 3 is a pedestrian, who is closer and does not count
    places = [[1.0, 1.0, 8.0, 0.0, 0.0, 2.0], [1.0, 1.0, 8.5, 0.0, 0.0, 2.0], [0.0, 0.0, 30.0, 0.0, 0.0, 25.0]]
    locations = [*places, [0.0, 0.0, 5.0, 0.0, 0.0, 6.0], []]
    assert read(tmp_path, "kitti", objects__type=kinds, objects__location=locations) == [0, 1, 2, 3, 3]


def test_dsprites_puts_neighbouring_values_of_a_factor_into_16_bins(tmp_path):
    positions = read(tmp_path / "x", "dsprites_loc", label_x_position=[[x] for x in range(32)])
    orientations = read(tmp_path / "o", "dsprites_ori", label_orientation=[[o] for o in range(40)])
    assert positions == [int(np.floor(np.float32(x) / 2.0)) for x in range(32)]
    assert orientations == [int(np.floor(np.float32(o) / 2.5)) for o in range(40)]


def test_smallnorb_has_two_labels(tmp_path):
    both = {"label_azimuth": [[17]], "label_elevation": [[8]]}
    assert read(tmp_path / "a", "smallnorb_azi", **both) == [17]
    assert read(tmp_path / "e", "smallnorb_ele", **both) == [8]


def test_images_stay_as_they_were_stored_but_those_of_dsprites_become_black_and_white(tmp_path):
    pixels = np.array([[0, 1], [1, 1]], np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    examples = [{"image": [file.getvalue()], "label": [0], "label_x_position": [0]}]
    folder = write_export(("toys", "1.0.0"), {"train": examples}, shards=1, root=tmp_path)
    export = TfdsExport(folder, {"train": ((folder / "toys-train.tfrecord-00000-of-00001", 1),)})
    images = {
        task: next(labelled_examples(export, TASKS[task], ("train", range(1))))[1] for task in ("dtd", "dsprites_loc")
    }
    assert images["dtd"] == file.getvalue()
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(images["dsprites_loc"]))), pixels * 255)


@pytest.mark.parametrize(
    ("task", "features", "message"),
    [
        ("dtd", {"label": [[47]]}, "label 47, and dtd has 47 classes"),
        ("dtd", {"label": [[-1]]}, "label -1"),
        ("dtd", {"label": [[1, 2]]}, "one whole number"),
        ("dtd", {"label": [[1.0]]}, "one whole number"),
        ("dtd", {"name": [[b"x"]]}, r"no feature 'label', only \['image', 'name'\]"),
        ("clevr_count", {"objects__size": [[0, 0]]}, "label -1"),
        ("clevr_dist", {"objects__pixel_coords": [[1.0, 2.0]]}, "points of three"),
        ("clevr_dist", {"objects__pixel_coords": [[1.0, 2.0, float("nan")]]}, "finite"),
        ("clevr_dist", {"objects__pixel_coords": [[]]}, "label 6"),
        ("kitti", {"objects__type": [[0]], "objects__location": [[]]}, "does not fit the task kitti"),
        ("dsprites_loc", {"image": [[encoded(2)]], "label_x_position": [[1]]}, "pixels of 0 and 1, got 2"),
        ("dsprites_loc", {"image": [[b"no image"]], "label_x_position": [[1]]}, "cannot be decoded"),
        ("dtd", {"image": [[3]], "label": [[1]]}, "one encoded image"),
    ],
)
def test_an_example_that_does_not_fit_is_named(tmp_path, task, features, message):
    with pytest.raises(ValueError, match=rf"record 0 of .*{message}"):
        read(tmp_path, task, **features)
