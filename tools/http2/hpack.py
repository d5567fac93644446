"""Headers as HTTP/2 has them, compressed (HPACK, RFC 7541).

A `Decoder` for what comes; what is sent is written as literals that nobody has
to remember, so encoding has no state.

A gRPC client's blocks are alike but for the time that is left to each call:
that comes as a new entry of the table, which moves all other indices by one. So
a block is first compared with the last one, moved by that; only what differs in
more is taken apart.
"""

from __future__ import annotations

from functools import lru_cache

from tools.http2 import huffman

Header = tuple[bytes, bytes]

TABLE_BYTES = 4096
"""Of the dynamic table: what a peer may use that wasn't told another size."""
_ENTRY_BYTES = 32
"""What an entry counts for beside its text."""

# RFC 7541, appendix A.
_STATIC: tuple[Header, ...] = (
    (b"", b""),  # indices begin at 1
    (b":authority", b""),
    (b":method", b"GET"),
    (b":method", b"POST"),
    (b":path", b"/"),
    (b":path", b"/index.html"),
    (b":scheme", b"http"),
    (b":scheme", b"https"),
    *((b":status", status) for status in (b"200", b"204", b"206", b"304", b"400", b"404", b"500")),
    (b"accept-charset", b""),
    (b"accept-encoding", b"gzip, deflate"),
    *(
        (name, b"")
        for name in (
            b"accept-language accept-ranges accept access-control-allow-origin age allow authorization cache-control "
            b"content-disposition content-encoding content-language content-length content-location content-range "
            b"content-type cookie date etag expect expires from host if-match if-modified-since if-none-match if-range "
            b"if-unmodified-since last-modified link location max-forwards proxy-authenticate proxy-authorization "
            b"range referer refresh retry-after server set-cookie strict-transport-security transfer-encoding "
            b"user-agent vary via www-authenticate"
        ).split()
    ),
)
_STATIC_COUNT = len(_STATIC)
_FIRST_DYNAMIC = 0x80 + _STATIC_COUNT
_LAST_SINGLE = 0xFE
"""A header that is an index alone, in one byte."""
_MOVED = bytes((*range(_FIRST_DYNAMIC), *range(_FIRST_DYNAMIC + 1, 0x100), 0xFF))
"""Such a byte when the table has one more entry."""
_STATUS_200 = b"\x88"
_CONTENT_TYPE = 31


class HpackError(Exception):
    """What came can't be decoded; nothing that comes later on this connection can, either."""


