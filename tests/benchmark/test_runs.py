import json

import pytest

from gift.benchmark import record as record_file
from gift.benchmark.record import FILE, Record, alone, locked, read_lines
from gift.benchmark.runs import SEARCH_SEED, final_runs, search_runs
from tests.benchmark.small import final_run, small_run

BEST = {"accuracy": 0.9, "loss": 0.5}


def finished(run, **changes):
    return run.described() | {"accuracy": 0.8, "loss": 0.5} | changes


def choose(*outcomes):
    """Return the rates of the final run after a search with these outcomes, at the rates 0.1, 0.2, ..."""
    runs = [small_run(rate=(number + 1) / 10) for number in range(len(outcomes))]
    lines = {run.id: finished(run, **outcome) for run, outcome in zip(runs, outcomes, strict=True)}
    finals = final_runs(runs, lines, [0, 3])
    assert [run.seed for run in finals] == [0, 3]
    assert len({run.learning_rate for run in finals}) == 1
    return finals[0].learning_rate


def test_ids_tell_all_runs_of_a_benchmark_apart():
    changes = ({}, {"rate": 0.1}, {"decay": 0.1}, {"task": "b"}, {"method": "gift"})
    runs = [*(small_run(**it) for it in changes), final_run(0), final_run(1)]
    assert len({run.id for run in runs}) == len(runs)


@pytest.mark.parametrize(
    "name", ["toast-lite:feedback=/tmp/../x", "lora:r=4", "..", "lora:target_modules=[a.b,c]", "a%2Fb", 300 * "x"]
)
def test_the_folder_of_a_run_lies_three_folders_below_its_task_whatever_the_method_is_called(name, tmp_path):
    folder = small_run(method=name).folder(tmp_path)
    assert folder.resolve().relative_to(tmp_path).parts[:2] == ("runs", "stripes")
    assert len(folder.relative_to(tmp_path).parts) == 5
    assert max(map(len, folder.parts)) <= 255
    others = {small_run(method=other).folder(tmp_path) for other in ("lora", "lora:r=4", "a/b", "a%2Fb", "a_b")}
    assert len(others) == 5


def test_a_search_never_sees_test_images_and_a_final_run_trains_on_validation_images(tmp_path):
    search, final = small_run().options(tmp_path), final_run(2).options(tmp_path)
    assert (search.train_on_validation, search.evaluate_test, search.seed) == (False, False, SEARCH_SEED)
    assert (final.train_on_validation, final.evaluate_test, final.seed) == (True, True, 2)


@pytest.mark.parametrize(
    ("outcomes", "rate"),
    [
        ([BEST, {}, {}], 0.1),
        ([{}, {}, BEST], 0.3),
        ([{}, BEST, BEST | {"loss": 0.4}], 0.3),  # of equals the smaller loss
        ([{}, BEST, BEST], 0.2),  # then the smaller rate
        ([{}, {"accuracy": None, "loss": None}], 0.1),
        ([{"accuracy": None, "loss": None}, {"accuracy": 0.0}], 0.2),
    ],
)
def test_the_best_on_validation_images_is_chosen(outcomes, rate):
    assert choose(*outcomes) == rate


def test_a_search_without_an_outcome_keeps_no_other_from_its_final_runs():
    runs = [small_run(rate=rate, task=task) for task in ("a", "b", "c") for rate in (0.1, 0.2)]
    diverged, unfinished = runs[0:2], runs[3]
    lines = {run.id: finished(run, **({"accuracy": None} if run in diverged else {})) for run in runs}
    del lines[unfinished.id]
    assert [(run.task.name, run.seed) for run in final_runs(runs, lines, [0, 1])] == [("c", 0), ("c", 1)]


