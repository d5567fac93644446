"""Manifests as text: ours, and the checklists of `sha256sum` and `b3sum`. A codec with no I/O.

Ours, one line an entry, fields between tabs, in the order of the paths'
components, so that two of them can be compared line by line:

    casfs manifest 1 <function>
    f <digest> <mtime> <path>              a file; mtime in nanoseconds, or -
    x <digest> <mtime> <path>              the same, executable
    l <target> <mtime> <path>              a symbolic link
    r <stamp> <host path> <path>           a file by reference; stamp is device:inode:size:mtime:ctime
    X <stamp> <host path> <path>           the same, executable
    d <path>                               an empty directory

In paths and targets ``%``, control characters, separators of lines and bytes
that are not UTF-8 are written ``%XX``; everything else stands as it is. A digest is ``<hash>/<size>``
of the function in the first line. Lines that begin with ``#`` and empty lines
mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from store.digest import Digest, DigestFunction, empty_hash, parse_hash
from store.entries import (
    Entry,
    FileEntry,
    ReferenceEntry,
    Stamp,
    SymlinkEntry,
    check_stamp,
    check_target,
    check_time,
    printable,
    split_path,
)
from store.errors import BadDigest, BadInput, BadManifest

MAGIC = "casfs manifest"
VERSION = 1

_UNSAFE = re.compile(r"[\x00-\x1f\x7f%\udc80-\udcff\x85\u2028\u2029]")
_RAW = re.compile(r"[\x00-\x1f\x7f]|%(?![0-9A-F]{2})")
"""What no field may have in it: control characters that aren't escaped, and half an escape."""
_ESCAPED = re.compile(rb"%([0-9A-F]{2})")
_DIGEST = re.compile(r"([0-9a-f]{64})/([0-9]{1,18})")
_NUMBER = re.compile(r"-?[0-9]{1,20}")


class Item(NamedTuple):
    """A path, the entry there (None: an empty directory), and the line that says so."""

    path: bytes
    entry: Entry | None
    line: int


def quote(raw: bytes) -> str:
    """A path or target as it stands in a manifest's text."""
    text = raw.decode("utf-8", "surrogateescape")
    if not _UNSAFE.search(text):
        return text
    return _UNSAFE.sub(
        lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogateescape")), text
    )


def unquote(text: str) -> bytes:
    """The inverse of `quote`. Raises ValueError for what `quote` would have escaped."""
    if found := _RAW.search(text):
        raise ValueError(f"{found[0]!r} in {text[:80]!r} has to be written %XX")
    raw = text.encode("utf-8", "surrogateescape")
    return _ESCAPED.sub(lambda match: bytes((int(match[1], 16),)), raw) if b"%" in raw else raw


def format_manifest(items: Iterable[tuple[bytes, Entry | None]], function: DigestFunction) -> Iterator[str]:
    """The lines of a manifest, each with its newline; items as `TreeBuilder.add_paths` takes them."""
    yield f"{MAGIC} {VERSION} {function.label}\n"
    for path, entry in items:
        where = quote(path)
        if isinstance(entry, FileEntry):
            kind = "x" if entry.executable else "f"
            digest = f"{entry.digest.hash.hex()}/{entry.digest.size}"
            if entry.digest.function is not function:
                digest = str(entry.digest)
            yield f"{kind}\t{digest}\t{_format_mtime(entry.mtime_ns)}\t{where}\n"
        elif isinstance(entry, SymlinkEntry):
            yield f"l\t{quote(entry.target)}\t{_format_mtime(entry.mtime_ns)}\t{where}\n"
        elif isinstance(entry, ReferenceEntry):
            kind = "X" if entry.executable else "r"
            yield f"{kind}\t{':'.join(map(str, entry.stamp))}\t{quote(entry.path)}\t{where}\n"
        else:
            yield f"d\t{where}\n"


def _format_mtime(mtime_ns: int | None) -> str:
    return "-" if mtime_ns is None else str(mtime_ns)


def parse_manifest(lines: Iterable[str], function: DigestFunction, source: str) -> Iterator[Item]:
    """The items of a manifest's text after its first line, in its order.

    `source` names the text in messages. Raises BadManifest with the line's number.
    """
    for number, line in enumerate(lines, 2):
        line = line.rstrip("\n")
        if not line or line.startswith("#"):
            continue
        try:
            yield _parse_line(line, function, number)
        except (BadInput, ValueError) as error:
            raise BadManifest(f"{source}:{number}: {error}") from error


def check_paths(items: Iterable[Item], source: str) -> None:
    """Raise BadManifest for a path that is there twice, or is a file and a directory at once.

    The items must be in the order of their paths (`path_order`).
    """
    previous: Item | None = None
    for item in items:
        if previous is not None:
            if item.path == previous.path:
                what = "is there twice"
            elif previous.entry is not None and item.path.startswith(previous.path + b"/"):
                what = "is a file and a directory at once"
            else:
                previous = item
                continue
            first, second = sorted((previous.line, item.line))
            raise BadManifest(f"{source}:{second}: {printable(previous.path)} {what}; see line {first}")
        previous = item


