"""Tables in documents: what stands between two markers is written by a benchmark, never by hand."""

from pathlib import Path


def between(path: Path, start: str, end: str) -> str:
    """Return what stands between two lines of a document, without empty lines around it."""
    return path.read_text().partition(f"{start}\n")[2].partition(f"{end}\n")[0].strip()


def replace_between(path: Path, start: str, end: str, text: str) -> None:
    """Replace what stands between two lines of a document, and nothing else.

    Raises:
        ValueError: If the document does not hold both lines, in this order.
    """
    before, found, rest = path.read_text().partition(f"{start}\n")
    _, found_end, after = rest.partition(f"{end}\n")
    if not (found and found_end):
        raise ValueError(f"{path} must hold the lines {start!r} and {end!r}, between which the tables go.")
    path.write_text(f"{before}{start}\n{text.strip()}\n{end}\n{after}")
