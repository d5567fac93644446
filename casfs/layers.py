"""Layers kept warm: what `casfs.planning` cuts out of trees, built once and stacked into every mount that has it.

`Layers.lay_out` gives what a mount of a tree is stacked from: descriptors of
the layers that are kept, of one fresh layer with the rest, of the directories
with the bytes. A kept layer is an overlay of its own (`casfs.overlay`) over
metadata in tmpfs, or for a large one, where EROFS can be mounted, in an image
that the store keeps. Nothing is attached anywhere: layers live as long as
their descriptors here and the mounts made of them, and end with this process.

What is kept is the least recently used within a budget of memory. A layer in
use (its `Layout` not closed) is never dropped.

Blobs: what has no row is hashed before it is shown, what is missing is fetched
when it is opened (`casfs.blob_mount`), or now where there is no FUSE. What a
kept layer needs was here when it was built; after anything was removed from the
store it is looked for again at the layer's next use.

Threads may share a `Layers`; two that want one layer have it built once.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Protocol, Self

from casfs.errors import MissingCapability, MountError
from casfs.metadata import MEMORY_PER_NODE, Part, write_tmpfs
from casfs.overlay import Family, check_showable, find_family, stack, verify
from casfs.planning import Plan, Sight, Subtree, plan, plan_layer
from casfs.syscalls import is_initial_namespace
from store.blobs import removals
from store.digest import Digest, DigestFunction
from store.entries import FileEntry
from store.errors import MissingBlob, NoSpace
from store.repository import Store
from store.trees import get_directory, list_entries

if TYPE_CHECKING:
    from casfs.blob_mount import BlobMount

IMAGE_NODES = 50_000
"""From so many nodes on a kept layer is an image, where that can be mounted: its pages can be reclaimed."""
_IMAGE_MEMORY = 1 << 20
_LAYER_MEMORY = 100 << 10
"""What a layer takes beside its nodes: two superblocks."""
_SEEN_MOST = 1 << 16
_SAMPLES = 16
_NOTE_SECONDS = 3600

Needed = tuple[bytes, Digest]
"""A path and the blob its file has."""


def default_budget() -> int:
    """Bytes that kept layers may take: an eighth of the machine's memory, at most 1 GiB."""
    return min(1 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)


@dataclass(slots=True)
class Layout:
    """What a mount is stacked from; a context manager, to be closed when the mount is gone.

    `layers` the uppermost first, the last has redirects; `fetching` the data-only
    layers that come after the blob directory, of which whoever mounts takes his
    own: that of another mount namespace can't be stacked. `sample` are files to
    verify the mount by, `fresh_nodes` were laid
    out for it.
    """

    family: Family
    layers: list[int]
    fetching: list[int]
    sample: list[Needed]
    fresh_nodes: int
    parts: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        """Let go of all of it; harmless when repeated."""
        self.parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Layouts(Protocol):
    """Where layouts come from: `Layers` in this process, or those of a holder (`casfs.holder`)."""

    def lay_out(self, root: Digest) -> Layout:
        """What to mount the interned tree `root` from, on which the caller holds a lease.

        Raises MissingCapability, MissingBlob, MountError, NoSpace, StoreError.
        """
        ...

    def upcalls(self) -> int:
        """Requests of the kernel answered so far, for blobs that were missing."""
        ...

    def statistics(self) -> dict[str, int]:
        """At least `layers` and the `bytes` they take."""
        ...

    def close(self) -> None: ...


