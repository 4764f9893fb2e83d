import numpy as np
import pytest

from gift.explain.scores import (
    best_maps,
    choose_distinct,
    class_separation,
    correlations,
    effective_number,
    energy_inside,
    maps_of_classes,
    overlap_sums,
    part_agreement,
    pointing_hits,
)

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


# ---- the best map of a part ------------------------------------------------------------------------------------------


def overlap_by_hand(chosen, of_part):
    """Return intersection over union, in patches, of all images together."""
    intersection = union = 0.0
    for is_chosen, share in zip(chosen.ravel(), of_part.ravel(), strict=True):
        intersection += share if is_chosen else 0
        union += 1 if is_chosen else share
    return intersection / union


def every_overlap(maps, of_part):
    """Return the overlap of every candidate at every threshold that chooses something."""
    found = {}
    for candidate in range(maps.shape[1]):
        for threshold in set(maps[:, candidate].ravel().tolist()):
            found[candidate, threshold] = overlap_by_hand(maps[:, candidate] >= threshold, of_part)
    return found


def random_parts(count=3):
    """Return shares of patches, most of them none or all."""
    return np.clip(RNG.normal(size=(4, count, 3, 4)) * 2, 0, 1)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_best_map_has_the_largest_overlap_over_all_candidates_and_thresholds(ties, dtype):
    maps, coverage = RNG.normal(size=(4, 5, 3, 4)).astype(dtype), random_parts()
    maps = maps.round() if ties else maps
    found = best_maps(maps, coverage)
    for part in range(3):
        overlaps = every_overlap(maps, coverage[:, part])
        candidate, threshold = int(found.candidates[part]), float(found.thresholds[part])
        assert found.overlaps[part] == pytest.approx(max(overlaps.values()))
        assert overlaps[candidate, threshold] == pytest.approx(max(overlaps.values()))
        chosen = maps[:, candidate] >= found.thresholds[part]
        assert overlap_by_hand(chosen, coverage[:, part]) == pytest.approx(found.overlaps[part])


def test_equal_responses_are_taken_together_or_not_at_all():
    maps = np.array([2.0, 1, 1, 0]).reshape(1, 1, 2, 2)
    coverage = np.array([1.0, 1, 0, 0]).reshape(1, 1, 2, 2)
    found = best_maps(maps, coverage)
    assert found.overlaps[0] == pytest.approx(2 / 3)  # not 1, which the first two patches alone would reach
    assert found.thresholds[0] == 1


def test_a_part_covers_itself_whole_whatever_the_scale_of_its_map():
    coverage = (RNG.random((4, 2, 3, 4)) < 0.4).astype(float)
    maps = np.stack([RNG.normal(size=(4, 3, 4)), 5 * coverage[:, 1] - 9, 0.1 * coverage[:, 0]], axis=1)
    found = best_maps(maps, coverage)
    assert found.candidates.tolist() == [2, 1]
    assert found.overlaps == pytest.approx([1, 1])
    assert found.thresholds == pytest.approx([0.1, -4])


def test_a_part_that_is_nowhere_is_covered_by_nothing_and_does_not_disturb_the_others():
    maps, coverage = RNG.normal(size=(4, 5, 3, 4)), random_parts(2)
    with_absent = np.insert(coverage, 1, 0, axis=1)
    found, others = best_maps(maps, with_absent), best_maps(maps, coverage)
    assert found.overlaps[1] == 0
    assert found.thresholds[1] in maps[:, found.candidates[1]]
    assert np.array_equal(found.overlaps[[0, 2]], others.overlaps)
    assert np.array_equal(found.candidates[[0, 2]], others.candidates)


def test_a_map_that_never_changes_chooses_every_patch():
    coverage = random_parts(1)
    found = best_maps(np.full((4, 1, 3, 4), 0.1), coverage)
    assert found.overlaps[0] == pytest.approx(coverage.mean())
    assert found.thresholds[0] == 0.1


# ---- scores of one map -----------------------------------------------------------------------------------------------


def test_overlap_sums_are_intersection_and_union_of_every_image():
    chosen, of_part = RNG.random((5, 3, 4)) < 0.5, random_parts(1)[:, 0]
    of_part = np.concatenate([of_part, 0 * of_part[:1]])
    found = overlap_sums(chosen, of_part)
    assert found.shape == (5, 2)
    for image in range(5):
        pairs = list(zip(chosen[image].ravel(), of_part[image].ravel(), strict=True))
        assert found[image, 0] == pytest.approx(sum(share for is_chosen, share in pairs if is_chosen))
        assert found[image, 1] == pytest.approx(sum(1 if is_chosen else share for is_chosen, share in pairs))


