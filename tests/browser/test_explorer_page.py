"""The explorer in a browser: what a person does there, and what they see."""

import io
import re
import time

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import expect

from gift.explain import exploring
from gift.explain.exploring import open_explorer
from gift.explain.names import ClusterNames
from gift.serving import PASSWORD, serving
from tests.training.pictures import CLASSES

CARD = "#cards .thumbnail-item"
WAIT_MS = 30_000


def drop(page, path):
    page.set_input_files("#upload input[type=file]", str(path))


def dropped(page, path, name=None):
    """Drop a picture and wait until it is shown."""
    drop(page, path)
    expect(page.locator("#picture-name textarea, #picture-name input")).to_have_value(
        name or path.name, timeout=WAIT_MS
    )
    expect(page.locator("#selected img")).to_be_visible(timeout=WAIT_MS)
    return page


def captions(page, gallery="cards"):
    return page.locator(f"#{gallery} .caption-label").all_inner_texts()


def value(page, elem_id):
    return page.locator(f"#{elem_id} textarea, #{elem_id} input").first


def pixels_of(page, elem_id):
    for _ in range(50):
        # Gradio writes a picture anew that is drawn a second time: who reads meanwhile gets a part of it.
        source = page.locator(f"#{elem_id} img").first.get_attribute("src")
        try:
            return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")).astype(int)
        except (OSError, PlaywrightError):
            page.wait_for_timeout(100)
    raise AssertionError(f"{source} is no picture")


def choose_layer(page, text):
    page.locator("#layer input").click()
    page.get_by_role("option", name=re.compile(f"^✓?\\s*{text}")).click()


def save_name(page, name):
    value(page, "new-name").fill(name)
    page.locator("#save-name").click()


def set_slider(page, elem_id, number):
    field = page.locator(f"#{elem_id} input[type=number]")
    field.fill(str(number))
    field.press("Enter")
    field.blur()


@pytest.fixture
def picture(striped):
    return striped / "test" / "down" / "3.png"


def test_a_picture_is_dropped_looked_at_and_its_clusters_are_named(open_page, address, own_run, picture):
    page = dropped(open_page(address), picture)
    assert page.locator("#with").inner_text().split()[1] in CLASSES or any(
        name in page.locator("#with").inner_text() for name in CLASSES
    )
    expect(page.locator("#without")).to_be_visible()
    assert {caption[:2] for caption in captions(page)} == {"L0", "L1"}
    choose_layer(page, "L1")
    expect(page.locator("#cards .caption-label").first).to_contain_text("L1/C", timeout=WAIT_MS)
    page.wait_for_function(
        "[...document.querySelectorAll('#cards .caption-label')].every(c => c.innerText.startsWith('L1'))"
    )
    expect(value(page, "selected-ref")).to_have_value(re.compile("^L1/C"), timeout=WAIT_MS)
    save_name(page, "first")  # what is selected by itself can be named
    expect(value(page, "selected-ref")).to_have_value(re.compile(r"^first \(L1/C"), timeout=WAIT_MS)
    save_name(page, "")
    expect(value(page, "selected-ref")).to_have_value(re.compile("^L1/C"), timeout=WAIT_MS)
    ref = captions(page)[1].split(":")[0]
    page.locator(CARD).nth(1).click()
    expect(value(page, "selected-ref")).to_have_value(ref, timeout=WAIT_MS)
    save_name(page, "stripes down")
    expect(value(page, "selected-ref")).to_have_value(f"stripes down ({ref})", timeout=WAIT_MS)
    expect(page.locator("#cards .caption-label", has_text=f"stripes down ({ref})")).to_be_visible(timeout=WAIT_MS)
    assert ClusterNames.load(own_run / "adapter").clusters == {ref: "stripes down"}
    other = dropped(open_page(address), picture)  # another person sees it, too
    choose_layer(other, "L1")
    expect(other.locator("#cards .caption-label", has_text="stripes down")).to_be_visible(timeout=WAIT_MS)


