"""How long people wait when they look through an adapter: for the report and for the explorer, in a real browser.

    python benchmarks/looking.py --adapter runs/flowers --images flowers/test --out results/looking.json \
        --write_docs docs/looking.md

Needs chromium. The report is opened from disk, `--rounds` times, until its first picture is drawn; pictures are dropped
into the explorer, one after the other, each in a page that is open, until its clusters are shown.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.documents import replace_between
from benchmarks.interleaved import environment, estimate, write_json
from gift.data.pictures import picture_files, some_of_every_group
from gift.explain.explanation import REPORT, explain_pictures
from gift.explain.exploring import open_explorer
from gift.serving import serving

START, END = "<!-- looking -->", "<!-- /looking -->"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
NAMED = "name => document.querySelector('#picture-name textarea, #picture-name input').value === name"
DRAWN = "before => { const shown = document.querySelector('#selected img'); return shown && shown.src !== before; }"


def open_report(page: Page, address: str) -> float:
    """Return the seconds until the first picture of a report is drawn."""
    page.goto("about:blank")
    started = time.perf_counter()
    page.goto(address)
    page.wait_for_selector("html[data-ready=true]", state="attached")
    return time.perf_counter() - started


def drop(page: Page, picture: Path) -> float:
    """Return the seconds until a picture is shown with its clusters."""
    clear = page.locator("#upload button[aria-label=Clear]")
    if clear.count():
        clear.first.click()
    shown = page.locator("#selected img")
    before = shown.first.get_attribute("src") if shown.count() else None
    started = time.perf_counter()
    page.set_input_files("#upload input[type=file]", str(picture))
    page.wait_for_function(NAMED, arg=picture.name)
    page.wait_for_function(DRAWN, arg=before)
    return time.perf_counter() - started


def table(results: dict[str, Any]) -> str:
    """Return the table of `docs/looking.md`."""
    report, explorer = results["report"], results["explorer"]
    seconds = {name: results[name]["seconds"] for name in ("report", "explorer")}
    shown = {name: f"{each['median']:.2f} s [{each['low']:.2f}, {each['high']:.2f}]" for name, each in seconds.items()}
    return "\n".join(
        [
            "| what | measured |",
            "|---|---|",
            f"| `gift explain` of {report['pictures']} pictures | {report['written in seconds']:.0f} s |",
            f"| size of its report | {report['megabytes']:.1f} MB |",
            f"| the report, from disk until the first picture is drawn | {shown['report']} |",
            f"| the explorer, from dropping a picture until its clusters are shown | {shown['explorer']} |",
            f"| the slowest of {explorer['pictures']} pictures | {explorer['slowest in seconds']:.2f} s |",
        ]
    )


def main(
    adapter: Path, images: Path, out: Path, rounds: int = 15, count: int = 50, write_docs: Path | None = None
) -> None:
    """Measure and write.

    Args:
        adapter: Folder of a run.
        images: Folder of pictures.
        out: JSON file to write.
        rounds: How often the report is opened, and how many pictures are dropped.
        count: Pictures of the report.
        write_docs: Document whose table is written anew.
    """
    browser_path = shutil.which("chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        started = time.perf_counter()
        explanation = explain_pictures(adapter, [images], Path(folder) / "out", count=count)
        written = time.perf_counter() - started
        report = explanation.folder / REPORT
        browser = playwright.chromium.launch(executable_path=browser_path, args=ARGUMENTS)
        page = browser.new_page()
        opened = [open_report(page, report.as_uri()) for _ in range(rounds)]
        with serving(open_explorer(adapter, [images])) as (address, _):
            page = browser.new_page()
            page.goto(address)
            page.wait_for_selector("#upload input[type=file]", state="attached")
            files = some_of_every_group(picture_files([images]), rounds + 1)
            shown = [drop(page, file.path) for file in files][1:]  # the first one has the page load its parts
            browser.close()
        results = {
            "report": {
                "pictures": explanation.shown,
                "written in seconds": written,
                "megabytes": report.stat().st_size / 1e6,
                "seconds": estimate(opened)._asdict(),
            },
            "explorer": {
                "pictures": len(shown),
                "seconds": estimate(shown)._asdict(),
                "slowest in seconds": max(shown),
            },
            "environment": environment(),
        }
    write_json(out, results)
    print(f"report {statistics.median(opened):.2f} s, explorer {statistics.median(shown):.2f} s")
    if write_docs is not None:
        replace_between(write_docs, START, END, table(results))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
