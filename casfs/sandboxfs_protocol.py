r"""The protocol between Bazel and a sandboxfs 0.2: bytes to requests, and answers to bytes. No I/O.

    parser = Parser()
    for request in parser.feed(os.read(0, 1 << 16)):
        …
        os.write(1, encode_answer(request.id, None))

Requests are JSON objects one behind the other, with or without white space:

    {"C": {"i": "0", "m": [{"x": 1, "p": "ws", "y": 2, "u": "scratch", "w": true}, …], "q": {"1": "/", "2": "/…"}}}
    {"D": "0"}

C creates a sandbox, D destroys it. A mapping shows the host's file or directory
y/u at x/p, where x and y are numbers of prefixes: q says what they stand for,
for all later requests too; 0, or no number, is the root. An answer is a line,
with these two keys and no other: Bazel gives up on any other key.

Names are bytes: what is not UTF-8 comes as raw bytes or as the escapes that
Python writes for them (\udc80 to \udcff), or from Bazel encoded twice (`as_bazel_means`).
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from contextlib import suppress
from json.scanner import NUMBER_RE
from typing import Any, NamedTuple

from casfs.errors import BadStream, CasfsError
from store.entries import printable

VERSION = "0.2.0"
"""Of the protocol: what Bazel takes from the first line of ``--version``."""

_DECODER = json.JSONDecoder()
_SPACE = " \t\n\r"
_MAY_END = re.compile(r"\}[ \t\n\r]*(?:\{|\Z)")
"""Where one request ends and another begins, or nothing follows yet; inside of one only a string can look like it."""
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NO_NAMES = frozenset(("", ".", ".."))
_SHORT = 4096
"""Characters up to which it is looked at closely whether an object that makes no sense is whole."""
_BEGIN = re.compile(r'\{"C":\{"i":"[^"\\]*",("m":\[\{)')
"""How Bazel begins a request to create a sandbox."""
_TEXT = r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"'
_MEMBER = rf'"[a-z]":(?:{_TEXT}|0|[1-9][0-9]*|true|false)'
_MAPPING = re.compile(rf"{_MEMBER}(?:,{_MEMBER})*")
"""What stands between the braces of a mapping as Bazel writes it."""
_KNOWN_MOST = 1 << 17
_LONGEST_TOKEN = 16
"""Of what may be cut at the end of a piece, but for strings and numbers: ``false``, or an escape."""


class Refused(CasfsError):
    """A whole JSON object that is no request; the next one may be. `id` is that of the answer, None if unknown."""

    def __init__(self, text: str, sandbox: str | None = None) -> None:
        super().__init__(text)
        self.id = sandbox


class Mapping(NamedTuple):
    """`path` in the sandbox (b"" is its root; no leading slash) shows what is `name` in a directory of the host."""

    path: bytes
    directory: bytes
    name: bytes
    writable: bool

    @property
    def host(self) -> bytes:
        """The absolute path on the host."""
        return self.directory.rstrip(b"/") + b"/" + self.name


def map_path(path: bytes, host: bytes, writable: bool) -> Mapping:
    """The mapping of an absolute path of the host."""
    directory, _, name = host.rpartition(b"/")
    return Mapping(path, directory or b"/", name, writable)


class Create(NamedTuple):
    """Make the sandbox `id`."""

    id: str
    mappings: list[Mapping]


class Destroy(NamedTuple):
    """Take the sandbox `id` away."""

    id: str


Request = Create | Destroy


class Parser:
    """Takes the stream in pieces of any size. Each whole object gives a request, or a Refused in its place."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._undecoded = b""
        self._prefixes: dict[int, bytes] = {0: b""}
        self._known: dict[str, Mapping] = {}
        """Mappings by what stands between their braces, as long as prefixes stand for what they stood for."""

    def feed(self, data: bytes) -> Iterator[Request | Refused]:
        """What is complete now. Raises BadStream, after which nothing can be fed any more."""
        piece = self._decode(data)
        first = not self._pieces
        self._pieces.append(piece)
        # A large request comes in many pieces; it is not parsed again for each.
        if not _MAY_END.search(piece) and not (first and _begins_wrong(piece)):
            return
        text = "".join(self._pieces)
        self._pieces.clear()
        while text := text.lstrip(_SPACE):
            if _begins_wrong(text):
                raise BadStream(f"a request is a JSON object, not {text[:40]!r}")
            try:
                value, pieces, text = self._split(text)
            except ValueError as error:
                if _is_cut(text, error):
                    self._pieces.append(text)
                    return
                raise BadStream(f"a request is not JSON: {error}") from error
            except RecursionError:
                raise BadStream("a request is nested too deeply") from None
            try:
                request: Request | Refused = self._read(value, pieces)
            except Refused as refused:
                request = refused
            yield request

    def _split(self, text: str) -> tuple[dict[str, Any], list[str], str]:
        """The first object of a text that begins with one, and what comes behind it.

        Of a request as Bazel writes it the mappings are given apart, as what stands between the braces of each: those
        of an action are mostly those of the one before, and parsing them is most of the work. Where each of these
        pieces is an object by itself, JSON's grammar leaves no other way to read them all. Raises ValueError.
        """
        found = _BEGIN.match(text)
        end = text.find("}]", found.end()) if found is not None else -1
        if found is not None and end >= 0:
            pieces = text[found.end() : end].split("},{")
            if all(map(_MAPPING.fullmatch, set(pieces) - self._known.keys())):
                rest = f'{text[: found.start(1)]}"m":[]{text[end + 2 :]}'
                with suppress(ValueError):  # else it is told with its place in the text
                    value, stop = _DECODER.raw_decode(rest)
                    return value, pieces, rest[stop:]
        value, stop = _DECODER.raw_decode(text)
        return value, [], text[stop:]

    def finish(self) -> None:
        """The stream has ended. Raises BadStream if that was in the middle of a request."""
        rest = "".join(self._pieces).strip(_SPACE)
        if rest or self._undecoded:
            raise BadStream(f"the input ended in the middle of a request: {rest[:40]!r}…")

    def _decode(self, data: bytes) -> str:
        """Text, keeping back the beginning of a character that a piece ends in."""
        data = self._undecoded + data
        cut = len(data)
        for back in range(1, min(4, len(data)) + 1):
            byte = data[-back]
            if byte >= 0xC0:  # begins a character of 2, 3 or 4 bytes
                if back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4):
                    cut = len(data) - back
                break
            if byte < 0x80:
                break
        self._undecoded = data[cut:]
        return data[:cut].decode("utf-8", "surrogateescape")

    def _read(self, value: dict[str, Any], pieces: list[str]) -> Request:
        if len(value) != 1:
            raise Refused(f"a request has one key, C or D, not {_shown(list(value))}")
        if "D" in value:
            return Destroy(_id(value["D"]))
        if "C" in value:
            return self._read_create(value["C"], pieces)
        raise Refused(f"there is no request {_shown(next(iter(value)))}: C or D")

    def _read_create(self, value: Any, pieces: list[str]) -> Create:
        if not isinstance(value, dict):
            raise Refused(f"C takes an object, not {_shown(value)}")
        name = _id(value.get("i"))
        mappings, prefixes = value.get("m") or [], value.get("q") or {}
        if not isinstance(mappings, list):
            raise Refused(f"sandbox {name}: m takes a list, not {_shown(mappings)}", name)
        if not isinstance(prefixes, dict):
            raise Refused(f"sandbox {name}: q takes an object, not {_shown(prefixes)}", name)
        for number, prefix in prefixes.items():
            if not number.isdecimal() or not isinstance(prefix, str) or not prefix.startswith("/"):
                raise Refused(
                    f"sandbox {name}: prefix {_shown(number)} is {_shown(prefix)}, not an absolute path", name
                )
            try:
                self._set_prefix(int(number), _clean(_encode(prefix)))
            except ValueError as error:
                raise Refused(f"sandbox {name}: prefix {number}: {error}", name) from error
        if len(self._known) > _KNOWN_MOST:
            self._known.clear()
        known = list(map(self._known.get, pieces))
        read = [mapping or self._learn(name, piece) for mapping, piece in zip(known, pieces, strict=True)]
        read += [self._read_mapping(name, value) for value in mappings]
        return Create(name, read)

    def _learn(self, name: str, piece: str) -> Mapping:
        mapping = self._known[piece] = self._read_mapping(name, _DECODER.decode(f"{{{piece}}}"))
        return mapping

    def _set_prefix(self, number: int, path: bytes) -> None:
        if self._prefixes.get(number, path) != path:
            self._known.clear()
        self._prefixes[number] = path

    def _read_mapping(self, name: str, mapping: Any) -> Mapping:
        """A mapping of the sandbox of that name. Raises Refused."""
        try:
            return self._map(mapping)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise Refused(f"sandbox {name}: mapping {_shown(mapping)}: {what}", name) from error

    def _map(self, mapping: dict[str, Any]) -> Mapping:
        get = mapping.get
        number, below, name, host = get("x", 0), get("y", 0), mapping["p"], mapping["u"]
        prefixes = self._prefixes
        if number not in prefixes or below not in prefixes:
            raise ValueError(f"prefix {below if number in prefixes else number} was never defined")
        writable = get("w", False)
        if writable is not True and writable is not False:
            raise ValueError("w is neither true nor false")
        path = _join(prefixes[number], name)[1:]
        directory = prefixes[below]
        if directory and _is_plain(host):
            return Mapping(path, directory, _encode(host), writable)
        return map_path(path, _join(directory, host), writable)


