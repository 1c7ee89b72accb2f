"""TFRecord framing and Example parsing, against bytes built by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tfds_bytes import crc32c, example, feature, field, masked, record, varint

from vlm4vla_core.episodes.tfrecord import masked_crc, parse_example, read_records
from vlm4vla_core.errors import InputError

RECORDS = [b"first", b"", b"the third record"]


def test_checksum_is_the_published_one():
    assert crc32c(b"123456789") == 0xE3069283  # check value of CRC-32C (Castagnoli)
    assert struct.pack("<I", masked_crc(b"123456789")) == masked(b"123456789")


def test_reads_every_record(tmp_path: Path):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(b"".join(map(record, RECORDS)))
    assert list(read_records(path)) == RECORDS


def test_a_cut_at_every_byte_is_told_or_falls_between_records(tmp_path: Path):
    whole = b"".join(map(record, RECORDS))
    ends = np.cumsum([0, *(len(record(data)) for data in RECORDS)])
    path = tmp_path / "x.tfrecord"
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        complete = int(np.searchsorted(ends, cut, side="right")) - 1
        if cut in ends:  # whole as far as the file itself can tell; the dataset's record counts tell the rest
            assert list(read_records(path)) == RECORDS[:complete]
            continue
        with pytest.raises(InputError, match="cut short") as caught:
            list(read_records(path))
        assert f"{path}, record {complete}, byte {ends[complete]}" in str(caught.value)


def test_a_changed_byte_anywhere_is_a_crc_mismatch_naming_the_record(tmp_path: Path):
    whole = b"".join(map(record, RECORDS))
    ends = np.cumsum([0, *(len(record(data)) for data in RECORDS)])
    path = tmp_path / "x.tfrecord"
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        number = int(np.searchsorted(ends, place, side="right")) - 1
        with pytest.raises(InputError, match="CRC mismatch") as caught:
            list(read_records(path))
        assert f"{path}, record {number}, byte {ends[number]}" in str(caught.value)


def test_a_huge_length_with_a_right_checksum_is_not_believed(tmp_path: Path):
    length = struct.pack("<Q", 2**62)
    path = tmp_path / "x.tfrecord"
    path.write_bytes(length + masked(length) + b"abc")
    with pytest.raises(InputError, match="cut short"):
        list(read_records(path))


def test_a_missing_file_is_told(tmp_path: Path):
    with pytest.raises(InputError, match=r"cannot be read.*gone\.tfrecord"):
        list(read_records(tmp_path / "gone.tfrecord"))


@pytest.mark.parametrize("packed", [True, False])
def test_example_with_packed_and_unpacked_lists(packed: bool):
    floats = np.array([0.5, -1e30, np.nan, np.inf], np.float32)
    integers = np.array([0, 1, 300, -1, 2**63 - 1, -(2**63)], np.int64)
    found = parse_example(example({"f": floats, "i": integers, "b": [b"", b"\xff\x00"], "ü": []}, packed))
    np.testing.assert_array_equal(found["f"], floats)
    np.testing.assert_array_equal(found["i"], integers)
    assert found["f"].dtype == np.float32
    assert found["i"].dtype == np.int64
    assert found["b"] == [b"", b"\xff\x00"]
    assert found["ü"] == []


def test_unknown_fields_are_skipped_and_the_last_kind_wins():
    unknown = varint(7 << 3) + varint(5) + varint(8 << 3 | 1) + b"8 bytes!" + varint(9 << 3 | 5) + b"four"
    value = unknown + feature([b"gone"]) + feature(np.array([1, 2])) + feature(np.array([3]))
    entry = field(2, value) + field(1, b"key")  # the value may come before the key
    found = parse_example(unknown + field(1, field(1, entry)))
    assert list(found) == ["key"]
    np.testing.assert_array_equal(found["key"], [1, 2, 3])


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",  # a length is missing
        b"\x0a\x05abc",  # fewer bytes than told
        b"\x0b",  # a group, which Example has none of
        b"\x08\x01",  # a number where a message belongs
        b"\x0a" + b"\xff" * 11,  # a number that does not end
        b"\x00\x00",  # field number 0
        field(1, field(1, field(1, b"\xff\xfe") + field(2, b""))),  # a key that is no text
        field(1, field(1, field(1, b"k") + field(2, field(2, field(1, b"12345"))))),  # five bytes of float32
    ],
)
def test_malformed_examples_name_the_place(data: bytes):
    with pytest.raises(InputError, match=r"malformed.*\[file, record 7\]"):
        parse_example(data, "file, record 7")


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.binary(max_size=64))
def test_no_bytes_crash_the_parser(data: bytes):
    try:
        parse_example(data, "here")
    except InputError as error:
        assert "here" in str(error)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.data())
def test_no_damage_to_a_real_message_crashes_the_parser(data: st.DataObject):
    whole = bytearray(example({"a": np.arange(3.0), "b": [b"xyz"], "c": np.arange(-2, 2)}))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_example(bytes(whole[: data.draw(st.integers(0, len(whole)))]), "here")
    except InputError as error:
        assert "here" in str(error)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.dictionaries(
        st.text(max_size=5),
        st.one_of(
            st.lists(st.binary(max_size=5), max_size=4),
            st.lists(st.floats(width=32), min_size=1, max_size=4).map(lambda v: np.array(v, np.float32)),
            st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4).map(lambda v: np.array(v, np.int64)),
        ),
        max_size=4,
    )
)
def test_what_goes_in_comes_out(features: dict):
    found = parse_example(example(features))
    assert found.keys() == features.keys()
    for key, value in features.items():
        np.testing.assert_array_equal(found[key], value)
