"""The format of trace files: events to lines of JSON and back, no I/O.

A trace is written while a tree is used, a line at a time, and only ever appended to:

    {"casfs-trace": 1, "root": "blake3:…/77", "engine": "passthrough", "outputs": ["a.o"]}   always first
    ["process", 4711, "cc1"]        from here on the process 4711 runs the command cc1
    ["look", 4711, "include/a.h"]   what it did, and to which path; in order
    ["end"]                         the writer ended by itself

Paths are relative to the tree's root, which is ``""``. What JSON can't hold of
a name's bytes is there as the surrogates of PEP 383, so every name survives.
`Kind` has the kinds of events; each is written once a process, "miss" and the
"look" of a directory once in all.

A writer may be killed at any moment, so a last line that is cut off is left
out, and said (`Trace.cut`); damage anywhere else is a BadTrace. Readers skip
lines whose first word they don't know; whatever else changes raises `VERSION`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from casfs.errors import BadTrace
from store.digest import Digest
from store.entries import split_path
from store.errors import BadDigest, BadName

VERSION = 1
BEGINNING = b'{"casfs-trace":'
"""What every trace begins with."""


class Kind(StrEnum):
    """What a process did to a path."""

    LOOK = "look"
    """Looked it up, as stat and access do, and each open, also of what is below it."""
    OPEN = "open"
    """Opened the file: to read it, or to map it, which the kernel tells nobody."""
    EXEC = "exec"
    """Opened the file to execute it."""
    LINK = "link"
    """Read the symbolic link."""
    LIST = "list"
    """Listed the directory."""
    MISS = "miss"
    """Looked it up, and there is no such path."""


@dataclass(frozen=True, slots=True)
class Header:
    """Of which tree the trace is, what showed it, and which outputs were declared."""

    root: Digest
    engine: str
    outputs: Sequence[bytes] = ()


class Event(NamedTuple):
    """`command` is what the process ran, as the kernel names it; empty where that is not known."""

    kind: Kind
    process: int
    command: str
    path: bytes


@dataclass(slots=True)
class Trace:
    """A trace that was read. `ended`: its writer came to its end. `cut`: half a line at the end was left out."""

    header: Header
    events: list[Event] = field(default_factory=list)
    ended: bool = False
    cut: bool = False


def encode_header(header: Header) -> bytes:
    """The first line."""
    return _line(
        {
            "casfs-trace": VERSION,
            "root": str(header.root),
            "engine": header.engine,
            "outputs": [os.fsdecode(path) for path in header.outputs],
        }
    )


def encode_process(process: int, command: str) -> bytes:
    """The line that says what a process runs."""
    return _line(["process", process, command])


def encode_event(kind: Kind, process: int, path: bytes) -> bytes:
    """An event's line."""
    return _line([kind.value, process, os.fsdecode(path)])


def encode_end() -> bytes:
    """The last line."""
    return _line(["end"])


def _line(value: object) -> bytes:
    return json.dumps(value).encode("ascii") + b"\n"


def decode_trace(lines: Iterable[bytes]) -> Trace:
    """A trace from its lines, each with its newline. Raises BadTrace naming the line."""
    numbered = enumerate(lines, 1)
    trace = Trace(_decode_header(next(numbered, (1, b""))[1]))
    commands: dict[int, str] = {}
    for number, line in numbered:
        if not line.endswith(b"\n"):
            trace.cut = True
            break
        try:
            _decode_line(json.loads(line), trace, commands)
        except (ValueError, TypeError, LookupError, RecursionError, BadName) as error:
            raise BadTrace(f"line {number} of the trace is damaged: {line[:80]!r}") from error
    return trace


def _decode_header(line: bytes) -> Header:
    if not line.startswith(BEGINNING):
        raise BadTrace("it is no trace: it doesn't begin as one")
    try:
        found = json.loads(line)
        version = found["casfs-trace"]
        if version != VERSION:
            raise BadTrace(f"it is a trace of version {version!r}, and this casfs reads version {VERSION}")
        outputs = [_decode_path(path) for path in found["outputs"]]
        return Header(Digest.parse(found["root"]), str(found["engine"]), outputs)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, BadDigest, BadName) as error:
        raise BadTrace(f"the first line of the trace is damaged: {line[:80]!r}") from error


def _decode_line(value: Any, trace: Trace, commands: dict[int, str]) -> None:
    word = value[0]
    if word == "end":
        trace.ended = True
    elif word == "process":
        _, process, command = value
        commands[int(process)] = str(command)
    elif word in _KINDS:
        _, process, path = value
        trace.events.append(Event(Kind(word), int(process), commands.get(process, ""), _decode_path(path)))
    elif not isinstance(word, str):
        raise TypeError("a line begins with a word")


_KINDS = frozenset(Kind)


def _decode_path(text: str) -> bytes:
    """Whatever follows a path of a trace may rely on it that it doesn't lead out of the tree. Raises BadName."""
    path = os.fsencode(text)
    if path:
        split_path(path, "path")
    return path
