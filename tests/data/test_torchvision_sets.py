import inspect

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from torchvision.datasets import VisionDataset

from gift.data.decoding import encoded_image, open_upright
from gift.data.torchvision_sets import list_torchvision
from tests.data.image_files import fill, names, picture


class Arrays(VisionDataset):
    """Like CIFAR10: arrays in memory, told apart by `train`."""

    classes = ("zero", "one", "one")

    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        super().__init__(root)
        if download:
            (root / "here").write_text("")
        elif not (root / "here").exists():
            raise RuntimeError("Dataset not found.")
        self.count = 4 if train else 2

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return picture(index), np.int64(index % 3)


class Files(Arrays):
    """Like DTD: files, told apart by `split`."""

    def __init__(self, root, split="train", loader=Image.open, download=False):
        torchvision.datasets.utils.verify_str_arg(split, "split", ("train", "val", "trainval", "test", "extra"))
        super().__init__(root, download=download)
        self.split, self.loader = split, loader

    def __getitem__(self, index):
        return self.loader(self.root / f"{self.split}{index}.png"), index % 2


class Opened(Arrays):
    """Like Caltech101: images that were opened from files and not yet read."""

    def __init__(self, root, download=False):
        super().__init__(root, download=download)

    def __getitem__(self, index):
        picture(index).save(self.root / f"{index}.png")
        return Image.open(self.root / f"{index}.png"), index % 2


class Segmented(Arrays):
    def __getitem__(self, index):
        return picture(index), picture(index)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    for kind in (Arrays, Files, Opened, Segmented):
        monkeypatch.setattr(torchvision.datasets, kind.__name__, kind, raising=False)


def test_arrays_become_png_with_splits_by_train(tmp_path):
    listing = list_torchvision("Arrays", tmp_path)  # not there: downloaded
    assert {split: len(rows) for split, rows in listing.splits.items()} == {"train": 4, "test": 2}
    assert listing.class_names == ("zero", "one (1)", "one (2)")
    assert listing.splits["train"]["label"][:] == [0, 1, 2, 0]
    name, file = encoded_image(listing.splits["train"], 3)
    assert name == "image 3 of Arrays (train)"
    assert np.array_equal(open_upright(name, file), picture(3))


def test_files_stay_files_with_splits_by_name(tmp_path):
    listing = list_torchvision("Files", tmp_path)
    assert list(listing.splits) == ["train", "validation", "test"]
    paths = [[row["image"]["path"] for row in listing.splits[split]] for split in ("validation", "test")]
    assert paths == [[f"{tmp_path}/{split}{index}.png" for index in range(4)] for split in ("val", "test")]


def test_opened_files_stay_files_in_one_pool(tmp_path):
    listing = list_torchvision("Opened", tmp_path)
    assert list(listing.splits) == ["train"]
    assert [row["image"]["path"] for row in listing.splits["train"]] == [f"{tmp_path}/{i}.png" for i in range(4)]


def test_a_set_of_torchvision_itself_is_read(tmp_path):
    fill(tmp_path / "eurosat" / "2750", ("Forest", "River"), count=2)
    listing = list_torchvision("EuroSAT", tmp_path)
    assert names(listing.splits["train"])[1:3] == [("Forest", "1.png"), ("River", "0.png")]
    assert listing.form == "torchvision's EuroSAT"


@pytest.mark.parametrize(("kind", "split"), [("GTSRB", "test"), ("OxfordIIITPet", "trainval")])
def test_sets_that_only_give_decoded_images_have_the_lists_that_are_read(kind, split):
    source = inspect.getsource(getattr(torchvision.datasets, kind))
    assert ("self._samples = samples" in source) or ("self._images = [" in source and "self._labels" in source)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nothing", "torchvision has no set 'Nothing'"),
        ("FakeData", "torchvision has no set 'FakeData'"),
        ("folder", "torchvision has no set 'folder'"),
        ("EMNIST", "EMNIST has no split to train on"),
        ("Segmented", "Items of torchvision's Segmented must be an image and a number"),
        ("Kinetics", "torchvision cannot read this set"),
        ("FER2013", "FER2013 is not in .* or cannot be read there"),
    ],
)
def test_what_is_no_set_of_labelled_images_is_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        list_torchvision(name, tmp_path)
