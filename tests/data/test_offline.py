import numpy as np
import pytest
from sklearn.datasets import load_digits

from gift.data.catalog import TASKS
from gift.data.dsprites import draw_sprites
from gift.data.offline import OFFLINE_TASKS, draw_flowers, part_coverage, read_digits
from gift.data.rendered import PARTS, draw_flower


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


def arrays(task, count, seed):
    images, labels = zip(*OFFLINE_TASKS[task].examples(count, seed), strict=True)
    return np.stack(images), np.array(labels)


@pytest.mark.parametrize("task", list(OFFLINE_TASKS))
def test_more_examples_of_a_seed_begin_with_the_same_ones_and_another_seed_draws_others(task):
    (few, labels), (more, more_labels), (other, _) = (arrays(task, *it) for it in ((5, 3), (9, 3), (5, 4)))
    assert few.shape[1:3] == (64, 64)
    assert np.array_equal(few, more[:5])
    assert np.array_equal(labels, more_labels[:5])
    assert np.array_equal(few, other) == (task == "digits")


@pytest.mark.parametrize("task", list(OFFLINE_TASKS))
def test_there_are_enough_examples_for_the_sizes_of_the_catalogue(task):
    row = TASKS[task]
    assert row.train + row.validation + row.test <= OFFLINE_TASKS[task].available


def test_the_digits_of_the_task_are_all_digits_in_their_order():
    pixels, labels = arrays("digits", OFFLINE_TASKS["digits"].available, 0)
    digits = read_digits(64)
    assert np.array_equal(pixels, digits.pixels[..., 1])
    assert np.array_equal(labels, digits.labels)


def test_the_flowers_of_the_task_are_of_all_species_in_turn_each_in_a_scene_of_the_seed():
    pixels, labels = arrays("rendered_flowers", 17, 2)
    assert labels.tolist() == [*range(8), *range(8), 0]
    assert np.array_equal(pixels[9], draw_flower(1, 2 * 2**32 + 9).image)
    drawn, flowers = draw_flowers(8, seed=2, image_size_px=64)
    alike = [np.array_equal(one, other) for one, other in zip(pixels[:8], drawn.pixels, strict=True)]
    assert any(alike)
    assert alike == [flower.label == index for index, flower in enumerate(flowers)]


def test_the_sprites_of_the_task_are_those_in_memory():
    pixels, labels = arrays("dsprites_ori", 4, 1)
    sprites = draw_sprites("dsprites_ori", 4, 1)
    assert np.array_equal(pixels, sprites.pixels[..., 0])
    assert np.array_equal(labels, sprites.labels)
