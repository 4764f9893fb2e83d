"""Drawn flowers: the same everywhere, differing only where they should, and known only from all of their parts."""

import hashlib
import itertools

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader

from gift.data.rendered import FLOWER_PARTS, PARTS, SPECIES, RenderedFlower, RenderedFlowers, draw_flower

PAIRS = {
    part: [
        (a, b)
        for a, b in itertools.combinations(range(len(SPECIES)), 2)
        if SPECIES[a].parts_unlike(SPECIES[b]) == (part,)
    ]
    for part in FLOWER_PARTS
}


@pytest.fixture(scope="module")
def flowers():
    """400 flowers to learn from and 200 to be asked about."""
    return list(RenderedFlowers(400, seed=0)), list(RenderedFlowers(200, seed=1))


def show(flower, part):
    """Where at least one sample of a pixel shows the part."""
    return flower.coverage[PARTS.index(part)] > 0


def widened(mask):
    """A mask and the pixels right next to it, corners included."""
    padded, (rows, columns) = np.pad(mask, 1), mask.shape
    return np.any([padded[i : i + rows, j : j + columns] for i in range(3) for j in range(3)], axis=0)


def changed(flower, other):
    return (flower.image != other.image).any(axis=2)


def digest(flowers):
    together = hashlib.sha256()
    for flower in flowers:
        together.update(flower.image.tobytes() + flower.coverage.tobytes() + flower.parts.tobytes())
    return together.hexdigest()[:16]


def test_every_species_is_another_combination_of_two_kinds_of_each_part():
    assert len(SPECIES) == len({species.name for species in SPECIES}) == 8
    assert {part: len(pairs) for part, pairs in PAIRS.items()} == dict.fromkeys(FLOWER_PARTS, 4)
    assert {len({getattr(species, part) for species in SPECIES}) for part in FLOWER_PARTS} == {2}


def test_the_bytes_of_a_flower_never_change():
    drawn = [draw_flower(index, seed=7 * index, cue=index % 2 == 0) for index in range(8)]
    assert digest(drawn) == "e374cd1754e7b46d"
    assert digest([draw_flower(5, seed=2**40, image_size_px=224)]) == "e1b36a229a3cf670"


def test_drawing_leaves_the_global_random_numbers_alone_and_is_not_moved_by_them():
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    first = draw_flower(3, seed=3)
    assert (np.random.get_state()[1] == state).all()
    np.random.seed(2)
    assert digest([first]) == digest([draw_flower(3, seed=3)])


def test_an_image_and_its_parts_have_the_shape_that_was_asked_for():
    flower = draw_flower(2, seed=0, image_size_px=40)
    assert flower.image.shape == (40, 40, 3)
    assert flower.parts.shape == (40, 40)
    assert flower.label == 2
    assert (flower.coverage.sum(axis=0) == 9).all()


def test_every_part_can_be_seen_in_every_image(flowers):
    sizes = np.array([np.bincount(flower.parts.ravel(), minlength=len(PARTS)) for flower in flowers[0]])
    assert dict(zip(PARTS, sizes.min(axis=0) >= [2000, 200, 20, 250, 0], strict=True)) == dict.fromkeys(PARTS, True)
    assert (sizes[:, PARTS.index("cue")] == 0).all()


def test_a_pixel_has_the_label_of_what_covers_most_of_it_and_of_equals_the_front():
    flower = draw_flower(0, seed=0, cue=True)
    assert (flower.parts == flower.coverage.argmax(axis=0))[flower.coverage.max(axis=0) > 4].all()
    behind_to_front = [PARTS.index(part) for part in ("background", "cue", "leaves", "petals", "centre")]
    for behind, front in itertools.pairwise(behind_to_front):
        coverage = np.zeros((len(PARTS), 1, 1), np.uint8)
        coverage[[behind, front]] = 4
        assert RenderedFlower(flower.image[:1, :1], coverage, label=0).parts.item() == front


@pytest.mark.parametrize("part", FLOWER_PARTS)
def test_leaving_a_part_out_changes_its_samples_and_what_the_blur_makes_of_them(part):
    for seed in range(24):
        flower = draw_flower(seed % 8, seed, cue=True)
        without = draw_flower(seed % 8, seed, cue=True, leave_out=(part,))
        difference = changed(flower, without)
        assert not (difference & ~widened(show(flower, part))).any()
        assert difference[flower.parts == PARTS.index(part)].mean() > 0.95
        assert not show(without, part).any()


@pytest.mark.parametrize("part", FLOWER_PARTS)
def test_the_other_parts_stay_when_a_part_is_left_out_and_show_what_it_hid(part):
    flower, without = draw_flower(6, seed=5), draw_flower(6, seed=5, leave_out=(part,))
    for other in set(FLOWER_PARTS) - {part}:
        assert not (show(flower, other) & ~show(without, other)).any()


@pytest.mark.parametrize("part", FLOWER_PARTS)
def test_species_that_differ_in_one_part_differ_nowhere_else(part):
    for seed, (a, b) in enumerate(PAIRS[part]):
        flower, other = draw_flower(a, seed), draw_flower(b, seed)
        difference = changed(flower, other)
        assert difference.any()
        assert not (difference & ~widened(show(flower, part) | show(other, part))).any()
        alike = [draw_flower(species, seed, leave_out=(part,)) for species in (a, b)]
        assert digest(alike[:1]) == digest(alike[1:])