def test_every_method_is_searched_on_every_task_by_its_own_rates():
    one = small_run()
    pairs = {one.method.name: [(0.1, 0.0), (0.2, 0.01)]}
    tasks = [one.task, small_run(task="b").task]
    runs = search_runs("offline", tasks, [one.method], pairs, {"tries": 2}, {"epochs": 7})
    assert [(run.task.name, run.learning_rate, run.weight_decay) for run in runs] == [
        *(("stripes", 0.1, 0.0), ("stripes", 0.2, 0.01)),
        *(("b", 0.1, 0.0), ("b", 0.2, 0.01)),
    ]
    assert {(run.described()["epochs"], run.described()["tries"]) for run in runs} == {(7, 2)}


def test_lines_are_read_again_as_they_were_written(tmp_path):
    record, runs = Record(tmp_path), [small_run(), final_run(0), final_run(1)]
    for run in runs[:2]:
        record.add(finished(run))
    again = Record(tmp_path)
    assert list(again.lines.values()) == [json.loads(json.dumps(finished(run))) for run in runs[:2]]
    assert again.missing(runs) == runs[2:]
    assert read_lines(tmp_path) == read_lines(tmp_path / FILE) == list(again.lines.values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (small_run(epochs=3), "epochs was 2, now 3"),
        (small_run(method_options={"r": 2}), "method_options was {}, now {'r': 2}"),
        (small_run(model="other"), "model was 'small', now 'other'"),
    ],
)
def test_a_line_of_other_options_is_not_taken_for_the_run(changed, message, tmp_path):
    record = Record(tmp_path)
    record.add(finished(small_run()))
    with pytest.raises(ValueError, match=message):
        record.missing([changed])


@pytest.mark.parametrize(("name", "then"), [("tries", 24), ("scheduler", "asha"), ("epochs", 9), ("model", "other")])
def test_lines_of_another_protocol_are_not_added_to(name, then, tmp_path):
    record, other = Record(tmp_path), small_run(task="other")
    record.add(finished(other) | {name: then})
    with pytest.raises(ValueError, match=f"another protocol.*{name} was {then!r}"):
        record.missing([small_run()])


def test_a_disk_without_locks_keeps_no_run_from_being_done(tmp_path, monkeypatch, caplog):
    def unsupported(file, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(record_file.fcntl, "flock", unsupported)
    with locked(tmp_path / "out"), alone(tmp_path / "out" / "runs" / "a"):
        pass
    assert "cannot be locked" in caplog.text


def test_a_run_waits_for_the_process_that_does_it_but_not_for_ever(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(record_file.time, "sleep", waited.append)
    with alone(tmp_path / "run"):
        with alone(tmp_path / "other"):
            assert waited == []
        with alone(tmp_path / "run"):
            assert len(waited) == record_file.LONGEST_WAIT_S


def test_a_line_on_other_images_is_not_taken_for_the_run(tmp_path):
    record = Record(tmp_path)
    record.add(finished(small_run()) | {"images_digest": "others"})
    with pytest.raises(ValueError, match="images_digest was 'others', now 'abc'"):
        record.missing([small_run()])


def test_an_option_that_came_later_does_not_make_a_line_another_run(tmp_path):
    record, line = Record(tmp_path), finished(small_run())
    record.add(line | {"config": {key: value for key, value in line["config"].items() if key != "cutmix"}})
    assert record.missing([small_run()]) == []


@pytest.mark.parametrize("text", ['{"id": "a"', '{"other": 1}', "[]", "3"])
def test_a_damaged_line_is_named(text, tmp_path):
    (tmp_path / FILE).write_text('{"id": "a"}\n' + text + "\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*runs.jsonl is no result"):
        read_lines(tmp_path)


def test_results_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="There are no results at"):
        read_lines(tmp_path / "nowhere")


def test_one_benchmark_at_a_time_has_a_folder(tmp_path):
    with locked(tmp_path / "out"), pytest.raises(ValueError, match="is running"), locked(tmp_path / "out"):
        pass
    with locked(tmp_path / "out"):
        pass


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="no folder of a benchmark"), locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
