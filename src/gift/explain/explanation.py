"""What `gift explain` does: an adapter and pictures in; sheets, overlays, label maps and a report out."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gift.data.pictures import picture_files, read_pictures, some_of_every_group
from gift.explain.render import Look
from gift.explain.report import Surrounding, write_report
from gift.explain.sheets import Sheets
from gift.explain.viewer import Seen, Viewer
from gift.tuner.options import check_number

RECORD, REPORT = "explanation.json", "report.html"


@dataclass(frozen=True)
class Explanation:
    """What was written.

    Attributes:
        folder: Where.
        shown: How many pictures are shown.
        left_out: How many more there are.
        problems: Why some could not be read, by their names.
    """

    folder: Path
    shown: int
    left_out: int
    problems: dict[str, str]


def explain_pictures(
    adapter: Path | str,
    images: Sequence[Path],
    out: Path,
    backbone: str | None = None,
    count: int = 50,
    look: Look | None = None,
    scores: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Explanation:
    """Write what the clusters of an adapter see in pictures.

    `report.html`, `overview.png`, what `gift.explain.sheets.Sheets.write` lists, and `explanation.json`: predictions
    with and without the adapter, and the best clusters of every picture.

    Args:
        adapter: Folder of a run or of an adapter.
        images: Pictures and folders of pictures.
        out: Folder to write: a new or empty one, or that of an earlier explanation, which is replaced at the end.
        backbone: Name or folder of the backbone; by default what the adapter says.
        count: How many pictures at most; of more, some of every folder are taken.
        look: How maps are laid over pictures.
        scores: What `gift score --out` wrote of this adapter.
        report: Called with what is being done.

    Raises:
        ValueError: If no picture can be read, the adapter has no clusters, or `out` holds anything else; nothing was
            written.
    """
    check_number("count", count, smallest=1, whole=True)
    out = Path(out).absolute()
    _check_replaceable(out)
    of_scores = None if scores is None else read_scores(scores)
    files = picture_files(images)
    chosen = some_of_every_group(files, count)
    viewer = Viewer.load(adapter, backbone)
    report(f"Reading {len(chosen)} of {len(files)} pictures")
    pictures, problems = read_pictures(chosen, viewer.geometry)
    if not pictures:
        few = "\n  ".join([*problems.values()][:5])
        raise ValueError(f"None of {len(chosen)} pictures can be read:\n  {few}")
    seen = viewer.see(pictures)
    surrounding = Surrounding(viewer.title, viewer.names(), problems, len(files) - len(chosen), of_scores)
    report(f"Drawing {len(pictures)} pictures")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_report(viewer, seen, surrounding, partial / REPORT)
        Sheets(seen, seen.scales(), surrounding.names, look or Look()).write(partial)
        (partial / RECORD).write_text(json.dumps(_record(seen, surrounding), indent=1) + "\n")
        _check_replaceable(out)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Explanation(out, len(pictures), surrounding.left_out, problems)


def read_scores(path: Path) -> dict[str, Any]:
    """Return what `gift score --out` wrote.

    Raises:
        ValueError: If the file holds anything else.
    """
    try:
        scores = json.loads(path.read_text())
        _ = scores["adapter"], scores["data"], scores["images"], scores["seed"]
        for row in scores["rows"]:
            for part in row["parts"]:
                _ = row["maps"], row["reading"], part["part"], part["map"], part["iou"], part["low"], part["high"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no scores of `gift score --out`: {error!r}.") from error
    return scores


def describe_explanation(explanation: Explanation) -> str:
    """Return what was written, and what could not be read."""
    more = f" of {explanation.shown + explanation.left_out} (--count shows more)" if explanation.left_out else ""
    lines = [f"Wrote {explanation.folder / REPORT}: {explanation.shown} pictures{more}. Open it in a browser."]
    problems = [*explanation.problems.values()]
    if problems:
        lines += [f"Not read: {len(problems)}", *(f"  {problem}" for problem in problems[:10])]
        lines += [f"  and {len(problems) - 10} more, listed in {RECORD}"] if len(problems) > 10 else []
    return "\n".join(lines)


def _record(seen: Seen, surrounding: Surrounding) -> dict[str, Any]:
    pictures = [
        {
            "name": picture.name,
            "prediction": seen.predictions(image),
            "without the adapter": seen.predictions_without(image),
        }
        for image, picture in enumerate(seen.pictures)
    ]
    return {
        "adapter": surrounding.adapter,
        "reading": seen.maps.reading,
        "pictures": pictures,
        "left_out": surrounding.left_out,
        "problems": surrounding.problems,
        "versions": seen.maps.versions,
    }


def _check_replaceable(out: Path) -> None:
    if out == Path.cwd():
        raise ValueError("The folder of an explanation is written anew: name another one than the current folder.")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / RECORD).exists()):
        raise ValueError(f"{out} exists and holds no explanation: choose another folder, since it is cleared.")
