"""The codec of REAPI Directory messages, against a second reading of the canonical rules and against damage."""

from __future__ import annotations

from contextlib import suppress
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from store.digest import Digest, DigestFunction
from store.directory import decode_directory, encode_directory
from store.entries import DirectoryEntry, Entry, FileEntry, ReferenceEntry, Stamp, SymlinkEntry
from store.errors import BadTree

BLAKE3 = DigestFunction.BLAKE3
NAMES = st.binary(min_size=1, max_size=255).filter(lambda n: not {47, 0} & set(n) and n not in (b".", b".."))
TIMES = st.none() | st.integers(-(1 << 63), (1 << 63) - 1)
DIGESTS = st.builds(Digest, st.just(BLAKE3), st.binary(min_size=32, max_size=32), st.integers(0, (1 << 63) - 1))
STAMPS = st.builds(
    Stamp,
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 63) - 1),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.integers(-(1 << 63), (1 << 63) - 1),
)
HOST_PATHS = st.binary(max_size=300).map(lambda path: b"/" + path.replace(b"\0", b""))
TARGETS = st.binary(min_size=1, max_size=4095).filter(lambda target: b"\0" not in target)


def _entry(name: bytes) -> st.SearchStrategy[Entry]:
    return st.one_of(
        st.builds(FileEntry, st.just(name), DIGESTS, st.booleans(), TIMES),
        st.builds(ReferenceEntry, st.just(name), HOST_PATHS, STAMPS, st.booleans()),
        st.builds(SymlinkEntry, st.just(name), TARGETS, TIMES),
        st.builds(DirectoryEntry, st.just(name), DIGESTS),
    )


ENTRIES = st.sets(NAMES, max_size=8).flatmap(lambda names: st.tuples(*map(_entry, sorted(names)))).map(list)


@given(ENTRIES, st.randoms())
def test_entries_come_back_whatever_order_they_went_in(entries: list[Entry], chance: Random) -> None:
    shuffled = list(entries)
    chance.shuffle(shuffled)
    message = encode_directory(shuffled)
    assert message == encode_directory(entries)
    assert decode_directory(message, BLAKE3) == entries


@given(ENTRIES)
def test_messages_are_canonical(entries: list[Entry]) -> None:
    """Fields in order of number, each kind sorted by name, defaults left out, no number longer than it need be."""
    fields = list(_read(encode_directory(entries)))
    assert [number for number, _ in fields] == sorted(number for number, _ in fields)
    for kind in (1, 2, 3):
        nodes = [list(_read(payload)) for number, payload in fields if number == kind and isinstance(payload, bytes)]
        names = [name for node in nodes for number, name in node if number == 1 and isinstance(name, bytes)]
        assert names == sorted(names)
        for node in nodes:
            assert [number for number, _ in node] == sorted(number for number, _ in node)
            assert 0 not in [value for _, value in node], "a default is written"


def _read(message: bytes) -> list[tuple[int, bytes | int]]:
    """Fields of a message, by another reader than the one under test; refuses long varints."""
    fields: list[tuple[int, bytes | int]] = []
    position = 0

    def varint() -> int:
        nonlocal position
        start, value = position, 0
        while message[position] & 128:
            value |= (message[position] & 127) << 7 * (position - start)
            position += 1
        value |= message[position] << 7 * (position - start)
        assert message[position] or position == start, "a varint with a useless byte"
        position += 1
        return value

    while position < len(message):
        tag = varint()
        if tag & 7 == 0:
            fields.append((tag >> 3, varint()))
        else:
            assert tag & 7 == 2
            length = varint()
            fields.append((tag >> 3, message[position : position + length]))
            position += length
    return fields


def test_a_message_has_the_bytes_protobuf_would_write() -> None:
    digest = Digest(DigestFunction.SHA256, bytes(range(32)), 300)
    message = encode_directory(
        [
            SymlinkEntry(b"link", b"to"),
            DirectoryEntry(b"sub", digest),
            FileEntry(b"b", digest._replace(size=0), False),
            FileEntry(b"a", digest, True, 1_500_000_000),
        ]
    )
    hexadecimal = bytes(range(32)).hex().encode()
    with_size = b"\x12\x45\x0a\x40" + hexadecimal + b"\x10\xac\x02"
    without_size = b"\x12\x42\x0a\x40" + hexadecimal
    mtime = b"\x32\x0a\x12\x08\x08\x01\x10\x80\xca\xb5\xee\x01"
    assert message == b"".join(
        [
            b"\x0a\x58\x0a\x01a" + with_size + b"\x20\x01" + mtime,
            b"\x0a\x47\x0a\x01b" + without_size,
            b"\x12\x4c\x0a\x03sub" + with_size,
            b"\x1a\x0a\x0a\x04link\x12\x02to",
        ]
    )


def test_the_empty_directory_is_the_empty_message() -> None:
    assert encode_directory([]) == b""
    assert decode_directory(b"", BLAKE3) == []


@given(st.binary(max_size=200))
@example(b"\x0a\x05\x0a\x03abc")
@example(b"\x08\x01")
@example(b"\x0b")
@example(b"\xff" * 12)
def test_any_bytes_are_a_directory_or_bad(message: bytes) -> None:
    with suppress(BadTree):
        decode_directory(message, BLAKE3)


@given(ENTRIES.filter(bool), st.data())
def test_a_message_cut_short_or_changed_in_a_byte_is_another_directory_or_bad(
    entries: list[Entry], data: st.DataObject
) -> None:
    message = bytearray(encode_directory(entries))
    position = data.draw(st.integers(0, len(message) - 1))
    if data.draw(st.booleans()):
        del message[position:]
    else:
        message[position] ^= data.draw(st.integers(1, 255))
    with suppress(BadTree):
        decode_directory(bytes(message), BLAKE3)


def _node(field: int, name: bytes, rest: bytes) -> bytes:
    node = b"\x0a" + bytes((len(name),)) + name + rest
    return bytes((field << 3 | 2, len(node))) + node


DIGEST = b"\x12\x44\x0a\x40" + b"0" * 64 + b"\x10\x05"


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (_node(1, b"..", DIGEST), "can't be an entry"),
        (_node(1, b"", DIGEST), "an empty name"),
        (_node(1, b"a/b", DIGEST), "slash"),
        (_node(2, b"a\0b", DIGEST), "NUL"),
        (_node(1, b"a", b""), "is not a hash"),
        (_node(1, b"a", b"\x12\x04\x0a\x02zz"), "is not a hash"),
        (_node(3, b"a", b""), "target"),
        (_node(1, b"a", DIGEST) + _node(2, b"a", DIGEST), "twice"),
        (_node(3, b"a", b"\x12\x01x") + _node(1, b"a", DIGEST), "twice"),
    ],
)
def test_what_breaks_the_rules_is_refused_with_the_reason(message: bytes, why: str) -> None:
    with pytest.raises(BadTree, match=why):
        decode_directory(message, BLAKE3)


def test_unknown_fields_are_passed_over() -> None:
    assert decode_directory(b"\x78\x01" + _node(1, b"a", DIGEST) + b"\x7d1234", BLAKE3) == [
        FileEntry(b"a", Digest(BLAKE3, bytes(32), 5), False)
    ]
