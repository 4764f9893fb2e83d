import pytest

from gift.benchmark.benchmark import run_benchmark
from gift.benchmark.outcome import write_table
from gift.benchmark.validation import read_searches, validation_markdown
from gift.cli import main
from tests.benchmark import result
from tests.benchmark.small import METHODS, small_options


def searched(task, method, accuracies, **changes):
    """Return a try for every accuracy, with the learning rates 0.001, 0.002 and so on."""
    return [
        result(task, method, 100, accuracy, phase="search", learning_rate=(index + 1) / 1000, **changes)
        for index, accuracy in enumerate(accuracies)
    ]


def both():
    lora = searched("digits", "lora", [0.8, 0.9, 0.7]) + searched("flowers", "lora", [0.5, 0.6, 0.8])
    gift = searched("digits", "gift", [0.1, 0.91, 0.2], trained_parameters_without_head=4096)
    return lora + gift + searched("flowers", "gift", [None, 0.7, 0.6], trained_parameters_without_head=4096)


def test_the_best_try_of_each_task_counts_and_the_mean_is_over_tasks():
    lora, gift = read_searches(both())
    assert {task: line["learning_rate"] for task, line in lora.best.items()} == {"digits": 0.002, "flowers": 0.003}
    assert lora.accuracy(("digits", "flowers")) == pytest.approx(85)
    assert gift.accuracy(("digits", "flowers")) == pytest.approx(80.5)
    assert (lora.parameters, gift.parameters) == (16384, 4096)
    assert (lora.at_end, gift.at_end) == ({"flowers"}, frozenset())


def test_the_table_has_differences_to_the_reference_and_marks_rates_at_an_end():
    text = validation_markdown(both(), "gift")
    assert "| lora | 16,384 | 85.0 | +4.5 | 90.0 | 80.0 * |" in text
    assert "| gift | 4,096 | 80.5 | reference | 91.0 | 70.0 |" in text


def test_equal_accuracies_are_told_apart_as_for_final_runs():
    lines = searched("digits", "lora", [0.9, 0.9])
    lines[1]["loss"] = 0.1
    assert read_searches(lines)[0].best["digits"] is lines[1]


def test_a_task_of_which_every_try_diverged_leaves_the_method_without_a_mean():
    lines = [*both(), *searched("sprites", "lora", [0.2]), *searched("sprites", "gift", [None])]
    gift = read_searches(lines)[1]
    assert gift.accuracy(("digits", "flowers", "sprites")) is None
    assert "| gift | 4,096 | – | – | 91.0 | 70.0 | – |" in validation_markdown(lines, "lora")
    assert "| mean of 0 |" in validation_markdown(searched("sprites", "gift", [None]), "gift")


def test_tests_are_never_looked_at():
    lines = both()
    tests = [result(task, method, 0, 1.0) for task in ("digits", "flowers") for method in ("lora", "gift")]
    assert validation_markdown([*tests, *lines], "lora") == validation_markdown(lines, "lora")
    with pytest.raises(ValueError, match="None of the 4 results is of a search"):
        read_searches(tests)
    with pytest.raises(ValueError, match="no search of 'vera': choose lora, gift"):
        validation_markdown(lines, "vera")


def test_a_benchmark_can_end_with_its_searches_and_go_on_later(pictures, backbone, tmp_path, capsys):
    out = tmp_path / "out"
    options = {"learning_rates": (0.02, 0.005), "budget": 2}
    lines = run_benchmark(small_options(out, pictures, backbone, search_only=True, **options))
    assert {line["phase"] for line in lines} == {"search"}
    assert [line["learning_rate"] for line in lines] == [0.005, 0.02] * 2
    assert not (out / "table.md").exists()
    text = (out / "validation.md").read_text()
    assert text == write_table(out, None, None, validation=True)
    main(["benchmark", "table", str(out), "--validation=true", f"--reference={METHODS[1]}"])
    assert "| linear probe | 0 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"This table is written as \.md, got"):
        write_table(out, None, tmp_path / "table.csv", validation=True)

    said = []
    whole = run_benchmark(small_options(out, pictures, backbone, seeds=(0,), **options), said.append)
    assert said[0] == "search: 4 runs, 4 of them done before"
    assert [line["phase"] for line in whole] == ["search"] * 4 + ["test"] * 2
    assert (out / "table.md").exists()


@pytest.mark.parametrize("rates", [(), (0.1, 0.1), (0.0, 0.1), (-0.1,), (float("nan"),), (1e4,)])
def test_learning_rates_that_make_no_search_are_refused(pictures, backbone, tmp_path, rates):
    with pytest.raises(ValueError, match="learning_rates must be different positive numbers, got"):
        small_options(tmp_path / "out", pictures, backbone, learning_rates=rates)
