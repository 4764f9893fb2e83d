"""A browser for the tests of pages, and what they look at."""

import os
import shutil

import pytest

from gift.explain.explanation import explain_pictures
from gift.explain.exploring import open_explorer
from gift.serving import serving
from tests.explain.conftest import striped, trained  # noqa: F401 - fixtures

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync", "--disable-default-apps"]
LOCAL = ("http://127.0.0.1:", "data:", "blob:", "file://")


@pytest.fixture(scope="session")
def browser():
    """Return a browser without a window; without one installed, tests are skipped."""
    path = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no browser is installed: apt-get install chromium, or set BROWSER_PATH")
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - only with a browser

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Return a function that opens an address in a session of its own; nothing but this machine may be asked."""
    contexts, asked, errors = [], [], []

    def open_page(url, width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked
    assert [url for url in asked if not url.startswith(LOCAL)] == []
    assert errors == []


@pytest.fixture(scope="session")
def explained(trained, striped, tmp_path_factory):  # noqa: F811
    """Return the folder of an explanation of all test pictures, which no test changes."""
    return explain_pictures(trained[0], [striped / "test"], tmp_path_factory.mktemp("out") / "explained").folder


@pytest.fixture
def own_run(trained, tmp_path):  # noqa: F811
    """Return a run of a test's own, in which it may name clusters."""
    return shutil.copytree(trained[0], tmp_path / "run")


@pytest.fixture
def address(own_run, trained, striped):  # noqa: F811
    """Return the address of an explorer of `own_run`, beside another run."""
    with serving(open_explorer(own_run, [striped / "test"], compare=trained[1])) as (url, _):
        yield url
