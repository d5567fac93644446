"""The codec of the kernel's protocol: layouts as in fuse.h, and no input that does more harm than BadRequest."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casfs import wire
from casfs.errors import BadRequest
from casfs.wire import InitFlag, InitReply, Opcode

HEADER = struct.Struct("<IIQQIIIHH")
ENTRY = struct.Struct("<QQQQII")
ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
DIRENT = struct.Struct("<QQII")

u64 = st.integers(0, (1 << 64) - 1)
u32 = st.integers(0, (1 << 32) - 1)
names = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name)
times = st.integers(-(1 << 62), 1 << 62)

DECODERS: dict[str, tuple[Callable[[bytes], Any], int]] = {
    "INIT": (wire.decode_init, 16),
    "OPEN": (wire.decode_open, 8),
    "READ": (wire.decode_read, 40),
    "RELEASE": (wire.decode_release, 24),
    "INTERRUPT": (wire.decode_interrupt, 8),
}
"""Each with the length of the smallest body it can read."""


@given(opcode=u32, unique=u64, node=u64, pid=u32, body=st.binary(max_size=300))
def test_a_request_comes_back_as_it_was_sent(opcode: int, unique: int, node: int, pid: int, body: bytes) -> None:
    message = HEADER.pack(40 + len(body), opcode, unique, node, 5, 6, pid, 0, 0) + body
    request = wire.decode_request(message)
    assert (request.opcode, request.unique, request.node, request.pid) == (opcode, unique, node, pid)
    assert bytes(request.body) == body


@given(body=st.binary(max_size=64), extensions=st.integers(0, 10))
def test_extensions_are_cut_off_the_body(body: bytes, extensions: int) -> None:
    message = HEADER.pack(40 + len(body), 1, 2, 3, 0, 0, 0, extensions, 0) + body
    if 8 * extensions <= len(body):
        assert bytes(wire.decode_request(message).body) == body[: len(body) - 8 * extensions]
    else:
        with pytest.raises(BadRequest):
            wire.decode_request(message)


@given(message=st.binary(max_size=200))
def test_random_bytes_are_a_request_or_refused(message: bytes) -> None:
    try:
        request = wire.decode_request(message)
    except BadRequest:
        return
    assert len(message) == int.from_bytes(message[:4], "little")
    assert len(request.body) <= len(message) - 40


@given(body=st.binary(max_size=100), cut=st.integers(0, 140), more=st.binary(max_size=20))
def test_a_message_that_is_not_as_long_as_it_says_is_refused(body: bytes, cut: int, more: bytes) -> None:
    message = HEADER.pack(40 + len(body), 1, 2, 3, 0, 0, 0, 0, 0) + body
    for wrong in (message[: min(cut, len(message) - 1)], message + b"x" + more):
        with pytest.raises(BadRequest):
            wire.decode_request(wrong)


@pytest.mark.parametrize("name", DECODERS)
@given(body=st.binary(max_size=128))
def test_a_body_is_refused_exactly_when_it_is_too_short(name: str, body: bytes) -> None:
    decode, shortest = DECODERS[name]
    if len(body) < shortest:
        with pytest.raises(BadRequest, match=name):
            decode(body)
    else:
        decode(body)


@given(body=st.binary(max_size=300))
def test_a_name_ends_in_its_only_nul(body: bytes) -> None:
    if len(body) > 1 and body.index(0) == len(body) - 1 if 0 in body else False:
        assert wire.decode_name(body) == body[:-1]
    else:
        with pytest.raises(BadRequest):
            wire.decode_name(body)


@given(name=names)
def test_a_good_name_is_read(name: bytes) -> None:
    assert wire.decode_name(name + b"\0") == name


def test_init_has_its_upper_flags_only_with_the_flag_that_says_so() -> None:
    long = struct.pack("<IIIII44x", 7, 41, 131072, 1 << 30 | 1, 0x20)
    assert wire.decode_init(long).flags == InitFlag.INIT_EXT | InitFlag.ASYNC_READ | InitFlag.PASSTHROUGH
    assert wire.decode_init(struct.pack("<IIIII44x", 7, 41, 0, 1, 0x20)).flags == InitFlag.ASYNC_READ
    assert wire.decode_init(long[:16]).flags & 0xFFFFFFFF == 1 << 30 | 1


def test_the_answer_to_init_is_laid_out_as_the_kernel_wants() -> None:
    flags = InitFlag.INIT_EXT | InitFlag.PASSTHROUGH | InitFlag.READDIRPLUS
    body = wire.encode_init(InitReply(41, 1 << 17, flags, 64, 4096, 256, 1))
    assert len(body) == 64
    major, minor, readahead, low, background, congestion, write, gran, pages, _, high, depth = struct.unpack(
        "<IIIIHHIIHHII24x", body
    )
    assert (major, minor, readahead, background, write, gran, pages, depth) == (7, 41, 1 << 17, 64, 4096, 1, 256, 1)
    assert low == 1 << 30 | 1 << 13 and high == 1 << 5
    assert 0 < congestion <= background


@given(unique=u64, node=u64, mode=u32, size=u64, time=times, nlink=u32, uid=u32, gid=u32)
def test_attributes_are_laid_out_as_the_kernel_wants(
    unique: int, node: int, mode: int, size: int, time: int, nlink: int, uid: int, gid: int
) -> None:
    seconds, nanos = divmod(time, 10**9)
    seconds &= (1 << 64) - 1
    blocks = (size + 511) >> 9
    expected = (node, size, blocks, *[seconds] * 3, *[nanos] * 3, mode, nlink, uid, gid, 0, 4096, 0)

    entry = wire.encode_entry(unique, node, mode, size, time, nlink, uid, gid)
    assert struct.unpack_from("<IiQ", entry) == (len(entry), 0, unique) and len(entry) == 16 + 40 + 88
    assert ENTRY.unpack_from(entry, 16) == (node, 0, wire.FOREVER, wire.FOREVER, 0, 0)
    assert ATTR.unpack_from(entry, 56) == expected

    attr = wire.encode_attr(unique, node, mode, size, time, nlink, uid, gid)
    assert struct.unpack_from("<IiQ", attr) == (len(attr), 0, unique) and len(attr) == 16 + 16 + 88
    assert struct.unpack_from("<QII", attr, 16) == (wire.FOREVER, 0, 0)
    assert ATTR.unpack_from(attr, 32) == expected


def test_no_entry_is_an_answer_that_the_kernel_remembers() -> None:
    reply = wire.encode_no_entry(9)
    assert struct.unpack_from("<IiQ", reply) == (144, 0, 9) and len(reply) == 144
    assert ENTRY.unpack_from(reply, 16)[:3] == (0, 0, wire.FOREVER)


@given(unique=u64, number=st.integers(1, 4095))
def test_an_error_is_negative_and_has_no_body(unique: int, number: int) -> None:
    assert wire.encode_error(unique, number) == struct.pack("<IiQ", 16, -number, unique)
    assert wire.decode_opened(wire.encode_error(unique, number)) is None


@given(unique=u64, handle=u64, flags=u32, backing_id=st.integers(-(1 << 31), (1 << 31) - 1))
def test_an_answer_to_open_gives_its_handle_back(unique: int, handle: int, flags: int, backing_id: int) -> None:
    reply = wire.encode_open(unique, handle, flags, backing_id)
    assert struct.unpack("<IiQQIi", reply) == (32, 0, unique, handle, flags, backing_id)
    assert wire.decode_opened(reply) == handle


@given(
    entries=st.lists(st.tuples(names, st.integers(1, 1 << 40), st.sampled_from([0o100444, 0o40555, 0o120777]))),
    size=st.integers(0, 5000),
    plus=st.booleans(),
)
def test_a_page_holds_as_many_whole_entries_as_fit(
    entries: list[tuple[bytes, int, int]], size: int, plus: bool
) -> None:
    page = wire.DirectoryPage(size)
    taken = 0
    for cookie, (name, node, mode) in enumerate(entries, 3):
        if plus:
            fits = page.add_entry(cookie, name, node, mode, 5, 7, 1, 0, 0)
        else:
            fits = page.add_name(node, cookie, mode, name)
        if not fits:
            break
        taken += 1
    reply = page.encode(77)
    assert struct.unpack_from("<IiQ", reply) == (len(reply), 0, 77)
    assert len(reply) - 16 <= size
    if taken < len(entries):
        needed = (128 if plus else 0) + 24 + (len(entries[taken][0]) + 7 & ~7)
        assert len(reply) - 16 + needed > size
    assert read_page(reply[16:], plus) == [
        (name, node, cookie, mode >> 12) for cookie, (name, node, mode) in enumerate(entries[:taken], 3)
    ]


def read_page(page: bytes, plus: bool) -> list[tuple[bytes, int, int, int]]:
    """The entries of a page, read as the kernel reads them."""
    found = []
    offset = 0
    while offset < len(page):
        if plus:
            node = ENTRY.unpack_from(page, offset)[0]
            assert ATTR.unpack_from(page, offset + 40)[0] == node
            offset += 128
        node, cookie, length, file_type = DIRENT.unpack_from(page, offset)
        found.append((page[offset + 24 : offset + 24 + length], node, cookie, file_type))
        assert not any(page[offset + 24 + length : offset + 24 + (length + 7 & ~7)])
        offset += 24 + (length + 7 & ~7)
    assert offset == len(page)
    return found


def test_notifications_are_laid_out_as_the_kernel_wants() -> None:
    assert wire.notify_inval_inode(5, 0, -1) == struct.pack("<IiQQqq", 40, 2, 0, 5, 0, -1)
    assert wire.notify_inval_entry(5, b"name") == struct.pack("<IiQQII", 37, 3, 0, 5, 4, 0) + b"name\0"
    assert wire.notify_delete(5, 6, b"name") == struct.pack("<IiQQQII", 45, 6, 0, 5, 6, 4, 0) + b"name\0"
    assert wire.notify_resend() == struct.pack("<IiQ", 16, 7, 0)
    assert wire.notify_inc_epoch() == struct.pack("<IiQ", 16, 8, 0)
    assert wire.notify_prune([5, 6]) == struct.pack("<IiQIIQQQ", 48, 9, 0, 2, 0, 0, 5, 6)


def test_the_numbers_of_requests_are_below_the_length_of_the_table_of_counts() -> None:
    assert max(Opcode) < wire.OPCODES
    assert len({int(opcode) for opcode in Opcode}) == len(Opcode)
