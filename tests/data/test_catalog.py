from dataclasses import fields
from pathlib import Path

import pytest

from gift.data.catalog import TASKS, find_task, task_table
from gift.data.offline import OFFLINE_TASKS
from gift.data.vtab import SLICINGS

VTAB = {
    "Natural": "caltech101 cifar dtd oxford_flowers102 oxford_iiit_pet svhn sun397",
    "Specialized": "patch_camelyon eurosat resisc45 diabetic_retinopathy",
    "Structured": "clevr_count clevr_dist dmlab kitti dsprites_loc dsprites_ori smallnorb_azi smallnorb_ele",
}


def test_vtab_has_19_tasks_in_three_groups_each_with_800_and_200_images():
    tasks = {name: task for name, task in TASKS.items() if task.suite == "vtab1k"}
    assert {name: task.group for name, task in tasks.items()} == {
        name: group for group, names in VTAB.items() for name in names.split()
    }
    assert {(task.train, task.validation) for task in tasks.values()} == {(800, 200)}
    assert tasks.keys() == SLICINGS.keys()
    assert len(tasks) == 19


@pytest.mark.parametrize(
    ("name", "classes", "official_train", "test"),
    [
        ("cub", 200, 5994, 5794),
        ("nabirds", 555, 23929, 24633),
        ("oxford_flowers", 102, 2040, 6149),
        ("stanford_dogs", 120, 12000, 8580),
        ("stanford_cars", 196, 8144, 8041),
    ],
)
def test_train_and_validation_of_fgvc_are_the_official_training_part(name, classes, official_train, test):
    task = TASKS[name]
    assert (task.suite, task.classes, task.train + task.validation, task.test) == (
        "fgvc",
        classes,
        official_train,
        test,
    )
    if name != "oxford_flowers":  # which has an official validation part
        assert task.validation == -(-official_train // 10)


def test_what_needs_no_download_has_800_and_200_images_as_vtab_and_can_be_made():
    tasks = {name: task for name, task in TASKS.items() if task.suite == "offline"}
    assert {name: (task.classes, task.train, task.validation, task.test) for name, task in tasks.items()} == {
        "digits": (10, 800, 200, 797),
        "rendered_flowers": (8, 800, 200, 800),
    }
    assert OFFLINE_TASKS.keys() == tasks.keys() | {"dsprites_loc", "dsprites_ori"}


def test_every_row_is_whole_and_called_by_its_key():
    for name, task in TASKS.items():
        empty = {one.name for one in fields(task) if not getattr(task, one.name)}
        assert task.name == name
        assert empty <= {"group", "tfds", "hashes"} | ({"validation"} if task.suite == "imagenet" else set())
        assert bool(task.tfds) == bool(task.group) == (task.suite == "vtab1k")
        assert all(len(digest) == 64 and file in task.source for file, digest in task.hashes.items())


def test_an_unknown_task_is_an_error_that_lists_the_tasks():
    with pytest.raises(ValueError, match="no task 'cifar100': choose one of cub, nabirds"):
        find_task("cifar100")


def test_the_table_of_the_documentation_is_that_of_the_catalogue():
    assert task_table() in Path(__file__).parents[2].joinpath("docs/data.md").read_text()
    assert task_table().count("\n") == len(TASKS) + 2
