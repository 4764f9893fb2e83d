"""What a prediction loses when patches are removed from an image: filled with its mean patch.

For a ViT, whose patch embedding is linear, this replaces the embedded tokens of the region by the mean of the image's
tokens before positions are added; for any other model it is the same picture.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn
from torch.nn import functional

from gift.backbones import patch_grid, patch_size
from gift.explain.capture import evaluating
from gift.explain.recording import IMAGES_PER_PASS, logits_of


def remove_patches(
    images: Float[Tensor, "batch channels height width"],
    removed: Bool[Tensor, "batch rows columns"],
    patch: tuple[int, int],
) -> Float[Tensor, "batch channels height width"]:
    """Return the images with the chosen patches replaced by the mean of all whole patches of the same image.

    Args:
        images: The images; what lies beyond the patches stays as it is.
        removed: Which patches.
        patch: Height and width of a patch in pixels.
    """
    (height, width), (tall, wide) = images.shape[2:], patch
    down, across = height // tall, width // wide
    patches = images[:, :, : down * tall, : across * wide].unflatten(3, (across, wide)).unflatten(2, (down, tall))
    mean = patches.mean(dim=(2, 4)).repeat(1, 1, down + 1, across + 1)[:, :, :height, :width]
    pixels = removed.repeat_interleave(tall, dim=1).repeat_interleave(wide, dim=2)
    pixels = functional.pad(pixels, (0, max(0, width - pixels.shape[2]), 0, max(0, height - pixels.shape[1])))
    return torch.where(pixels[:, None, :height, :width], mean, images)


def patch_of_grid(
    model: nn.Module, images: Float[Tensor, "batch channels height width"], grid: tuple[int, ...]
) -> tuple[int, int]:
    """Return the height and width in pixels of the patches of a grid (rows, columns), of any stage of the model.

    Raises:
        ValueError: If no stage has such a grid.
    """
    (tall, wide), first = patch_size(model), patch_grid(model, images.shape[2], images.shape[3])
    for merged in (2**stage for stage in range(max(first).bit_length() + 1)):
        if tuple(-(-size // merged) for size in first) == tuple(grid):
            return merged * tall, merged * wide
    raise ValueError(f"Maps of {tuple(grid)} patches are not of this model, whose grid is {first} for these images.")


def regions(
    maps: Num[np.ndarray, "batch clusters rows columns"], thresholds: Float[np.ndarray, " clusters"]
) -> Bool[np.ndarray, "batch clusters rows columns"]:
    """Return the patches whose response reaches the threshold of the cluster, one for all images."""
    return maps >= thresholds[None, :, None, None]


@dataclass(frozen=True, eq=False)
class Drops:
    """How far a logit falls when regions are removed, and when as many patches at random are.

    Attributes:
        region: Logit of the whole image less that without the region; positive if the region spoke for the class.
        random: The same for as many patches of the image, drawn at random.
        patches: Number of patches removed; where it is 0, nothing falls.
    """

    region: Float[np.ndarray, "batch clusters"]
    random: Float[np.ndarray, "batch clusters"]
    patches: Int[np.ndarray, "batch clusters"]

    @property
    def net(self) -> Float[np.ndarray, "batch clusters"]:
        """How much more the region took than random patches."""
        return self.region - self.random


@torch.no_grad()
def logit_drops(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    removed: Bool[np.ndarray, "batch clusters rows columns"],
    classes: Int[np.ndarray, " batch"] | None = None,
    seed: int = 0,
    among: Bool[np.ndarray, "batch rows columns"] | None = None,
) -> Drops:
    """Return how far the logit of each image's class falls without each region, against as many random patches.

    Args:
        model: An image classifier; it is left as it was.
        images: What it takes.
        removed: The regions.
        classes: Whose logits are looked at; by default the predicted ones.
        seed: Of the random patches.
        among: The patches that random ones are drawn from, of which every region holds at most all; by default any.
    """
    chances = np.random.default_rng(seed).random(removed.shape)
    if among is not None:
        chances += ~among[:, None]  # what is not allowed comes last
    at_random = chances.reshape(*removed.shape[:2], -1).argsort(axis=-1).argsort(axis=-1)
    counts = removed.sum(axis=(2, 3))
    as_many = (at_random < counts[..., None]).reshape(removed.shape)
    whole = logits_without(model, images, np.zeros((len(images), 1, *removed.shape[2:]), bool))[:, 0]
    chosen = whole.argmax(axis=1) if classes is None else classes
    of_class = np.take_along_axis(whole, chosen[:, None], axis=1)
    drops = []
    for without in (removed, as_many):
        logits = logits_without(model, images, without)
        drops.append(of_class - np.take_along_axis(logits, chosen[:, None, None], axis=2)[..., 0])
    return Drops(drops[0], drops[1], counts)


@torch.no_grad()
def logits_without(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    removed: Bool[np.ndarray, "batch regions rows columns"],
) -> Float[np.ndarray, "batch regions classes"]:
    """Return the logits of every image without each of its regions."""
    first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    patch = patch_of_grid(model, images, removed.shape[2:])

    def batches() -> Iterator[Tensor]:
        places = np.argwhere(np.ones(removed.shape[:2], bool))
        for start in range(0, len(places), IMAGES_PER_PASS):
            image, region = places[start : start + IMAGES_PER_PASS].T
            yield remove_patches(images[image], torch.from_numpy(removed[image, region]).to(images.device), patch)

    if not removed.size:
        return np.zeros((*removed.shape[:2], 0), np.float32)
    with evaluating(model):
        logits = torch.cat([logits_of(model(batch.to(first))).float().cpu() for batch in batches()])
    return logits.numpy().reshape(*removed.shape[:2], -1)


def removal_curves(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    maps: Num[np.ndarray, "batch rows columns"],
    steps: int = 10,
) -> tuple[Float[np.ndarray, " batch"], Float[np.ndarray, " batch"]]:
    """Return the areas under the deletion and the insertion curve of every image, from 0 to 1.

    The probability of the predicted class is followed while patches are removed, the highest responses first
    (deletion: a small area is good), and while they are put back into an image without any (insertion: large is good);
    after Petsiuk et al. (2018, arXiv 1806.07421), in equal steps of patches.

    Args:
        model: An image classifier; it is left as it was.
        images: What it takes.
        maps: One map per image.
        steps: Number of steps from the whole image to none of it.
    """
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    order = (-flat).argsort(axis=1, kind="stable").argsort(axis=1)
    shares = np.round(np.linspace(0, flat.shape[1], steps + 1))
    deleted = np.stack([order < share for share in shares], axis=1).reshape(len(maps), steps + 1, *maps.shape[1:])
    areas = []
    predicted = None
    for removed in (deleted, ~deleted):
        logits = torch.from_numpy(logits_without(model, images, removed)).double()
        predicted = logits[:, 0].argmax(dim=1) if predicted is None else predicted  # of the whole images
        chances = logits.softmax(dim=2)[torch.arange(len(maps)), :, predicted].numpy()
        areas.append(((chances[:, 1:] + chances[:, :-1]) / 2).mean(axis=1))
    return areas[0], areas[1]
