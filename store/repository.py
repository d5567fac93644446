"""One store, opened: where its parts are put together.

`Store.open` is the way in. Open it after a fork, close it before; threads may
share it.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from store import kernel
from store.action_cache import ActionCache
from store.blobs import Blobs
from store.cold import ColdTier
from store.digest import Digest
from store.directory_source import DirectorySource
from store.errors import NewerFormat, StoreUnusable
from store.index import Index
from store.ingest import Ingest
from store.layout import Layout
from store.leases import Leases
from store.manifests import Manifests
from store.sessions import living_sessions
from store.sources import DEFAULT_TIMEOUT, RemoteSource, Source, TreeSource

if TYPE_CHECKING:
    from store.demotion import Demoter
    from store.gc import Collected, Collector
    from store.hydration import Hydrator
    from store.importing import Importer
    from store.presence import Presence
    from store.quota import Limits, Space
    from store.uploads import StoreElsewhere, Uploads
    from store.verify import Verifier

FORMAT = 1
"""Of the directory; the index has a format of its own."""


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Where missing blobs may come from, beside the store's own cold tier; `timeout` is in seconds.

    `remote` is called when the store is opened, so in the process that will use
    what it makes: options cross a fork, connections don't.
    """

    directories: tuple[Path, ...] = ()
    timeout: float = DEFAULT_TIMEOUT
    remote: Callable[[], Sequence[RemoteSource]] = tuple


