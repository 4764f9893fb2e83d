import numpy as np
import pytest
import torch

from gift.explain import ClusterMaps, Reading, explain_images
from gift.explain.ranking import (
    ClusterScales,
    concentration,
    rank_for_dataset,
    rank_for_image,
    stability_under_augmentation,
    strongest_responses,
)
from gift.explain.recording import token_statistics
from tests.models import make_adapted_vit, make_images

RNG = np.random.default_rng(0)
PREDICTIONS = np.array([0, 1, 1, 3, 0, 1, 3, 0])


def make_maps(maps, predictions=PREDICTIONS, layers=(2, 5), clusters=(7, 0, 4)):
    """Return maps of four classes, of which class 2 is never predicted."""
    logits = np.zeros((len(maps), 4), np.float32)
    logits[np.arange(len(maps)), predictions[: len(maps)]] = 1.0
    return ClusterMaps(
        maps=maps.astype(np.float32),
        layer_names=tuple(f"blocks.{number}.attn.proj" for number in layers),
        assignments=np.zeros((len(layers), 4, len(clusters)), np.float32),
        predictions=logits.argmax(axis=1),
        logits=logits,
        image_sizes=np.full((len(maps), 2), 32),
        layer_numbers=layers,
        cluster_numbers=clusters,
        reading="plain",
        adapted=True,
        block=-1,
        versions={},
    )


def random_maps(seed=0, shape=(8, 2, 3, 4, 5)):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) * rng.uniform(0.5, 3, (1, *shape[1:3], 1, 1)) + rng.normal(size=(*shape[:3], 1, 1))


def every_cluster(maps):
    layers, clusters = maps.maps.shape[1:3]
    return [(layer, cluster) for layer in range(layers) for cluster in range(clusters)]


def share_surpassed(value, values):
    """Return the share of all other values that are smaller, of which equal ones count half."""
    smaller = sum(1.0 if other < value else 0.5 if other == value else 0.0 for other in values) - 0.5
    return smaller / (len(values) - 1)


def concentration_by_hand(strength):
    """Return the share of the strongest tenth (here 2 of 20 patches); nothing of nothing."""
    ordered = sorted(strength.ravel(), reverse=True)
    return sum(ordered[:2]) / sum(ordered) if any(ordered) else 0


# ---- scales ----------------------------------------------------------------------------------------------------------


def test_the_scales_of_a_cluster_are_quantiles_and_spread_of_its_responses_in_all_images():
    maps = make_maps(random_maps())
    scales = ClusterScales.of(maps)
    for layer, cluster in every_cluster(maps):
        responses = np.sort(maps.maps[:, layer, cluster].astype(np.float64).ravel())
        place = 0.98 * (len(responses) - 1)
        high = responses[int(place)] + (place - int(place)) * (responses[int(place) + 1] - responses[int(place)])
        spread = (sum((responses - responses.mean()) ** 2) / len(responses)) ** 0.5
        assert scales.low[layer, cluster] == pytest.approx((responses[79] + responses[80]) / 2, abs=1e-5)
        assert scales.high[layer, cluster] == pytest.approx(high, abs=1e-5)
        assert scales.deviation[layer, cluster] == pytest.approx(spread, rel=1e-5)


def test_the_mean_of_a_class_is_in_standard_deviations_of_the_strength_in_an_image():
    maps = make_maps(random_maps())
    scales = ClusterScales.of(maps)
    for layer, cluster in every_cluster(maps):
        responses = maps.maps[:, layer, cluster].astype(np.float64)
        strengths = np.array([np.maximum(one - np.median(responses), 0).mean() for one in responses])
        standard = (strengths - sum(strengths) / 8) / (sum((strengths - sum(strengths) / 8) ** 2) / 8) ** 0.5
        for label in range(4):
            of_class = [standard[image] for image in range(8) if PREDICTIONS[image] == label]
            expected = sum(of_class) / len(of_class) if of_class else 0
            assert scales.class_means[layer, cluster, label] == pytest.approx(expected, abs=1e-5)


