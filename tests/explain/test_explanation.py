import base64
import json
import os
import re
import shutil

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from gift.cli import main
from gift.data.pictures import picture_files, read_pictures
from gift.explain import report
from gift.explain.command import read_scores
from gift.explain.explanation import describe_explanation, explain_pictures
from gift.explain.names import ClusterNames, ClusterRef, Combination
from gift.explain.ranking import ClusterScales
from gift.explain.render import Look, overlay
from gift.explain.report import Surrounding, report_data
from tests.training.pictures import CLASSES


@pytest.fixture(scope="module")
def explained(trained, striped, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "explained"
    return explain_pictures(trained[0], [striped / "test"], out, count=12)


def data_of(folder):
    page = (folder / "report.html").read_text()
    return json.loads(re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])


def test_everything_is_there(explained):
    out = explained.folder
    assert {path.name for path in out.iterdir()} == {
        *("report.html", "overview.png", "explanation.json", "layers", "classes", "overlays", "labels"),
    }
    assert {path.name for path in (out / "layers").iterdir()} == {"L0.png", "L1.png"}
    assert {path.stem for path in (out / "classes").iterdir()} == set(CLASSES)
    assert {int(path.name[:5]) for path in (out / "overlays").iterdir()} == set(range(12))
    for layer in ("L0", "L1"):
        assert (out / "labels" / layer / "segments.json").exists()
        assert len(list((out / "labels" / layer / "laid over").iterdir())) == 12
    for path in out.rglob("*.png"):
        assert np.asarray(Image.open(path)).size
    assert (explained.shown, explained.left_out, explained.problems) == (12, 12, {})
    assert "12 pictures of 24 (--count shows more)" in describe_explanation(explained)


def test_the_report_holds_what_was_computed(explained, viewer, striped):
    data, record = data_of(explained.folder), json.loads((explained.folder / "explanation.json").read_text())
    assert [image["name"] for image in data["images"]] == [picture["name"] for picture in record["pictures"]]
    assert {image["group"] for image in data["images"]} == set(CLASSES)
    files = {file.name: file for file in picture_files([striped / "test"])}
    pictures, _ = read_pictures([files[image["name"]] for image in data["images"]], viewer.geometry)
    seen = viewer.see(pictures)
    strength = ClusterScales.of(seen.maps).strength(seen.maps.maps)
    shape = (len(data["layers"]), len(data["clusters"]), *data["grid"])
    for number, image in enumerate(data["images"]):
        stored = np.frombuffer(base64.b64decode(image["maps"]), np.uint8).reshape(shape)
        assert np.abs(stored / 255 - np.clip(strength[number], 0, 1)).max() <= 0.5 / 255 + 1e-6
        assert [name for name, _ in image["with"]] == [name for name, _ in seen.predictions(number)]
        assert image["without"][0][0] == seen.predictions_without(number)[0][0]
        for layer, of_layer in enumerate(image["ranked"]):
            scores = [score for _, score, _ in of_layer]
            assert scores == sorted(scores, reverse=True)
            assert of_layer, f"no cluster of layer {layer}"
    likes = data["layers"][1]["likes"][0]
    peaks = seen.maps.maps[:, 1, likes["cluster"]].max(axis=(1, 2))
    assert [image for image, _, _ in likes["responses"]] == np.argsort(-peaks, kind="stable")[:6].tolist()