def test_sliders_and_colours_change_what_is_drawn(open_page, address, picture):
    page = dropped(open_page(address), picture)
    before = pixels_of(page, "selected")

    def wait_for(grey):
        for _ in range(600):
            pixels = pixels_of(page, "selected")
            if (np.ptp(pixels, axis=2).max() <= 12) == grey and not (grey is False and np.array_equal(pixels, before)):
                return pixels
            page.wait_for_timeout(100)
        raise AssertionError("the picture did not change")

    set_slider(page, "opacity", 0)
    wait_for(grey=True)
    set_slider(page, "opacity", 1)
    stronger = wait_for(grey=False)
    page.get_by_label("jet", exact=True).check()
    for _ in range(600):
        if not np.array_equal(pixels_of(page, "selected"), stronger):
            break
        page.wait_for_timeout(100)
    else:
        raise AssertionError("jet changed nothing")
    set_slider(page, "threshold", 1)
    for _ in range(600):
        if (np.ptp(pixels_of(page, "selected"), axis=2).max(axis=None) <= 12) or (
            (np.ptp(pixels_of(page, "selected"), axis=2) > 12).mean() < 0.2
        ):
            break
        page.wait_for_timeout(100)
    else:
        raise AssertionError("the threshold hides nothing")


def test_label_map_comparison_combination_and_scan(open_page, address, own_run, picture, striped):
    page = dropped(open_page(address), picture)
    page.get_by_role("tab", name="Label map").click()
    expect(page.locator("#labels img")).to_be_visible(timeout=WAIT_MS)
    expect(page.locator("#labels-legend li").first).to_contain_text(re.compile(r"L\d/C\d.*, \d+ %"), timeout=WAIT_MS)
    choose_layer(page, "L0")
    expect(page.locator("#labels-legend p")).to_contain_text("Layer L0", timeout=WAIT_MS)
    page.get_by_role("tab", name="Compare").click()
    expect(page.locator("#other-cards img").first).to_be_visible(timeout=WAIT_MS)
    assert captions(page, "own-cards")
    assert any(name in page.locator("#other").inner_text() for name in CLASSES)
    page.get_by_role("tab", name="Combine").click()
    for ref in ("L0/C1", "L1/C4"):
        page.locator("#members input").fill(ref)
        page.locator("#members input").press("Enter")
    value(page, "combination-name").fill("both")
    page.locator("#save-combination").click()
    expect(page.locator("#combined img")).to_be_visible(timeout=WAIT_MS)
    assert list(ClusterNames.load(own_run / "adapter").combinations) == ["both"]
    before = page.locator("#combined img").first.get_attribute("src")
    set_slider(page, "opacity", 0.2)
    page.wait_for_function("before => document.querySelector('#combined img').src !== before", arg=before)
    page.get_by_role("tab", name="Scan a folder").click()
    page.locator("#what input").fill("L1/C4")
    page.locator("#what input").press("Enter")
    page.locator("#scan").click()
    expect(page.locator("#found img").first).to_be_visible(timeout=WAIT_MS)
    assert len(captions(page, "found")) == 12
    assert any(captions(page, "found")[0].startswith(f"{name}/") for name in CLASSES)
    expect(value(page, "progress")).to_have_value("24 of 24 pictures")
    page.get_by_role("tab", name="Names").click()
    expect(page.locator("#known input")).to_have_value("both", timeout=WAIT_MS)
    page.locator("#forget").click()
    expect(page.locator("#known input")).not_to_have_value("both", timeout=WAIT_MS)
    assert ClusterNames.load(own_run / "adapter").combinations == {}
    page.get_by_role("tab", name="Combine").click()
    expect(page.locator("#combination input")).to_have_value("", timeout=WAIT_MS)  # it was shown
    expect(page.locator("#combined img")).to_have_count(0)
    set_slider(page, "opacity", 0.6)
    page.wait_for_timeout(1000)
    expect(page.locator(".toast-body")).to_have_count(0)


