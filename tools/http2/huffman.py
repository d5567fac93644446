"""The Huffman code of HPACK (RFC 7541, appendix B): decoding only, as nothing has to be sent in it.

The code is canonical: codes of one length follow each other in the order of
their symbols, and longer ones go on where shorter ones end. So the lengths say
all of it.
"""

from __future__ import annotations

from functools import cache, lru_cache

# fmt: off
_LENGTHS = (
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28,
    28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12,
    10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5, 6,
    5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22,
    22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20,
    22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28,
    27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28,
    27, 27, 27, 27, 27, 26, 30,
)
"""Bits of each byte's code, and of the end's, which is 256."""
# fmt: on
_END = 256
_PADDING_MOST = 7

_State = int
_Step = tuple[_State, bytes, bool]
"""After four more bits: the next state, what they completed, and whether a text may end there."""


@cache
def _steps() -> list[tuple[_Step, ...]]:
    """For each state what each four bits do. A state is a node of the code's tree, or the last one: all is lost."""
    children: list[dict[int, int]] = [{}]
    symbols: dict[int, int] = {}
    code = length = 0
    for symbol in sorted(range(len(_LENGTHS)), key=lambda symbol: (_LENGTHS[symbol], symbol)):
        code <<= _LENGTHS[symbol] - length
        length = _LENGTHS[symbol]
        node = 0
        for shift in range(length - 1, -1, -1):
            bit = code >> shift & 1
            if bit not in children[node]:
                children[node][bit] = len(children)
                children.append({})
            node = children[node][bit]
        symbols[node] = symbol
        code += 1
    # What a text may be filled up with is the beginning of the end's code: ones.
    filling = [0]
    while len(filling) <= _PADDING_MOST:
        filling.append(children[filling[-1]][1])
    lost = len(children)

    def step(node: int, bits: int) -> _Step:
        completed = b""
        for shift in (3, 2, 1, 0):
            node = children[node][bits >> shift & 1]
            symbol = symbols.get(node)
            if symbol == _END:
                return lost, b"", False
            if symbol is not None:
                completed += bytes((symbol,))
                node = 0
        return node, completed, node in filling

    steps = [() if node in symbols else tuple(step(node, bits) for bits in range(16)) for node in range(lost)]
    return [*steps, ((lost, b"", False),) * 16]


@lru_cache(4096)
def _take_byte(state: _State, byte: int) -> _Step:
    """Two steps in one. Remembered for the bytes that come again and again: in numbers, as of a call's timeout."""
    state, first, _ = _steps()[state][byte >> 4]
    state, second, may_end = _steps()[state][byte & 15]
    return state, first + second, may_end


def decode(data: bytes) -> bytes:
    """The text. Raises ValueError for what is none: the end's code in it, or a wrong filling."""
    state = 0
    parts = []
    may_end = True
    for byte in data:
        state, completed, may_end = _take_byte(state, byte)
        parts.append(completed)
    if not may_end:
        raise ValueError("a Huffman-coded text doesn't end where it should")
    return b"".join(parts)