class Decoder:
    """One direction of one connection: each block has to be decoded, in order."""

    def __init__(self) -> None:
        self._entries: list[Header] = []
        """The dynamic table, the newest last."""
        self._bytes = 0
        self._most = TABLE_BYTES
        self.changes = 0
        """Grows when the table changes: until then, equal blocks have equal headers."""
        self.varied = -1
        """The place of the only header in which the block that was decoded last differs from the one before it, where
        that is known; else -1."""
        self._last: list[Header] = []
        self._before = self._behind = b""
        """What stands around that header's place in a block like the last one, were it to come next."""
        self._deepest = -1
        """The oldest entry that these need, counted from the newest; -1: no block is like the last one."""

    def decode(self, block: bytes) -> list[Header]:
        """A whole header block. Raises HpackError."""
        try:
            headers = self._decode_like_last(block) if self._deepest >= 0 else None
            return self._decode(block) if headers is None else headers
        except (IndexError, ValueError) as error:
            raise HpackError(f"a header block that can't be decoded: {error}") from error

    def _decode_like_last(self, block: bytes) -> list[Header] | None:
        """Those of a block in which all headers but one are the last block's, as it had them; None: of another."""
        before, behind, entries = self._before, self._behind, self._entries
        place, end = len(before), len(block) - len(behind)
        if not (place < end and block.startswith(before) and block.endswith(behind) and self._deepest < len(entries)):
            return None
        head, name = block[place], self._last[place][0]
        if not 0x40 < head < 0x7F or self._get(head & 0x3F)[0] != name:
            return None
        value, stop = _read_text(block, place + 1)
        if stop != end or (behind and self._bytes + len(name) + len(value) + _ENTRY_BYTES > self._most):
            # Such an entry pushes out others, and with them perhaps what is behind.
            return None
        headers = self._last.copy()
        headers[place] = header = (name, value)
        self._keep(header)
        self._move()
        self.varied = place
        return headers

    def _move(self) -> None:
        self._deepest += 1
        if _FIRST_DYNAMIC + self._deepest > _LAST_SINGLE:
            self._deepest = -1
            return
        self._before = self._before.translate(_MOVED)
        self._behind = self._behind.translate(_MOVED)

    def _keep(self, header: Header) -> None:
        """Put it into the table."""
        self._entries.append(header)
        self._bytes += len(header[0]) + len(header[1]) + _ENTRY_BYTES
        self._evict()

    def _note(self, block: bytes, headers: list[Header], kept: tuple[int, int] | None) -> None:
        """Prepare for one like it: of headers that are a byte each, but for one that was kept, from there to there."""
        self._deepest = -1
        if kept is None:
            return
        before, behind = block[: kept[0]], block[kept[1] :]
        if len(before) + len(behind) + 1 != len(headers):
            return
        self._last = headers.copy()
        self._before, self._behind = before, behind
        self._deepest = max((_FIRST_DYNAMIC, *before, *behind)) - _FIRST_DYNAMIC
        self._move()

    def _decode(self, block: bytes) -> list[Header]:
        self.varied = -1
        headers: list[Header] = []
        position, end = 0, len(block)
        entries = self._entries
        kept_at: tuple[int, int] | None = None
        while position < end:
            byte = block[position]
            if byte & 0x80:
                position += 1
                back = byte - _FIRST_DYNAMIC
                if 0 <= back < len(entries) and byte < 0xFF:
                    # Most often.
                    headers.append(entries[~back])
                    continue
                index = byte & 0x7F
                if index == 0x7F:
                    index, position = _read_rest(block, position, index)
                headers.append(self._get(index))
            elif byte & 0xE0 == 0x20:
                if headers:
                    raise HpackError("a table's size behind a header")
                size, position = _read_number(block, position, 0x1F)
                if size > TABLE_BYTES:
                    raise HpackError(f"a table of {size} bytes, where {TABLE_BYTES} were offered")
                self._most = size
                self._evict()
            else:
                kept = byte & 0x40
                start = position
                index, position = _read_number(block, position, 0x3F if kept else 0x0F)
                if index:
                    name = self._get(index)[0]
                else:
                    name, position = _read_text(block, position)
                value, position = _read_text(block, position)
                headers.append((name, value))
                if kept:
                    self._keep((name, value))
                    kept_at = start, position
        self._note(block, headers, kept_at)
        return headers

    def _get(self, index: int) -> Header:
        if index < _STATIC_COUNT:
            if not index:
                raise HpackError("a header of index 0")
            return _STATIC[index]
        back = index - _STATIC_COUNT + 1
        if back > len(self._entries):
            raise HpackError(f"a header of index {index}, which isn't in the table")
        return self._entries[-back]

    def _evict(self) -> None:
        self.changes += 1
        evicted = 0
        while self._bytes > self._most:
            name, value = self._entries[evicted]
            self._bytes -= len(name) + len(value) + _ENTRY_BYTES
            evicted += 1
        if evicted:
            del self._entries[:evicted]


def _read_number(block: bytes, position: int, mask: int) -> tuple[int, int]:
    """A number whose first bits are what a mask leaves of a byte, and the position behind it."""
    number = block[position] & mask
    position += 1
    return (number, position) if number < mask else _read_rest(block, position, number)


def _read_rest(block: bytes, position: int, number: int) -> tuple[int, int]:
    for shift in (0, 7, 14, 21):
        byte = block[position]
        position += 1
        number += (byte & 0x7F) << shift
        if not byte & 0x80:
            return number, position
    raise HpackError("a number that is too large")


def _read_text(block: bytes, position: int) -> tuple[bytes, int]:
    coded = block[position] & 0x80
    size, position = _read_number(block, position, 0x7F)
    end = position + size
    text = block[position:end]
    if len(text) != size:
        raise HpackError("a text that is longer than its block")
    return (_decode_huffman(text) if coded else text), end


_decode_huffman = lru_cache(1024)(huffman.decode)
"""The same texts come again and again; a block is bounded, and so is what is remembered."""


def encode(headers: list[Header]) -> bytes:
    """A block with these headers, that leaves the other's table as it is."""
    parts = []
    for name, value in headers:
        if (name, value) == (b":status", b"200"):
            parts.append(_STATUS_200)
        elif name == b"content-type":
            parts += (_number(_CONTENT_TYPE, 0x0F), _text(value))
        else:
            parts += (b"\0", _text(name), _text(value))
    return b"".join(parts)


def _text(text: bytes) -> bytes:
    return _number(len(text), 0x7F) + text


def _number(number: int, mask: int) -> bytes:
    if number < mask:
        return bytes((number,))
    coded = bytearray((mask,))
    number -= mask
    while number > 0x7F:
        coded.append(number & 0x7F | 0x80)
        number >>= 7
    coded.append(number)
    return bytes(coded)