def test_pointing_counts_the_share_of_the_part_in_the_highest_patch_of_images_that_show_it():
    maps, of_part = RNG.normal(size=(6, 3, 4)), np.clip(RNG.random((6, 3, 4)), 0.2, 0.9)
    of_part[[1, 4]] = 0
    expected = []
    for image in (0, 2, 3, 5):
        places = [(maps[image, row, column], of_part[image, row, column]) for row in range(3) for column in range(4)]
        expected.append(max(places)[1])
    assert pointing_hits(maps, of_part) == pytest.approx(expected)


def test_energy_inside_is_the_share_of_the_strength_of_all_images_together():
    strength, of_part = RNG.random((5, 3, 4)) * np.arange(1, 6)[:, None, None], RNG.random((5, 3, 4))
    inside = total = 0.0
    for image, row, column in np.ndindex(5, 3, 4):
        inside += strength[image, row, column] * of_part[image, row, column]
        total += strength[image, row, column]
    assert energy_inside(strength, of_part) == pytest.approx(inside / total)
    assert energy_inside(strength, np.ones((5, 3, 4))) == pytest.approx(1)
    assert energy_inside(0 * strength, of_part) == 0


# ---- how many different maps -----------------------------------------------------------------------------------------


def test_correlations_are_over_all_patches_of_all_images_and_none_with_a_constant():
    maps = RNG.normal(size=(5, 4, 3, 4)) * [[[[1.0]], [[5.0]], [[1.0]], [[0.0]]]] + 3
    maps[:, 2] += maps[:, 0]
    found = correlations(maps)
    assert found.shape == (4, 4)
    for one in range(4):
        for other in range(4):
            first, second = (maps[:, place].ravel() - maps[:, place].sum() / 60 for place in (one, other))
            spread = (sum(first**2) * sum(second**2)) ** 0.5
            expected = sum(first * second) / spread if 3 not in (one, other) else 0
            assert found[one, other] == pytest.approx(expected, abs=1e-12)


def orthogonal_maps():
    """Return four maps over 2 images of 2 x 4 patches that are centred, orthogonal and of different strength."""
    signs = [[(-1.0) ** bin(place & mask).count("1") for place in range(16)] for mask in (1, 2, 4, 8)]
    return np.moveaxis(np.array(signs).reshape(4, 2, 2, 4), 0, 1) * [[[[1.0]], [[7.0]], [[0.1]], [[-2.0]]]]


def test_copies_are_one_map_orthogonal_maps_all_different_and_constants_none():
    one = RNG.normal(size=(5, 1, 3, 4))
    assert effective_number(np.concatenate([one, 3 * one + 1, -one], axis=1)) == pytest.approx(1)
    assert effective_number(orthogonal_maps()) == pytest.approx(4)
    assert effective_number(np.full((5, 3, 3, 4), 0.1)) == 0
    with_constants = np.concatenate([orthogonal_maps(), np.full((2, 3, 2, 4), 0.1)], axis=1)
    assert effective_number(with_constants) == pytest.approx(4)


def test_the_effective_number_is_the_participation_ratio_of_the_eigenvalues():
    maps = RNG.normal(size=(5, 6, 3, 4)) @ RNG.normal(size=(4, 4)) + 2 * RNG.normal(size=(5, 1, 3, 4))
    eigenvalues = np.linalg.eigvalsh(np.corrcoef(np.moveaxis(maps, 1, 0).reshape(6, -1)))
    expected = sum(eigenvalues) ** 2 / sum(eigenvalues**2)
    assert 1.2 < expected < 5
    assert effective_number(maps) == pytest.approx(expected)


def test_the_map_that_goes_with_a_class_lights_up_where_its_logit_is_large_even_if_its_mean_is_always_zero():
    logits = RNG.normal(size=(40, 2))
    maps = 0.1 * RNG.normal(size=(40, 3, 4, 4))
    maps[:, 2, 1, 1] += np.maximum(logits[:, 0], 0)
    maps[:, 1, 3, 0] += np.maximum(logits[:, 1], 0)
    maps -= maps.mean(axis=(2, 3), keepdims=True)

    largest, found = maps_of_classes(maps, logits)

    assert found.tolist() == [2, 1]
    assert (largest > 0.6).all()
