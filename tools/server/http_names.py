"""What HTTP requests say, as values: paths, ranges, encodings. No I/O, and nothing of a server library.

/[instance/]cas/<64 hex>     a blob; by which function the hash is, nobody says
/[instance/]ac/<64 hex>      an action's result, or what somebody keeps under that name
/                            pages for a person, see `PAGES`
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from enum import Enum
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote

from store.digest import Digest, parse_hash
from store.errors import BadName
from tools.server.errors import OutOfRange


class Kind(Enum):
    """The two halves of a cache."""

    CAS = "cas"
    AC = "ac"


class CacheName(NamedTuple):
    """Something in the cache, under an instance's name, which isn't checked here."""

    instance: str
    kind: Kind
    hash: bytes


_KINDS = {kind.value: kind for kind in Kind}


def parse_cache_path(path: str) -> CacheName | None:
    """What a path (as in the request, without the query) names in the cache, or None. Raises BadName, BadDigest."""
    *before, kind, hash_ = path.split("/") if path.count("/") >= 2 else ("", "", "")
    if kind not in _KINDS:
        return None
    try:
        instance = unquote("/".join(before[1:]), errors="strict")
    except UnicodeDecodeError:
        raise BadName(f"{path[:200]!r} is no path in UTF-8") from None
    return CacheName(instance, _KINDS[kind], parse_hash(hash_))


PAGES = ("tree", "blob", "result")


class PageName(NamedTuple):
    """A page about a digest: what it is looked at as, one of `PAGES`."""

    kind: str
    digest: Digest


def parse_page_path(path: str) -> PageName | None:
    """What a path like ``/tree/blake3/<hex>/<size>`` shows, or None. Raises BadDigest."""
    match path.split("/"):
        case ["", kind, function, hash_, size] if kind in PAGES:
            return PageName(kind, Digest.parse(f"{function}:{hash_}/{size}"))
    return None


def page_path(kind: str, digest: Digest) -> str:
    """The inverse of `parse_page_path`."""
    return f"/{kind}/{digest.function.label}/{digest.hex}/{digest.size}"


_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::[0-9]{0,5})?")


def is_host(text: str | None, names: Collection[str]) -> bool:
    """Whether a Host header (None: there was none) means a server of these names, in small letters.

    A browser that was lured by DNS to connect to an address which isn't that
    of the page's host still says the host's name. So an address is always
    right: the page was loaded from there. "localhost" is right, too: RFC 6761
    has it resolved without asking anybody.
    """
    if text is None:
        return True
    match = _HOST.fullmatch(text)
    if match is None:
        return False
    host = match[1].lower().removesuffix(".")
    return host == "localhost" or host in names or _is_address(host.strip("[]"))


@lru_cache(64)
def _is_address(text: str) -> bool:
    # Remembered: each request of a client has the same, and taking one apart costs a tenth of a small answer.
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


# More digits than a size has would only cost time.
_RANGE = re.compile(r"bytes=([0-9]{0,19})-([0-9]{0,19})")


def parse_range(text: str | None, size: int) -> tuple[int, int] | None:
    """The bytes from … up to … that a Range header asks for, or None for all: RFC 9110, section 14.

    What is no range, or several of them, is ignored, as it says there. Raises OutOfRange.
    """
    match = _RANGE.fullmatch(text.strip()) if text else None
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        first, end = max(size - int(match[2]), 0), size
    else:
        first, end = int(match[1]), size if match[2] == "" else min(int(match[2]) + 1, size)
        if match[2] and int(match[2]) < first:
            return None
    if first >= size:
        raise OutOfRange(f"bytes from {first} on of {size}", size)
    return first, end


def accepts_zstd(text: str | None) -> bool:
    """Whether an Accept-Encoding header has zstd in it, and not only to refuse it."""
    for part in (text or "").lower().split(","):
        coding, _, weight = part.partition(";")
        if coding.strip() == "zstd":
            return re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", weight) is None
    return False


def matches(text: str | None, etag: str) -> bool:
    """Whether an If-None-Match header names what the client would get."""
    if text is None:
        return False
    tags = {tag.strip().removeprefix("W/") for tag in text.split(",")}
    return "*" in tags or etag in tags
