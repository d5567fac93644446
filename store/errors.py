"""Everything that can go wrong in the store, as one tree.

    StoreError
    ├── BadInput                 what was handed in is wrong; nothing was changed
    │   ├── BadDigest            not a digest, or a digest of another function
    │   ├── BadName              a path, entry or manifest name that can't be
    │   ├── BadManifest          a manifest text or checksum list, with its line
    │   └── BadTree              a Directory message that breaks REAPI's rules
    ├── NotFound
    │   ├── MissingBlob          no such blob in the store
    │   ├── MissingManifest      no such manifest name
    │   └── MissingTree          a directory that is not interned
    ├── DigestMismatch           bytes do not have the digest they were offered under
    ├── CorruptBlob              a stored blob's bytes are wrong; it was quarantined
    ├── StaleReference           a by-reference file changed since it was recorded
    ├── AlreadyExists            a name is taken
    ├── NoSpace                  the disk or the quota is full
    ├── StoreUnusable            not a store, not writable, not readable
    └── NewerFormat              made by a newer casfs

Messages say what was being done to which thing, and what the person can do.
"""

from __future__ import annotations


class StoreError(Exception):
    """Any failure of the store that has a message for a person."""


class BadInput(StoreError):
    """What was handed in is wrong; nothing was changed."""


class BadDigest(BadInput):
    """A text or message that is no digest."""


class BadName(BadInput):
    """A path, entry name or manifest name that can't be used."""


class BadManifest(BadInput):
    """A manifest text or checksum list that can't be read; the message names the line."""


class BadTree(BadInput):
    """A Directory message that breaks the rules of the Remote Execution API."""


class NotFound(StoreError):
    """Something that was asked for isn't there."""


class MissingBlob(NotFound):
    """A blob is neither in the store nor in any of its sources."""


class MissingManifest(NotFound):
    """There is no manifest of that name."""


class MissingTree(NotFound):
    """A directory is not in the index, or not any more."""


class DigestMismatch(StoreError):
    """Bytes do not have the digest they were offered under."""


class CorruptBlob(StoreError):
    """A stored blob had other bytes than its digest says; it was quarantined."""


class StaleReference(StoreError):
    """A by-reference file isn't any more what was recorded."""


class AlreadyExists(StoreError):
    """The name is taken and replacing it was not asked for."""


class NoSpace(StoreError):
    """The disk or the quota is full."""


class StoreUnusable(StoreError):
    """The directory is not a store, or not one this user can use."""


class NewerFormat(StoreUnusable):
    """The store was made by a newer casfs."""
