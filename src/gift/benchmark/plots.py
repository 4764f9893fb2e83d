"""Accuracy against trained parameters as a picture: what each method costs, and which no other beats at its cost."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, NullLocator

from gift.benchmark.intervals import Estimate, pareto_front
from gift.benchmark.published import SOURCE, is_published_model
from gift.benchmark.summary import SUITES, Row, Summary

FORMATS = (".png", ".svg")
# By whether it is GIFT; told apart by colour-blind people, and in greyscale by the marker.
STYLES = {True: {"color": "#0072b2", "marker": "o"}, False: {"color": "#d55e00", "marker": "s"}}
_INK = {True: "#004f7c", False: "#8f3f00"}  # the same, dark enough to read
FAMILIES = {True: "GIFT", False: "other methods"}
GREY = "#666666"
# Where a label may stand from its marker: first close by and to the right, then further away, with a line to it.
_DIRECTIONS = (0, 30, -30, 90, -90, 180, 60, -60, 150, -150, 120, -120)
_DISTANCES = (9, 14, 22, 34, 50, 70, 95)
_FONT_SIZE = 8.5

Boxes = Float[np.ndarray, "boxes 4"]  # left, bottom, right, top in pixels
Corners = Float[np.ndarray, "corners 2"]  # of a line, in data coordinates


@dataclass(frozen=True)
class Point:
    """A method in the picture.

    Attributes:
        label: Its title.
        cost: Trained parameters without the head; where 0 is shown is decided later.
        accuracy: In %.
        is_gift: Whether it is of the family.
        is_published: Whether it is from the paper.
    """

    label: str
    cost: int
    accuracy: Estimate
    is_gift: bool
    is_published: bool


def draw_pareto(summary: Summary, path: Path) -> None:
    """Draw mean accuracy over trained parameters into a picture; see `pareto_figure`.

    Args:
        summary: Of the results.
        path: The picture, a PNG or an SVG by its ending.

    Raises:
        ValueError: If it is to be of another format, or if no method has a mean.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"A plot is written as {' or '.join(FORMATS)}, got {path.name}: name one that ends so.")
    figure = pareto_figure(summary)
    partial = path.with_name(f"{path.name}.partial")
    form = path.suffix.lower()[1:]
    # The same results give the same SVG, byte by byte.
    with rc_context({"svg.hashsalt": "gift"}):
        figure.savefig(partial, dpi=150, format=form, metadata={"Date": None} if form == "svg" else None)
    partial.rename(path)


