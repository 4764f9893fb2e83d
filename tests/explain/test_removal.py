import math
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch

from gift.explain.removal import (
    Drops,
    logit_drops,
    logits_without,
    patch_of_grid,
    regions,
    removal_curves,
    remove_patches,
)
from tests.models import make_adapted_vit, make_images, make_vit

RNG = np.random.default_rng(0)
WEIGHTS = 20 * np.random.default_rng(1).normal(size=(5, 4, 4))  # of every patch, for each class


def patch_means(images):
    """Return the mean of the first channel in every patch of 8 px, by loops and in float64."""
    images = np.asarray(images, np.float64)
    means = np.zeros((len(images), 4, 4))
    for row in range(4):
        for column in range(4):
            patch = images[:, 0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            means[:, row, column] = patch.mean(axis=(1, 2))
    return means


def logits_by_hand(means):
    """Return a logit per class: a weighted sum of what the patches hold."""
    return np.array([sum((WEIGHTS[label] * means).ravel()) for label in range(5)])


def make_known(seen=None):
    """Return a ViT whose logits are those known ones; the images that it is given go to `seen`."""
    model = make_vit()

    def forward(pixels):
        if seen is not None:
            seen.append(pixels.double().numpy())
        return torch.from_numpy(np.array([logits_by_hand(means) for means in patch_means(pixels)])).float()

    model.forward = forward
    return model


def without_by_hand(means, removed):
    """Return the patches of one image of which some hold their mean."""
    return np.where(removed, means.sum() / 16, means)


def state_of(model):
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    return hooks, [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


# ---- removing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 16), (13, 18), (15, 19)])
def test_a_removed_patch_holds_the_mean_of_all_whole_patches_of_its_image(size):
    images, removed = torch.randn(2, 3, *size, dtype=torch.float64), torch.from_numpy(RNG.random((2, 3, 3)) < 0.4)
    found = remove_patches(images, removed, (4, 5))
    expected = images.clone()
    for image in range(2):
        patches = [images[image, :, 4 * r : 4 * r + 4, 5 * c : 5 * c + 5] for r in range(3) for c in range(3)]
        for row in range(3):
            for column in range(3):
                if removed[image, row, column]:
                    expected[image, :, 4 * row : 4 * row + 4, 5 * column : 5 * column + 5] = sum(patches) / 9
    assert 0 < removed.sum() < 18
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.equal(found[:, :, 12:], images[:, :, 12:])
    assert torch.equal(found[:, :, :, 15:], images[:, :, :, 15:])


def test_a_patch_that_lies_partly_beyond_a_padded_image_is_removed_as_far_as_there_are_pixels():
    images, removed = torch.randn(1, 1, 10, 9, dtype=torch.float64), torch.zeros(1, 3, 3, dtype=torch.bool)
    removed[0, 2, 2] = removed[0, 0, 2] = True
    found, expected = remove_patches(images, removed, (4, 4)), images.clone()
    mean = sum(images[0, 0, r : r + 4, c : c + 4] for r in (0, 4) for c in (0, 4)) / 4
    expected[0, 0, 8:, 8:], expected[0, 0, :4, 8:] = mean[:2, :1], mean[:, :1]
    assert torch.allclose(found, expected, atol=1e-12)


def test_nothing_and_everything_can_be_removed_and_the_images_given_are_left_alone():
    images = make_images()
    before = images.clone()
    nothing = remove_patches(images, torch.zeros(2, 4, 4, dtype=torch.bool), (8, 8))
    everything = remove_patches(images, torch.ones(2, 4, 4, dtype=torch.bool), (8, 8))
    assert torch.equal(nothing, before)
    assert torch.equal(images, before)
    assert torch.allclose(everything[:, :, :8, :8], everything[:, :, 16:24, 24:], atol=1e-7)


def test_for_a_linear_patch_embedding_removed_tokens_are_the_mean_of_the_images_tokens():
    embed, images = make_vit().double().patch_embed, make_images().double()
    removed = torch.from_numpy(RNG.random((2, 4, 4)) < 0.4)
    whole, found = embed(images), embed(remove_patches(images, removed, (8, 8)))
    for image in range(2):
        for token in range(16):
            is_removed = removed[image, token // 4, token % 4]
            expected = sum(whole[image]) / 16 if is_removed else whole[image, token]
            assert torch.allclose(found[image, token], expected, atol=1e-12)


# ---- sizes of patches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "grid", "size"), [({}, (4, 4), (8, 8)), ({"patch_size": (8, 4)}, (4, 8), (8, 4))])
def test_the_patches_of_a_vit_are_those_it_embeds(changes, grid, size):
    assert patch_of_grid(make_vit(**changes), make_images(), grid) == size
    adapted = make_adapted_vit()
    assert patch_of_grid(adapted, make_images(), (4, 4)) == (8, 8)
    with pytest.raises(ValueError, match=r"Maps of \(4, 3\) patches are not of this model"):
        patch_of_grid(adapted, make_images(), (4, 3))


def test_a_stage_of_one_row_is_told_by_its_columns():
    sizes = {"img_size": (8, 64), "window_size": 2, "embed_dim": 16, "depths": (1, 1, 1), "num_heads": (2, 2, 2)}
    model = timm.create_model("swin_tiny_patch4_window7_224", **sizes)
    grids = {(2, 16): (4, 4), (1, 8): (8, 8), (1, 4): (16, 16)}
    assert {grid: patch_of_grid(model, torch.zeros(1, 3, 8, 64), grid) for grid in grids} == grids


@pytest.mark.parametrize(("rows", "side"), [(16, 4), (8, 8), (4, 16)])
def test_the_patches_of_a_later_stage_of_swin_are_merged_ones(rows, side):
    sizes = {"img_size": (64, 96), "window_size": 4, "embed_dim": 16, "depths": (1, 1, 1), "num_heads": (2, 2, 2)}
    model = timm.create_model("swin_tiny_patch4_window7_224", **sizes)
    images = torch.zeros(1, 3, 64, 96)
    seen = []
    for stage in model.layers:
        stage.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output.shape[1:3]))
    model.eval()(images)
    assert (rows, rows * 96 // 64) in [tuple(shape) for shape in seen]
    assert patch_of_grid(model, images, (rows, rows * 96 // 64)) == (side, side)


def test_a_region_holds_the_patches_that_reach_the_threshold_of_their_cluster():
    maps = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    thresholds = np.array([0.0, np.sort(maps[:, 1], axis=None)[20], maps.max() + 1], np.float64)
    found = regions(maps, thresholds)
    assert np.array_equal(found[:, 0], maps[:, 0] >= 0)
    assert found[:, 1].sum() == 32 - 20
    assert not found[:, 2].any()


# ---- what a logit loses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, np.array([4, 0, 2])])
def test_a_drop_is_the_logit_of_the_class_less_that_without_the_region(classes):
    images, removed = make_images(3), RNG.random((3, 4, 4, 4)) < 0.3
    found, means = logit_drops(make_known(), images, removed, classes), patch_means(images)
    for image in range(3):
        whole = logits_by_hand(means[image])
        label = np.argmax(whole) if classes is None else classes[image]
        for region in range(4):
            less = logits_by_hand(without_by_hand(means[image], removed[image, region]))
            assert found.region[image, region] == pytest.approx(whole[label] - less[label], abs=1e-4)
            assert found.patches[image, region] == sum(removed[image, region].ravel())
    assert len({int(np.argmax(logits_by_hand(one))) for one in means}) > 1


def test_the_random_drop_is_that_of_as_many_patches_of_the_same_image():
    seen, images, removed = [], make_images(3), RNG.random((3, 4, 4, 4)) < 0.3
    found = logit_drops(make_known(seen), images, removed, np.array([4, 0, 2]))
    means, given = patch_means(images), np.concatenate([patch_means(one) for one in seen])
    at_random = given[-12:].reshape(3, 4, 4, 4)  # after the whole images and those without the regions
    for image in range(3):
        for region in range(4):
            gone = np.abs(at_random[image, region] - means[image]) > 1e-6
            whole, less = logits_by_hand(means[image]), logits_by_hand(without_by_hand(means[image], gone))
            label = (4, 0, 2)[image]
            assert sum(gone.ravel()) == found.patches[image, region] > 0
            assert found.random[image, region] == pytest.approx(whole[label] - less[label], abs=1e-4)
    assert not np.allclose(found.random, found.region, atol=0.1)


def test_random_patches_follow_the_seed_and_differ_from_region_to_region():
    removed = np.zeros((2, 6, 4, 4), bool)
    removed[:, :, 1, :3] = True
    drops = [logit_drops(make_known(), make_images(), removed, seed=seed) for seed in (0, 0, 1)]
    assert np.array_equal(drops[0].random, drops[1].random)
    assert not np.allclose(drops[0].random, drops[2].random, atol=1e-3)
    assert np.array_equal(drops[0].region, drops[2].region)
    assert len(np.unique(drops[0].random[0].round(3))) > 1


def test_random_patches_come_from_anywhere_in_the_image():
    seen, images, removed = [], make_images(1), np.zeros((1, 300, 4, 4), bool)
    removed[:, :, 0, 0] = True
    logit_drops(make_known(seen), images, removed)
    given = np.concatenate([patch_means(one) for one in seen])[-300:]
    gone = np.abs(given - patch_means(images)) > 1e-6
    assert gone.sum() == 300
    assert (gone.sum(axis=0) > 0).all()


def test_random_patches_are_drawn_among_those_that_are_allowed():
    seen, images, removed = [], make_images(2), np.zeros((2, 200, 4, 4), bool)
    removed[:, :, 0, :3] = True
    among = np.zeros((2, 4, 4), bool)
    among[0, 1:3, 1:], among[1, 3] = True, True
    found = logit_drops(make_known(seen), images, removed, among=among)
    given = np.concatenate([patch_means(one) for one in seen])[-400:].reshape(2, 200, 4, 4)
    gone = np.abs(given - patch_means(images)[:, None]) > 1e-6
    assert (gone.sum(axis=(2, 3)) == 3).all()
    assert np.array_equal(gone.any(axis=1), among)
    assert (found.patches == 3).all()


def test_where_no_patch_is_removed_nothing_falls():
    removed = np.zeros((2, 2, 4, 4), bool)
    removed[1, 1] = True
    found = logit_drops(make_adapted_vit(), make_images(), removed)
    nothing = found.patches == 0
    assert np.array_equal(nothing, [[True, True], [True, False]])
    assert np.allclose(found.region[nothing], 0, atol=1e-5)
    assert np.allclose(found.random[nothing], 0, atol=1e-5)
    assert found.random[1, 1] == pytest.approx(found.region[1, 1], abs=1e-5)  # all patches are all patches
    assert abs(found.region[1, 1]) > 1e-3


def test_the_net_drop_is_what_the_region_took_more_than_random_patches():
    drops = Drops(np.array([[3.0, 1.0]]), np.array([[0.5, 2.0]]), np.array([[4, 4]]))
    assert drops.net.tolist() == [[2.5, -1.0]]


def test_many_regions_are_removed_as_they_are_one_by_one():
    model, images, removed = make_adapted_vit(), make_images(3), RNG.random((3, 30, 4, 4)) < 0.4
    found = logits_without(model, images, removed)
    assert found.shape == (3, 30, 5)
    for image, region in ((0, 0), (1, 29), (2, 3), (2, 4), (2, 29)):
        alone = remove_patches(images[[image]], torch.from_numpy(removed[[image], region]), (8, 8))
        with torch.no_grad():
            assert np.allclose(found[image, region], model(alone)[0], atol=1e-5)


# ---- curves ----------------------------------------------------------------------------------------------------------


def area_by_hand(means, order, label, steps, deletes):
    """Return the area under the chances of a class while patches go, or come back into an image without any."""
    chances = []
    for step in range(steps + 1):
        chosen = order[: round(16 * step / steps)]
        removed = np.array([(place in chosen) == deletes for place in range(16)]).reshape(4, 4)
        logits = logits_by_hand(without_by_hand(means, removed))
        chances.append(math.exp(logits[label] - logits.max()) / sum(np.exp(logits - logits.max())))
    return sum((first + second) / 2 / steps for first, second in pairwise(chances))


@pytest.mark.parametrize("steps", [1, 5, 16, 20])
def test_the_curves_follow_the_predicted_class_while_the_highest_patches_go_first(steps):
    images, maps = make_images(6), RNG.integers(0, 6, size=(6, 4, 4)).astype(np.float32)
    deletion, insertion = removal_curves(make_known(), images, maps, steps)
    changes = 0
    for image, means in enumerate(patch_means(images)):
        order = sorted(range(16), key=lambda place, image=image: -maps[image].ravel()[place])  # of equal ones the first
        label = int(np.argmax(logits_by_hand(means)))
        changes += label != np.argmax(logits_by_hand(np.full((4, 4), means.mean())))
        assert deletion[image] == pytest.approx(area_by_hand(means, order, label, steps, True), abs=1e-5)
        assert insertion[image] == pytest.approx(area_by_hand(means, order, label, steps, False), abs=1e-5)
    assert changes > 0


def test_the_order_of_what_patches_contribute_deletes_faster_and_inserts_faster_than_its_reverse():
    images, means = make_images(6), patch_means(make_images(6))
    labels = [int(np.argmax(logits_by_hand(one))) for one in means]
    best = np.stack([WEIGHTS[label] * (one - one.mean()) for label, one in zip(labels, means, strict=True)])
    (deletion, insertion), (slow, late) = (removal_curves(make_known(), images, maps) for maps in (best, -best))
    assert (deletion < slow).all()
    assert (insertion > late).all()
    assert deletion.min() >= 0
    assert insertion.max() <= 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_also_after_an_error(fails):
    model = make_adapted_vit().train()
    model.base_model.model.blocks[0].eval()
    before, seen = state_of(model), []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    if fails:
        hook.remove()
        with pytest.raises(AssertionError):
            removal_curves(model, torch.zeros(1, 3, 40, 40), np.zeros((1, 5, 5)))
    else:
        removal_curves(model, make_images(), RNG.random((2, 4, 4)))
        logit_drops(model, make_images(), RNG.random((2, 3, 4, 4)) < 0.5)
        hook.remove()
        assert not any(seen)
    assert state_of(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
