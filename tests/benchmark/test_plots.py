from itertools import combinations

import numpy as np
import pytest
from matplotlib.text import Annotation, Text

from gift.benchmark.plots import draw_pareto, pareto_figure
from gift.benchmark.summary import summarise
from gift.data.catalog import TASKS
from tests.benchmark import results

PUBLISHED_MODEL = "vit_base_patch16_224.augreg_in21k"


def summary_of(methods, tasks=("digits", "flowers"), **changes):
    """Results by method: trained parameters and accuracy."""
    random = np.random.default_rng(0)
    lines = []
    for method, (parameters, accuracy) in methods.items():
        values = {task: (accuracy + 0.005 * random.standard_normal(3)).tolist() for task in tasks}
        lines += results(method, values, trained_parameters_without_head=parameters, **changes)
    return summarise(lines)


FEW = {"linear probe": (0, 0.8), "LoRA r=8": (16384, 0.93), "gift-paca": (6865, 0.94), "full": (1600000, 0.9)}
CROWDED = {"linear probe": (0, 0.8)} | {
    f"gift-linear: r={rank}": (256 * rank, 0.9 + 0.001 * rank) for rank in range(1, 15)
}


ALIKE = {f"LoRA of {rank} layers": (4096, 0.9 + 0.0001 * rank) for rank in range(15)}


def labels_of(figure):
    return [text for text in figure.axes[0].texts if isinstance(text, Annotation)]


def legend_of(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


@pytest.mark.parametrize("methods", [FEW, CROWDED, ALIKE])
def test_every_method_has_a_label_within_the_figure_clear_of_the_others(methods):
    figure = pareto_figure(summary_of(methods))

    figure.draw_without_rendering()
    labels = labels_of(figure)
    boxes = [Text.get_window_extent(label) for label in labels]  # without the line to the marker
    assert sorted(label.get_text() for label in labels) == sorted(methods)
    assert not [(one, other) for one, other in combinations(boxes, 2) if one.overlaps(other)]
    assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
    assert all(box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height for box in boxes)


def test_no_parameters_stand_left_of_a_break_under_a_0():
    axes = pareto_figure(summary_of(FEW)).axes[0]

    ticks = dict(zip([tick.get_text() for tick in axes.get_xticklabels()], axes.get_xticks(), strict=True))
    place = next(label.xy[0] for label in labels_of(axes.figure) if label.get_text() == "linear probe")
    assert ticks["0"] == place
    assert 0 < place < min(value for name, value in ticks.items() if name != "0")
    assert ticks["10,000"] == pytest.approx(10_000)
    assert ticks["1 M"] == pytest.approx(1_000_000)


def test_markers_stand_at_parameters_and_mean_accuracies():
    summary = summary_of(FEW)

    places = {label.get_text(): label.xy for label in labels_of(pareto_figure(summary))}

    for row in summary.rows[1:]:
        assert places[row.title] == pytest.approx((row.parameters, row.scores[summary.mean].accuracy.mean))


def test_the_front_is_a_line_of_steps_through_what_nothing_dominates():
    summary = summary_of(FEW)

    lines = pareto_figure(summary).axes[0].get_lines()

    front = next(line for line in lines if "Pareto" in line.get_label())
    probe, gift = (summary.rows[index].scores[summary.mean].accuracy.mean for index in (0, 2))
    assert front.get_ydata() == pytest.approx([probe, probe, gift, gift])
    assert front.get_xdata()[1:3] == pytest.approx([6865, 6865])


def test_axes_and_title_say_what_is_drawn():
    figure = pareto_figure(summary_of(FEW))

    axes = figure.axes[0]
    assert axes.get_title() == "offline, model small, 5 epochs, 3 seeds per task"
    assert axes.get_ylabel() == "accuracy in %, mean of 2 tasks"
    assert "without the head" in axes.get_xlabel()
    assert figure.get_supxlabel().startswith("Bars: 95 % intervals over seeds")
    assert legend_of(figure) == ["GIFT", "other methods", "Pareto front of the means"]


def test_published_rows_are_drawn_hollow_for_their_backbone_and_whole_suites():
    tasks = [task.name for task in TASKS.values() if task.suite == "fgvc"]

    same = pareto_figure(summary_of(FEW, tasks, suite="fgvc", model=PUBLISHED_MODEL))
    other = pareto_figure(summary_of(FEW, tasks, suite="fgvc", model="small"))
    part = pareto_figure(summary_of(FEW, tasks[:2], suite="fgvc", model=PUBLISHED_MODEL))

    assert "GIFT, published (arXiv 2312.00700v2)" in legend_of(same)
    places = {label.get_text(): label.xy for label in labels_of(same)}
    assert places["GIFT linear r=16 (published)"] == pytest.approx((24882, 89.39))
    assert len(labels_of(other)) == len(labels_of(part)) == len(FEW)


def test_methods_without_a_mean_are_named_beneath():
    lines = results("lora", {"digits": [0.9, 0.91], "flowers": [0.8, 0.81]}) + results("toast", {"digits": [0.9]})

    figure = pareto_figure(summarise(lines))

    assert [label.get_text() for label in labels_of(figure)] == ["lora"]
    assert "left out: toast" in figure.get_supxlabel()


def test_without_any_mean_there_is_an_error():
    tasks = [task.name for task in TASKS.values() if task.suite == "fgvc"]
    lines = results("lora", {task: [None] for task in tasks}, suite="fgvc", model=PUBLISHED_MODEL)

    with pytest.raises(ValueError, match="No method has a mean to draw"):
        pareto_figure(summarise(lines))


@pytest.mark.parametrize("parameters", [0, 5])
def test_one_method_with_one_seed_can_be_drawn(parameters):
    lines = results("costs $5 and $6 | <b>", {"digits": [0.9]}, trained_parameters_without_head=parameters)

    figure = pareto_figure(summarise(lines))

    assert figure.get_supxlabel() == ""
    assert len(labels_of(figure)) == 1


def test_pictures_are_png_or_svg_and_the_same_each_time(tmp_path):
    summary = summary_of(FEW)

    for name in ("one.png", "one.SVG", "two.SVG"):
        draw_pareto(summary, tmp_path / name)

    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "one.SVG").read_bytes()
    assert (tmp_path / "one.SVG").read_bytes() == (tmp_path / "two.SVG").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_another_format_is_an_error_before_anything_is_drawn(tmp_path):
    with pytest.raises(ValueError, match=r"\.png or \.svg, got plot\.pdf"):
        draw_pareto(summary_of(FEW), tmp_path / "plot.pdf")