def encode_answer(sandbox: str | None, error: str | None) -> bytes:
    """A line: that a request for this sandbox was met, or why it wasn't."""
    return json.dumps({"id": sandbox, "error": error}, separators=(",", ":")).encode() + b"\n"


def _id(value: Any) -> str:
    if not isinstance(value, str):
        raise Refused(f"a sandbox's name is a text, not {_shown(value)}")
    if (
        not value
        or "/" in value
        or "\0" in value
        or value in (".", "..")
        or len(value.encode("utf-8", "replace")) > 255
    ):
        raise Refused(f"{_shown(value)} can't be the name of a sandbox", value)
    try:
        _encode(value)
    except ValueError as error:
        raise Refused(str(error), value) from error
    return value


def encode_name(name: str) -> bytes:
    """A sandbox's name as the name of its directory."""
    return _encode(name)


def _encode(text: str) -> bytes:
    if "\0" in text:
        raise ValueError(f"{_shown(text)} has a zero byte")
    try:
        return as_bazel_means(text.encode("utf-8", "surrogateescape"), sure=True)
    except UnicodeEncodeError:
        raise ValueError(f"{_shown(text)} stands for no bytes") from None


def as_bazel_means(name: bytes, *, sure: bool) -> bytes:
    """Bazel takes the bytes of a name for characters of Latin-1, and encodes those in UTF-8: back again.

    `sure`: only where that gives UTF-8, which hardly a name does that was encoded once; else it has to be found out
    which of the two exists. The same bytes where Bazel can't have made them.
    """
    if name.isascii():
        return name
    try:
        once = name.decode().encode("latin-1")
        if sure:
            once.decode()
    except UnicodeError:
        return name
    return once


