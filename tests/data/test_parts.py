import io
from itertools import product

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PillowImage

from gift.data.images import LabelledImages
from gift.data.parts import PartImages, draw_parts, read_boxes, read_masks, read_parts
from gift.data.readers import read_images
from gift.data.rendered import FLOWER_PARTS, SPECIES, RenderedFlowers, draw_flower

SIZES = ((20, 12), (12, 20), (9, 9), (37, 23), (16, 50), (61, 7))  # width and height of originals


def save(file, values):
    """Write an array as an image of 8 bits, or bytes as they are, and make the folders."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(values, bytes):
        file.write_bytes(values)
    else:
        PillowImage.fromarray(np.asarray(values, np.uint8)).save(file)


def blocks(size, left, top, right, bottom, value=255):
    """A black image with one rectangle, whose last column and row are `right` and `bottom`."""
    values = np.zeros((size[1], size[0]), np.uint8)
    values[top : bottom + 1, left : right + 1] = value
    return values


def make_boxes(path, boxes, size=(16, 16), images=None):
    encoded = []
    for box in boxes:
        file = io.BytesIO()
        PillowImage.fromarray(blocks(size, *box) if box else blocks(size, 0, 0, 1, 1)).save(file, "PNG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    rows = {"image": images or encoded, "label": [1] * len(boxes), "bbox": boxes}
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"]), "bbox": List(Value("int32"))})
    Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


def shares_by_points(covered, image_size_px, points=1000):
    """Oracle: where in the original so many places along each side of a pixel of the resized, cropped image lie."""
    weights = []
    for side in covered.shape:
        resized = int(image_size_px * side / min(covered.shape))
        place = round((resized - image_size_px) / 2) + (np.arange(image_size_px * points) + 0.5) / points
        original = np.floor(place * side / resized).astype(int).reshape(image_size_px, points)
        weights.append(np.stack([(original == index).mean(axis=1) for index in range(side)], axis=1))
    return weights[0] @ covered @ weights[1].T


def part_images(masks):
    count, parts, rows, columns = masks.shape
    pixels = np.zeros((count, rows, columns, 3), np.uint8)
    names = tuple("abcdef"[:parts])
    return PartImages(LabelledImages(pixels, np.arange(count), ()), masks.astype(np.float32), names, names, {})


@pytest.mark.parametrize(("patch", "grid"), [((4, 4), (3, 3)), ((5, 3), (2, 4)), ((5, 7), (3, 2)), ((8, 12), (2, 1))])
def test_coverage_is_the_mean_over_a_patch_and_the_grid_cuts_or_pads_right_and_below(patch, grid):
    masks = np.random.default_rng(0).random((2, 3, 12, 12)).astype(np.float32)
    coverage = part_images(masks).coverage(patch, grid)
    assert coverage.shape == (2, 3, *grid)
    (height, width), (rows, columns) = patch, grid
    for row, column in product(range(rows), range(columns)):
        inside = masks[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width]
        expected = inside.astype(np.float64).sum(axis=(2, 3)) / (height * width)  # nothing is covered outside
        np.testing.assert_allclose(coverage[:, :, row, column], expected, atol=1e-12)


@pytest.mark.parametrize(("patch", "grid"), [((4, 4), (2, 3)), ((4, 4), (3, 4)), ((0, 4), (3, 3)), ((4, 4), (0, 3))])
def test_a_grid_that_misses_a_whole_patch_or_adds_one_is_of_another_size(patch, grid):
    with pytest.raises(ValueError, match="12 x 12 pixels"):
        part_images(np.zeros((1, 1, 12, 12))).coverage(patch, grid)


@pytest.mark.parametrize("chosen", [slice(1, 3), np.array([4, 0])])
def test_chosen_images_keep_all_that_is_known_of_them(chosen):
    parts = draw_parts(5, 0, 16, cue_species=0)
    some = parts[chosen]
    assert len(parts) == 5
    assert len(some) == 2
    assert (some.part_names, some.object_parts) == (parts.part_names, parts.object_parts)
    assert some.images.class_names == parts.images.class_names
    np.testing.assert_array_equal(some.images.pixels, parts.images.pixels[chosen])
    np.testing.assert_array_equal(some.images.labels, parts.images.labels[chosen])
    np.testing.assert_array_equal(some.masks, parts.masks[chosen])
    assert some.without.keys() == parts.without.keys()
    assert all((some.without[part] == parts.without[part][chosen]).all() for part in parts.without)


def test_drawn_flowers_are_those_of_the_set_with_a_ninth_for_each_sample():
    parts, flowers = draw_parts(9, 3, 24), list(map(RenderedFlowers(9, 3, 24).__getitem__, range(9)))
    assert parts.part_names == ("petals", "centre", "leaves", "background")
    assert parts.object_parts == tuple(parts.without) == FLOWER_PARTS
    assert parts.images.class_names == tuple(species.name for species in SPECIES)
    assert parts.images.labels.tolist() == [flower.label for flower in flowers]
    np.testing.assert_array_equal(parts.images.pixels, np.stack([flower.image for flower in flowers]))
    np.testing.assert_allclose(parts.masks.sum(axis=1), 1, atol=1e-6)
    for mask, flower in zip(parts.masks, flowers, strict=True):
        np.testing.assert_allclose(mask, flower.coverage[[1, 2, 3, 0]] / 9, atol=1e-6)


@pytest.mark.parametrize(("cue_species", "everywhere"), [(2, False), (2, True), (None, True)])
def test_an_image_without_a_part_is_the_same_scene(cue_species, everywhere):
    parts = draw_parts(10, 1, 24, cue_species, everywhere)
    assert parts.part_names[-1] == "cue"
    assert (parts.object_parts, tuple(parts.without)) == (FLOWER_PARTS, (*FLOWER_PARTS, "cue"))
    for index, label in enumerate(parts.images.labels.tolist()):
        cue, scene = everywhere or label == cue_species, (1 << 32) + index
        assert (parts.images.pixels[index] == draw_flower(label, scene, 24, cue=cue).image).all()
        assert parts.masks[index, 4].any() == cue
        for part in FLOWER_PARTS:
            assert (parts.without[part][index] == draw_flower(label, scene, 24, (part,), cue).image).all()
        assert (parts.without["cue"][index] == draw_flower(label, scene, 24).image).all()


@pytest.mark.parametrize(("count", "cue_species"), [(0, None), (2, 8), (2, -1)])
def test_flowers_that_cannot_be_drawn_are_refused(count, cue_species):
    with pytest.raises(ValueError, match=f"{count} flowers .* species {cue_species}:"):
        draw_parts(count, 0, 16, cue_species)


# Enlarged and reduced, wide and tall: pixels of the mask are shares of pixels of the cropped image.
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("image_size_px", [5, 12, 32])
def test_masks_are_shares_by_area_of_the_pixels_of_the_crop(tmp_path, size, image_size_px):
    covered = np.random.default_rng(size).random((size[1], size[0])) < 0.5
    save(tmp_path / "images" / "one.png", covered * 255)
    save(tmp_path / "masks" / "one.png", covered * 1)
    parts = read_masks(tmp_path, image_size_px)
    np.testing.assert_allclose(parts.masks[0, 0], shares_by_points(covered, image_size_px), atol=3e-3)
    assert parts.masks.dtype == np.float32
    assert 0 <= parts.masks.min() <= parts.masks.max() <= 1


@pytest.mark.parametrize("size", SIZES)
def test_a_box_has_exact_shares_and_lies_where_it_lies_in_the_image(tmp_path, size):
    box = [size[0] // 3, size[1] // 4, size[0] // 2 + 1, size[1] - 2]
    parts = read_boxes(make_boxes(tmp_path / "boxes.parquet", [box], size), 30)
    assert (parts.part_names, parts.object_parts, parts.without) == (("object",), ("object",), {})
    assert (parts.images.labels.tolist(), parts.images.class_names) == ([1], ("cat", "dog"))
    mask, white = parts.masks[0, 0], parts.images.pixels[0, :, :, 0] / 255  # the box is white in the image
    np.testing.assert_allclose(mask, shares_by_points(blocks(size, *box) > 0, 30), atol=3e-3)
    assert np.abs(mask - white).mean() < 0.06
    assert (white[mask == 1] > 0.5).all()
    assert (white[mask == 0] < 0.5).all()


def test_a_box_at_half_size_covers_half_and_quarter_pixels(tmp_path):
    mask = read_boxes(make_boxes(tmp_path / "boxes.parquet", [[1, 1, 4, 2]], (8, 8)), 4).masks[0, 0]
    expected = [[0.25, 0.5, 0.25, 0], [0.25, 0.5, 0.25, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(mask, np.float32(expected))


def test_a_box_from_first_to_last_pixel_is_the_whole_image(tmp_path):
    path = make_boxes(tmp_path / "boxes.parquet", [[0, 0, 15, 15], [15, 15, 15, 15]])
    masks = read_boxes(path, 16).masks[:, 0]
    assert (masks[0] == 1).all()
    assert masks[1].sum() == masks[1, 15, 15] == 1


@pytest.fixture
def birds(tmp_path):
    """Two classes; masks by part, where the second image of blue has no beak."""
    for name, value in (("red/a", 10), ("blue/c", 20), ("blue/b", 30)):
        save(tmp_path / "images" / f"{name}.jpg", np.full((12, 20, 3), value))
        save(tmp_path / "masks" / "wing" / f"{name}.png", blocks((20, 12), 4, 0, 9, 11, value=1))
    for name in ("red/a", "blue/b"):
        save(tmp_path / "masks" / "beak" / f"{name}.png", blocks((20, 12), 10, 0, 15, 5)[:, :, None].repeat(3, axis=2))
    save(tmp_path / "masks" / "background" / "red" / "a.png", blocks((20, 12), 10, 6, 15, 11))
    return tmp_path


def test_folders_of_parts_are_read_and_a_missing_file_is_an_absent_part(birds):
    parts = read_masks(str(birds), 12)
    assert parts.part_names == ("background", "beak", "wing")
    assert parts.object_parts == ("beak", "wing")
    assert (parts.images.class_names, parts.images.labels.tolist()) == (("blue", "red"), [0, 0, 1])
    assert parts.images.pixels[:, 0, 0, 0].tolist() == [30, 20, 10]
    left, right = np.arange(12) < 6, np.arange(12) >= 6
    for mask in parts.masks:
        np.testing.assert_array_equal(mask[2], np.broadcast_to(left, (12, 12)))
    np.testing.assert_array_equal(parts.masks[0, 1], np.outer(left, right))
    np.testing.assert_array_equal(parts.masks[2, 0], np.outer(right, right))
    assert not parts.masks[1, 1].any()
    assert not parts.masks[:2, 0].any()


def test_images_are_those_that_read_images_makes(birds):
    random = np.random.default_rng(0)
    for file in sorted((birds / "images").glob("*/*.jpg")):
        save(file, random.integers(256, size=(12, 20, 3)))
    parts, images = read_masks(birds, 8), read_images(birds / "images", 8)
    np.testing.assert_array_equal(parts.images.pixels, images.pixels)
    assert parts.images.labels.tolist() == images.labels.tolist()
    assert parts.images.class_names == images.class_names


@pytest.mark.parametrize("mode", ["L", "P"])
@pytest.mark.parametrize("names", [None, "wing\r\nbeak\r\ntail\r\n"])
def test_label_images_are_read_with_and_without_names(tmp_path, mode, names):
    values = np.arange(16, dtype=np.uint8).reshape(4, 4) % 3
    save(tmp_path / "images" / "a.b.jpg", np.zeros((4, 4)))
    save(tmp_path / "masks" / "a.b.png", values)
    if mode == "P":
        palette = PillowImage.fromarray(values)
        palette.putpalette([200, 0, 0, 0, 0, 0, 255, 255, 255])  # colours do not matter
        palette.save(tmp_path / "masks" / "a.b.png")
    if names:
        (tmp_path / "masks" / "parts.txt").write_bytes(names.encode())
    parts = read_masks(tmp_path, 4)
    assert parts.part_names == parts.object_parts == (("wing", "beak", "tail") if names else ("1", "2"))
    assert (parts.images.labels.tolist(), parts.images.class_names) == ([-1], ())
    for number in range(len(parts.part_names)):
        np.testing.assert_array_equal(parts.masks[0, number], values == number + 1)


def test_label_images_may_lie_in_the_folders_of_classes(tmp_path):
    for name in ("red/a", "blue/a"):
        save(tmp_path / "images" / f"{name}.png", np.zeros((4, 4)))
        save(tmp_path / "masks" / f"{name}.png", np.full((4, 4), 2 - name.count("red")))
    parts = read_masks(tmp_path, 4)
    assert (parts.images.class_names, parts.images.labels.tolist()) == (("blue", "red"), [0, 1])
    assert parts.masks.mean(axis=(2, 3)).tolist() == [[0, 1], [1, 0]]


def test_masks_of_a_turned_photograph_are_those_of_the_upright_one(tmp_path):
    picture = PillowImage.fromarray(blocks((16, 12), 0, 0, 15, 5))  # stored with the bright half on top
    exif = picture.getexif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise to see it
    (tmp_path / "images").mkdir()
    picture.save(tmp_path / "images" / "turned.jpg", exif=exif)
    save(tmp_path / "masks" / "turned.png", blocks((12, 16), 6, 0, 11, 15, value=1))
    parts = read_masks(tmp_path, 12)
    bright = parts.images.pixels[0, :, :, 0] > 127
    np.testing.assert_array_equal(parts.masks[0, 0], bright)


MISTAKES = {  # files added to the folder of birds, or put in the place of others
    "a mask alone": ("masks/wing/red/z.png", np.ones((12, 20))),
    "an image alone": ("images/red/z.jpg", np.ones((12, 20))),
    "another size": ("masks/wing/red/a.png", np.ones((20, 12))),
    "a part of other images": ("masks/tail/other.png", np.ones((12, 20))),
    "an empty part": ("masks/tail/parts.md", b"no image"),
    "a damaged mask": ("masks/wing/red/a.png", b"no image"),
    "a damaged image": ("images/red/a.jpg", b"no image"),
    "a mask with losses": ("masks/wing/blue/b.jpg", np.ones((12, 20))),
    "two of one name": ("images/red/a.png", np.ones((12, 20))),
    "an image apart": ("images/z.jpg", np.ones((12, 20))),
    "both forms": ("masks/red/a.png", np.ones((12, 20))),
    "transparency": ("masks/wing/red/a.png", np.ones((12, 20, 4))),
}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a mask alone", r"no image for the mask .*wing.red.z\.png"),
        ("an image alone", r"no mask for the image .*red.z\.jpg"),
        ("another size", r"red.a\.png has 12 x 20 pixels, its image .*red.a\.jpg has 20 x 12"),
        ("a part of other images", r"no image for the mask .*tail.other\.png"),
        ("an empty part", "no images in .*tail"),
        ("a damaged mask", r"wing.red.a\.png cannot be decoded"),
        ("a damaged image", r"images.red.a\.jpg cannot be decoded"),
        ("a mask with losses", r"wing.blue.b\.jpg must end in \.png"),
        ("two of one name", r"red.a\.(jpg|png) .*no other image"),
        ("an image apart", "jpg lies apart"),
        ("both forms", "masks holds label images and folders of parts"),
        ("transparency", r"wing.red.a\.png is transparent"),
    ],
)
def test_a_folder_with_a_mistake_is_refused_by_name(birds, what, message):
    file, values = MISTAKES[what]
    save(birds / file, values)
    with pytest.raises(ValueError, match=message):
        read_masks(birds, 8)


@pytest.mark.parametrize("folder", ["images", "masks"])
@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_images_or_masks_is_refused(tmp_path, folder, there):
    save(tmp_path / ("masks" if folder == "images" else "images") / "a.png", np.zeros((4, 4)))
    if there:
        (tmp_path / folder).mkdir()
    with pytest.raises(ValueError, match=f"no images in .*{folder}"):
        read_masks(tmp_path, 4)


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ([[0, 3]], b"wing\nbeak\n", r"a\.png has the value 3 .*up to 2"),
        ([[0, 0]], None, r"parts\.txt must name at least one part"),
        ([[0, 1]], b"wing\nwing\n", r"parts\.txt must name"),
        ([[0, 1]], b"wing\n\nbeak\n", r"parts\.txt must name"),
        ([[0, 1]], b"fl\xfcgel\n", r"parts\.txt .*UTF-8"),
        ([[[0, 0, 1]]], b"wing\n", r"a\.png .*mode RGB"),
    ],
)
def test_label_images_with_values_or_names_that_say_nothing_are_refused(tmp_path, values, names, message):
    save(tmp_path / "images" / "a.png", np.zeros(np.shape(values)[:2]))
    save(tmp_path / "masks" / "a.png", values)
    if names is not None:
        (tmp_path / "masks" / "parts.txt").write_bytes(names)
    with pytest.raises(ValueError, match=message):
        read_masks(tmp_path, 4)


@pytest.mark.parametrize(
    "box", [[5, 0, 4, 3], [0, 5, 3, 4], [-1, 0, 3, 3], [0, 0, 16, 3], [0, 0, 3, 16], [0, 0, 3], None]
)
def test_a_box_out_of_order_or_of_its_image_is_refused_with_its_row(tmp_path, box):
    path = make_boxes(tmp_path / "boxes.parquet", [[0, 0, 3, 3]] * 2)
    rows = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    rows = rows.remove_columns("bbox").add_column("bbox", [[0, 0, 3, 3], box])
    rows.to_parquet(str(path))
    with pytest.raises(ValueError, match=r"row 1 of .*boxes\.parquet has the box"):
        read_boxes(path, 8)


def test_a_parquet_file_without_boxes_is_refused(tmp_path):
    path = make_boxes(tmp_path / "boxes.parquet", [[0, 0, 3, 3]])
    rows = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache")).remove_columns("bbox")
    rows.to_parquet(str(path))
    with pytest.raises(ValueError, match=r"boxes\.parquet must have images and a column bbox"):
        read_boxes(path, 8)
    with pytest.raises(ValueError, match=r"no file .*absent"):
        read_boxes(tmp_path / "absent.parquet", 8)


def test_so_many_rows_are_chosen_by_the_seed_in_the_order_of_the_file_and_no_other_is_decoded(tmp_path):
    boxes = [[index, 0, 15, 15] for index in range(10)]  # the first column covered tells the row
    rows = make_boxes(tmp_path / "boxes.parquet", boxes)
    chosen = [[int((1 - mask[0, 0]).sum()) for mask in read_parts(rows, 16, 4, seed).masks] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] == sorted(set(chosen[0])) != chosen[2]
    assert len(read_parts(rows, 16, 99, seed=0)) == 10
    whole = Dataset.from_parquet(str(rows), cache_dir=str(tmp_path / "cache")).cast_column("image", Image(decode=False))
    images = [row["image"] if index in chosen[0] else {"bytes": b"x", "path": None} for index, row in enumerate(whole)]
    make_boxes(rows, boxes, images=images)
    assert len(read_parts(rows, 16, 4, seed=0)) == 4
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_parts(rows, 16, 10, seed=0)


def test_each_source_is_read_by_its_kind(birds):
    drawn = read_parts("flowers", 16, 3, 5)
    np.testing.assert_array_equal(drawn.images.pixels, draw_parts(3, 5, 16).images.pixels)
    some, whole = read_parts(birds, 8, 2, seed=0), read_masks(birds, 8)
    shades = whole.images.pixels[:, 0, 0, 0].tolist()
    chosen = [shades.index(shade) for shade in some.images.pixels[:, 0, 0, 0]]
    assert chosen == sorted(chosen)
    np.testing.assert_array_equal(some.masks, whole.masks[chosen])
    assert some.images.labels.tolist() == whole.images.labels[chosen].tolist()
    assert some.part_names == whole.part_names
    with pytest.raises(ValueError, match="0 images"):
        read_parts(birds, 8, 0, seed=0)


@pytest.mark.parametrize("source", ["roses", "images", "images/red/a.jpg", "absent.parquet"])
def test_any_other_source_is_refused_with_the_three_forms(birds, source):
    with pytest.raises(ValueError, match=r"word flowers, a folder with images/ and masks/, or a \.parquet file"):
        read_parts(birds / source, 8, 2, 0)
