"""TFRecord files and the `tf.train.Example` messages inside them, read without TensorFlow.

A record is a little-endian u64 length, a masked CRC-32C of it, the bytes, and a masked CRC-32C of those.
Trap: a file cut exactly between two records looks whole; only the record count of the dataset's own
description tells, so callers compare it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vlm4vla_core.errors import InputError

Feature = np.ndarray | list[bytes]  # float32 (n,), int64 (n,) or n byte strings; an unset feature is an empty list
_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
_FETCH_AGAIN = "fetch the file again from its source"


def masked_crc(data: bytes) -> int:
    """TFRecord's masked CRC-32C of some bytes."""
    from crc32c import crc32c

    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(path: Path) -> Iterator[bytes]:
    """Every record of a TFRecord file, both checksums verified.

    Raises InputError naming the file, the record (from 0) and the byte offset where it begins, on a checksum that
    does not match and on a file cut short within a record.
    """
    try:
        size = path.stat().st_size
        handle = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=path) from None
    with handle:
        number = offset = 0
        while offset < size:
            where = f"{path}, record {number}, byte {offset}"
            header = handle.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise InputError("tfrecord cut short within a record's header", where=where, fix=_FETCH_AGAIN)
            length, crc = _HEADER.unpack(header)
            if masked_crc(header[:8]) != crc:
                raise InputError("CRC mismatch in a record's length", where=where, fix=_FETCH_AGAIN)
            if offset + _HEADER.size + length + _FOOTER.size > size:  # before reading: a length may be huge
                left = size - offset - _HEADER.size
                what = f"tfrecord cut short: the record needs {length + _FOOTER.size} more bytes, {left} are left"
                raise InputError(what, where=where, fix=_FETCH_AGAIN)
            data = handle.read(length)
            footer = handle.read(_FOOTER.size)
            if len(data) + len(footer) < length + _FOOTER.size:  # the file shrank while it was read
                raise InputError("tfrecord cut short within a record", where=where, fix=_FETCH_AGAIN)
            if masked_crc(data) != _FOOTER.unpack(footer)[0]:
                raise InputError("CRC mismatch in a record's data", where=where, fix=_FETCH_AGAIN)
            yield data
            offset += _HEADER.size + length + _FOOTER.size
            number += 1


def parse_example(data: bytes, where: str = "") -> dict[str, Feature]:
    """The features of one serialised `tf.train.Example`: float32 (n,), int64 (n,) or a list of byte strings each.

    Packed and unpacked number lists are accepted, unknown fields skipped. Raises InputError, with `where` (file
    and record), when the bytes are no such message.
    """
    found: dict[str, Feature] = {}
    try:
        for features in _messages(memoryview(data), 1):
            for entry in _messages(features, 1):
                key, value = "", memoryview(b"")
                for number, _, content in _fields(entry):
                    if number == 1:
                        key = bytes(_bytes(content)).decode("utf-8")
                    elif number == 2:
                        value = _bytes(content)
                found[key] = _feature(value)
    except (ValueError, struct.error) as error:
        raise InputError(f"malformed tf.train.Example ({error})", where=where, fix=_FETCH_AGAIN) from None
    return found


def _feature(message: memoryview) -> Feature:
    """A Feature is one of bytes_list (1), float_list (2), int64_list (3); each has its values in field 1."""
    kind, lists = 0, list[memoryview]()
    for number, _, content in _fields(message):
        if number in (1, 2, 3):
            if number != kind:  # a oneof: the last kind set wins, equal kinds are joined
                kind, lists = number, []
            lists.append(_bytes(content))
    if kind == 2:
        return _numbers([_floats(message) for message in lists], np.float32)
    if kind == 3:
        return _numbers([_integers(message) for message in lists], np.int64)
    return [bytes(value) for message in lists for value in _messages(message, 1)]


def _numbers(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])


def _floats(message: memoryview) -> np.ndarray:
    parts = []
    for number, wire, content in _fields(message):
        if number == 1:
            if wire not in (2, 5):
                raise ValueError(f"a float with wire type {wire}")
            parts.append(np.frombuffer(_bytes(content), "<f4"))  # ValueError when not a multiple of 4 bytes
    return _numbers(parts, np.float32)


def _integers(message: memoryview) -> np.ndarray:
    values: list[int] = []
    for number, wire, content in _fields(message):
        if number != 1:
            continue
        if wire == 0:
            values.append(int(content))
            continue
        if wire != 2:
            raise ValueError(f"an integer with wire type {wire}")
        packed, position = _bytes(content), 0
        while position < len(packed):
            value, position = _varint(packed, position)
            values.append(value)
    unsigned = np.array(values, np.uint64)
    return unsigned.view(np.int64)  # negative numbers are written as 64-bit two's complement


def _messages(message: memoryview, field: int) -> Iterator[memoryview]:
    """The contents of every length-delimited field with this number."""
    for number, wire, content in _fields(message):
        if number == field:
            if wire != 2:
                raise ValueError(f"field {field} with wire type {wire}")
            yield _bytes(content)


def _bytes(content: int | memoryview) -> memoryview:
    if isinstance(content, int):
        raise ValueError("a number where bytes belong")
    return content


def _fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Fields of one protobuf message: number, wire type, and the varint or the bytes."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise ValueError("a field without a number")
        if wire == 0:
            value, position = _varint(message, position)
            yield number, wire, value
            continue
        if wire == 2:
            length, position = _varint(message, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire}")
        if length > end - position:
            raise ValueError(f"a field of {length} bytes where {end - position} are left")
        yield number, wire, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(message):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than ten bytes")
    raise ValueError("a number that is cut short")