def _is_plain(text: str) -> bool:
    """Whether it is one name: the usual case, which needs no closer look."""
    return "/" not in text and text not in _NO_NAMES


def _join(prefix: bytes, text: str) -> bytes:
    """The absolute path, without slash at its end: b"" for the root."""
    path = prefix + b"/" + _encode(text)
    return path if _is_plain(text) else _clean(path)


def _clean(path: bytes) -> bytes:
    """Without repeated slashes and ``.``. ValueError for ``..``: what it means depends on symbolic links."""
    if b".." in path.split(b"/"):
        raise ValueError(f"{printable(path)} has '..' in it")
    return posixpath.normpath(b"/" + path.lstrip(b"/")).rstrip(b"/")


def _begins_wrong(text: str) -> bool:
    return not text.lstrip(_SPACE).startswith("{") and bool(text.strip(_SPACE))


def _is_cut(text: str, error: ValueError) -> bool:
    """Whether an object that can't be parsed may go on."""
    position = getattr(error, "pos", len(text))
    if len(text) <= _SHORT:
        bare = _STRING.sub("", text)
        if '"' not in bare and bare.count("{") <= bare.count("}"):
            return False  # all that was opened is closed
    rest = text[position:]
    return str(error).startswith("Unterminated string") or len(rest) <= _LONGEST_TOKEN or _is_number(rest)


def _is_number(rest: str) -> bool:
    found = NUMBER_RE.match(rest)
    return found is not None and found.end() == len(rest)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "…"
