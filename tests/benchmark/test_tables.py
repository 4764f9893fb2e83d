import csv
import io

import numpy as np
import pytest

from gift.benchmark.intervals import mean_interval, paired_interval
from gift.benchmark.summary import summarise
from gift.benchmark.tables import csv_text, markdown
from gift.data.catalog import TASKS
from tests.benchmark import result, results

LORA = {"digits": [0.95, 0.93], "flowers": [0.8, 0.84]}
GIFT = {"digits": [0.96, 0.95], "flowers": [0.82, 0.85]}
VTAB = [task.name for task in TASKS.values() if task.suite == "vtab1k"]


def both():
    return results("lora", LORA, title="LoRA r=8") + results("gift", GIFT, title="GIFT paca")


def cells(text, heading=""):
    """Lines of a table as dictionaries: the first one after a heading."""
    lines = text[text.index(heading) :].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = [[cell.strip() for cell in line.split(" | ")] for line in lines[start:] if line.startswith("|")]
    end = next((i for i, line in enumerate(lines[start:]) if not line.startswith("|")), len(rows))
    header, _, *body = ([cell.strip("| ") for cell in row] for row in rows[:end])
    return [dict(zip(header, row, strict=True)) for row in body]


def records(summary):
    return list(csv.DictReader(io.StringIO(csv_text(summary))))


def test_searches_on_validation_images_change_nothing():
    searched = [
        result("digits", "lora", seed, 1.0, phase="search", epochs=99, learning_rate=0.5, images=200) for seed in (0, 5)
    ]

    with_searches = summarise(searched + both(), "lora")

    assert with_searches == summarise(both(), "lora")
    assert markdown(with_searches) == markdown(summarise(both(), "lora"))
    assert csv_text(with_searches) == csv_text(summarise(both(), "lora"))


def test_searches_alone_are_an_error():
    with pytest.raises(ValueError, match="None of the 1 results is a test"):
        summarise([result("digits", "lora", 0, 0.9, phase="search")])


def test_a_method_that_was_only_searched_for_is_named():
    summary = summarise([*both(), result("digits", "bitfit", 0, 0.9, phase="search", title="BitFit")])

    assert [row.method for row in summary.rows] == ["lora", "gift"]
    assert "Searched for, not tested, and so not shown: BitFit." in summary.notes


def test_means_and_differences_are_those_of_the_formulas():
    row = summarise(both(), "lora").rows[1]

    ours, theirs = ([100 * np.array(values) for values in one.values()] for one in (GIFT, LORA))
    mean = mean_interval(ours)
    difference = paired_interval(*([dict(enumerate(values.tolist())) for values in one] for one in (ours, theirs)))
    score = next(score for column, score in row.scores.items() if column.scope == "mean")
    assert score.accuracy is not None
    assert score.difference is not None
    assert (score.accuracy.mean, score.accuracy.low) == pytest.approx((mean.mean, mean.low))
    assert (score.difference.mean, score.difference.high) == pytest.approx((difference.mean, difference.high))


def test_the_main_table_shows_sizes_accuracy_difference_and_costs():
    lines = both()
    lines[0]["train_seconds"], lines[0]["peak_memory_mb"] = 1234.0, 1500

    first, second = cells(markdown(summarise(lines, "lora")))

    assert first["method"] == "LoRA r=8"
    assert first["seeds"] == "2"
    assert first["trained without head (of backbone)"] == "16,384 (1 %)"
    assert first["mean of 2 tasks"].startswith("88.0 [")
    assert first["difference to LoRA r=8 in points"] == "reference"
    assert second["difference to LoRA r=8 in points"].startswith("+1.5 [")
    assert (first["train s"], first["inference ms per image"], first["peak MB"]) == ("50", "0.5, merged", "1,500")


@pytest.mark.parametrize(
    ("merged", "shown"),
    [
        ([True, True], "0.5, merged"),
        ([False, False], "0.5, not merged"),
        ([None, None], "0.5"),
        ([True, False], "0.5, partly merged"),
    ],
)
def test_inference_says_whether_the_adapter_was_merged(merged, shown):
    lines = [result("digits", "lora", seed, 0.9, merged=value) for seed, value in enumerate(merged)]

    assert cells(markdown(summarise(lines)))[0]["inference ms per image"] == shown


def test_costs_that_were_not_measured_are_left_open():
    lines = [result("digits", "lora", 0, 0.9, inference_ms_per_image=None, merged=None)]

    assert cells(markdown(summarise(lines)))[0]["inference ms per image"] == "–"


