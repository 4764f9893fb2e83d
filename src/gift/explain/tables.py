"""Scores in words: tables in Markdown."""

from collections.abc import Sequence

import numpy as np

from gift.explain.scoring import MethodScore, PartScore
from gift.explain.shortcuts import Shortcut


def score_table(rows: Sequence[MethodScore]) -> str:
    """Return a line per row of scores: the overlap with every part, then what was measured beside it.

    A cluster's overlap that 5 % of sets of random maps reach is marked by a star.
    """
    parts = [part.part for part in rows[0].parts]
    whole = any(row.deletion is not None for row in rows)
    header = ["maps", "reading", "candidates", "different maps a layer", *(f"IoU {part}" for part in parts)]
    header += (
        ["pointing", "energy inside", "deletion", "insertion", "importance"] if whole else ["pointing", "energy inside"]
    )
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [row.maps, row.reading, str(row.candidates), _number(_mean(row.effective_numbers), 1)]
        cells += [_overlap(part) for part in row.parts]
        cells += [_number(_mean([getattr(part, name) for part in row.parts])) for name in ("pointing", "energy")]
        cells += [_number(value) for value in (row.deletion, row.insertion, row.importance)] if whole else []
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def verdicts(rows: Sequence[MethodScore]) -> list[str]:
    """Return for every reading of the learned clusters which parts they find better than random maps read alike."""
    words = []
    for row in rows:
        if row.maps == "learned" and all(part.chance is not None for part in row.parts):
            better = [f"{part.part} ({part.map})" for part in row.parts if part.iou > (part.chance or 0)]
            worse = [f"{part.part} ({part.map})" for part in row.parts if part.iou <= (part.chance or 0)]
            words.append(
                f"{row.reading}: better than random clusters for {', '.join(better) or 'no part'}; "
                f"no better for {', '.join(worse) or 'none'}."
            )
    return words


def shortcut_table(shortcuts: Sequence[Shortcut], class_names: Sequence[str], count: int = 10) -> str:
    """Return a line per shortcut: the cluster, the class it speaks for, and what it lies on."""
    lines = [
        "| cluster | class | net logit drop (std) | at least | outside the object | region | shows most |",
        "|---" * 7 + "|",
    ]
    for one in shortcuts[:count]:
        part = max(one.lifts, key=lambda name: one.lifts[name], default="")
        name = class_names[one.label] if class_names else str(one.label)
        lines.append(
            f"| {one.ref} | {name} | {one.net_drop:.2f} | {one.low:.2f} | {100 * one.outside:.0f} % | "
            f"{100 * one.region:.0f} % | {f'{part}, {one.lifts[part]:.1f} times' if part else ''} |"
        )
    return "\n".join(lines)


def _overlap(part: PartScore) -> str:
    is_chance = part.chance is not None and part.iou <= part.chance
    interval = f" [{part.low:.2f}, {part.high:.2f}]" if part.low < part.high else ""
    return f"{part.iou:.2f}{interval}{'*' if is_chance else ''}"


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
