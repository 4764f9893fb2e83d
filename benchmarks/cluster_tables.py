"""The tables of `benchmarks/cluster_maps.py` in Markdown: means over seeds with 95 % intervals (Student's t)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from documents import replace_between
from scipy.stats import t as student

MARKS = {
    name: (f"<!-- {name}: benchmarks/cluster_maps.py --write-docs FILE -->", f"<!-- end of {name} -->")
    for name in ("scores", "effective numbers", "variants", "cue")
}
MAIN = "apart"
READINGS = ("plain", "centred", "own", "whitened")
FIRST = 3  # places of the list of shortcuts in which a planted cue should stand

Scores = dict[str, Any]


def interval(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean of a number per seed and the half-width of its 95 % interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def write_tables(document: Path, results: dict[str, Any]) -> None:
    for name, text in tables(results).items():
        replace_between(document, *MARKS[name], text)


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Return the text of every table by name."""
    main = [one for one in results["variants"] if one["variant"] == MAIN]
    return {
        "scores": table_of_scores(main),
        "effective numbers": table_of_numbers(main),
        "variants": table_of_variants(results["variants"]),
        "cue": table_of_cue(results["cue"]),
    }


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rest])


def _row(scores: Scores, maps: str, reading: str) -> Scores:
    return next(row for row in scores["rows"] if (row["maps"], row["reading"]) == (maps, reading))


def table_of_scores(of_seeds: Sequence[Scores]) -> str:
    parts = [part["part"] for part in of_seeds[0]["rows"][0]["parts"]]
    lines = [
        [
            "maps",
            "reading",
            "of",
            *(f"IoU {part}" for part in parts),
            "pointing",
            "energy",
            "deletion",
            "insertion",
            "importance",
        ]
    ]
    for row in of_seeds[0]["rows"]:
        rows = [_row(scores, row["maps"], row["reading"]) for scores in of_seeds]
        cells = [row["maps"], row["reading"], str(row["candidates"])]
        cells += [_overlap([one["parts"][place] for one in rows]) for place in range(len(parts))]
        for measure in ("pointing", "energy"):
            cells.append(interval([float(np.mean([part[measure] for part in one["parts"]])) for one in rows]))
        for measure in ("deletion", "insertion", "importance"):
            known = [one[measure] for one in rows if one[measure] is not None]
            cells.append(interval(known) if known else "")
        lines.append(cells)
    return _markdown(lines)


def _overlap(parts: Sequence[Scores]) -> str:
    """Return the overlap with its interval, and in how many seeds it exceeds what chance can do."""
    text = interval([part["iou"] for part in parts])
    if any(part["chance"] is None for part in parts):
        return text
    return f"{text} ({sum(part['iou'] > part['chance'] for part in parts)}/{len(parts)})"


def table_of_numbers(of_seeds: Sequence[Scores]) -> str:
    layers = len(of_seeds[0]["rows"][0]["effective_numbers"])
    lines = [["maps", "reading", *(f"layer {layer}" for layer in range(layers))]]
    for row in of_seeds[0]["rows"]:
        if len(row["effective_numbers"]) == layers and row["candidates"] > layers:
            rows = [_row(scores, row["maps"], row["reading"]) for scores in of_seeds]
            numbers = np.mean([one["effective_numbers"] for one in rows], axis=0)
            lines.append([row["maps"], row["reading"], *(f"{number:.1f}" for number in numbers)])
    return _markdown(lines)


def table_of_variants(variants: Sequence[Scores]) -> str:
    """Return per variant and block how many maps differ, and how far learned maps overlap parts beyond random ones."""
    keys = list(dict.fromkeys((one["variant"], one["block"]) for one in variants))
    lines = [
        [
            "variant",
            "block",
            "seeds",
            "accuracy in %",
            "different maps: learned",
            "random",
            "untrained",
            *(f"{reading}: IoU - random" for reading in READINGS),
            "parts better than chance, own",
            "whitened",
        ]
    ]
    for variant, block in keys:
        of_seeds = [one for one in variants if (one["variant"], one["block"]) == (variant, block)]
        cells = [variant, str(block), str(len(of_seeds)), interval([100 * one["accuracy"] for one in of_seeds], 1)]
        for maps in ("learned", "random", "untrained"):
            cells.append(interval([float(np.mean(_row(one, maps, "own")["effective_numbers"])) for one in of_seeds], 1))
        cells += [_beyond_random(of_seeds, reading) for reading in READINGS]
        cells += [_better_than_chance(of_seeds, reading) for reading in ("own", "whitened")]
        lines.append(cells)
    return _markdown(lines)


def _beyond_random(of_seeds: Sequence[Scores], reading: str) -> str:
    mean: Callable[[Scores, str], float] = lambda one, maps: float(  # noqa: E731
        np.mean([part["iou"] for part in _row(one, maps, reading)["parts"]])
    )
    return interval([mean(one, "learned") - mean(one, "random") for one in of_seeds], 3)


def _better_than_chance(of_seeds: Sequence[Scores], reading: str) -> str:
    parts = [part for one in of_seeds for part in _row(one, "learned", reading)["parts"]]
    return f"{sum(part['iou'] > part['chance'] for part in parts)} of {len(parts)}"


def is_cue(shortcut: Scores, species: int) -> bool:
    """Return whether a shortcut is the planted one: for its species, and on the cue more than on any other part."""
    lifts = shortcut["lifts"]
    return shortcut["label"] == species and max(lifts, key=lambda part: lifts[part]) == "cue"


def place_of_cue(of_model: Scores, species: int) -> int | None:
    """Return the place, from 1, of the first shortcut that is the planted one; None if none is."""
    places = [place for place, one in enumerate(of_model["shortcuts"], 1) if is_cue(one, species)]
    return places[0] if places else None


def table_of_cue(cues: Sequence[Scores]) -> str:
    lines = [
        [
            "seed",
            "training",
            "logit falls without the cue",
            "shortcuts listed",
            "place of the cue",
            "its net logit drop",
            "its lift on the cue",
        ]
    ]
    for cue in cues:
        for training in ("trained with it", "trained without it"):
            of_model, place = cue[training], place_of_cue(cue[training], cue["species"])
            first = of_model["shortcuts"][place - 1] if place else None
            drop = f"{first['net_drop']:.2f}" if first else ""
            lift = f"{first['lifts']['cue']:.1f}" if first else ""
            listed = str(len(of_model["shortcuts"]))
            lines.append(
                [str(cue["seed"]), training, f"{of_model['importance']:.2f}", listed, str(place or "none"), drop, lift]
            )
    return _markdown(lines)