def test_without_flower_only_the_background_is_left():
    bare = [draw_flower(species, seed=2, leave_out=FLOWER_PARTS) for species in range(8)]
    assert len({digest([flower]) for flower in bare}) == 1
    assert (bare[0].parts == PARTS.index("background")).all()


def test_the_cue_stands_in_the_background_and_changes_nothing_else():
    for seed in range(24):
        plain, cued = draw_flower(seed % 8, seed), draw_flower(seed % 8, seed, cue=True)
        assert not show(plain, "cue").any()
        assert (cued.parts == PARTS.index("cue")).sum() > 60
        assert not (changed(plain, cued) & ~widened(show(cued, "cue"))).any()
        assert all((show(plain, part) == show(cued, part)).all() for part in FLOWER_PARTS)


def test_a_set_shows_the_cue_with_one_species_only():
    cued = RenderedFlowers(24, seed=0, cue_species=3)
    assert [show(flower, "cue").any() for flower in cued] == [flower.label == 3 for flower in cued]


def test_a_set_is_balanced_and_in_random_order():
    flowers = RenderedFlowers(400, seed=0)
    assert np.bincount(flowers.labels).tolist() == [50] * 8
    assert np.bincount(RenderedFlowers(11, seed=0).labels).tolist() == [2, 2, 2, 1, 1, 1, 1, 1]
    assert 30 < (np.diff(flowers.labels) == 0).sum() < 70
    assert (flowers.labels != RenderedFlowers(400, seed=1).labels).any()


def test_sets_of_one_seed_show_the_same_scenes_and_sets_of_another_seed_others():
    whole, without = RenderedFlowers(16, seed=4), RenderedFlowers(16, seed=4, leave_out=("centre",))
    assert (whole.labels == without.labels).all()
    assert not (changed(whole[9], without[9]) & ~widened(show(whole[9], "centre"))).any()
    scenes = {digest([flower]) for seed in (4, 5) for flower in RenderedFlowers(16, seed, leave_out=FLOWER_PARTS)}
    assert len(scenes) == 32


def test_a_set_can_be_read_by_a_data_loader_and_ends():
    loader = DataLoader(RenderedFlowers(10, seed=0), batch_size=4, collate_fn=len)
    assert list(loader) == [4, 4, 2]
    with pytest.raises(IndexError, match="no flower 10 in a set of 10"):
        RenderedFlowers(10, seed=0)[10]


def test_what_does_not_exist_is_named_in_the_error():
    with pytest.raises(ValueError, match="no species 8; choose one from 0 to 7"):
        draw_flower(8, seed=0)
    with pytest.raises(ValueError, match="Cannot leave out cue; a flower has petals, centre, leaves"):
        draw_flower(0, seed=0, leave_out=("cue",))


def test_a_linear_classifier_of_pixels_does_not_know_the_species(flowers):
    train, test = (np.stack([flower.image.ravel() for flower in part]) / 255 for part in flowers)
    labels, test_labels = ([flower.label for flower in part] for part in flowers)
    # 400 images span 400 directions: the rotation to them changes no prediction and makes the fit fast.
    rotation = PCA().fit(train)
    for strength in (0.01, 1.0):
        classifier = LogisticRegression(C=strength, max_iter=5000).fit(rotation.transform(train), labels)
        assert 1 / 8 < classifier.score(rotation.transform(test), test_labels) < 0.6


def boundary(mask):
    return np.diff(mask, axis=0).sum() + np.diff(mask, axis=1).sum()


def statistics_of_parts(flower):
    """Two numbers of each part: how ragged the petals are, size and light of the centre, how ragged the leaves are."""
    petals, centre, leaves = (flower.parts == PARTS.index(part) for part in FLOWER_PARTS)
    head = petals | centre
    return {
        "petals": [boundary(head) ** 2 / head.sum(), np.divide(*flower.image[petals].mean(axis=0)[[1, 0]])],
        "centre": [centre.sum() / head.sum(), flower.image[centre].mean()],
        "leaves": [boundary(leaves) ** 2 / leaves.sum(), boundary(leaves) / leaves.sum()],
    }


def is_of_first_kind(part, flowers):
    return np.array([getattr(SPECIES[flower.label], part) == getattr(SPECIES[0], part) for flower in flowers])


def looks_of_first_kind(part, flowers, references):
    """Whether the statistics of each flower's part are nearer to the mean of the first kind than of the second."""
    known = np.array([statistics_of_parts(flower)[part] for flower in references])
    asked = np.array([statistics_of_parts(flower)[part] for flower in flowers])
    is_first = is_of_first_kind(part, references)
    first, second = (
        np.square((asked - known[kind].mean(axis=0)) / known.std(axis=0)).sum(axis=1) for kind in (is_first, ~is_first)
    )
    return first < second


def test_the_statistics_of_its_parts_tell_the_species(flowers):
    train, test = flowers
    is_right = [looks_of_first_kind(part, test, train) == is_of_first_kind(part, test) for part in FLOWER_PARTS]
    assert np.all(is_right, axis=0).mean() > 0.95
