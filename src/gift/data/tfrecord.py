"""TFRecord files and the `tf.train.Example` in them, read without TensorFlow.

A record is its length (8 bytes, little-endian), a masked CRC-32C of these 8 bytes, the data, and a masked CRC-32C of
the data. An Example is a Protocol Buffers message: a map from names to lists of bytes, of floats, or of integers
(tensorflow/tensorflow, `tensorflow/core/lib/io/record_writer.h`, `tensorflow/core/example/feature.proto`).
"""

import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt32

_POLYNOMIAL = 0x82F63B78  # of Castagnoli, bits reversed
_BLOCK = 1024  # bytes taken at once: the table of them (1 MB) stays in the cache of a core
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types

Value = list[bytes] | list[float] | list[int]


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli, as in iSCSI) of some bytes, about 100 MB a second on one core.

    The remainder is linear over XOR: every byte adds what a table holds for its distance from the end of a block, and
    the remainder so far acts as if it were XORed into the first four bytes of the next block.
    """
    table = _remainders()
    state = 0xFFFFFFFF
    for start in range(0, len(data), _BLOCK):
        block = np.frombuffer(data, np.uint8, min(_BLOCK, len(data) - start), start).copy()
        carried = np.frombuffer(struct.pack("<I", state), np.uint8)
        block[:4] ^= carried[: len(block)]
        state = int(np.bitwise_xor.reduce(table[np.arange(len(block) - 1, -1, -1), block])) ^ (state >> 8 * len(block))
    return state ^ 0xFFFFFFFF


@cache
def _remainders() -> UInt32[np.ndarray, "distance 256"]:
    """Return the remainder that a byte leaves behind, by its distance from the end and by its value."""
    table = np.zeros((_BLOCK, 256), np.uint32)
    table[0] = np.arange(256)
    for _ in range(8):
        table[0] = np.where(table[0] & 1, (table[0] >> 1) ^ np.uint32(_POLYNOMIAL), table[0] >> 1)
    for distance in range(1, _BLOCK):
        table[distance] = (table[distance - 1] >> 8) ^ table[0][table[distance - 1] & 255]
    return table


def _masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def count_records(file: Path) -> int:
    """Return the number of records of a file; their data are neither read nor checked.

    Raises:
        ValueError: If the file ends within a record or a length is damaged.
    """
    return sum(1 for _ in read_records(file, range(0, 0)))


def read_records(file: Path, chosen: range) -> Iterator[bytes | None]:
    """Yield the data of the records of a file in order, and None for those that are not `chosen`, which are skipped.

    Raises:
        ValueError: If the file ends within a record, or a checksum is wrong.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        number = 0
        while stream.tell() < size:
            name = f"record {number} of {file}"
            length = struct.unpack("<Q", _checked(stream, 8, f"The first bytes of {name}"))[0]
            if length > size - stream.tell() - 4:
                raise ValueError(f"The data of {name}, {length} bytes, are cut off. Was the download complete?")
            if number in chosen:
                yield _checked(stream, length, f"The data of {name}")
            else:
                stream.seek(length + 4, 1)
                yield None
            number += 1


def _checked(stream: BinaryIO, length: int, name: str) -> bytes:
    """Return so many bytes, once their checksum, which follows them, has been compared."""
    data, checksum = stream.read(length), stream.read(4)
    if len(data) < length or len(checksum) < 4:
        raise ValueError(f"{name} are cut off. Was the download complete?")
    if _masked(crc32c(data)) != struct.unpack("<I", checksum)[0]:
        raise ValueError(f"{name} are damaged: their checksum is wrong. Export or copy the file anew.")
    return data


def parse_example(data: bytes) -> dict[str, Value]:
    """Return the features of a serialised `tf.train.Example` by name; nested names are joined by a slash.

    Raises:
        ValueError: If it is not such a message.
    """
    features: dict[str, Value] = {}
    try:
        for _, body in _fields(data, {1: (_LENGTH,)}):
            for _, entry in _fields(body, {1: (_LENGTH,)}):
                parts = dict(_fields(entry, {1: (_LENGTH,), 2: (_LENGTH,)}))
                features[parts.get(1, b"").decode()] = _feature(parts.get(2, b""))
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"These {len(data)} bytes are no tf.train.Example: {error}.") from error
    return features


def _feature(data: bytes) -> Value:
    """Return the list of a Feature: of bytes (field 1), floats (2) or integers (3)."""
    value: Value = []
    for kind, body in _fields(data, {1: (_LENGTH,), 2: (_LENGTH,), 3: (_LENGTH,)}):
        if kind == 1:
            value = [part for _, part in _fields(body, {1: (_LENGTH,)})]
        elif kind == 2:
            parts = b"".join(part for _, part in _fields(body, {1: (_LENGTH, _FIXED32)}))
            value = [number for (number,) in struct.iter_unpack("<f", parts)]
        else:
            value = _integers(b"".join(part for _, part in _fields(body, {1: (_LENGTH, _VARINT)})))
    return value


def _integers(packed: bytes) -> list[int]:
    """Return signed integers of 64 bits that lie one after the other."""
    numbers, position = list[int](), 0
    while position < len(packed):
        number, position = _varint(packed, position)
        numbers.append(number - (1 << 64) if number >> 63 else number)
    return numbers


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return an integer in groups of 7 bits, the lowest first, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number & 0xFFFFFFFFFFFFFFFF, position
    raise struct.error("an integer of more than 64 bits")


def _fields(data: bytes, wanted: dict[int, tuple[int, ...]]) -> list[tuple[int, bytes]]:
    """Return the numbers and bytes of the wanted fields of a message, with the wire types they may have."""
    found, position = list[tuple[int, bytes]](), 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == _LENGTH:
            length, position = _varint(data, position)
            end = position + length
        elif wire == _VARINT:
            end = _varint(data, position)[1]
        elif wire in (_FIXED32, _FIXED64):
            end = position + (4 if wire == _FIXED32 else 8)
        else:
            raise struct.error(f"wire type {wire}")
        if end > len(data) or wire not in wanted.get(number, (wire,)):
            raise struct.error(f"field {number} of wire type {wire} ends after the message or is of another type")
        if number in wanted:
            found.append((number, data[position:end]))
        position = end
    return found
