"""Where things lie in a store directory. Paths only; no I/O.

    STORE/
      blobs/                 Bazel's disk-cache layout; nothing else may lie here
        cas/ab/<hash>          SHA-256
        blake3/cas/ab/<hash>   BLAKE3
        ac/, blake3/ac/        action results
      index/                 the LMDB environment and its locks
      manifests/<name>.json  the names of roots, so that a lost index loses no name
      leases/<id>            a lock file per lease, held by whoever holds the lease
      tmp/<session>/         unpublished files of one session, locked while it lives
      cold/blake3/ab/<hash>.zst   blobs that were not used for long, compressed; made when first needed
      profiles/<hash>.json   which inputs actions of one kind opened; made when first needed, may go at any time
      quarantine/            files whose bytes were not what their name says
      format                 says that this is a store, and of which format
      casfs.log              what went wrong behind a mount

All of it must be on one file system: things move by rename.
"""

from __future__ import annotations

from binascii import hexlify
from pathlib import Path

from store.digest import Digest, DigestFunction, parse_hash
from store.errors import BadDigest

_PREFIX = {DigestFunction.SHA256: "cas", DigestFunction.BLAKE3: "blake3/cas"}


class Layout:
    """The paths of one store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blobs"
        self.index = root / "index"
        self.manifests = root / "manifests"
        self.leases = root / "leases"
        self.tmp = root / "tmp"
        self.cold = root / "cold"
        self.profiles = root / "profiles"
        self.quarantine = root / "quarantine"
        self.log = root / "casfs.log"
        self.marker = root / "format"

    def directories(self) -> tuple[Path, ...]:
        """What must exist in a store."""
        return (self.blobs, self.index, self.manifests, self.leases, self.tmp, self.quarantine)


def blob_path(digest: Digest) -> str:
    """Where a blob lies, relative to ``STORE/blobs``."""
    hexadecimal = digest.hash.hex()
    return f"{_PREFIX[digest.function]}/{hexadecimal[:2]}/{hexadecimal}"


def blob_path_in_function(hash_: bytes) -> bytes:
    """Where a blob lies, relative to the directory of its function's shards (`cas_directories`)."""
    hexadecimal = hexlify(hash_)
    return hexadecimal[:2] + b"/" + hexadecimal


def cas_directories() -> dict[DigestFunction, str]:
    """The directory of the shards of each function, relative to ``STORE/blobs``."""
    return dict(_PREFIX)


def hash_of_name(shard: str, name: str) -> bytes | None:
    """The hash that a file in a shard stands for, or None if the name is no blob's."""
    try:
        hash_ = parse_hash(name)
    except BadDigest:
        return None
    return hash_ if name[:2] == shard else None
