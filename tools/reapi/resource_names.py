"""What ByteStream's resources are called: texts to values, and back. No I/O.

    read    [instance/]blobs/[function/]hash/size
            [instance/]compressed-blobs/compressor/[function/]hash/size
    write   [instance/]uploads/uuid/ and one of these, and perhaps more behind it, which means nothing

The function is left out for SHA-256 and a must for BLAKE3. An instance's name
may have slashes, and none of the words above between them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from store.digest import Digest, DigestFunction, parse_hash
from store.errors import BadDigest, BadName

_RESERVED = frozenset(
    ("blobs", "uploads", "actions", "actionResults", "operations", "capabilities", "compressed-blobs")
)
_NAME_MOST = 4096
_FUNCTIONS = {function.label: function for function in DigestFunction}


class Compression(IntEnum):
    """How bytes travel; the numbers are REAPI's ``Compressor.Value``."""

    IDENTITY = 0
    ZSTD = 1

    @property
    def label(self) -> str:
        """As in a resource's name."""
        return self.name.lower()


class ResourceName(NamedTuple):
    """A blob of an instance; `upload` is what the client calls its upload, and empty in what is read."""

    instance: str
    digest: Digest
    compression: Compression = Compression.IDENTITY
    upload: str = ""

    def __str__(self) -> str:
        parts = [self.instance] if self.instance else []
        if self.upload:
            parts += ["uploads", self.upload]
        if self.compression is Compression.IDENTITY:
            parts.append("blobs")
        else:
            parts += ["compressed-blobs", self.compression.label]
        if self.digest.function is not DigestFunction.SHA256:
            parts.append(self.digest.function.label)
        return "/".join([*parts, self.digest.hex, str(self.digest.size)])


def check_instance(name: str) -> str:
    """The name itself. Raises BadName for what can't be an instance's."""
    if name:
        segments = name.split("/")
        if "" in segments or "\0" in name or len(name) > _NAME_MOST or not _RESERVED.isdisjoint(segments):
            raise BadName(
                f"{name[:80]!r} can't be an instance: its parts aren't empty, and none is "
                f"one of {', '.join(sorted(_RESERVED))}"
            )
    return name


def parse_read(name: str) -> ResourceName:
    """What a client wants to read. Raises BadName or BadDigest."""
    segments = _split(name)
    found, rest = _parse_blob(name, segments, _find(name, segments, "blobs", "compressed-blobs"))
    if rest:
        raise BadName(f"{name!r} goes on behind the size of the blob")
    return found


def parse_write(name: str) -> ResourceName:
    """What a client wants to write. Raises BadName or BadDigest."""
    segments = _split(name)
    at = _find(name, segments, "uploads")
    if len(segments) < at + 3 or segments[at + 2] not in ("blobs", "compressed-blobs"):
        raise BadName(f"{name!r} is no upload: it goes on with /uuid/blobs/hash/size")
    found, _ = _parse_blob(name, segments, at + 2)
    return found._replace(instance=check_instance("/".join(segments[:at])), upload=segments[at + 1])


def _split(name: str) -> list[str]:
    if len(name) > _NAME_MOST:
        raise BadName(f"a resource's name of {len(name)} characters: {_NAME_MOST} are the most")
    return name.split("/")


def _find(name: str, segments: list[str], *words: str) -> int:
    for position, segment in enumerate(segments):
        if segment in words:
            return position
    raise BadName(f"{name!r} names no resource: it has none of {', '.join(words)} in it")


def _parse_blob(name: str, segments: list[str], at: int) -> tuple[ResourceName, list[str]]:
    """The blob whose description begins there, and what follows it."""
    instance = "/".join(segments[:at])
    if "uploads" not in segments[:at]:
        check_instance(instance)
    kind, *rest = segments[at:]
    compression = Compression.IDENTITY
    if kind == "compressed-blobs":
        label, *rest = rest or [""]
        if label != Compression.ZSTD.label:
            raise BadName(f"{name!r} is compressed with {label!r}: there is zstd")
        compression = Compression.ZSTD
    function = DigestFunction.SHA256
    if rest and rest[0] in _FUNCTIONS:
        function = _FUNCTIONS[rest[0]]
        rest = rest[1:]
    if len(rest) < 2:
        raise BadName(f"{name!r} has no hash and size")
    hash_, size, *rest = rest
    if not (size.isascii() and size.isdigit() and len(size) < 20 and int(size) < 1 << 63):
        raise BadDigest(f"{name!r} has the size {size[:30]!r}: it is a number of bytes")
    return ResourceName(instance, Digest(function, parse_hash(hash_), int(size)), compression), rest
