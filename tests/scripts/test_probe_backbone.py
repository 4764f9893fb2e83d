import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("probe_backbone")


def make_images(folder, seed, per_class=10):
    """Write images of two classes that anybody can tell apart: red and green, with noise."""
    rng = np.random.default_rng(seed)
    for channel, name in enumerate(("red", "green")):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            pixels[..., channel] += 180
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def test_the_shipped_backbone_tells_colours_apart_and_the_result_is_stored(script, tmp_path):
    make_images(tmp_path / "colours" / "train", 0)
    make_images(tmp_path / "colours" / "test", 1, per_class=4)
    train, test = (str(tmp_path / "colours" / split) for split in ("train", "test"))
    script.main(["--train", train, "--test", test, f"--out={tmp_path / 'new' / 'result.json'}"])
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    row = result["data"]["colours"]
    assert (row["classes"], row["train"], row["test"]) == (2, 20, 8)
    assert row["linear probe"]["accuracy"] == row["k-NN"]["accuracy"] == 100
    assert result["backbone"] == "vit_64px_patch8_d128_l8"


def test_neighbours_vote_with_the_weight_of_their_similarity(script, monkeypatch):
    monkeypatch.setattr(script, "NEIGHBOURS", 3)
    train, labels = np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]]), np.array([0, 1, 1, 2])
    near_one = np.array([[1.0, 0.05]])  # one close neighbour of class 0 outweighs two far ones of class 1
    assert script.nearest_neighbours(train, labels, near_one) == [0]
    assert script.nearest_neighbours(train, labels, np.array([[0.2, 1.0]])) == [1]


def test_the_interval_is_wilsons(script):
    # 80 of 100: worked example of Wilson's formula with z = 1.96
    low, high = script.interval(np.arange(100) < 80)
    for edge in (low / 100, high / 100):
        assert abs(edge - 0.8) == pytest.approx(1.96 * (edge * (1 - edge) / 100) ** 0.5, abs=1e-4)
    assert script.interval(np.ones(10, bool))[1] == pytest.approx(100)


def test_sets_that_do_not_belong_together_are_refused(script, tmp_path):
    for name in ("one", "two"):
        make_images(tmp_path / name, 0, per_class=5)
    (tmp_path / "one" / "red").rename(tmp_path / "one" / "blue")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    with pytest.raises(ValueError, match="1 training and 2 test sets"):
        script.main(["--train", one, "--test", one, two])
    with pytest.raises(ValueError, match="no test set be trained on"):
        script.main(["--train", one, "--test", one])
    with pytest.raises(ValueError, match="a name of its own"):
        script.main(["--train", one, one, "--test", two, two])
    with pytest.raises(ValueError, match=r"do not share the classes \['blue', 'red'\]"):
        script.main(["--train", one, "--test", two])
