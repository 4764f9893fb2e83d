import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from gift.data.pictures import picture_files, read_pictures
from gift.explain import exploring
from gift.explain.exploring import open_explorer
from gift.explain.names import ClusterNames, ClusterRef, combined_map
from gift.explain.render import Look, label_overlay, overlay
from gift.training.options import TrainOptions
from gift.training.train import train
from tests.explain.conftest import GENERATOR


@pytest.fixture
def explorer(run, striped):
    return open_explorer(run, [striped / "test"])


@pytest.fixture
def opened(explorer, striped):
    return explorer.open(striped / "test" / "down" / "3.png", "3.png")


def last(steps):
    *_, step = steps
    return step


def everything(explorer, striped):
    """Return what the adapter makes of all test pictures."""
    pictures, _ = read_pictures(picture_files([striped / "test"]), explorer.viewer.geometry)
    return explorer.viewer.see(pictures)


def test_cards_are_the_ranked_clusters_on_the_scale_of_the_reference(explorer, opened, striped):
    cards = explorer.cards(opened, 1, Look())
    assert len({card.ref for card in cards}) == len(cards) > 1
    assert all(card.ref.layer == 1 for card in cards)
    scales, maps = everything(explorer, striped).scales(), opened.seen[0].maps
    for card in cards:
        strength = scales.strength(maps.maps)[0, 1, card.ref.cluster]
        assert np.array_equal(card.drawn, overlay(opened.picture.shown, strength, Look()))
        assert card.caption.startswith(str(card.ref))
    assert {card.ref.layer for card in explorer.cards(opened, None, Look())} == {0, 1}


def test_a_picture_can_be_its_own_scale(run, striped, opened):
    alone = open_explorer(run.rename(run.parent / "elsewhere"), [])  # its data are still known
    assert list(alone.folders) == [str(striped)]
    (run.parent / "elsewhere" / "config.yaml").unlink()
    alone = open_explorer(run.parent / "elsewhere", [])
    assert alone.folders == {}
    picture = alone.open(striped / "test" / "down" / "3.png", "3.png")
    (card, *_) = alone.cards(picture, 0, Look())
    strength = picture.seen[0].scales().strength(picture.seen[0].maps.maps)[0, 0, card.ref.cluster]
    assert np.array_equal(card.drawn, overlay(picture.picture.shown, strength, Look()))
    assert alone.draw_labels(picture, None, 0.5).drawn.shape == picture.picture.shown.shape
    with pytest.raises(ValueError, match="no example 0"):
        alone.open_example(0)
    with pytest.raises(ValueError, match="no folder 'x' to scan; there are: none"):
        last(alone.scan("x", "L0/C0", 3, Look()))


def test_names_are_kept_beside_the_adapter_and_shown(explorer, opened, run):
    explorer.name("L1/C2", " stripes ")
    assert ClusterNames.load(run / "adapter").clusters == {"L1/C2": "stripes"}
    assert explorer.draw(opened, "L1/C2", Look()).caption == "stripes (L1/C2)"
    explorer.name("L1/C2", "")
    explorer.name("L1/C3", "")
    assert ClusterNames.load(run / "adapter") == ClusterNames()


def test_what_is_no_name_or_no_cluster_is_refused_and_changes_nothing(explorer, opened, run):
    explorer.name("L0/C1", "stripes")
    before = (run / "adapter" / "cluster_names.json").read_bytes()
    for change, message in (
        (lambda: explorer.name("L0/C2", "stripes"), "it names L0/C1"),
        (lambda: explorer.name("L0/C2", "x" * 61), "1 to 60 printable"),
        (lambda: explorer.name("L2/C0", "new"), "There is no cluster L2/C0: the last one is L1/C5"),
        (lambda: explorer.name("../../x", "new"), "is written like L8/C28"),
        (lambda: explorer.combine("both", "sum", ["L0/C1"]), "at least two clusters"),
        (lambda: explorer.combine("both", "product", ["L0/C1", "L0/C2"]), "sum, intersection"),
        (lambda: explorer.combine("both", "sum", ["L0/C1", "L0/C6"]), "There is no cluster L0/C6"),
        (lambda: explorer.forget("other"), "no name 'other'"),
        (lambda: explorer.draw(opened, "other", Look()), "is written like L8/C28"),
    ):
        with pytest.raises(ValueError, match=message):
            change()
    assert (run / "adapter" / "cluster_names.json").read_bytes() == before


@pytest.mark.parametrize("how", ["sum", "intersection"])
def test_a_combination_is_that_of_the_library(explorer, opened, striped, how):
    explorer.combine("both", how, ["L0/C1", "L1/C4"])
    all_maps = np.concatenate([everything(explorer, striped).maps.maps, opened.seen[0].maps.maps])
    combined = combined_map(np.stack([all_maps[:, 0, 1], all_maps[:, 1, 4]], axis=1), how)
    low, high = np.quantile(combined, (0.5, 0.98))
    strength = np.maximum(combined[-1] - low, 0) / (high - low)
    card = explorer.draw(opened, "both", Look("cividis"))
    assert np.array_equal(card.drawn, overlay(opened.picture.shown, strength, Look("cividis")))
    assert explorer.forget("both").combinations == {}


