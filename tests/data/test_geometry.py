import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize

from gift.data.geometry import Geometry, Preparation
from tests.data.image_files import picture

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def preparation(train=True, size_px=14, **options):
    return Preparation(Geometry(size_px, MEAN, STD, **options), train)


@pytest.mark.parametrize("size", [(40, 31), (31, 40), (16, 16), (8, 300)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_middle_is_cut_out_as_torchvision_does(size, interpolation):
    image = picture(size=size)
    filters = InterpolationMode(interpolation)
    expected = np.asarray(Compose([Resize(16, filters), CenterCrop(14)])(image))
    kept = preparation(train=False, interpolation=interpolation).kept(image)
    assert np.array_equal(kept.permute(1, 2, 0), expected)


def test_squashing_ignores_the_shape():
    image = picture(size=(40, 31))
    expected = np.asarray(image.resize((14, 14), Image.Resampling.BICUBIC))
    assert np.array_equal(preparation(train=False, resize="squash").kept(image).permute(1, 2, 0), expected)


@pytest.mark.parametrize(
    ("options", "train", "size"),
    [
        ({}, True, (24, 16)),
        ({}, False, (14, 14)),
        ({"augment": "resized-crop-flip"}, True, (24, 16)),
        ({"augment": "flip"}, True, (14, 14)),
        ({"resize": "squash"}, True, (16, 16)),
        ({"resize": "squash", "augment": "flip"}, True, (14, 14)),
        ({"resize": "squash"}, False, (14, 14)),
    ],
)
def test_what_is_kept_is_all_that_a_crop_may_show(options, train, size):
    steps, image = preparation(train, **options), picture(size=(60, 40))
    assert steps.kept_size((60, 40)) == size
    assert tuple(steps.kept(image).shape) == (3, size[1], size[0])


def test_crops_fall_everywhere_and_half_of_the_images_are_mirrored():
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(17), indexing="ij")
    places = torch.stack([rows, columns, columns]).to(torch.uint8)
    seen = []
    for _ in range(600):
        crop = preparation().augmented(places)
        assert tuple(crop.shape) == (3, 14, 14)
        mirrored = bool(crop[1, 0, 0] > crop[1, 0, -1])
        seen.append((mirrored, int(crop[0, 0, 0]), int(crop[1, 0].min())))
    assert {place[1:] for place in seen} == {(row, column) for row in range(3) for column in range(4)}
    assert 0.4 < np.mean([mirrored for mirrored, *_ in seen]) < 0.6
    for _, row, column in seen:
        assert 30 < sum(place[1:] == (row, column) for place in seen) < 75  # 50 expected


def test_a_resized_crop_covers_between_8_and_100_percent_with_sides_up_to_3_to_4():
    rows, columns = torch.meshgrid(torch.arange(120.0), torch.arange(120.0), indexing="ij")
    places = torch.stack([rows, columns, columns]).to(torch.uint8)
    steps = preparation(augment="resized-crop-flip", size_px=28)
    heights, widths = [], []
    for _ in range(400):
        crop = steps.augmented(places).float()
        heights.append(float(crop[0, -1].mean() - crop[0, 0].mean()) * 28 / 27)
        widths.append(abs(float(crop[1, :, -1].mean() - crop[1, :, 0].mean())) * 28 / 27)
    areas, ratios = np.multiply(heights, widths) / 120**2, np.divide(widths, heights)
    assert 0.06 < areas.min() < 0.14
    assert 0.85 < areas.max() < 1.06
    assert 0.7 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 1.4


def test_a_resized_crop_that_fits_nowhere_is_the_middle_square():
    pixels = torch.zeros(3, 2, 600, dtype=torch.uint8)
    pixels[:, :, 299:301] = 255
    assert preparation(augment="resized-crop-flip").augmented(pixels).min() == 255


def test_images_are_not_augmented_unless_they_are_trained_on():
    pixels = preparation(train=False).kept(picture())
    before = torch.random.get_rng_state()
    assert preparation(train=False, augment="flip").augmented(pixels) is pixels
    assert preparation(train=True, augment="none").augmented(pixels) is pixels
    assert torch.equal(torch.random.get_rng_state(), before)


def test_pixels_are_scaled_and_normalised_per_channel():
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    expected = (pixels.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    normalised = preparation().normalised(pixels)
    assert normalised.dtype == torch.float32
    assert torch.allclose(normalised.double(), expected, atol=1e-6)


def test_an_image_that_would_become_too_large_is_refused():
    with pytest.raises(
        ValueError, match=f"is too long: 1 x 50000000 pixels would be resized to 16 x {16 * 50_000_000}"
    ):
        preparation().kept_size((1, 50_000_000))
    preparation(resize="squash").kept_size((1, 50_000_000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size_px": 0}, "size_px must be"),
        ({"interpolation": "nearest"}, "Unknown interpolation 'nearest': choose one of bicubic, bilinear"),
        ({"resize": "pad"}, "Unknown resize"),
        ({"augment": "mixup"}, "Unknown augment"),
        ({"mean": (0.5,)}, "mean must be three numbers"),
        ({"std": (0.5, 0, 0.5)}, "std above 0"),
        ({"std": ()}, "three numbers"),
        ({"mean": (0, float("nan"), 0)}, "mean must be three numbers"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Geometry(**({"size_px": 14, "mean": MEAN, "std": STD} | options))