def pareto_figure(summary: Summary) -> Figure:
    """Return the figure: a marker per method, its interval over seeds, its name, and the Pareto front of the means.

    Trained parameters do not count the head and stand on a logarithmic axis, 0 beyond a break at its left. Published
    rows are hollow markers, and only there if the backbone and the tasks are the paper's. Methods without a mean are
    named beneath.

    Raises:
        ValueError: If no method has a mean.
    """
    points = [point for row in (*summary.rows, *summary.published) if (point := _point(row, summary)) is not None]
    if all(point.is_published for point in points):
        raise ValueError(
            "No method has a mean to draw: each lacks a test of some task, or diverged there. `gift benchmark table` "
            "says what is missing."
        )
    figure = Figure(figsize=(9, 6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = _scale(axes, points)
    _draw_points(axes, points, places)
    front = _draw_front(axes, points, places)
    _describe(figure, axes, summary)
    canvas.draw()  # puts the axes where they stay
    figure.set_layout_engine("none")
    _place_labels(axes, points, places, front)
    return figure


def _point(row: Row, summary: Summary) -> Point | None:
    accuracy = row.scores[summary.mean].accuracy
    if accuracy is None or (row.is_published and not is_published_model(summary.model)):
        return None
    return Point(row.title, row.parameters or 0, accuracy, row.method.lower().startswith("gift"), row.is_published)


def _scale(axes: Axes, points: Sequence[Point]) -> list[float]:
    """Set up both axes and return where on the horizontal one the points lie."""
    costs = sorted({point.cost for point in points if point.cost > 0}) or [1]
    has_zero = any(point.cost == 0 for point in points)
    span = math.log10(costs[-1] / costs[0])
    gap = 10 ** max(0.5, 0.2 * span)
    first = costs[0] / 10 ** (0.15 + 0.03 * span)
    zero = first / gap
    axes.set_xscale("log")
    axes.set_xlim((zero if has_zero else first) / 10 ** (0.1 + 0.05 * span), costs[-1] * 10 ** (0.25 + 0.12 * span))
    steps = (1, 1.5, 2, 3, 4, 5, 7) if span < 0.7 else (1, 2, 5) if span < 1.5 else (1,)
    exponents = range(math.floor(math.log10(first)), math.ceil(math.log10(costs[-1])) + 2)
    ticks = [step * 10**exponent for exponent, step in product(exponents, steps)]
    ticks = [tick for tick in ticks if first <= tick <= axes.get_xlim()[1] and any(point.cost for point in points)]
    labels = [f"{tick / 10**6:g} M" if tick >= 10**6 else f"{tick:,.0f}" for tick in ticks]
    axes.xaxis.set_major_locator(FixedLocator([zero, *ticks] if has_zero else ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(["0", *labels] if has_zero else labels)
    if has_zero and any(point.cost for point in points):
        _draw_break(axes, zero * gap**0.6)
    _scale_accuracy(axes, [point.accuracy for point in points])
    return [float(point.cost or zero) for point in points]


def _scale_accuracy(axes: Axes, found: Sequence[Estimate]) -> None:
    """Show all means and, unless that would make the differences of means too small to see, all intervals."""
    means = [one.mean for one in found]
    ends = [end for one in found for end in (one.low, one.high) if end is not None]
    room = max(2 * (max(means) - min(means)), 2.0)
    low = max(min([*means, *ends]), min(means) - room)
    high = min(max([*means, *ends]), max(means) + room)
    margin = 0.08 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _draw_break(axes: Axes, place: float) -> None:
    """Draw two strokes across the horizontal axis, and white between them."""
    left, right = np.log10(axes.get_xlim())
    middle = (math.log10(place) - left) / (right - left)
    stroke = {"linestyle": "", "marker": [(-0.5, -1), (0.5, 1)], "markersize": 11, "clip_on": False, "zorder": 6}
    axes.plot(middle, 0, color="white", markeredgewidth=5, transform=axes.transAxes, **stroke)  # type: ignore[arg-type]
    ends = [middle - 0.004, middle + 0.004]
    axes.plot(ends, [0, 0], color="black", markeredgewidth=1, transform=axes.transAxes, **stroke)  # type: ignore[arg-type]


def _draw_points(axes: Axes, points: Sequence[Point], places: Sequence[float]) -> None:
    """Draw markers and intervals, and what the legend says of them."""
    for point, place in zip(points, places, strict=True):
        style = STYLES[point.is_gift]
        mean, low, high = point.accuracy.mean, point.accuracy.low, point.accuracy.high
        if low is not None and high is not None:
            axes.errorbar(place, mean, [[mean - low], [high - mean]], color=style["color"], alpha=0.5, capsize=3)
        face = "white" if point.is_published else style["color"]
        axes.plot(place, mean, linestyle="", markersize=7, markerfacecolor=face, zorder=4, **style)  # type: ignore[arg-type]
    kinds = dict.fromkeys((point.is_published, point.is_gift) for point in points)
    for is_published, is_gift in sorted(kinds, key=lambda kind: (kind[0], not kind[1])):
        style = STYLES[is_gift]
        label = f"{FAMILIES[is_gift]}, published ({SOURCE})" if is_published else FAMILIES[is_gift]
        face = "white" if is_published else style["color"]
        axes.plot([], [], linestyle="", markersize=7, markerfacecolor=face, label=label, **style)  # type: ignore[arg-type]


def _draw_front(axes: Axes, points: Sequence[Point], places: Sequence[float]) -> Corners:
    """Draw the best of our own means for at most so many parameters as a line of steps, and return its corners."""
    own = {str(i): (place, points[i].accuracy.mean) for i, place in enumerate(places) if not points[i].is_published}
    front = [own[name] for name in pareto_front(own)]
    ends = [place for place, _ in front[1:]] + [axes.get_xlim()[1]]
    corners = np.array([at for (x, y), end in zip(front, ends, strict=True) for at in ((x, y), (end, y))])
    axes.plot(*corners.T, color="#999999", linestyle="--", linewidth=1, label="Pareto front of the means")
    return corners


def _describe(figure: Figure, axes: Axes, summary: Summary) -> None:
    """Write what the picture is of, and what is not in it."""
    drawn = [row for row in summary.rows if row.scores[summary.mean].accuracy is not None]
    counts = [count for row in drawn for count in row.seeds or ()]
    seeds = "–".join(str(count) for count in dict.fromkeys((min(counts), max(counts))))
    suite = SUITES.get(summary.suite, summary.suite)
    title = (
        f"{suite}, model {summary.model}, {summary.epochs} epochs, {seeds} seed{'' if seeds == '1' else 's'} per task"
    )
    axes.set_title("\n".join(textwrap.wrap(title, 90)), parse_math=False)
    axes.set_xlabel("trained parameters without the head (logarithmic)")
    axes.set_ylabel(f"accuracy in %, {summary.mean.title}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False, fontsize=9)
    bars = [end for row in drawn if (one := row.scores[summary.mean].accuracy) for end in (one.low, one.high)]
    ends = [end for end in bars if end is not None]
    is_cut = any(not axes.get_ylim()[0] <= end <= axes.get_ylim()[1] for end in ends)
    notes = [f"Bars: 95 % intervals over seeds{'; some are cut by the edge' if is_cut else ''}."] if ends else []
    left_out = [row.title for row in summary.rows if row not in drawn]
    notes += [f"Without a mean, and so left out: {', '.join(left_out)}."] if left_out else []
    if notes:
        figure.supxlabel("\n".join(textwrap.wrap(" ".join(notes), 130)), fontsize=8, color=GREY, parse_math=False)


def _place_labels(axes: Axes, points: Sequence[Point], places: Sequence[float], front: Corners) -> None:
    """Write each method's name near its marker, clear of what else is drawn there as far as there is room."""
    scale = axes.figure.dpi / 72
    centres = _pixels(axes, places, [point.accuracy.mean for point in points])
    names = [textwrap.shorten(point.label, 60, placeholder="…") for point in points]
    sizes = np.array([_size(axes, name) for name in names])
    offsets = scale * np.array([_offset(distance, angle) for distance in _DISTANCES for angle in _DIRECTIONS])
    sides = np.array([_side(angle) for _ in _DISTANCES for angle in _DIRECTIONS])
    corners = centres[:, None] + offsets + sides * sizes[:, None]  # [labels, places, 2], lower left
    boxes = np.concatenate([corners, corners + sizes[:, None]], axis=2)
    chosen = _choose(boxes, centres, offsets, _obstacles(axes, points, places, front), np.array(axes.bbox.extents))
    doubt = _doubt(boxes, centres)
    for index, choice in enumerate(chosen):
        is_far = choice >= 2 * len(_DIRECTIONS) or doubt[index, choice] > 0
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4} if is_far else None
        axes.annotate(
            names[index],
            (places[index], points[index].accuracy.mean),
            tuple((boxes[index, choice, :2] - centres[index]) / scale),
            textcoords="offset points",
            va="bottom",
            fontsize=_FONT_SIZE,
            color=_INK[points[index].is_gift],
            path_effects=[withStroke(linewidth=2, foreground="white", alpha=0.8)],
            arrowprops={**line, "relpos": tuple(-sides[choice])} if line else None,
            parse_math=False,
            zorder=7,
        )


def _obstacles(axes: Axes, points: Sequence[Point], places: Sequence[float], front: Corners) -> Boxes:
    """Return what is drawn: markers, intervals, the sections of the front."""
    lows = [point.accuracy.low or point.accuracy.mean for point in points]
    highs = [point.accuracy.high or point.accuracy.mean for point in points]
    means = [point.accuracy.mean for point in points]
    corners = [(means, means, 5.0), (lows, highs, 2.0)]
    boxes = [
        np.hstack([_pixels(axes, places, bottoms) - size, _pixels(axes, places, tops) + size])
        for bottoms, tops, size in corners
    ]
    line = axes.transData.transform(front)
    sections = np.hstack([np.minimum(line[:-1], line[1:]) - 2, np.maximum(line[:-1], line[1:]) + 2])
    return np.vstack([*boxes, sections])


def _pixels(axes: Axes, places: Sequence[float], heights: Sequence[float]) -> Float[np.ndarray, "points 2"]:
    return np.asarray(axes.transData.transform(list(zip(places, heights, strict=True))))


def _size(axes: Axes, name: str) -> tuple[float, float]:
    """Return width and height of a label in pixels."""
    text = axes.text(0, 0, name, fontsize=_FONT_SIZE, parse_math=False)
    extent = text.get_window_extent()
    text.remove()
    return extent.width, extent.height


def _offset(distance: int, angle: int) -> tuple[float, float]:
    return distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))


def _side(angle: int) -> tuple[float, float]:
    """Return how far the lower left corner is from the end of the offset, in widths and heights of the label."""
    across, up = _offset(1, angle)
    across, up = (0 if abs(part) < 0.3 else math.copysign(1, part) for part in (across, up))
    return (across - 1) / 2, (up - 1) / 2


def _choose(
    boxes: Float[np.ndarray, "labels places 4"],
    centres: Float[np.ndarray, "labels 2"],
    offsets: Float[np.ndarray, "places 2"],
    obstacles: Boxes,
    frame: Float[np.ndarray, "4"],
) -> list[int]:
    """Return which place each label takes: one after the other the best that others leave, three times over."""
    steps = np.linspace(0.2, 1, 9)[:, None, None]
    preference = np.arange(boxes.shape[1]) * 0.1
    inside = np.stack([_overlap(own, frame[None])[:, 0] for own in boxes])
    blocked = np.stack([_overlap(own, obstacles).sum(axis=1) for own in boxes])
    fixed = preference + 300 * (1 - inside) + 30 * blocked + 8 * _doubt(boxes, centres)
    chosen = [int(costs.argmin()) for costs in fixed]
    for _ in range(3):
        for index, own in enumerate(boxes):
            others = [i for i in range(len(boxes)) if i != index]
            if not others:
                continue
            taken = np.stack([boxes[i, chosen[i]] for i in others])
            lines = np.concatenate([centres[i] + steps[:, 0] * offsets[chosen[i]] for i in others])
            line = centres[index] + steps * offsets  # [steps, places, 2]
            crossing = sum(_inside(at, taken).sum(axis=1) for at in line) + _inside(lines, own).sum(axis=0)
            costs = fixed[index] + 100 * (_overlap(own, taken) > 0).sum(axis=1) + 5 * crossing
            chosen[index] = int(costs.argmin())
    return chosen


def _doubt(
    boxes: Float[np.ndarray, "labels places 4"], centres: Float[np.ndarray, "labels 2"]
) -> Float[np.ndarray, "labels places"]:
    """Return from 0 to 1 how much a label would seem to be that of another marker, which lies nearer."""
    if len(centres) == 1:
        return np.zeros(boxes.shape[:2])
    beyond = np.maximum(boxes[:, :, None, :2] - centres, centres - boxes[:, :, None, 2:])
    distances = np.linalg.norm(np.clip(beyond, 0, None), axis=3)  # [labels, places, markers]
    own = np.take_along_axis(distances, np.arange(len(centres))[:, None, None], axis=2)[..., 0]
    others = np.where(np.eye(len(centres), dtype=bool)[:, None], np.inf, distances).min(axis=2)
    return np.clip((own + 4 - others) / 10, 0, 1)


def _overlap(own: Float[np.ndarray, "own 4"], others: Float[np.ndarray, "others 4"]) -> Float[np.ndarray, "own others"]:
    """Return which share of each box others cover."""
    low = np.maximum(own[:, None, :2], others[None, :, :2])
    high = np.minimum(own[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=2) / (own[:, 2:] - own[:, :2]).prod(axis=1)[:, None]


def _inside(at: Float[np.ndarray, "dots 2"], boxes: Boxes) -> Float[np.ndarray, "dots boxes"]:
    """Return 1 where a dot lies in a box."""
    above = (at[:, None] >= boxes[None, :, :2]).all(axis=2)
    return np.asarray((above & (at[:, None] <= boxes[None, :, 2:]).all(axis=2)).astype(np.float64))
