"""What a person or a script sees: tables, sizes, JSON, warnings, progress.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from store.errors import BadInput

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def print_json(value: Any) -> None:
    """One JSON document; what is not ASCII is escaped, so that any file name survives."""
    print(json.dumps(value, indent=2))


def print_table(rows: Iterable[Sequence[object]], right: frozenset[int] = frozenset()) -> None:
    """Rows in aligned columns, those in `right` to the right; the last column is never padded."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(padded).rstrip())


def warn(message: str) -> None:
    """A line on standard error that is no failure."""
    print(f"casfs: warning: {message}", file=sys.stderr)


def format_size(size: int) -> str:
    """A number of bytes for a person: three or four significant digits."""
    if size < 1024:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, len(_UNITS) - 1)
    number = size / 1024**power
    return f"{number:.1f} {_UNITS[power]}" if number < 100 else f"{number:.0f} {_UNITS[power]}"


def count(number: int, noun: str) -> str:
    """``1 file``, ``2 files``, ``12,000 files``."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun[:-1]}ies" if noun.endswith("y") else f"{number:,} {noun}s"


_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGTPE])(i?B?)|B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes from ``20GiB``, ``20G`` (both binary), ``20GB`` (decimal) or ``1024``. Raises BadInput."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BadInput(f"{text!r} is not a size: write a number of bytes, or as in 500MiB or 20G")
    prefix, suffix = (match[2] or "").upper(), (match[3] or "").upper()
    base = 1000 if suffix == "B" else 1024
    return int(float(match[1]) * base ** " KMGTPE".index(prefix or " "))


_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_duration(text: str) -> int:
    """Seconds from ``90``, ``15m``, ``1h``, ``2d`` or ``1w``. Raises BadInput."""
    match = re.fullmatch(r"([0-9]+)\s*([smhdw]?)", text.strip())
    if match is None:
        raise BadInput(f"{text!r} is not a duration: write seconds, or as in 15m, 1h or 2d")
    return int(match[1]) * _SECONDS[match[2]]


def format_duration(seconds: float) -> str:
    """Seconds for a person."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if hours < 1:
        return f"{minutes} min {int(seconds) % 60} s"
    return f"{hours} h {minutes % 60} min" if days < 1 else f"{days} d {hours % 24} h"


Progress = Callable[[int, int], None]
"""Told how many items and how many bytes have just been done."""


@contextmanager
def progress(doing: str, items: str, total_bytes: int | None = None) -> Iterator[Progress]:
    """A progress bar of bytes that also counts `items`, if standard error is a terminal; else nothing."""
    if not sys.stderr.isatty():
        yield lambda number, size: None
        return
    from tqdm import tqdm

    done = 0
    with tqdm(desc=doing, total=total_bytes, unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:

        def advance(number: int, size: int) -> None:
            nonlocal done
            done += number
            bar.set_postfix_str(f"{done:,} {items}", refresh=False)
            bar.update(size)

        yield advance
