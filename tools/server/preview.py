"""The beginning of a blob for a person: text where it is text, else a dump of its bytes. No I/O."""

from __future__ import annotations

import codecs

PREVIEW_BYTES = 64 << 10
_DUMPED_BYTES = 4 << 10
_ACROSS = 16
_CONTROLS = frozenset(range(32)) - frozenset(b"\t\n\r\f\x1b")


def preview(beginning: bytes, *, whole: bool) -> tuple[str, str]:
    """``text`` or ``bytes``, and what to show. `whole`: nothing follows, so a character isn't cut in two."""
    text = None if _CONTROLS.intersection(beginning) else _decode(beginning, whole)
    return ("bytes", dump(beginning[:_DUMPED_BYTES])) if text is None else ("text", text)


def _decode(data: bytes, whole: bool) -> str | None:
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data, final=whole)
    except UnicodeDecodeError:
        return None


def dump(data: bytes) -> str:
    """Sixteen bytes a line: offset, hexadecimal, ASCII."""
    lines = []
    for at in range(0, len(data), _ACROSS):
        row = data[at : at + _ACROSS]
        letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{at:08x}  {row.hex(' ', 1):<47}  {letters}")
    return "\n".join(lines)