def test_a_cluster_whose_mean_is_zero_in_every_image_likes_the_class_whose_images_it_lights_up():
    maps = 0.01 * RNG.normal(size=(8, 2, 3, 4, 5))
    maps[PREDICTIONS == 3, 1, 2, 1, 1] += 4
    maps -= maps.mean(axis=(3, 4), keepdims=True)  # as the reading `own` does
    found = make_maps(maps)
    scales = ClusterScales.of(found)
    assert scales.class_means[1, 2, 3] > 1.5
    shifted = ClusterScales.of(make_maps(maps + 1e-6 * RNG.normal(size=(8, 2, 3, 1, 1))))
    assert shifted.class_means == pytest.approx(scales.class_means, abs=1e-2)


def test_strength_is_none_below_the_low_end_one_at_the_high_end_and_goes_on_beyond():
    low, high = np.array([[1.0, -2.0]]), np.array([[3.0, -1.0]])
    scales = ClusterScales(low, high, np.ones((1, 2)), np.zeros((1, 2, 1)))
    responses = np.array([[0.0, 1.0, 2.0, 3.0, 7.0], [-3.0, -2.0, -1.5, -1.0, 0.0]]).reshape(1, 1, 2, 1, 5)
    expected = [[0, 0, 0.5, 1, 3], [0, 0, 0.5, 1, 2]]
    assert scales.strength(responses).reshape(2, 5).tolist() == expected


def test_a_cluster_that_never_changes_has_no_strength():
    maps = make_maps(np.full((8, 2, 3, 4, 5), 0.1))
    scales = ClusterScales.of(maps)
    assert not scales.strength(maps.maps).any()
    assert not scales.class_means.any()


# ---- criteria --------------------------------------------------------------------------------------------------------


def test_concentration_is_the_share_of_the_strongest_tenth_of_the_patches():
    strength = RNG.random((2, 2, 3, 4, 5)) ** 3
    strength[1, 1, 2] = 0
    found = concentration(strength)
    for image, layer, cluster in np.ndindex(2, 2, 3):
        expected = concentration_by_hand(strength[image, layer, cluster])
        assert found[image, layer, cluster] == pytest.approx(expected)


def test_at_least_one_patch_is_the_strongest_tenth():
    assert concentration(np.array([1.0, 3.0, 0.0, 4.0]).reshape(1, 1, 1, 2, 2)) == pytest.approx(4 / 8)


def image_criteria(maps, image, layer, cluster, scales):
    here = maps.maps[image, layer, cluster].astype(np.float64)
    low, high = scales.low[layer, cluster], scales.high[layer, cluster]
    strength = np.array([max(0.0, one - low) / (high - low) for one in here.ravel()])
    contrast = (here.max() - sum(here.ravel()) / 20) / scales.deviation[layer, cluster]
    agreement = scales.class_means[layer, cluster, PREDICTIONS[image]]
    return {"concentration": concentration_by_hand(strength), "contrast": contrast, "agreement": agreement}


def dataset_criteria(maps, labels, layer, cluster):
    responses = maps.maps[:, layer, cluster].astype(np.float64)
    between = sum(np.square(responses[labels == label].mean(0) - responses.mean(0)).sum() for label in labels)
    low, high = np.quantile(responses, 0.5), np.quantile(responses, 0.98)
    strength = np.maximum(responses - low, 0) / (high - low)
    concentrated = sum(concentration_by_hand(one) for one in strength) / len(strength)
    separated = between / np.square(responses - responses.mean(0)).sum()
    return {"separation": separated, "concentration": concentrated}


def assert_ranked_by(found, maps, criteria):
    """Every cluster has these criteria, the mean share that it surpasses as its score, and the best come first."""
    assert {(one.layer, one.cluster) for one in found} == set(criteria)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for one in found:
        own = criteria[one.layer, one.cluster]
        assert one.criteria == pytest.approx(own, abs=1e-4)
        shares = [share_surpassed(own[name], [other[name] for other in criteria.values()]) for name in own]
        assert one.score == pytest.approx(sum(shares) / len(shares))
        assert str(one.ref) == f"L{(2, 5)[one.layer]}/C{(7, 0, 4)[one.cluster]}"