def test_a_report_asks_for_nothing_from_outside(explained):
    page = (explained.folder / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert not re.search(r"https?://(?!www\.w3\.org/)|@import|url\((?!data:)", page)
    assert "{{" not in page


def test_the_page_escapes_what_would_end_its_script(viewer, pictures, tmp_path):
    names = ClusterNames().with_name(ClusterRef(0, 1), "</script><b>1</b>")
    surrounding = Surrounding("</script><!--", names, problems={"</SCRIPT>": "x"})
    report.write_report(viewer, viewer.see(pictures[:2]), surrounding, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.lower().count("</script>") == 2  # of the data and of the script
    assert data_of(tmp_path)["adapter"] == "</script><!--"
    assert data_of(tmp_path)["names"] == {"L0/C1": "</script><b>1</b>"}


def test_of_too_many_clusters_the_named_and_the_best_are_kept(viewer, pictures, monkeypatch):
    monkeypatch.setattr(report, "MAPS_BYTES", 1)
    monkeypatch.setattr(report, "FEWEST_CLUSTERS", 2)
    names = ClusterNames().with_combination("both", Combination("sum", (ClusterRef(0, 5), ClusterRef(1, 3))))
    data = report_data(viewer, viewer.see(pictures), Surrounding("x", names))
    assert data["clusters"] == [3, 5]
    assert data["all_clusters"] == 6
    best = report_data(viewer, viewer.see(pictures), Surrounding("x"))
    assert len(best["clusters"]) == 2
    for image in best["images"]:
        assert {cluster for of_layer in image["ranked"] for cluster, _, _ in of_layer} <= {0, 1}


def test_an_earlier_explanation_is_replaced_and_nothing_else(explained, trained, striped, tmp_path):
    out = tmp_path / "out"
    explain_pictures(trained[0], [striped / "test" / "down"], out, count=2)
    assert len(list((out / "overlays").iterdir())) > 0
    again = explain_pictures(trained[0], [striped / "test" / "across" / "0.png"], out)
    assert (again.shown, again.left_out) == (1, 0)
    assert {path.stem for path in (out / "classes").iterdir()} <= set(CLASSES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("precious")
    for name, content in (("precious.txt", "precious"), ("explanation.json", '{"my": "thing"}')):
        (tmp_path / "mine" / name).write_text(content)
        with pytest.raises(ValueError, match=f"mine holds {min(name, 'precious.txt')}, which is of no explanation"):
            explain_pictures(trained[0], [striped / "test"], tmp_path / "mine")
        assert (tmp_path / "mine" / name).read_text() == content


@pytest.mark.parametrize("place", ["notes.txt", "overlays/mine.jpg", "mine/a.png"])
def test_what_somebody_put_among_an_explanation_is_not_deleted(trained, striped, tmp_path, place):
    out = tmp_path / "out"
    explain_pictures(trained[0], [striped / "test" / "down"], out, count=1)
    (out / place).parent.mkdir(exist_ok=True)
    (out / place).write_text("precious")
    with pytest.raises(ValueError, match=f"holds {place}, which is of no explanation"):
        explain_pictures(trained[0], [striped / "test" / "down"], out, count=1)
    assert (out / place).read_text() == "precious"


def test_a_folder_beside_it_and_links_are_left_alone(trained, striped, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious.txt").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for _ in range(2):
        explained = explain_pictures(trained[0], [striped / "test" / "down"], tmp_path / "link", count=1)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out" / "report.html").exists()
    assert explained.folder == tmp_path / "link"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "link", "out.partial"}
    assert (tmp_path / "out.partial" / "precious.txt").read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_said_at_once(trained, striped, tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OSError, match=r"out cannot be written: .*\. Choose another folder"):
        explain_pictures(trained[0], [striped / "test"], tmp_path / "file" / "out")


def test_pictures_in_folders_of_any_name_are_shown(trained, striped, tmp_path):
    """Class folders whose names are formulas, no text, too long for a file, or alike once they are names of files."""
    names = [
        b"$\\frac$ $x",
        b"\xe9t\xe9",
        b"x" * 250,
        b"a?",
        b"a*",
        b"A_",
        b"<b>'\"",
        "花".encode(),
        b"line\nbreak",
        b"-",
    ]
    for number, name in enumerate(names):
        folder = tmp_path / "pictures" / os.fsdecode(name)
        folder.mkdir(parents=True)
        shutil.copy(striped / "test" / "down" / f"{number % 8}.png", folder / "same.png")
    explained = explain_pictures(trained[0], [tmp_path / "pictures"], tmp_path / "out")
    assert explained.shown == len(names)
    classes = [path.name for path in (tmp_path / "out" / "classes").iterdir()]
    assert len({name.casefold() for name in classes}) == len(names)
    data_of(tmp_path / "out")


def test_names_of_clusters_that_do_not_exist_are_passed_over(run, striped, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAPS_BYTES", 1)
    monkeypatch.setattr(report, "FEWEST_CLUSTERS", 2)
    ClusterNames().with_name(ClusterRef(0, 999), "ghost").save(run / "adapter")
    explain_pictures(run, [striped / "test" / "down"], tmp_path / "out")
    assert len(data_of(tmp_path / "out")["clusters"]) == 2


def test_pictures_of_one_name_are_kept_apart(trained, striped, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "class").mkdir(parents=True)
        (tmp_path / folder / "class" / "bad.png").write_text("no picture")
        shutil.copy(striped / "test" / "down" / "0.png", tmp_path / folder / "class" / "good.png")
    (tmp_path / "one" / "again").symlink_to(tmp_path / "one" / "class" / "good.png")
    images = [tmp_path / "one", tmp_path / "two", tmp_path / "one" / "again"]
    explained = explain_pictures(trained[0], images, tmp_path / "out")
    assert (explained.shown, len(explained.problems)) == (2, 2)


SCORES = {"adapter": "adapter", "data": "flowers", "images": 8, "seed": 0}
PART = {
    "part": "petals",
    "map": "L0/C1",
    "iou": 0.4,
    "low": 0.3,
    "high": 0.5,
    "pointing": 0.5,
    "energy": 1,
    "chance": 0.45,
}
ROW = {"maps": "learned", "reading": "own", "candidates": 12, "effective_numbers": [1.5], "parts": [PART]}


def test_scores_are_shown(trained, striped, tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps(SCORES | {"rows": [ROW | {"deletion": None}]}))
    explain_pictures(trained[0], [striped / "test"], tmp_path / "out", count=2, scores=tmp_path / "scores.json")
    assert data_of(tmp_path / "out")["scores"]["rows"][0]["parts"] == [PART]


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        json.dumps(SCORES | {"rows": [ROW | {"parts": [PART | {"map": 3}]}]}),
        json.dumps(SCORES | {"rows": [ROW | {"maps": ["learned"]}]}),
        json.dumps(SCORES | {"rows": [ROW | {"parts": [PART | {"iou": float("nan")}]}]}),
        json.dumps(SCORES | {"rows": ROW}),
        json.dumps({"rows": [ROW]}),
    ],
)
def test_damaged_scores_are_refused(tmp_path, content):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(ValueError, match=r"scores.json holds no scores of `gift score --out`"):
        read_scores(tmp_path / "scores.json")


def test_what_cannot_be_explained_writes_nothing(trained, striped, tmp_path, monkeypatch):
    here = tmp_path / "apart" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "scores.json").write_text('{"rows": [{}]}')
    for given, message in (
        ({"images": [tmp_path / "bad.png"]}, "None of 1 pictures can be read:\n  bad.png cannot be decoded"),
        ({"images": [tmp_path / "missing"]}, "missing is neither an image nor a folder"),
        ({"images": [striped], "adapter": tmp_path}, "holds no adapter"),
        ({"images": [striped], "count": 0}, "count must be a whole number of at least 1"),
        ({"images": [striped], "scores": tmp_path / "scores.json"}, "holds no scores of `gift score --out`"),
        ({"images": [striped], "out": striped / "out"}, "must lie apart from .*, which is read"),
        ({"images": [striped / "test"], "out": striped}, "must lie apart from .*, which is read"),
        ({"images": [striped], "out": trained[0].parent}, "must lie apart from"),
        ({"images": [striped], "out": tmp_path / "bad.png"}, "bad.png is a file"),
        ({"images": [striped], "out": here}, "is the current folder or holds it"),
        ({"images": [striped], "out": here.parent}, "is the current folder or holds it"),
    ):
        with pytest.raises(ValueError, match=message):
            explain_pictures(**({"adapter": trained[0], "out": tmp_path / "out"} | given))
    assert not list(tmp_path.glob("out*"))


def test_an_explanation_that_is_stopped_leaves_the_one_before(trained, striped, tmp_path, monkeypatch):
    out = tmp_path / "out"
    explain_pictures(trained[0], [striped / "test"], out, count=2)
    before = (out / "report.html").read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gift.explain.sheets.draw_sheets", stop)
    with pytest.raises(KeyboardInterrupt):
        explain_pictures(trained[0], [striped / "test"], out, count=3)
    assert (out / "report.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_tells_what_was_not_read(trained, striped, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "good.png").write_bytes((striped / "test" / "down" / "0.png").read_bytes())
    for number in range(12):
        (pictures / f"bad-{number:02}.png").write_text("no picture")
    words = ["explain", "--adapter", str(trained[0]), "--images", str(pictures), "--out", str(tmp_path / "out")]
    main([*words, "--colours", "jet"])
    said = capsys.readouterr().out
    assert "1 pictures. Open it in a browser" in said
    assert "Not read: 12" in said
    assert "and 2 more, listed in explanation.json" in said
    assert len(json.loads((tmp_path / "out" / "explanation.json").read_text())["problems"]) == 12
    with pytest.raises(SystemExit):
        main([*words, "--colours", "rainbow"])
    assert "Unknown colours 'rainbow': choose one of viridis, cividis, jet" in capsys.readouterr().err


def test_an_overlay_is_the_grey_picture_where_nothing_responds():
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    grey = np.rint(image.mean(axis=2)).astype(np.uint8)
    assert (overlay(image, np.zeros((2, 2))) == grey[..., None]).all()
    full = overlay(image, np.ones((2, 2)), Look("jet", opacity=1))
    assert (full == full[0, 0]).all()
    assert (overlay(image, np.full((2, 2), 0.4), Look(threshold=0.5)) == grey[..., None]).all()
    half = overlay(image, np.full((2, 2), 0.5), Look(opacity=0.8)).astype(float)
    expected = 0.6 * image.mean(axis=2)[..., None] + 0.4 * 255 * np.array(colormaps["viridis"](0.5)[:3])
    assert np.abs(half - expected).max() <= 0.5


@pytest.mark.parametrize(("field", "value"), [("opacity", 1.1), ("threshold", -0.1), ("colours", "hot")])
def test_a_look_that_cannot_be_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Look(**{field: value})


def test_jupyter_shows_maps(viewer, pictures):
    seen = viewer.see(pictures)
    shown = seen.maps._repr_html_()
    assert "24 images, 2 layers, 6 clusters, 4 x 4 patches, read as own" in shown
    assert shown.count("<img ") == 4 * shown.count("<th>L")
    assert shown.count('alt="map of L') == shown.count("<img ")
    assert "20 more images" in shown