def test_the_order_is_that_in_which_methods_come():
    lines = results("b", {"digits": [0.1]}) + results("a", {"digits": [0.2]})

    assert [row["method"] for row in cells(markdown(summarise(lines)))] == ["b", "a"]


def test_the_tables_by_task_show_accuracies_and_chosen_rates():
    lines = both()
    for line in lines:
        line["learning_rate"] = {"digits": 0.0025, "flowers": 0.001}[line["task"]]

    text = markdown(summarise(lines))

    flowers = cells(text, "### By task")[0]["flowers"]
    assert flowers.startswith("82.0 [")
    assert cells(text, "### Learning rate")[0]["flowers"] == "0.001 / 0.0001"
    assert "0.0025 / 0.0001" in cells(text, "### Learning rate")[1].values()
    assert "chosen on validation images" in text


@pytest.mark.parametrize(
    ("rate", "tried", "is_marked"),
    [(0.01, (0.001, 0.01), True), (0.001, (0.001, 0.01), True), (0.005, (0.001, 0.005, 0.01), False), (1, (1,), False)],
)
def test_a_learning_rate_at_the_end_of_those_tried_is_marked(rate, tried, is_marked):
    lines = [line | {"learning_rate": rate, "pairs_tried": [[one, 0] for one in tried]} for line in both()]

    text = markdown(summarise(lines))

    assert cells(text, "### Learning rate")[0]["flowers"].endswith(" *") == is_marked
    assert "*: the lowest or highest learning rate" in text


def test_a_missing_test_leaves_no_mean_and_a_note():
    lines = both()[:-2]

    text = markdown(summarise(lines, "lora"))

    lora, gift = cells(text)
    assert (gift["mean of 2 tasks"], gift["difference to LoRA r=8 in points"]) == ("–", "–")
    assert lora["mean of 2 tasks"].startswith("88.0")
    assert "GIFT paca has no test of flowers" in text
    assert cells(text, "### By task")[1]["flowers"] == "–"


@pytest.mark.parametrize("accuracy", [None, float("nan")])
def test_a_run_that_diverged_leaves_no_mean_and_a_note(accuracy):
    lines = both()
    lines[-1] |= {"accuracy": accuracy, "problem": "the loss is nan"}

    text = markdown(summarise(lines, "lora"))

    assert cells(text)[1]["mean of 2 tasks"] == "–"
    assert cells(text, "### By task")[1]["flowers"] == "–"
    assert "GIFT paca diverged on flowers seed 1 (the loss is nan)" in text


def test_when_the_reference_diverged_there_is_no_difference_but_a_mean():
    lines = both()
    lines[0]["accuracy"] = None

    gift = cells(markdown(summarise(lines, "lora")))[1]

    assert gift["difference to LoRA r=8 in points"] == "–"
    assert gift["mean of 2 tasks"].startswith("89.5")


def test_methods_without_a_common_seed_have_no_difference_and_a_note():
    lines = [result("digits", "lora", 0, 0.9), result("digits", "gift", 1, 0.9)]

    text = markdown(summarise(lines, "lora"))

    assert cells(text)[1]["difference to lora in points"] == "–"
    assert "gift and lora have no common seed on digits" in text


def test_vtab_has_groups_and_its_mean_is_over_tasks():
    accuracies = {task: [0.5 + 0.02 * index] for index, task in enumerate(VTAB)}

    row = cells(markdown(summarise(results("lora", accuracies, suite="vtab1k"))))[0]

    assert row["Natural"] == f"{50 + 2 * np.mean(range(7)):.2f}"
    assert row["Specialized"] == f"{50 + 2 * np.mean(range(7, 11)):.2f}"
    assert row["Structured"] == f"{50 + 2 * np.mean(range(11, 19)):.2f}"
    assert row["mean of all 19 tasks"] == "68.00"


def test_a_part_of_vtab_is_not_called_its_mean_nor_beside_published_means():
    lines = results("lora", {"cifar": [0.7], "dtd": [0.6], "eurosat": [0.9]}, suite="vtab1k")

    ours, published = cells(markdown(summarise(lines)))[:2]

    assert ours["mean of 3 tasks"] == "73.33"
    assert ours["Natural (2 of 7 tasks)"] == "65.00"
    assert published["method"] == "VPT (published)"
    assert (published["mean of 3 tasks"], published["Natural (2 of 7 tasks)"]) == ("–", "–")


