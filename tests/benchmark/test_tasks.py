from pathlib import Path

import pytest

from gift.benchmark import tasks as tasks_file
from gift.benchmark.suites import SPRITES_TESTED, SUITES
from gift.benchmark.tasks import open_tasks, task_names, tasks_by_catalogue
from gift.data.prepare import prepare_task
from tests.training.pictures import make_pictures

OFFLINE = SUITES["offline"]


def test_all_tasks_of_a_suite_and_given_folders_are_meant_unless_some_are_named():
    flowers = Path("photos/flowers17.zip")
    assert task_names(OFFLINE, None, [flowers]) == (list(OFFLINE.tasks), [flowers])
    assert task_names(OFFLINE, ["flowers17"], [flowers]) == ([], [flowers])
    assert task_names(OFFLINE, ["digits"], [flowers]) == (["digits"], [])


@pytest.mark.parametrize(
    ("chosen", "folders", "message"),
    [
        (["digit"], [], "There is no task digit: choose of digits"),
        ([], [], "no task"),
        (None, [Path("a/x"), Path("b/x")], "Two tasks have one name"),
        (None, [Path("a/digits")], "Two tasks have one name, that of their folder: digits"),
        (None, [Path("..")], "without a name"),
    ],
)
def test_tasks_that_cannot_be_told_are_refused(chosen, folders, message):
    with pytest.raises(ValueError, match=message):
        task_names(OFFLINE, chosen, folders)


def test_digits_are_made_where_they_are_missing_and_used_where_they_are(tmp_path):
    first = open_tasks("offline", ["digits"], [], tmp_path, 0)
    made = sorted((tmp_path / "offline" / "digits").rglob("*.txt"))
    again = open_tasks("offline", ["digits"], [], tmp_path, 0)
    assert first == again
    assert (first[0].train, first[0].validation, first[0].test) == (800, 200, 797)
    assert sorted((tmp_path / "offline" / "digits").rglob("*.txt")) == made


def test_names_of_folders_keep_what_is_no_suffix_of_an_archive():
    folders = [Path("cub.v1"), Path("cub.v2"), Path("a/photos.zip"), Path("torchvision:CIFAR10")]
    assert task_names(OFFLINE, ["cub.v2", "photos", "CIFAR10"], folders)[1] == folders[1:]


def test_a_drawn_task_with_another_number_of_test_images_is_refused(tmp_path):
    prepare_task("digits", None, tmp_path / "offline" / "digits", 100)
    with pytest.raises(ValueError, match="has 100 test images, and the suite offline has 797"):
        open_tasks("offline", ["digits"], [], tmp_path, 0)


def test_what_another_benchmark_drew_meanwhile_is_used(tmp_path, monkeypatch):
    def slower(name, source, place, count):
        prepare_task(name, source, place, count)
        raise OSError("Directory not empty")

    monkeypatch.setattr(tasks_file, "prepare_task", slower)
    assert open_tasks("offline", ["digits"], [], tmp_path, 0)[0].test == 797


def test_missing_tasks_are_all_named_with_the_command_that_makes_them(tmp_path):
    (tmp_path / "cub").mkdir()
    message = "lacks 2 of 3 tasks of fgvc: nabirds, stanford_cars.*gift data prepare nabirds --from"
    with pytest.raises(ValueError, match=message):
        open_tasks("fgvc", ["cub", "nabirds", "stanford_cars"], [], tmp_path, 0)


def test_a_fifth_of_given_images_is_to_choose_on_and_another_image_is_another_task(tmp_path):
    folder = make_pictures(tmp_path / "stripes", per_class=10)
    task = open_tasks("offline", [], [folder], tmp_path, 0)[0]
    assert (task.name, task.train, task.validation, task.test) == ("stripes", 24, 6, 30)
    next((folder / "train" / "down").iterdir()).unlink()
    assert open_tasks("offline", [], [folder], tmp_path, 0)[0].digest != task.digest


def test_images_without_a_test_split_make_no_task(tmp_path):
    folder = make_pictures(tmp_path / "stripes", splits=())
    with pytest.raises(ValueError, match="has no test images"):
        open_tasks("offline", [], [folder], tmp_path, 0)


def test_sizes_are_known_without_the_images():
    tasks = {task.name: task for task in tasks_by_catalogue("vtab1k", SUITES["vtab1k"].tasks)}
    assert {(task.train, task.validation) for task in tasks.values()} == {(800, 200)}
    assert tasks["dsprites_loc"].test == 73728
    assert tasks_by_catalogue("offline", ["dsprites_loc"])[0].test == SPRITES_TESTED
