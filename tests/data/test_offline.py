import numpy as np
from sklearn.datasets import load_digits

from gift.data.offline import draw_flowers, part_coverage, read_digits
from gift.data.rendered import PARTS


def test_digits_are_enlarged_in_their_order_with_all_their_greys():
    images, digits = read_digits(8), load_digits()
    assert images.pixels.shape == (1797, 8, 8, 3)
    assert np.array_equal(images.pixels[..., 0], (digits.images * 255 / 16).round())
    assert np.array_equal(images.pixels[..., 0], images.pixels[..., 2])
    assert [images.class_names[label] for label in images.labels[:3]] == ["0", "1", "2"]
    assert np.all(read_digits(64).pixels.max(axis=(1, 2, 3)) > 200)


def test_flowers_come_as_images_and_as_they_were_drawn():
    images, flowers = draw_flowers(9, seed=3, image_size_px=32)
    assert images.pixels.shape == (9, 32, 32, 3)
    assert all(np.array_equal(pixels, flower.image) for pixels, flower in zip(images.pixels, flowers, strict=True))
    assert images.labels.tolist() == [flower.label for flower in flowers]
    assert len(images.class_names) == 8


def test_the_coverage_of_a_patch_is_the_mean_of_its_pixels():
    _, flowers = draw_flowers(2, seed=3, image_size_px=32)
    coverage = part_coverage(flowers, (4, 4))
    assert coverage.shape == (2, len(PARTS), 4, 4)
    assert np.allclose(coverage.sum(axis=1), 1)
    assert np.isclose(coverage[1, 1, 2, 3], flowers[1].coverage[1, 16:24, 24:32].mean() / 9)