def test_label_maps_are_those_of_the_library(explorer, opened, striped):
    seen = everything(explorer, striped)
    card = explorer.draw_labels(opened, 0, Look().opacity)
    image = next(index for index, picture in enumerate(seen.pictures) if picture.name.endswith("down/3.png"))
    labels = seen.maps.segment(0)
    expected = label_overlay(opened.picture.shown, labels.of_pixels(image), labels.palette, Look().opacity)
    assert (card.drawn == expected).all(axis=2).mean() > 0.9  # the picture counts twice in the explorer's scale
    assert card.layer == 0
    assert sum(share for _, _, share in card.legend) == pytest.approx(1)
    colours = {name: f"#{bytes(colour).hex()}" for name, colour in zip(labels.names, labels.palette, strict=True)}
    assert all(name in colours or "+" in name for name, _, _ in card.legend)
    best = explorer.cards(opened, None, Look())[0].ref.layer
    assert explorer.draw_labels(opened, None, 0.5).layer == best


@pytest.mark.parametrize("at_once", [5, 32])
def test_a_scan_finds_where_a_cluster_responds_most(explorer, striped, monkeypatch, at_once):
    monkeypatch.setattr(exploring, "SCANNED_AT_ONCE", at_once)
    seen, folder = everything(explorer, striped), str(striped / "test")
    steps = list(explorer.scan(folder, "L1/C4", 5, Look()))
    cards, problems = steps[-1].cards, steps[-1].problems
    peaks = seen.maps.maps[:, 1, 4].max(axis=(1, 2))
    best = np.argsort(-peaks, kind="stable")[:5]
    assert [card.caption.split(":")[0] for card in cards] == [seen.pictures[image].name for image in best]
    assert problems == {}
    assert [step.read for step in steps] == [*range(at_once, 24, at_once), 24, 24]
    assert all(step.cards is None for step in steps[:-1])
    explorer.combine("both", "sum", ["L0/C1", "L1/C4"])
    both = last(explorer.scan(folder, "both", 1, Look())).cards
    combined = combined_map(np.stack([seen.maps.maps[:, 0, 1], seen.maps.maps[:, 1, 4]], axis=1), "sum")
    assert both[0].caption.startswith(seen.pictures[int(combined.max(axis=(1, 2)).argmax())].name)
    explorer.name("L1/C4", "beak")
    by_name = last(explorer.scan(folder, "beak", 5, Look())).cards
    assert [card.caption for card in by_name] == [card.caption for card in cards]


def test_a_scan_reads_around_what_is_damaged_and_only_what_was_given(run, striped, tmp_path):
    folder = shutil.copytree(striped / "test" / "down", tmp_path / "folder")
    (folder / "4.png").write_bytes(b"no picture")
    explorer = open_explorer(run, [folder])
    found = last(explorer.scan(str(folder), "L0/C0", 100, Look()))
    assert len(found.cards) == 7
    assert list(found.problems) == ["4.png"]
    for path in folder.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"No picture of .*folder can be read: 0.png cannot be decoded"):
        last(explorer.scan(str(folder), "L0/C0", 3, Look()))
    with pytest.raises(ValueError, match="There is no folder '/etc' to scan"):
        last(explorer.scan("/etc", "L0/C0", 3, Look()))


def test_two_adapters_see_the_same_picture(trained, striped):
    explorer = open_explorer(trained[0], [striped / "test"], compare=trained[1])
    opened = explorer.open_example(0)
    assert len(opened.seen) == 2
    assert opened.seen[0].pictures[0].name == opened.seen[1].pictures[0].name
    assert not np.allclose(opened.seen[0].maps.maps, opened.seen[1].maps.maps)
    own, other = (explorer.cards(opened, 0, Look(), side) for side in (0, 1))
    assert not np.array_equal(own[0].drawn, other[0].drawn)
    names = explorer.sides[1].viewer.layer_names
    assert [name in names for name in explorer.viewer.layer_names] == [True, True]


def test_layers_of_two_adapters_are_compared_by_name(trained, striped, tmp_path):
    """The other adapter has the second layer only, as its first."""
    backbone = trained[0].parent / "tiny-vit"
    target = open_explorer(trained[0], [striped / "test"]).viewer.layer_names[1]
    given = {"data": str(striped), "model": str(backbone), "output_dir": str(tmp_path / "one"), "progress": False}
    options = GENERATOR | {"target_modules": [target]}
    train(TrainOptions(**given, epochs=1, batch_size=8, method_options=options))
    explorer = open_explorer(trained[0], [striped / "test"], compare=tmp_path / "one")
    opened = explorer.open_example(3)
    assert explorer.cards(opened, 0, Look(), side=1) == []
    assert {card.ref.layer for card in explorer.cards(opened, 1, Look(), side=1)} == {0}


@pytest.mark.parametrize("content", ["{a: [", "- 1", "data: 3", "data: /missing", "\x00"])
def test_a_damaged_file_of_options_is_passed_over(run, content):
    (run / "config.yaml").write_text(content)
    assert open_explorer(run, []).folders == {}


def test_a_folder_of_tables_is_no_pictures_unless_it_is_asked_for(run, tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.parquet").touch()
    (run / "config.yaml").write_text(f"data: {tmp_path / 'tables'}")
    assert open_explorer(run, []).folders == {}
    with pytest.raises(ValueError, match="tables is neither an image nor a folder with images"):
        open_explorer(run, [tmp_path / "tables"])


def test_pictures_with_too_many_pixels_are_refused_before_they_are_decoded(explorer, tmp_path):
    Image.new("1", (10_000, 4_001)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"x\.png is too large: 10000 x 4001 pixels, and 40000000 are allowed"):
        explorer.open(tmp_path / "large.png", "x.png")


def test_people_who_name_at_the_same_time_lose_no_name(explorer, run):
    threads = [
        threading.Thread(target=explorer.name, args=(f"L{layer}/C{cluster}", f"name {layer} {cluster}"))
        for layer in (0, 1)
        for cluster in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = ClusterNames.load(run / "adapter")
    assert len(names.clusters) == 12
    assert names.label(ClusterRef(1, 5)) == "name 1 5 (L1/C5)"