@dataclass(eq=False, slots=True)
class _Layer:
    """A kept layer: `mounted` is the overlay, `metadata` what it is over. `counted`: see `removals`."""

    subtree: Subtree
    metadata: int
    memory: int
    sample: list[Needed]
    counted: int = -1
    mounted: int = -1
    whole: bool = True
    users: int = 0
    noted: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while it is looked over."""
    superseded: list[int] = field(default_factory=list)
    """What `mounted` was before; another thread may be stacking it just now."""

    def close(self) -> None:
        for descriptor in (self.mounted, self.metadata, *self.superseded):
            if descriptor >= 0:
                os.close(descriptor)


class Layers:
    """The layers of one store that this process keeps. Implements `Layouts`."""

    def __init__(self, store: Store, budget: int | None = None) -> None:
        """`budget`: bytes of memory for what is kept. Raises MissingCapability where nothing can be stacked here."""
        self._store = store
        self._family = find_family()
        self._budget = default_budget() if budget is None else budget
        self._images = is_initial_namespace()
        # Under `_lock`, as a layer's `subtree` and `users` are:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[bytes, bytes], _Layer] = OrderedDict()
        self._building: dict[tuple[bytes, bytes], threading.Lock] = {}
        self._seen: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()
        self._paths: OrderedDict[bytes, None] = OrderedDict()
        self._fetching: dict[DigestFunction, BlobMount] = {}
        self._built = 0

    def lay_out(self, root: Digest) -> Layout:
        """See `Layouts`."""
        with self._store.index.view() as view:
            directory = get_directory(view, root)
            check_showable(directory)
            counted = removals(view)
            planned = plan(directory, partial(list_entries, view), self._sight)
        with ExitStack() as parts:
            layers = [self._take(subtree, counted, parts) for subtree in planned.layers]
            sample, whole = self._prepare(planned, root.function)
            fresh = self._write(planned.parts)
            parts.callback(os.close, fresh)
            self._note(planned)
            stacked = [*(layer.mounted for layer in layers), fresh]
            fetching = self._fetching_layers(root.function, whole and all(layer.whole for layer in layers))
            sample = sample or next((layer.sample for layer in layers if layer.sample), [])
            nodes = sum(len(part.rows) for part in planned.parts)
            return Layout(self._family, stacked, fetching, sample, nodes, parts.pop_all())

    def _sight(self, subtree: Subtree) -> Sight:
        with self._lock:
            if subtree.key in self._kept:
                return Sight.LAYER
            if subtree.key in self._seen:
                return Sight.SEEN
            return Sight.CHANGED if subtree.path in self._paths else Sight.NEW

    def _note(self, planned: Plan) -> None:
        with self._lock:
            for subtree in planned.noted:
                self._seen[subtree.key] = None
                self._paths[subtree.path] = None
            for remembered in (self._seen, self._paths):
                while len(remembered) > _SEEN_MOST:
                    remembered.popitem(last=False)

    def _take(self, subtree: Subtree, counted: int, parts: ExitStack) -> _Layer:
        """The layer of a subtree, built if need be, in use until `parts` are closed."""
        with self._lock:
            layer = self._use(subtree)
            turn = self._building.setdefault(subtree.key, threading.Lock()) if layer is None else None
        if turn is not None:
            with turn:
                with self._lock:
                    layer = self._use(subtree)
                layer = layer or self._keep(self._build(subtree, counted))
            with self._lock:
                self._building.pop(subtree.key, None)
        assert layer is not None  # noqa: S101 - one way or the other
        parts.callback(self._leave, layer)
        with layer.lock:
            self._refresh(layer, counted)
        return layer

    def _use(self, subtree: Subtree) -> _Layer | None:
        """The kept layer, if there is one, in use once more. Under the lock."""
        layer = self._kept.get(subtree.key)
        if layer is not None:
            self._kept.move_to_end(subtree.key)
            layer.users += 1
            # The same directory may have been interned anew, with another id.
            layer.subtree = subtree
        return layer

    def _keep(self, layer: _Layer) -> _Layer:
        with self._lock:
            self._kept[layer.subtree.key] = layer
            layer.users += 1
            self._built += 1
            self._seen[layer.subtree.key] = None
            self._paths[layer.subtree.path] = None
            dropped = self._drop_superfluous()
        for old in dropped:
            old.close()
        return layer

    def _leave(self, layer: _Layer) -> None:
        with self._lock:
            layer.users -= 1
            dropped = self._drop_superfluous()
        for old in dropped:
            old.close()

    def _drop_superfluous(self) -> list[_Layer]:
        """Take what is over the budget out of what is kept. Under the lock."""
        excess = sum(layer.memory for layer in self._kept.values()) - self._budget
        dropped = []
        for key, layer in list(self._kept.items()):
            if excess <= 0:
                break
            if not layer.users:
                dropped.append(self._kept.pop(key))
                excess -= layer.memory
        return dropped

    def _build(self, subtree: Subtree, counted: int) -> _Layer:
        with self._store.index.view() as view:
            planned = plan_layer(subtree, partial(list_entries, view))
        sample, whole = self._prepare(planned, subtree.digest.function)
        metadata = self._image(subtree) if self._images and subtree.nodes >= IMAGE_NODES else None
        memory = _IMAGE_MEMORY
        if metadata is None:
            metadata, memory = self._write(planned.parts), _LAYER_MEMORY + subtree.nodes * MEMORY_PER_NODE
        layer = _Layer(subtree, metadata, memory, sample)
        try:
            self._stack(layer, whole, counted)
            verify(sample, self._store.blobs.directory_of(subtree.digest.function), layer.mounted)
        except BaseException:
            layer.close()
            raise
        self._note(planned)
        return layer

    def _image(self, subtree: Subtree) -> int | None:
        """A layer in an image; None where the kernel can't stack one as high as a sandbox does."""
        from casfs.images import NEVER_WHOLE, mount_image, open_image

        with ExitStack() as opened, suppress(OSError):
            image = open_image(self._store, subtree, self._family, NEVER_WHOLE)
            opened.callback(os.close, image)
            metadata = mount_image(image)
            opened.callback(os.close, metadata)
            here = self._store.blobs.directory_of(subtree.digest.function)
            lower = stack([metadata], [here], self._family)
            opened.callback(os.close, lower)
            # Without an upper layer overlayfs wants two.
            os.close(stack([lower, metadata], [here], self._family))
            return os.dup(metadata)
        self._images = False
        return None

    def _stack(self, layer: _Layer, whole: bool, counted: int) -> None:
        function = layer.subtree.digest.function
        data = [self._store.blobs.directory_of(function), *self._fetching_layers(function, whole)]
        layer.superseded.append(layer.mounted)
        layer.mounted = stack([layer.metadata], data, self._family)
        layer.whole, layer.counted, layer.noted = whole, counted, time.monotonic()

    def _refresh(self, layer: _Layer, counted: int) -> None:
        """See that a kept layer's blobs are here, if that may have changed, and that they count as used."""
        if layer.counted == counted and time.monotonic() - layer.noted < _NOTE_SECONDS:
            return
        with self._store.index.view() as view:
            planned = plan_layer(layer.subtree, partial(list_entries, view))
        _, whole = self._prepare(planned, layer.subtree.digest.function)
        if whole >= layer.whole:
            # One that could fetch still can.
            layer.counted, layer.noted = counted, time.monotonic()
        else:
            self._stack(layer, whole, counted)

    def _prepare(self, planned: Plan, function: DigestFunction) -> tuple[list[Needed], bool]:
        """See to the blobs of what is laid out: some that are here, and whether all are."""
        files = list(_files(planned.parts))
        missing = set(self._store.blobs.prepare([digest for _, digest in files]))
        if missing:
            self._expect([needed for needed in files if needed[1] in missing], function)
            missing = {digest for digest in missing if not self._store.blobs.has(digest)}
        present = (needed for needed in files if needed[1] not in missing)
        return list(islice(present, _SAMPLES)), not missing

    def _expect(self, missing: list[Needed], function: DigestFunction) -> None:
        try:
            self._fetch_mount(function).expect(missing)
        except MissingCapability as error:
            # Nobody can fetch when they are opened, so it has to be now.
            from store.prefetch import prefetch

            failed = prefetch(self._store, [digest for _, digest in missing]).failed
            if failed:
                raise MissingBlob(f"{next(iter(failed.values()))}; {len(failed)} blobs in all ({error})") from error

    def _fetch_mount(self, function: DigestFunction) -> BlobMount:
        with self._lock:
            if function not in self._fetching:
                from casfs.blob_mount import BlobMount

                self._fetching[function] = BlobMount(self._store, function)
            return self._fetching[function]

    def _fetching_layers(self, function: DigestFunction, whole: bool) -> list[int]:
        return [] if whole else [self._fetch_mount(function).layer]

    def _write(self, parts: list[Part]) -> int:
        try:
            return write_tmpfs(parts, self._family)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise NoSpace("there is not enough memory for the names of this tree") from error
            raise MountError(f"can't lay out the names of this tree: {error.strerror}") from error

    def upcalls(self) -> int:
        """See `Layouts`."""
        return sum(sum(mount.upcalls().values()) for mount in list(self._fetching.values()))

    def statistics(self) -> dict[str, int]:
        """How many layers are kept and were ever built, how many are images, how many bytes they take and may take."""
        with self._lock:
            memory = sum(layer.memory for layer in self._kept.values())
            return {
                "layers": len(self._kept),
                "images": sum(layer.memory == _IMAGE_MEMORY for layer in self._kept.values()),
                "bytes": memory,
                "budget": self._budget,
                "built": self._built,
            }

    def close(self) -> None:
        """Let go of all layers; what is mounted of them lives on."""
        with self._lock:
            kept = list(self._kept.values())
            self._kept.clear()
        for layer in kept:
            layer.close()
        for mount in self._fetching.values():
            mount.close()


def _files(parts: Iterable[Part]) -> Iterator[Needed]:
    """The files with contents that are laid out."""
    for path, rows in parts:
        for row in rows:
            entry = row.entry
            if isinstance(entry, FileEntry) and entry.digest.size:
                yield (path + b"/" + entry.name if path else entry.name), entry.digest
