import numpy as np
import pytest

from gift.explain.scores import choose_distinct, class_separation, part_agreement

RNG = np.random.default_rng(0)


def test_agreement_is_the_correlation_over_all_patches_of_all_images():
    maps, coverage = RNG.normal(size=(5, 2, 3, 4, 4)), RNG.random((5, 2, 4, 4))
    found = part_agreement(maps, coverage)
    assert found.shape == (2, 3, 2)
    expected = np.corrcoef(maps[:, 1, 2].ravel(), coverage[:, 0].ravel())[0, 1]
    assert found[1, 2, 0] == pytest.approx(expected)


def test_a_part_agrees_with_itself_and_a_constant_map_with_nothing():
    coverage = RNG.random((3, 1, 4, 4))
    maps = np.stack([2 * coverage[:, 0] + 1, -coverage[:, 0], np.full((3, 4, 4), 7.0)], axis=1)[:, None]
    assert part_agreement(maps, coverage)[0, :, 0] == pytest.approx([1, -1, 0])


def test_class_separation_is_the_explained_share_of_the_variance():
    labels = np.array([0, 0, 1, 1, 2, 2])
    decided, noise = labels.astype(float), RNG.normal(size=6)
    maps = np.stack([decided, noise], axis=1)[:, None, :, None, None] * np.ones((1, 1, 1, 2, 2))
    means = noise.reshape(3, 2).mean(axis=1)
    expected = np.square(means - noise.mean()).mean() / noise.var()
    assert class_separation(maps, labels)[0] == pytest.approx([1, expected])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_map_that_never_changes_agrees_with_nothing_separates_nothing_and_is_not_chosen(dtype):
    maps = np.concatenate([np.full((7, 1, 1, 3, 3), 0.1), RNG.normal(size=(7, 1, 1, 3, 3))], axis=2).astype(dtype)
    labels = np.array([0, 0, 1, 1, 2, 2, 2])
    assert class_separation(maps, labels)[0, 0] == 0
    assert class_separation(maps, labels)[0, 1] > 0
    assert part_agreement(maps, RNG.random((7, 1, 3, 3)))[0, 0] == 0
    assert choose_distinct(np.array([[0.9, 0.1]]), maps, 2) == [(0, 1)]


def test_the_best_scores_are_chosen_without_look_alikes_also_inverted_ones():
    first, second = RNG.normal(size=(2, 6, 4, 4))
    maps = np.stack([first, 3 * first, -first, second], axis=1)[:, None]
    scores = np.array([[0.1, 0.9, 0.8, 0.5]])
    assert choose_distinct(scores, maps, 3) == [(0, 1), (0, 3)]
    assert choose_distinct(scores, maps, 1) == [(0, 1)]
    assert choose_distinct(scores, maps, 3, largest_correlation=1.1) == [(0, 1), (0, 2), (0, 3)]
