"""Whether blobs are here, asked for thousands at a time, each answer also extending their lives.

A cache's clients ask this most, about the same blobs again and again. So what
was found here within the last half minute is remembered, by the text of its
hash as it comes off the wire, and is neither looked up nor touched again. What
casfs removes moves a counter in the index, which is read with each question,
and once a millisecond for blobs that are read: then all is forgotten. What
others remove behind our back (Bazel collects its disk cache by itself) may be
vouched for that half minute longer; who reads it gets an honest NOT_FOUND.

A first answer costs a probe of the index and an utime of the file, which also
tells whether the file is there. Collections go by the later of the file's time
and the index's, so nothing has to be written there.

Threads may share a `Presence`: what they share are sets, used by single
operations, and replaced as wholes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import Protocol

from store.blobs import Blobs, find_size, is_known, removals
from store.cold import ColdTier, find_content_size
from store.digest import Digest, DigestFunction, parse_hash
from store.errors import BadDigest, CorruptBlob
from store.index import Index, View
from store.layout import blob_path

REMEMBER_SECONDS = 15.0
"""What is found is remembered for one to two such periods; collections have to spare what was used in a minute."""
_REMEMBER_MOST = 50_000
"""Names that are remembered in such a period; each takes some 220 bytes."""
_FRESH_SECONDS = 0.001
"""The removals may have been counted so long before: who reads what it asks about finds out by itself."""
_QUICK_MOST = 256
"""A question about more new blobs than these is not quick."""

Name = tuple[DigestFunction, str, int]
"""A blob as messages name it: its function, its hash in hexadecimal, its size."""


class Finder(Protocol):
    """Who knows which blobs can be had."""

    def find_absent(self, names: Collection[Name], *, may_wait: bool = True) -> list[Name]: ...
    def generation(self) -> int: ...


class WouldWait(Exception):
    """What was to be answered at once would have to wait for a disk; ask again from where that does no harm."""


class Presence:
    """Knows which blobs of one store are there."""

    def __init__(self, index: Index, blobs: Blobs, cold: ColdTier) -> None:
        self._index = index
        self._blobs = blobs
        self._cold = cold
        self._young: set[Name] = set()
        self._old: set[Name] = set()
        self._since = time.monotonic()
        with index.view() as view:
            self._removals = removals(view)
        self._fresh_until = 0.0
        self._spelled: dict[DigestFunction, set[bytes]] = {}
        """Other spellings of names in `_young` and `_old`, by function; given up with `_old`."""

    def find_absent(self, names: Collection[Name], *, may_wait: bool = True) -> list[Name]:
        """Those that are not here, in their order; the others count as used now.

        Raises BadDigest; without `may_wait` WouldWait where a file without a
        row has to be hashed, or there is much to look up.
        """
        with self._index.view() as view:
            self._keep_up(view)
            young, old = self._young, self._old
            unknown = [name for name in names if name not in young and name not in old]
            if not unknown:
                return []
            if not may_wait and len(unknown) > _QUICK_MOST:
                raise WouldWait
            digests = [as_digest(name) for name in unknown]
            known = [is_known(view, digest) for digest in digests]
        return self._look(unknown, digests, known, may_wait)

    def vouch(self, name: Name) -> set[Name] | None:
        """Whether a file that has a blob's name surely has its bytes: if so, what `note_open` is to be given.

        Never waits. Who then opens it tells `note_open`: of one blob that costs half of what `find_absent` does, and of
        one that is remembered next to nothing, since the removals aren't counted again for each of a thousand a second.
        Raises BadDigest.
        """
        young = self._young
        if (name in young or name in self._old) and time.monotonic() < self._fresh_until:
            return young
        with self._index.view() as view:
            self._keep_up(view)
            if name in self._young or name in self._old or is_known(view, as_digest(name)):
                return self._young
        return None

    def note_open(self, name: Name, descriptor: int, vouched: set[Name]) -> None:
        """The file of a blob that is vouched for is open: so it is here, and counts as used now."""
        if name not in self._young and name not in self._old:
            with suppress(PermissionError):  # another user's file, and its owner's to touch
                os.utime(descriptor)
            # Not in the set of now: what was removed since is forgotten with the one of then.
            vouched.add(name)

    def _look(
        self, names: Sequence[Name], digests: Sequence[Digest], known: Sequence[bool], may_wait: bool
    ) -> list[Name]:
        absent = []
        for name, digest, has_row in zip(names, digests, known, strict=True):
            if digest.is_empty_blob:
                self._young.add(name)
                continue
            here = self._touch(digest)
            if here and not has_row:
                # Bazel's, or left by a crash: hashed before it counts.
                if not may_wait:
                    raise WouldWait
                here = self._blobs.has(digest)
            if here or self._touch_cold(digest):
                self._young.add(name)
            else:
                absent.append(name)
        return absent

    def _touch(self, digest: Digest) -> bool:
        try:
            os.utime(blob_path(digest), dir_fd=self._blobs.directory)
        except FileNotFoundError:
            return False
        except PermissionError:
            # Another user's file: it is there, and its owner's to touch.
            return self._blobs.has_file(digest)
        return True

    def _touch_cold(self, digest: Digest) -> bool:
        """Whether it is in the cold tier, from where reading it brings it back."""
        try:
            os.utime(self._cold.path(digest))
        except OSError:
            return False
        return self._cold.has(digest)

    def remembers(self, name: Name) -> bool:
        """Whether it was lately found here, and nothing was removed since. Never waits."""
        if name not in self._young and name not in self._old:
            return False
        with self._index.view() as view:
            self._keep_up(view)
        return name in self._young or name in self._old

    def find_hashed(self, hash_: bytes) -> Digest | None:
        """The blob of that hash, by whichever function: what is here, in ``blobs/`` or in the cold tier."""
        with self._index.view() as view:
            for function in DigestFunction:
                size = find_size(view, function, hash_)
                if size is not None:
                    return Digest(function, hash_, size)
        for function in DigestFunction:
            size = self._blobs.size_on_disk(function, hash_)
            if size is None:
                with suppress(OSError, CorruptBlob):
                    found = Digest(function, hash_, 0)
                    size = find_content_size(self._cold.path(found), found)
            if size is not None:
                return Digest(function, hash_, size)
        return None

    def unknown(self, function: DigestFunction, spellings: Sequence[bytes]) -> list[bytes]:
        """Those of which `learn` wasn't told, or which weren't found here lately: each once, in order.

        Nothing is looked up.
        """
        spelled = self._spelled
        unknown = spellings
        if function in spelled:
            known = spelled[function]
            # Most often none, or a handful of thousands.
            unknown = [spelling for spelling in spellings if spelling not in known]
            with self._index.view() as view:
                self._keep_up(view)
            if self._spelled is not spelled:
                # Something was removed, or time has passed.
                unknown = spellings
        return list(dict.fromkeys(unknown))

    def learn(self, names: Sequence[Name], spellings: Sequence[bytes]) -> None:
        """Remember other spellings of blobs, those that were lately found here; all of one function."""
        # In this order: what is forgotten meanwhile takes the spellings along.
        spelled, young, old = self._spelled, self._young, self._old
        if names:
            known = spelled.setdefault(names[0][0], set())
            if len(known) > _REMEMBER_MOST:
                known.clear()
            known.update(
                spelling for name, spelling in zip(names, spellings, strict=True) if name in young or name in old
            )

    def _keep_up(self, view: View) -> None:
        """Forget what may have been removed since, or was found too long ago."""
        now = time.monotonic()
        if (count := removals(view)) != self._removals:
            self._young, self._old, self._spelled, self._removals = set(), set(), {}, count
        self._fresh_until = now + _FRESH_SECONDS
        self._rotate(now)

    def _rotate(self, now: float) -> None:
        if now - self._since > REMEMBER_SECONDS or len(self._young) > _REMEMBER_MOST:
            # After a pause what is young isn't.
            self._old = self._young if now - self._since < 2 * REMEMBER_SECONDS else set()
            self._young, self._spelled = set(), {}
            self._since = now

    def generation(self) -> int:
        """A number that moves whenever casfs has removed something: till then, what was complete is complete."""
        with self._index.view() as view:
            return removals(view)

    def note(self, names: Iterable[Name]) -> None:
        """They have just become available here."""
        self._rotate(time.monotonic())
        self._young.update(names)

    def forget(self, name: Name) -> None:
        """It was not there when somebody wanted to read it."""
        self._young.discard(name)
        self._old.discard(name)
        self._spelled = {}


def as_digest(name: Name) -> Digest:
    """The digest that a message names. Raises BadDigest."""
    function, hash_, size = name
    if size < 0:
        raise BadDigest(f"digest {hash_[:80]!r} has a negative size")
    return Digest(function, parse_hash(hash_), size)


def as_name(digest: Digest) -> Name:
    """The inverse of `as_digest`."""
    return digest.function, digest.hash.hex(), digest.size
