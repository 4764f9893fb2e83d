import random
import struct
from contextlib import suppress

import pytest

from gift.data.tfrecord import count_records, crc32c, parse_example, read_records
from tests.data.tfds_exports import example, field, framed, slow_crc32c, varint

RECORDS = [b"one", b"", b"three" * 500]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a-train.tfrecord-00000-of-00001"
    path.write_bytes(b"".join(map(framed, RECORDS)))
    return path


def test_the_checksum_is_the_castagnoli_crc_of_rfc_3720():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 1023, 1024, 1025, 1027, 1028, 2048, 3001])
def test_the_checksum_is_that_of_a_bitwise_division_at_every_length(length):
    data = random.Random(length).randbytes(length)
    assert crc32c(data) == slow_crc32c(data)


def test_chosen_records_are_read_and_the_others_skipped(file):
    assert list(read_records(file, range(3))) == RECORDS
    assert list(read_records(file, range(1, 2))) == [None, b"", None]
    assert count_records(file) == 3


@pytest.mark.parametrize("place", [0, 7, 8, 11, 12, 14, 15, 18])
def test_a_changed_byte_anywhere_in_a_record_is_noticed_and_named(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"record 0 of .*tfrecord-00000-of-00001 .*checksum"):
        list(read_records(file, range(3)))


@pytest.mark.parametrize("left", [1, 8, 11, 12, 13, 18, len(framed(b"one")) + 3, -1])
def test_a_file_that_ends_within_a_record_is_cut_off(file, left):
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"record [012] of .* cut off"):
        list(read_records(file, range(3)))
    with pytest.raises(ValueError, match="cut off"):
        count_records(file)


@pytest.mark.parametrize("packed", [True, False])
def test_an_example_holds_lists_of_bytes_floats_and_signed_integers_packed_or_not(packed):
    features = {"image": [b"\x00\xff", b""], "objects/pose": [1.5, -0.25], "label": [3, -1, 2**62, -(2**63)]}
    assert parse_example(example(features, packed)) == features


def test_an_empty_list_is_a_feature_and_unknown_fields_are_passed_over():
    extra = varint(5 * 8) + varint(300) + varint(6 * 8 + 1) + bytes(8) + varint(7 * 8 + 5) + bytes(4)
    assert parse_example(extra + example({"objects/type": []})) == {"objects/type": []}
    assert parse_example(field(1, field(1, field(1, b"bare")))) == {"bare": []}


def test_packed_and_single_numbers_are_joined():
    body = field(3, field(1, varint(1) + varint(2)) + varint(8) + varint(3))
    assert parse_example(field(1, field(1, field(1, b"n") + field(2, body)))) == {"n": [1, 2, 3]}


def of_feature(body):
    return field(1, field(1, field(1, b"n") + field(2, body)))


@pytest.mark.parametrize(
    "data",
    [
        example({"label": [1]})[:-1],
        varint(1 * 8) + varint(3),  # features that are a number
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",  # a length without an end
        varint(1 * 8 + 3),  # a group
        of_feature(field(2, field(1, bytes(5)))),  # floats of 5 bytes
        of_feature(field(3, field(1, b"\x80"))),
        of_feature(field(3, varint(8 + 1) + struct.pack("<d", 1.0))),
        field(1, field(1, field(1, b"\xff"))),  # no UTF-8
        b"not protobuf at all",
    ],
)
def test_what_is_no_example_is_refused(data):
    with pytest.raises(ValueError, match=r"no tf\.train\.Example"):
        parse_example(data)


def test_no_cut_or_changed_example_ends_in_another_error():
    whole, random_bytes = example({"image": [b"abc"], "label": [7], "x": [1.0]}), random.Random(0)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] = random_bytes.randrange(256)
        for data in (whole[:place], bytes(changed)):
            with suppress(ValueError):  # any other error fails the test
                assert isinstance(parse_example(data), dict)