@pytest.mark.parametrize("image", [0, 3])
def test_clusters_of_an_image_are_ranked_by_concentration_contrast_and_agreement(image):
    maps, scales = make_maps(random_maps()), ClusterScales.of(make_maps(random_maps()))
    criteria = {place: image_criteria(maps, image, *place, scales) for place in every_cluster(maps)}
    assert_ranked_by(rank_for_image(maps, image, count=10), maps, criteria)


def test_an_image_is_ranked_on_the_scales_that_are_given():
    maps, scales = make_maps(random_maps()), ClusterScales.of(make_maps(random_maps(seed=1)))
    criteria = {place: image_criteria(maps, 2, *place, scales) for place in every_cluster(maps)}
    assert_ranked_by(rank_for_image(maps, 2, scales, count=10), maps, criteria)
    assert rank_for_image(maps, 2, scales) != rank_for_image(maps, 2)


@pytest.mark.parametrize("with_stability", [False, True])
def test_clusters_of_a_data_set_are_ranked_by_separation_concentration_and_stability(with_stability):
    maps, labels = make_maps(random_maps()), np.array([0, 0, 1, 1, 1, 2, 2, 2])
    stability = RNG.uniform(-1, 1, (2, 3)) if with_stability else None
    criteria = {place: dataset_criteria(maps, labels, *place) for place in every_cluster(maps)}
    for place, own in criteria.items() if with_stability else ():
        own["stability"] = stability[place]
    assert_ranked_by(rank_for_dataset(maps, labels, stability), maps, criteria)


def test_equal_values_of_a_criterion_count_half():
    maps, labels = make_maps(random_maps()), np.array([0, 0, 1, 1, 1, 2, 2, 2])
    stability = np.array([[0.5, 0.5, 0.1], [0.5, 0.9, 0.9]])
    criteria = {place: dataset_criteria(maps, labels, *place) for place in every_cluster(maps)}
    shares = np.array([[2 / 5, 2 / 5, 0], [2 / 5, 4.5 / 5, 4.5 / 5]])
    for one in rank_for_dataset(maps, labels, stability):
        of_others = [[own[name] for own in criteria.values()] for name in ("separation", "concentration")]
        own = criteria[one.layer, one.cluster].values()
        surpassed = [share_surpassed(value, values) for value, values in zip(own, of_others, strict=True)]
        assert one.score == pytest.approx((sum(surpassed) + shares[one.layer, one.cluster]) / 3)


def planted(kind):
    """Return dull maps, and in layer 1, cluster 2 one that lights up in one patch or in images of one class."""
    maps = 0.3 * np.random.default_rng(3).normal(size=(8, 2, 3, 4, 5))
    if kind == "spot":
        maps[PREDICTIONS == 1, 1, 2, 2, 3] += 9
    else:
        maps[PREDICTIONS == 1, 1, 2] += 9
    return make_maps(maps)


def test_a_planted_spot_is_the_first_map_of_the_images_that_show_it():
    found = rank_for_image(planted("spot"), 1)
    assert str(found[0].ref) == "L5/C4"
    assert found[0].score == 1


def test_a_map_that_lights_up_for_one_class_separates_classes_best():
    found = rank_for_dataset(planted("class"), PREDICTIONS)
    best = max(found, key=lambda one: one.criteria["separation"])
    assert str(best.ref) == "L5/C4"
    assert best.criteria["separation"] > 0.9


@pytest.mark.parametrize("rank", [lambda maps: rank_for_image(maps, 1), lambda m: rank_for_dataset(m, PREDICTIONS)])
def test_near_duplicates_and_maps_that_do_not_vary_are_passed_over(rank):
    maps = planted("spot").maps.copy()
    maps[:, 0, 0], maps[:, 0, 1] = 2 * maps[:, 1, 2] + 1, -maps[:, 1, 2]
    maps[:, 1, 0] = 4
    found = rank(make_maps(maps))
    chosen = {(one.layer, one.cluster) for one in found}
    assert len(chosen) == len(found) == 3
    assert len(chosen & {(1, 2), (0, 0), (0, 1)}) == 1
    assert (1, 0) not in chosen