def test_published_rows_of_fgvc_stand_beside_ours_by_task():
    text = markdown(summarise(results("gift", {"cub": [0.9]}, suite="fgvc")))

    rows = cells(text, "### By task")
    assert rows[0] == {"method": "gift", "CUB-200-2011": "90.00"}
    assert rows[-1] == {"method": "GIFT linear r=16 (published)", "CUB-200-2011": "89.71"}


def test_offline_tasks_have_no_groups_nor_published_rows():
    summary = summarise(results("gift", {"dsprites_loc": [0.5], "flowers": [0.9]}))

    assert summary.of("group") == ()
    assert summary.published == ()
    assert [column.title for column in summary.of("task")] == [TASKS["dsprites_loc"].title, "flowers"]


def test_a_run_that_is_there_twice_is_an_error():
    with pytest.raises(ValueError, match="Task digits, method lora, seed 0 is there twice"):
        summarise([*both(), result("digits", "lora", 0, 0.5)])


@pytest.mark.parametrize(("key", "value"), [("model", "big"), ("epochs", 6), ("suite", "fgvc")])
def test_results_of_several_kinds_are_an_error_that_names_them(key, value):
    lines = [*both(), result("digits", "other", 0, 0.5, **{key: value})]

    with pytest.raises(ValueError, match=rf"2 values of '{key}': .*, {value}\. Pass results of one suite"):
        summarise(lines)


def test_different_test_images_of_a_task_are_an_error():
    with pytest.raises(ValueError, match="Task digits was tested on 797 images and on 100"):
        summarise([*both(), result("digits", "other", 0, 0.5, images=100)])


def test_an_unknown_reference_is_an_error_that_lists_the_methods():
    with pytest.raises(ValueError, match=r"'dora' to compare with: choose lora, gift\."):
        summarise(both(), "dora")


def test_several_commits_and_versions_are_a_note():
    lines = both()
    lines[-1] |= {"commit": "def", "versions": {"torch": "2.16.0"}}

    notes = summarise(lines).notes

    assert "The results are of 2 commits: abc, def." in notes
    assert "The results are of several versions of torch: 2.15.0, 2.16.0." in notes


def test_seconds_of_two_devices_are_not_compared_without_a_word():
    lines = [line | {"device": "EPYC (AVX512)"} for line in both()]
    warning = "Seconds and milliseconds compare methods only where they are of one device."
    assert warning not in summarise(lines).notes

    lines[-1]["device"] = "EPYC (AVX2)"

    notes = summarise(lines).notes
    assert "The results are of 2 devices: EPYC (AVX512), EPYC (AVX2)." in notes
    assert warning in notes


def test_parameters_that_differ_between_tasks_are_shown_as_their_mean():
    lines = results("vpt", {"digits": [0.9], "flowers": [0.9]})
    lines[0]["trained_parameters_without_head"] = 16386

    summary = summarise(lines)

    assert summary.rows[0].parameters == 16385
    assert "Trained parameters of vpt differ between tasks: their mean is shown." in summary.notes


def test_words_of_others_do_not_break_the_tables():
    lines = results("lora", {"digits": [0.9]}, title="a|b\n<script>")

    row = cells(markdown(summarise(lines)))[0]

    assert row["method"] == r"a\|b &lt;script>"


def test_csv_has_a_line_per_method_and_column_with_numbers():
    found = records(summarise(both(), "lora"))

    places = [(row["method"], row["scope"], row["name"]) for row in found]
    assert len(set(places)) == len(places) == 2 * 3
    mean = next(row for row in found if (row["method"], row["scope"]) == ("gift", "mean"))
    assert float(mean["accuracy"]) == pytest.approx(89.5)
    assert float(mean["difference"]) == pytest.approx(1.5)
    assert float(mean["difference_low"]) < 1.5 < float(mean["difference_high"])
    assert mean["seeds"] == mean["tasks"] == "2"


def test_csv_leaves_empty_what_is_missing_and_marks_what_is_published():
    found = records(summarise(results("gift", {"cub": [0.9]}, suite="fgvc")))

    ours, published = found[0], found[-1]
    assert (ours["source"], ours["accuracy_low"], ours["difference"]) == ("measured", "", "")
    assert (published["source"], published["method"], published["accuracy"]) == ("published", "GIFT", "89.71")
    assert published["model"] == "vit_base_patch16_224.augreg_in21k"
    assert published["train_seconds"] == ""
