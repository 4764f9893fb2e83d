import numpy as np
import torch

from gift.data.images import LabelledImages, NormalisedImages


def test_pixels_are_scaled_and_normalised_per_channel_and_labels_are_numbers():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    images = LabelledImages(pixels, np.array([2, 0, 1]), ("a", "b", "c"))
    items = NormalisedImages(images, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    expected = (pixels[1] / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.6, 0.7])
    assert len(items) == 3
    assert np.allclose(items[1]["pixel_values"].permute(1, 2, 0), expected, atol=1e-6)
    assert items[1]["pixel_values"].dtype == torch.float32
    assert [item["labels"] for item in map(items.__getitem__, range(3))] == [2, 0, 1]


def test_a_slice_keeps_images_and_labels_together():
    pixels = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    part = LabelledImages(pixels, np.arange(4), ("a", "b", "c", "d"))[1:3]
    assert part.pixels[:, 0, 0, 0].tolist() == part.labels.tolist() == [1, 2]
    assert part.class_names == ("a", "b", "c", "d")