def test_no_more_clusters_are_ranked_than_were_asked_for():
    maps = make_maps(random_maps())
    assert [len(rank_for_image(maps, 0, count=count)) for count in (1, 2, 9)] == [1, 2, 6]
    assert len(rank_for_image(maps, 0)) == 5
    assert rank_for_dataset(maps, PREDICTIONS, count=2) == rank_for_dataset(maps, PREDICTIONS)[:2]


# ---- stability -------------------------------------------------------------------------------------------------------


def correlation(first, second):
    first, second = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
    first, second = first - first.mean(), second - second.mean()
    return sum(first * second) / (sum(first**2) * sum(second**2)) ** 0.5


@pytest.mark.parametrize("reading", ["plain", "own"])
def test_stability_is_the_mean_correlation_with_mirrored_and_dimmed_images(reading):
    model, images = make_adapted_vit(), make_images(3) + torch.tensor([-3.0, 1.0, 9.0])[:, None, None]
    found = stability_under_augmentation(model, images, layers=[1], clusters=[4, 0], reading=reading)
    dimmed = images.clone()
    for image in range(3):
        for channel in range(3):
            mean = images[image, channel].mean()
            dimmed[image, channel] = mean + 0.8 * (images[image, channel] - mean)
    original, mirrored, dim = (
        explain_images(model, one, [1], [4, 0], reading=reading).maps for one in (images, images.flip(3), dimmed)
    )
    for cluster in range(2):
        here = original[:, 0, cluster]
        back = np.stack([[row[::-1] for row in one] for one in mirrored[:, 0, cluster]])
        expected = (correlation(here, back) + correlation(here, dim[:, 0, cluster])) / 2
        assert found[0, cluster] == pytest.approx(expected, abs=1e-4)
    assert found.shape == (1, 2)


def test_maps_of_mirror_images_without_contrast_are_as_stable_as_their_correlation_with_their_mirror():
    model, images = make_adapted_vit(), make_images(2).mean(dim=(2, 3), keepdim=True).expand(2, 3, 32, 32)
    found = stability_under_augmentation(model, images)
    maps = explain_images(model, images).maps
    for layer, cluster in np.ndindex(2, 6):
        expected = (correlation(maps[:, layer, cluster], maps[:, layer, cluster, :, ::-1]) + 1) / 2
        assert found[layer, cluster] == pytest.approx(expected, abs=1e-3)


def test_stability_is_measured_with_any_reading():
    model, images = make_adapted_vit(), make_images(3)
    whitened = Reading("whitened", token_statistics(model, images))
    found = stability_under_augmentation(model, images, reading=whitened)
    assert found.shape == (2, 6)
    assert np.abs(found).max() <= 1 + 1e-9
    assert not np.allclose(found, stability_under_augmentation(model, images), atol=1e-3)


# ---- strongest responses ---------------------------------------------------------------------------------------------


def test_the_strongest_responses_are_one_patch_of_every_image_the_strongest_first():
    maps = make_maps(random_maps())
    found = strongest_responses(maps, 1, 2, count=5)
    peaks = []
    for image in range(8):
        responses = maps.maps[image, 1, 2]
        peaks.append(max((responses[row, column], image, row, column) for row in range(4) for column in range(5)))
    expected = sorted(peaks, reverse=True)[:5]
    assert [(one.response, one.image, one.row, one.column) for one in found] == expected


def test_equal_responses_keep_the_order_of_the_images_and_no_image_comes_twice():
    maps = np.zeros((4, 2, 3, 4, 5))
    maps[[1, 3], 0, 1, 2, 4] = 2.0
    maps[3, 0, 1, 3, 3] = 2.0
    found = strongest_responses(make_maps(maps), 0, 1)
    assert [(one.image, one.row, one.column) for one in found] == [(1, 2, 4), (3, 2, 4), (0, 0, 0), (2, 0, 0)]
