import shutil
import threading

import numpy as np
import pytest
import torch

from gift.adapters import load_adapter
from gift.evaluation import predict_images
from gift.explain import explain_images
from gift.explain.names import ClusterNames, ClusterRef
from gift.explain.viewer import Viewer
from gift.merging import merge
from gift.training.options import TrainOptions
from gift.training.train import train
from tests.training.pictures import CLASSES


def test_maps_and_predictions_are_those_of_the_library(viewer, pictures, trained, striped):
    seen = viewer.see(pictures)
    model = load_adapter(trained[0]).model
    expected = explain_images(model, torch.stack([picture.pixels for picture in pictures]), reading="own")
    assert np.array_equal(seen.maps.maps, expected.maps)
    predicted = {each.image: each.classes for each in predict_images(trained[0], striped / "test", top=3)}
    for image, picture in enumerate(pictures):
        assert [name for name, _ in seen.predictions(image)] == [name for name, _ in predicted[picture.name]]
        assert [share for _, share in seen.predictions(image)] == pytest.approx([s for _, s in predicted[picture.name]])
    assert seen.labels == tuple(picture.group for picture in pictures)


def test_without_the_adapter_means_the_trained_head_on_the_layers_as_they_were(viewer, pictures, trained):
    model = load_adapter(trained[0]).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".recover"):
                parameter.zero_()  # so that every residual is 0
        logits = model(pixel_values=torch.stack([picture.pixels for picture in pictures[:3]])).logits
    seen = viewer.see(pictures[:3])
    assert np.allclose(seen.without, logits, atol=1e-5)
    assert not np.allclose(seen.without, seen.maps.logits, atol=1e-3)
    shares = logits.softmax(dim=1)[0]
    likeliest, share = seen.predictions_without(0, 1)[0]
    assert (likeliest, share) == (CLASSES[int(shares.argmax())], pytest.approx(float(shares.max())))


def test_a_merged_model_is_seen_alike_but_not_without_the_adapter(trained, pictures, viewer, tmp_path):
    merge(trained[0], tmp_path / "merged", "transformers")
    merged = Viewer.load(tmp_path / "merged")
    seen, before = merged.see(pictures[:4]), viewer.see(pictures[:4])
    assert seen.without is None
    assert seen.predictions_without(0) is None
    assert np.allclose(seen.maps.maps, before.maps.maps, atol=1e-4)
    assert merged.title == "merged"
    assert viewer.title == "seed-0"


def test_names_are_those_beside_the_adapter(run):
    viewer = Viewer.load(run)
    assert viewer.names() == ClusterNames()
    ClusterNames().with_name(ClusterRef(1, 2), "stripes").save(run / "adapter")
    assert viewer.names().label(ClusterRef(1, 2)) == "stripes (L1/C2)"


def test_an_adapter_without_clusters_is_refused(striped, trained, tmp_path):
    backbone = trained[0].parent / "tiny-vit"
    given = {"data": str(striped), "model": str(backbone), "output_dir": str(tmp_path / "lora"), "method": "lora"}
    train(TrainOptions(**given, epochs=1, batch_size=8, progress=False))
    with pytest.raises(
        ValueError, match="has no clusters to look at: it was trained with lora, and only GIFT has clusters"
    ):
        Viewer.load(tmp_path / "lora")


def test_several_threads_get_what_one_gets(viewer, pictures):
    expected = [viewer.see([picture]).maps.maps for picture in pictures[:8]]
    found = {}

    def look(number):
        found[number] = [viewer.see([picture]).maps.maps for picture in pictures[:8]]

    threads = [threading.Thread(target=look, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        np.array_equal(one, other) for of_one in found.values() for one, other in zip(of_one, expected, strict=True)
    )
    assert len(found) == 4


def test_a_run_that_was_moved_is_seen_too(trained, tmp_path):
    moved = shutil.copytree(trained[0], tmp_path / "elsewhere")
    assert Viewer.load(moved).class_names == CLASSES
