import numpy as np
import pytest

from gift.data.dsprites import choose_sprites, draw_sprite, draw_sprites, sprite_labels


def sprite(shape=0, scale=5, orientation=0, x=16, y=16):
    return draw_sprite(np.array([shape, scale, orientation, x, y]))


def middle(pixels):
    """Columns and rows of the centre of mass, in pixels."""
    weights = pixels.astype(np.float64) / pixels.sum()
    return (weights.sum(0) @ np.arange(64), weights.sum(1) @ np.arange(64))


def test_factors_are_different_repeatable_and_begin_alike():
    factors = choose_sprites(3000, 7)
    assert len(np.unique(factors, axis=0)) == 3000
    assert (factors.min(axis=0) >= 0).all()
    np.testing.assert_array_equal(factors.max(axis=0), [2, 5, 39, 31, 31])
    np.testing.assert_array_equal(choose_sprites(10, 7), factors[:10])
    assert (choose_sprites(10, 8) != factors[:10]).any()


@pytest.mark.parametrize("count", [0, 3 * 6 * 40 * 32 * 32 + 1])
def test_only_as_many_sprites_as_there_are_can_be_chosen(count):
    with pytest.raises(ValueError, match="737280 different"):
        choose_sprites(count, 0)


def test_labels_are_16_even_bins_of_the_position_or_the_orientation():
    every = np.stack([np.zeros(40, int), np.zeros(40, int), np.arange(40), np.arange(40) % 32, np.zeros(40, int)], 1)
    np.testing.assert_array_equal(sprite_labels("dsprites_loc", every[:32]), np.arange(32) // 2)
    np.testing.assert_array_equal(sprite_labels("dsprites_ori", every), np.floor(np.arange(40) / 2.5))
    with pytest.raises(ValueError, match="got 'dsprites'"):
        sprite_labels("dsprites", every)


@pytest.mark.parametrize("shape", [0, 1])
def test_the_middle_of_a_sprite_lies_where_its_position_says(shape):
    for x, y in ((0, 0), (31, 0), (5, 29)):
        expected = [16 + 32 * place / 31 - 0.5 for place in (x, y)]
        np.testing.assert_allclose(middle(sprite(shape=shape, orientation=3, x=x, y=y)), expected, atol=0.05)


def test_an_area_grows_with_the_square_of_the_scale():
    areas = [sprite(shape=1, scale=scale).sum() / 255 for scale in range(6)]
    expected = [np.pi * 0.6 * (16 * (0.5 + 0.1 * scale)) ** 2 for scale in range(6)]
    np.testing.assert_allclose(areas, expected, rtol=0.02)


def test_no_sprite_leaves_the_image_and_the_last_orientation_is_the_first():
    for shape in range(3):
        for orientation in range(0, 40, 3):
            rows, columns = np.nonzero(sprite(shape=shape, orientation=orientation, x=0, y=31))
            farthest = np.hypot(rows + 0.5 - 48, columns + 0.5 - 16).max()
            assert 13 < farthest < 16 + 0.5**0.5  # 16 from the edges, and a pixel that is touched lies so much farther
        np.testing.assert_array_equal(sprite(shape=shape), sprite(shape=shape, orientation=39))
        assert (sprite(shape=shape) != sprite(shape=shape, orientation=4)).any()


def test_sprites_in_memory_are_rgb_with_labels_of_the_task():
    images = draw_sprites("dsprites_ori", 5, 0)
    factors = choose_sprites(5, 0)
    assert images.pixels.shape == (5, 64, 64, 3)
    assert images.class_names == tuple(map(str, range(16)))
    np.testing.assert_array_equal(images.labels, sprite_labels("dsprites_ori", factors))
    np.testing.assert_array_equal(images.pixels[4, :, :, 1], draw_sprite(factors[4]))