def parse_header(line: str, source: str) -> DigestFunction:
    """The digest function that a manifest's first line names. Raises BadManifest."""
    fields = line.split()
    if fields[:2] != MAGIC.split() or len(fields) != 4:
        raise BadManifest(f"{source}:1: a manifest begins with '{MAGIC} {VERSION} blake3', not {line[:60]!r}")
    if fields[2] != str(VERSION):
        raise BadManifest(f"{source}:1: manifest version {fields[2]}: this casfs reads version {VERSION}")
    try:
        return DigestFunction.named(fields[3])
    except BadDigest as error:
        raise BadManifest(f"{source}:1: {error}") from error


def _parse_line(line: str, function: DigestFunction, number: int) -> Item:
    kind, *fields = line.split("\t")
    if len(fields) != (1 if kind == "d" else 3) or kind not in _KINDS:
        raise ValueError(f"not a manifest line (kind, fields between tabs): {line[:80]!r}")
    path = unquote(fields[-1])
    name = split_path(path, "manifest")[-1]
    entry: Entry | None = None
    if kind in "fx":
        entry = FileEntry(name, _parse_digest(fields[0], function), kind == "x", _parse_mtime(fields[1]))
    elif kind == "l":
        target = unquote(fields[0])
        check_target(target, "manifest")
        entry = SymlinkEntry(name, target, _parse_mtime(fields[1]))
    elif kind != "d":
        entry = ReferenceEntry(name, _parse_host_path(fields[1]), _parse_stamp(fields[0]), kind == "X")
    return Item(path, entry, number)


_KINDS = frozenset("fxlrXd")


def _parse_digest(text: str, function: DigestFunction) -> Digest:
    if match := _DIGEST.fullmatch(text):
        digest = Digest(function, bytes.fromhex(match[1]), int(match[2]))
    else:
        # Another function, or wrong: this one says what about it.
        digest = Digest.parse(text if ":" in text else f"{function.label}:{text}")
    if digest.function is not function:
        raise ValueError(f"digest {text} is not of the manifest's function, {function.label}")
    if (not digest.size) != (digest.hash == empty_hash(function)):
        raise ValueError(f"digest {text} contradicts itself: 0 bytes have one hash, and no others have it")
    return digest


def _parse_mtime(text: str) -> int | None:
    return None if text == "-" else check_time(_parse_number(text))


def _parse_number(text: str) -> int:
    # int() alone would take underscores, blanks and other scripts' digits.
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text[:80]!r} is not a number")
    return int(text)


def _parse_stamp(text: str) -> Stamp:
    numbers = [_parse_number(part) for part in text.split(":")]
    if len(numbers) != 5:
        raise ValueError(f"a stamp is device:inode:size:mtime:ctime, not {text[:80]!r}")
    stamp = Stamp(*numbers)
    check_stamp(stamp)
    return stamp


def _parse_host_path(text: str) -> bytes:
    path = unquote(text)
    if not path.startswith(b"/") or b"\0" in path:
        raise ValueError(f"a file by reference has an absolute host path, not {text[:80]!r}")
    return path


class ChecklistLine(NamedTuple):
    """One line of a checklist: a path, and the hash its file had."""

    path: bytes
    hash: bytes
    function: DigestFunction
    line: int


_TAGGED = re.compile(rb"^(SHA256|BLAKE3) \((.*)\) = ([0-9a-f]{64})$", re.DOTALL)
_PLAIN = re.compile(rb"^([0-9a-f]{64}) [ *](.+)$", re.DOTALL)
_BACKSLASHED = {b"\\\\": b"\\", b"\\n": b"\n", b"\\r": b"\r"}


def parse_checklist(lines: Iterable[bytes], function: DigestFunction, source: str) -> Iterator[ChecklistLine]:
    r"""The lines of what `sha256sum` or `b3sum` printed, plain or ``--tag``.

    A line that begins with a backslash has ``\\`` and ``\n`` escaped in its
    name, as coreutils and b3sum write it. A leading ``./`` is dropped. The
    plain format doesn't say its function: it is `function`. Raises BadManifest
    with the line's number.
    """
    for number, line in enumerate(lines, 1):
        line = line.rstrip(b"\n")
        if not line:
            continue
        escaped = line.startswith(b"\\")
        body = line[1:] if escaped else line
        if match := _TAGGED.match(body):
            named, path, hexadecimal = DigestFunction[match[1].decode()], match[2], match[3]
        elif match := _PLAIN.match(body):
            named, hexadecimal, path = function, match[1], match[2]
        else:
            raise BadManifest(f"{source}:{number}: not a line of sha256sum or b3sum: {line[:80]!r}")
        if escaped:
            path = re.sub(rb"\\[\\nr]", lambda found: _BACKSLASHED[found[0]], path)
        path = path.removeprefix(b"./")
        try:
            split_path(path, "checklist")
        except BadInput as error:
            raise BadManifest(f"{source}:{number}: {error}") from error
        yield ChecklistLine(path, parse_hash(hexadecimal.decode()), named, number)