def test_a_scan_can_be_stopped(open_page, own_run, picture, striped, monkeypatch):
    monkeypatch.setattr(exploring, "SCANNED_AT_ONCE", 1)
    read, original = [], exploring.read_pictures

    def slowly(files, geometry):
        read.append(files)
        time.sleep(0.3)
        return original(files, geometry)

    with serving(open_explorer(own_run, [striped / "test"])) as (url, _):
        page = dropped(open_page(url), picture)
        monkeypatch.setattr(exploring, "read_pictures", slowly)
        page.get_by_role("tab", name="Scan a folder").click()
        page.locator("#scan").click()
        expect(value(page, "progress")).to_have_value(re.compile("^[1-9] of 24 pictures"), timeout=WAIT_MS)
        page.locator("#stop").click()
        expect(value(page, "progress")).to_have_value("stopped", timeout=WAIT_MS)
        page.wait_for_timeout(1000)
        done = len(read)
        page.wait_for_timeout(1500)
        assert len(read) == done < 20
        assert page.locator(".toast-body").count() == 0


def test_what_is_typed_stays_while_sliders_move(open_page, address, picture):
    page = dropped(open_page(address), picture)
    value(page, "new-name").fill("half a na")
    before = page.locator("#selected img").first.get_attribute("src")
    set_slider(page, "opacity", 0.3)
    page.wait_for_function("before => document.querySelector('#selected img').src !== before", arg=before)
    assert value(page, "new-name").input_value() == "half a na"


def hostile_files(folder, picture):
    """Return files that are no pictures to look at, and what must be said of each."""
    content = picture.read_bytes()
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(folder / "deep.png")
    files = {
        "cut.png": content[:80],
        "script.svg": svg,
        "text.jpg": b"<script>document.title = 1</script>",
        "no.webp": b"",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {
        "bomb.png": "too large",
        "animated.gif": "animated",
        "deep.png": "more than 8 bits",
        "cut.png": "cannot be decoded",
        "script.svg": "no image",
        "text.jpg": "no image",
        "no.webp": "is empty",
    }


def test_hostile_files_are_refused_with_words_and_good_ones_still_work(open_page, address, picture, tmp_path):
    page = dropped(open_page(address), picture)
    title = page.title()
    for name, said in hostile_files(tmp_path, picture).items():
        drop(page, tmp_path / name)
        expect(page.locator(".toast-body").last).to_contain_text(said, timeout=WAIT_MS)
        expect(value(page, "picture-name")).to_have_value(picture.name)  # what was there stays
        expect(page.locator("#picture .error")).to_have_count(0)  # and is not covered
        page.evaluate("document.querySelectorAll('.toast-close').forEach(button => button.click())")  # it moves
        expect(page.locator(".toast-body")).to_have_count(0, timeout=WAIT_MS)
    assert page.title() == title
    for mode in ("CMYK", "L", "P"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.open(picture).convert(mode).save(path)
        dropped(page, path)


def test_a_sideways_photo_is_shown_upright(open_page, address, tmp_path):
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20] = 255  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    page = dropped(open_page(address), tmp_path / "turned.jpg")
    shown = pixels_of(page, "picture")
    assert shown[:60].mean() < 20
    assert shown[-60:].mean() > 235


def test_one_picture_takes_less_than_a_second(open_page, address, striped):
    page = dropped(open_page(address), striped / "test" / "down" / "0.png")
    seconds = []
    for number in range(1, 4):
        started = time.perf_counter()
        dropped(page, striped / "test" / "down" / f"{number}.png")
        seconds.append(time.perf_counter() - started)
    assert (
        min(seconds) < 3
    )  # 1 second is meant, with the backbone that ships, on a quiet machine: benchmarks/looking.py


def test_a_password_lets_nobody_past_without_it(open_page, own_run, picture, monkeypatch):
    monkeypatch.setenv(PASSWORD, "correct horse")
    with serving(open_explorer(own_run, []), user="ada") as (url, _):
        page = open_page(url)
        expect(page.locator("input[type=password]")).to_be_visible(timeout=WAIT_MS)
        assert page.locator("#upload").count() == 0
        for password in ("wrong", "correct horse"):
            page.locator("input[type=text], input:not([type]), textarea").first.fill("ada")
            page.locator("input[type=password]").fill(password)
            page.get_by_role("button", name=re.compile("log ?in", re.IGNORECASE)).click()
            if password == "wrong":
                page.wait_for_timeout(1000)
                assert page.locator("#upload").count() == 0
        dropped(page, picture)
