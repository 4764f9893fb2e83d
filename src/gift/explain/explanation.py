"""What `gift explain` does: an adapter and pictures in; sheets, overlays, label maps and a report out."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gift.data.pictures import picture_files, read_pictures, some_of_every_group
from gift.explain.command import read_scores
from gift.explain.render import Look
from gift.explain.report import Surrounding, write_report
from gift.explain.sheets import Sheets
from gift.explain.viewer import Seen, Viewer
from gift.tuner.options import check_number

RECORD, REPORT = "explanation.json", "report.html"
FORMAT = "gift explanation 1"


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
    with and without the adapter, and every file that was written.

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
        ValueError: If no picture can be read, the adapter has no clusters, or `out` holds or is held by anything else;
            nothing was written.
        OSError: If `out` cannot be written.
    """
    check_number("count", count, smallest=1, whole=True)
    _check_apart(out, images, [Path(adapter), *([] if scores is None else [scores])])
    of_scores = None if scores is None else read_scores(scores)
    files = picture_files(images)
    chosen = some_of_every_group(files, count)
    with _replacing(out) as folder:
        viewer = Viewer.load(adapter, backbone)
        names = viewer.names()
        report(f"Reading {len(chosen)} of {len(files)} pictures")
        pictures, problems = read_pictures(chosen, viewer.geometry)
        if not pictures:
            few = "\n  ".join([*problems.values()][:5])
            raise ValueError(f"None of {len(chosen)} pictures can be read:\n  {few}")
        seen = viewer.see(pictures)
        surrounding = Surrounding(viewer.title, names, problems, len(files) - len(chosen), of_scores)
        report(f"Drawing {len(pictures)} pictures")
        write_report(viewer, seen, surrounding, folder / REPORT)
        Sheets(seen, seen.scales(), names, look or Look()).write(folder)
        (folder / RECORD).write_text(json.dumps(_record(seen, surrounding, folder), indent=1) + "\n")
    return Explanation(out, len(pictures), surrounding.left_out, problems)


def describe_explanation(explanation: Explanation) -> str:
    """Return what was written, and what could not be read."""
    more = f" of {explanation.shown + explanation.left_out} (--count shows more)" if explanation.left_out else ""
    lines = [f"Wrote {explanation.folder / REPORT}: {explanation.shown} pictures{more}. Open it in a browser."]
    problems = [*explanation.problems.values()]
    if problems:
        lines += [f"Not read: {len(problems)}", *(f"  {problem}" for problem in problems[:10])]
        lines += [f"  and {len(problems) - 10} more, listed in {RECORD}"] if len(problems) > 10 else []
    return "\n".join(lines)


def _record(seen: Seen, surrounding: Surrounding, folder: Path) -> dict[str, Any]:
    pictures = [
        {
            "name": picture.name,
            "prediction": seen.predictions(image),
            "without the adapter": seen.predictions_without(image),
        }
        for image, picture in enumerate(seen.pictures)
    ]
    return {
        "format": FORMAT,
        "adapter": surrounding.adapter,
        "reading": seen.maps.reading,
        "pictures": pictures,
        "left_out": surrounding.left_out,
        "problems": surrounding.problems,
        "versions": seen.maps.versions,
        "files": sorted(_files(folder)),
    }


# ---- the folder --------------------------------------------------------------------------------------------------


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """Give a new folder that takes the place of `out` once it is filled; after an error `out` is as it was."""
    out = out.resolve()
    _check_replaceable(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".explaining-", dir=out.parent))
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror}. Choose another folder.") from error
    try:
        (partial / "new").mkdir()
        yield partial / "new"
        _check_replaceable(out)  # it took a while
        if out.exists():
            out.rename(partial / "old")
        (partial / "new").rename(out)
    finally:
        if not out.exists() and (partial / "old").exists():
            (partial / "old").rename(out)
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(out: Path) -> None:
    """Raise ValueError unless a folder can be replaced without losing what somebody else put there."""
    if Path.cwd().is_relative_to(out):
        raise ValueError(f"{out} is the current folder or holds it, and would be written anew: name another one.")
    if out.is_dir():
        if foreign := sorted(_files(out) - _files_of_explanation(out)):
            raise ValueError(f"{out} holds {foreign[0]}, which is of no explanation: choose another folder.")
    elif out.exists():
        raise ValueError(f"{out} is a file: name a folder to write.")


def _check_apart(out: Path, images: Sequence[Path], others: Sequence[Path]) -> None:
    """Raise ValueError if what is read would be deleted, or what is written would be read the next time."""
    out = out.resolve()
    inside = [path for path in (*images, *others) if path.resolve().is_relative_to(out)]
    around = [path for path in images if out.is_relative_to(path.resolve())]
    if near := [*inside, *around]:
        raise ValueError(f"{out} must lie apart from {near[0]}, which is read: choose another folder.")


def _files(folder: Path) -> set[str]:
    """Return what lies below a folder and is no folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def _files_of_explanation(folder: Path) -> set[str]:
    """Return the files that an explanation says it has written; none if there is no explanation."""
    try:
        record = json.loads((folder / RECORD).read_text())
        return {RECORD, *record["files"]} if record["format"] == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
