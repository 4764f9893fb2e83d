from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from gift.data.images import LabelledImages
from gift.data.parts import PartImages
from gift.explain import ClusterMaps
from gift.explain.shortcuts import ShortcutOptions, find_shortcuts
from gift.explain.tables import shortcut_table
from tests.models import make_vit

COUNT = 12
LOGITS = 2.0 * (-1) ** np.arange(2 * COUNT).reshape(2, COUNT).T  # each class's have a standard deviation of 2


class Toy(nn.Module):
    """Class 0 is the brightness of the object, class 1 that of the cue; the ViT in it only says how patches lie."""

    def __init__(self, cue_counts):
        super().__init__()
        self.vit, self.cue_counts = make_vit(), cue_counts

    def forward(self, images):
        cue, flower = images[:, 0, :8, :8].mean(dim=(1, 2)), images[:, 0, 16:24, 16:24].mean(dim=(1, 2))
        return torch.stack([10 * flower, 10 * cue * self.cue_counts], dim=1)


def make_truth():
    """Return images with an object in one patch, and a cue in another if the label is 1."""
    labels = np.arange(COUNT) % 2
    masks = np.zeros((COUNT, 3, 32, 32), np.float32)
    masks[:, 0, 16:24, 16:24] = 1
    masks[labels == 1, 2, :8, :8] = 1
    masks[:, 1] = 1 - masks[:, 0] - masks[:, 2]
    pixels = np.random.default_rng(0).integers(0, 40, (COUNT, 32, 32, 3)).astype(np.uint8)
    pixels[masks[:, [0, 2]].sum(axis=1) > 0] = 250
    return PartImages(
        LabelledImages(pixels, labels, ("a", "b")), masks, ("flower", "background", "cue"), ("flower",), {}
    )


@pytest.fixture
def with_maps(monkeypatch):
    """Let the clusters be: the cue, the object, a corner of the background."""
    places = [(0, 0), (2, 2), (3, 0)]

    def explain(model, images, reading):
        maps = 0.01 * np.random.default_rng(1).normal(size=(COUNT, 1, 3, 4, 4))
        for cluster, (row, column) in enumerate(places):
            maps[:, 0, cluster, row, column] += (
                images[:, 0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].mean(dim=(1, 2)).numpy()
            )
        zeros = np.zeros(COUNT, int)
        return ClusterMaps(
            maps,
            ("l",),
            np.zeros((1, 1, 3)),
            zeros,
            LOGITS,
            np.zeros((COUNT, 2), int),
            (4,),
            (0, 1, 2),
            "own",
            True,
            -1,
            {},
        )

    monkeypatch.setattr("gift.explain.shortcuts.explain_images", explain)


def normalise(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def test_a_cluster_on_a_planted_cue_is_found_for_its_class_only(with_maps):
    truth = make_truth()
    found = find_shortcuts(Toy(cue_counts=True), truth, normalise)
    assert [(str(one.ref), one.label) for one in found] == [("L4/C0", 1)]
    assert max(found[0].lifts, key=found[0].lifts.get) == "cue"
    assert set(found[0].lifts) == {"background", "cue"}
    assert found[0].lifts["cue"] == pytest.approx(15)  # it is one of 15 patches without object, and all of the region
    assert found[0].outside > 0.8
    mean = normalise(truth.images.pixels)[:, 0].unflatten(1, (4, 8)).unflatten(3, (4, 8)).mean(dim=(1, 2, 3, 4))
    drop = 10 / 2 * (250 / 255 - mean[1::2])  # minus what a random patch takes, which is the cue once in sixteen times
    assert 0.6 * float(drop.mean()) < found[0].net_drop <= float(drop.mean()) + 1e-4
    assert 0 < found[0].low < found[0].net_drop


def test_a_cue_that_does_not_count_is_not_found(with_maps):
    assert find_shortcuts(Toy(cue_counts=False), make_truth(), normalise) == []


def test_a_cluster_on_the_object_is_no_shortcut_since_the_object_is_never_removed(with_maps):
    found = find_shortcuts(Toy(True), make_truth(), normalise, ShortcutOptions(outside=0.0))
    assert {(str(one.ref), one.label) for one in found} == {("L4/C0", 1)}


def test_images_without_classes_are_refused(with_maps):
    truth = make_truth()
    truth.images.labels[:] = -1
    with pytest.raises(ValueError, match="whose classes and object are known"):
        find_shortcuts(Toy(True), truth, normalise)


def test_the_table_says_what_a_shortcut_lies_on(with_maps):
    found = find_shortcuts(Toy(True), make_truth(), normalise)
    line = shortcut_table(found, ("a", "b")).splitlines()[2]
    assert line.startswith("| L4/C0 | b |")
    assert "cue" in line


def test_objects_that_fill_the_images_and_have_no_surroundings_give_no_shortcuts(with_maps):
    truth = make_truth()
    filled = PartImages(truth.images, np.ones((COUNT, 1, 32, 32), np.float32), ("object",), ("object",), {})
    assert find_shortcuts(Toy(True), filled, normalise) == []
    found = find_shortcuts(Toy(True), make_truth(), normalise)
    assert shortcut_table([replace(found[0], lifts={})], ()).splitlines()[2].endswith("|  |")


def test_images_of_other_classes_are_refused(with_maps):
    truth = make_truth()
    truth.images.labels[:] = 7
    with pytest.raises(ValueError, match="labels up to 7, and the model 2 classes"):
        find_shortcuts(Toy(True), truth, normalise)