class Store:
    """The parts of a store, by name."""

    def __init__(self, layout: Layout, index: Index, options: SourceOptions | None = None) -> None:
        options = options or SourceOptions()
        self.layout = layout
        self.index = index
        self.blobs = Blobs(layout, index)
        self.cold = ColdTier(layout, index, self.blobs)
        self.manifests = Manifests(layout, index, self.blobs, self.cold)
        self.leases = Leases(layout, self.blobs)
        self.actions = ActionCache(layout)
        self._options = options
        self._remote = options.remote()
        self._making = threading.Lock()
        self._hydrator: Hydrator | None = None

    # What the rest needs is imported when it is asked for: not by a command that has a person waiting.
    # Without threads of their own, so that two may well make one twice; the hydrator is made under a lock.

    @property
    def hydrator(self) -> Hydrator:
        """Fetches what is missing. One a store, whoever asks first: it has threads."""
        with self._making:
            if self._hydrator is None:
                from store.hydration import Hydrator

                directories = map(DirectorySource, self._options.directories)
                sources: list[Source] = [self.cold, *directories, *self._remote]
                self._hydrator = Hydrator(self.blobs, self.ingest, sources, timeout=self._options.timeout)
            return self._hydrator

    @property
    def has_sources(self) -> bool:
        """Whether missing blobs may come from elsewhere than the cold tier."""
        return bool(self._options.directories or self._remote)

    @cached_property
    def presence(self) -> Presence:
        """Which blobs are here, asked often."""
        from store.presence import Presence

        return Presence(self.index, self.blobs, self.cold)

    @cached_property
    def importer(self) -> Importer:
        """Makes trees."""
        from store.importing import Importer

        trees = [source for source in self._remote if isinstance(source, TreeSource)]
        return Importer(self.layout, self.index, self.blobs, self.hydrator, trees)

    @cached_property
    def collector(self) -> Collector:
        """Removes what is not used."""
        from store.gc import Collector

        return Collector(self.layout, self.index, self.blobs, self.leases, self.cold, self.actions)

    @cached_property
    def demoter(self) -> Demoter:
        """Moves what is not used for long to the cold tier."""
        from store.demotion import Demoter

        return Demoter(self.layout, self.index, self.blobs, self.leases, self.cold)

    @cached_property
    def verifier(self) -> Verifier:
        """Hashes everything again."""
        from store.verify import Verifier

        return Verifier(self.index, self.blobs, self.cold, self.manifests, self.leases, self.importer)

    @classmethod
    def open(cls, root: Path, *, create: bool = True, sources: SourceOptions | None = None) -> Store:
        """Open the store in the directory `root`, making one where there is nothing.

        `sources` says where missing blobs may come from, beside the cold tier.
        What killed processes left in ``tmp/`` is removed. Raises StoreUnusable
        for a directory that is no store or can't be written, NewerFormat.
        """
        layout = Layout(root.absolute())
        _check_directory(layout, create)
        index = Index(layout.index)
        try:
            store = cls(layout, index, sources)
            living_sessions(layout, clean=True)
            store.leases.clean()
        except BaseException as error:
            index.close()
            if isinstance(error, OSError):
                raise StoreUnusable(f"can't use the store in {layout.root}: {error}") from error
            raise
        return store

    def ingest(self) -> Ingest:
        """A session for adding blobs."""
        return Ingest(self.layout, self.index, self.blobs)

    def limit(self, limits: Limits | None, note: Callable[[Collected], object] = lambda done: None) -> Space:
        """Who is asked for space before something is written; to be closed before the store is.

        `note` is told what each collection did.
        """
        from store.quota import Quota, Unlimited

        if limits is None:
            return Unlimited()
        return Quota(self.layout, self.index, self.actions, self.collector, limits, note=note)

    def uploads(
        self,
        space: Space,
        added: Callable[[Sequence[Digest]], None] = lambda digests: None,
        store_elsewhere: StoreElsewhere | None = None,
    ) -> Uploads:
        """The way in for many at once; to be closed before the store is. See `Uploads`."""
        from store.uploads import Uploads

        return Uploads(lambda: Ingest(self.layout, self.index, self.blobs, spares=False), space, added, store_elsewhere)

    def close(self) -> None:
        """Let go of all descriptors."""
        if self._hydrator is not None:
            self._hydrator.close()
        for source in self._remote:
            source.close()
        self.actions.close()
        self.blobs.close()
        self.index.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_directory(layout: Layout, create: bool) -> None:
    marker = layout.marker
    try:
        text = marker.read_bytes()
    except FileNotFoundError:
        if not create:
            raise StoreUnusable(
                f"there is no store in {layout.root}: 'casfs add' or 'casfs manifest create' begins one, "
                "--store or CASFS_STORE names another"
            ) from None
        _make_directory(layout, marker)
        return
    except OSError as error:
        raise StoreUnusable(f"can't read the store in {layout.root}: {error.strerror}") from error
    match = re.fullmatch(rb"casfs store (\d{1,9})\n", text)
    if match is None:
        raise StoreUnusable(f"{marker} doesn't say 'casfs store {FORMAT}': is {layout.root} a store?")
    if int(match[1]) > FORMAT:
        raise NewerFormat(
            f"the store in {layout.root} has format {int(match[1])}, this casfs knows {FORMAT}: use the newer casfs"
        )
    for directory in layout.directories():
        if not directory.is_dir():
            raise StoreUnusable(
                f"the store in {layout.root} is not whole: {directory} is missing; make it again, empty"
            )
        if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
            raise StoreUnusable(
                f"the store in {layout.root} can't be written by this user; choose another with --store"
            )


def _make_directory(layout: Layout, marker: Path) -> None:
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
        expected = {directory.name for directory in layout.directories()}
        if not expected.issuperset(os.listdir(layout.root)) and not marker.exists():
            raise StoreUnusable(f"{layout.root} is not empty and no store: choose an empty or new directory")
        for directory in layout.directories():
            directory.mkdir(exist_ok=True)
        kernel.spread_directories(str(layout.tmp))
        # Last and at once: a store is whole when it has its marker.
        partial = layout.tmp / f"format-{os.getpid()}"
        with open(partial, "wb") as out:
            out.write(b"casfs store %d\n" % FORMAT)
            out.flush()
            os.fsync(out.fileno())
        try:
            os.replace(partial, marker)
        except FileNotFoundError:
            if not marker.exists():  # else another process made the store just now, and cleaned up in tmp
                raise
        for directory in (layout.root, layout.root.parent):
            kernel.fsync_path(directory)
    except OSError as error:
        raise StoreUnusable(f"can't make a store in {layout.root}: {error.strerror}") from error
