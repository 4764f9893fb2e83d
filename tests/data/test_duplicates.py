import io
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from gift.data.duplicates import Looks, equal_groups, look, near_groups
from tests.data.image_files import encoded, picture


def looks_of(images):
    hashes, thumbnails = zip(*map(look, images), strict=True)
    return Looks(np.array(hashes, np.uint64), np.stack(thumbnails))


def test_the_hash_says_where_it_is_brighter_than_to_the_right():
    grey = np.random.default_rng(0).integers(0, 256, (8, 9), dtype=np.uint8)
    bits = "".join("1" if row[column] > row[column + 1] else "0" for row in grey for column in range(8))
    assert look(Image.fromarray(grey))[0] == int(bits, 2)


def test_equal_digests_are_grouped():
    assert equal_groups([b"a", b"b", b"a", b"c", b"b", b"a"]) == [[0, 2, 5], [1, 4]]


@pytest.mark.parametrize("near", [0, 1, 2, 5, 9])
def test_pairs_are_those_that_comparing_all_finds(near):
    rng = np.random.default_rng(near)
    centres = rng.integers(0, 2**63, 40, dtype=np.uint64)
    hashes = np.repeat(centres, 5)
    for index in range(len(hashes)):
        for bit in rng.choice(64, rng.integers(0, 5), replace=False):
            hashes[index] ^= np.uint64(1) << np.uint64(bit)
    looks = Looks(hashes, np.zeros((len(hashes), 8, 8, 3), np.uint8))
    expected = {index: {index} for index in range(len(hashes))}
    for one, other in combinations(range(len(hashes)), 2):
        if int(hashes[one] ^ hashes[other]).bit_count() <= near and expected[one] is not expected[other]:
            expected[one] |= expected[other]
            expected |= dict.fromkeys(expected[other], expected[one])
    groups = {tuple(sorted(group)) for group in expected.values() if len(group) > 1}
    assert {tuple(sorted(group)) for group in near_groups(looks, near, 0)} == groups
    assert groups


def test_a_photo_saved_smaller_and_worse_looks_alike_and_another_does_not():
    photo = picture(1, (300, 200))
    worse = Image.open(io.BytesIO(encoded(photo.resize((150, 100)), "JPEG", quality=40)))
    assert near_groups(looks_of([picture(2), photo, picture(3), worse]), 6, 10) == [[1, 3]]


def test_images_without_structure_are_told_apart_by_their_colours():
    plain = [Image.new("RGB", (9, 9), colour) for colour in ("red", "green", "red", "black")]
    assert near_groups(looks_of(plain), 6, 10) == [[0, 2]]


def test_pieces_that_thousands_share_are_not_compared_and_others_are(monkeypatch):
    monkeypatch.setattr("gift.data.duplicates._COMMON", 10)
    hashes = np.arange(40, dtype=np.uint64) << np.uint64(57)  # all but the last of 7 pieces are black
    hashes[7] = hashes[30]
    looks = Looks(hashes, np.zeros((40, 8, 8, 3), np.uint8))
    assert near_groups(looks, 6, 0) == [[7, 30]]
