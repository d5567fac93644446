"""Layers kept warm: what `casfs.planning` cuts out of trees, built once and stacked into every mount that has it.

`Layers.lay_out` gives what a mount of a tree is stacked from: descriptors of
the layers that are kept, of one fresh layer with the rest, of the directories
with the bytes. A kept layer is an overlay of its own (`casfs.overlay`) over
metadata in tmpfs, or for a large one, where EROFS can be mounted, in an image
that the store keeps. Nothing is attached anywhere: layers live as long as
their descriptors here and the mounts made of them, and end with this process.

What is kept is the most recently used within a budget of memory. A layer in
use (its `Layout` not closed, or another one kept that is a difference to it) is
never dropped.

A *difference* is what a tree has that a kept layer at the same path hasn't:
an overlay of its own over the few changed files, above that layer, and a tmpfs
with whiteouts above both, if anything is gone. The first one of a tree goes
with its mount; that of a tree that comes again is kept like any layer.

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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple, Protocol, Self

from casfs.errors import MountError
from casfs.layer_blobs import LayerBlobs, Needed
from casfs.metadata import MEMORY_PER_NODE, Part, write_tmpfs, write_whiteouts
from casfs.overlay import Family, check_showable, find_family, stack, verify
from casfs.planning import ENOUGH, Over, Plan, Sight, Subtree, plan, plan_layer, plan_over
from casfs.syscalls import is_initial_namespace
from store.blobs import removals
from store.compare import compare_trees
from store.digest import Digest
from store.errors import NoSpace
from store.index import View
from store.repository import Store
from store.trees import Directory, Row, find_directory, get_directory, list_entries

IMAGE_NODES = 50_000
"""From so many nodes on a kept layer is an image, where that can be mounted: its pages can be reclaimed."""
BASE_NODES = range(2_048, 65_536)
"""A tree of so many nodes of which nothing was known is kept at once: the next one is likely to be nearly the same."""
_BASES_MOST = 4
"""So many kept layers at a path are looked at for what is nearly the same; 0.5 µs an entry that differs."""
_IMAGE_MEMORY = 1 << 20
_LAYER_MEMORY = 100 << 10
"""What a layer takes beside its nodes: two superblocks."""
_SEEN_MOST = 1 << 16
_NOTE_SECONDS = 3600


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
    below: _Layer | None = None
    """Of a difference: what it is one to."""
    whiteouts: int = -1
    """And what takes away what is gone; -1 where nothing is."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while it is looked over."""
    superseded: list[int] = field(default_factory=list)
    """What `mounted` was before; another thread may be stacking it just now."""

    def stacked(self) -> list[int]:
        """Descriptors of what is stacked for it, the uppermost first."""
        if self.below is None:
            return [self.mounted]
        return [*([self.whiteouts] if self.whiteouts >= 0 else []), self.mounted, self.below.mounted]

    def close(self) -> None:
        for descriptor in (self.mounted, self.metadata, self.whiteouts, *self.superseded):
            if descriptor >= 0:
                os.close(descriptor)


class _Alike(NamedTuple):
    """What is nearly the same as a subtree, and how they differ; whether the difference is worth keeping."""

    base: _Layer
    over: Over
    keep: bool


class _TooMuch(Exception):
    """A plan would lay out over `ENOUGH` nodes."""


class Layers:
    """The layers of one store that this process keeps. Implements `Layouts`."""

    def __init__(self, store: Store, budget: int | None = None) -> None:
        """`budget`: bytes of memory for what is kept. Raises MissingCapability where nothing can be stacked here."""
        self._store = store
        self._blobs = LayerBlobs(store)
        self._family = find_family()
        self._budget = default_budget() if budget is None else budget
        self._images = is_initial_namespace()
        # Under `_lock`, as a layer's `subtree` and `users` are:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[bytes, bytes], _Layer] = OrderedDict()
        self._building: dict[tuple[bytes, bytes], threading.Lock] = {}
        self._seen: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()
        self._paths: OrderedDict[bytes, None] = OrderedDict()
        self._built = 0
        self._keeping = threading.Lock()
        """Held while a tree that is laid out already becomes a layer: only one of equal ones shall."""

    def lay_out(self, root: Digest) -> Layout:
        """See `Layouts`."""
        with ExitStack() as parts:
            alike: dict[tuple[bytes, bytes], _Alike] = {}
            with self._store.index.view() as view:
                directory = get_directory(view, root)
                check_showable(directory)
                counted = removals(view)
                planned = self._plan(view, directory, alike, parts)
            layers = [self._take(subtree, counted, alike.get(subtree.key), parts) for subtree in planned.layers]
            sample, whole = self._blobs.prepare(planned.parts, root.function)
            fresh = self._write(planned.parts)
            parts.callback(os.close, fresh)
            if whole and not planned.layers and directory.nodes in BASE_NODES:
                self._keep_fresh(directory, fresh, sample, counted)
            self._note(planned)
            stacked = [*(descriptor for layer in layers for descriptor in layer.stacked()), fresh]
            fetching = self._blobs.fetching(root.function, whole and all(layer.whole for layer in layers))
            sample = sample or next((layer.sample for layer in layers if layer.sample), [])
            nodes = sum(len(part.rows) for part in planned.parts)
            return Layout(self._family, stacked, fetching, sample, nodes, parts.pop_all())

    def _plan(
        self, view: View, directory: Directory, alike: dict[tuple[bytes, bytes], _Alike], parts: ExitStack
    ) -> Plan:
        """Layers and what is laid out; what is nearly the same as a kept layer goes into `alike`, held by `parts`."""
        rows_of = partial(list_entries, view)
        with self._lock:
            has_bases = any(_can_be_base(layer) for layer in self._kept.values())
        if not has_bases:
            return plan(directory, rows_of, self._sight)
        left = ENOUGH

        def spend(nodes: int) -> None:
            nonlocal left
            left -= nodes
            if left < 0:
                raise _TooMuch

        def rows_within(number: int) -> Iterator[Row]:
            for row in rows_of(number):
                spend(1)
                yield row

        def sight_within(subtree: Subtree) -> Sight:
            sight = self._sight(subtree)
            if sight is Sight.SEEN:
                spend(subtree.nodes)
            return sight

        with suppress(_TooMuch):
            return plan(directory, rows_within, sight_within)
        return plan(directory, rows_of, lambda subtree: self._sight_alike(view, subtree, alike, parts))

    def _sight_alike(
        self, view: View, subtree: Subtree, alike: dict[tuple[bytes, bytes], _Alike], parts: ExitStack
    ) -> Sight:
        sight = self._sight(subtree)
        if sight not in (Sight.SEEN, Sight.CHANGED) or subtree.nodes < ENOUGH:
            return sight
        if subtree.key in alike:
            return Sight.ALIKE
        after = get_directory(view, subtree.digest)
        for base in self._find_bases(subtree, parts):
            before = find_directory(view, base.subtree.digest)
            if before is None:
                continue  # it was kept longer than it was in the index
            over = plan_over(subtree, compare_trees(view, before, after))
            if over is not None:
                alike[subtree.key] = _Alike(base, over, sight is Sight.SEEN)
                return Sight.ALIKE
        return sight

    def _find_bases(self, subtree: Subtree, parts: ExitStack) -> list[_Layer]:
        """Kept layers at the same path, the latest first, in use until `parts` are closed."""
        with self._lock:
            found = (
                layer
                for layer in reversed(self._kept.values())
                if layer.subtree.path == subtree.path
                and _can_be_base(layer)
                and layer.subtree.digest.function is subtree.digest.function
            )
            bases = list(islice(found, _BASES_MOST))
            for base in bases:
                base.users += 1
                parts.callback(self._leave, base)
        return bases

    def _keep_fresh(self, directory: Directory, fresh: int, sample: list[Needed], counted: int) -> None:
        """Keep a whole tree that was laid out just now, for those to come that are nearly the same."""
        subtree = Subtree(b"", directory.digest, directory.id, directory.nodes)
        with self._keeping:
            with self._lock:
                if subtree.key in self._kept:
                    return
            memory = _LAYER_MEMORY + subtree.nodes * MEMORY_PER_NODE
            layer = _Layer(subtree, os.dup(fresh), memory, sample)
            try:
                self._stack(layer, True, counted)
            except BaseException:
                layer.close()
                raise
            self._leave(self._keep(layer))

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

    def _take(self, subtree: Subtree, counted: int, alike: _Alike | None, parts: ExitStack) -> _Layer:
        """The layer of a subtree, built if need be, in use until `parts` are closed."""
        if alike is not None and not alike.keep:
            layer = self._build_difference(subtree, counted, alike)
            parts.callback(layer.close)
            with self._lock:
                self._seen[subtree.key] = None
        else:
            layer = self._take_kept(subtree, counted, alike)
            parts.callback(self._leave, layer)
        with layer.lock:
            self._refresh(layer, counted)
        return layer

    def _take_kept(self, subtree: Subtree, counted: int, alike: _Alike | None) -> _Layer:
        with self._lock:
            layer = self._use(subtree)
            if layer is not None:
                return layer
            turn = self._building.setdefault(subtree.key, threading.Lock())
        with turn:
            with self._lock:
                layer = self._use(subtree)
            if layer is None:
                built = self._build_difference(subtree, counted, alike) if alike else self._build(subtree, counted)
                layer = self._keep(built)
        with self._lock:
            self._building.pop(subtree.key, None)
        return layer

    def _use(self, subtree: Subtree) -> _Layer | None:
        """The kept layer, if there is one, in use once more. Under the lock."""
        layer = self._kept.get(subtree.key)
        if layer is not None:
            self._kept.move_to_end(subtree.key)
            if layer.below is not None:
                # After it: what is a difference to another goes first.
                self._kept.move_to_end(layer.below.subtree.key)
            layer.users += 1
            # The same directory may have been interned anew, with another id.
            layer.subtree = subtree
        return layer

    def _keep(self, layer: _Layer) -> _Layer:
        with self._lock:
            self._kept[layer.subtree.key] = layer
            layer.users += 1
            if layer.below is not None:
                layer.below.users += 1
                self._kept.move_to_end(layer.below.subtree.key)
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
                if layer.below is not None:
                    layer.below.users -= 1
        return dropped

    def _build(self, subtree: Subtree, counted: int) -> _Layer:
        with self._store.index.view() as view:
            planned = plan_layer(subtree, partial(list_entries, view))
        sample, whole = self._blobs.prepare(planned.parts, subtree.digest.function)
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

    def _build_difference(self, subtree: Subtree, counted: int, alike: _Alike) -> _Layer:
        base, (parts, gone), _ = alike
        sample, whole = self._blobs.prepare(parts, subtree.digest.function)
        nodes = sum(len(part.rows) for part in parts) + len(gone)
        layer = _Layer(subtree, self._write(parts), _LAYER_MEMORY + nodes * MEMORY_PER_NODE, sample, below=base)
        try:
            if gone:
                layer.whiteouts = self._written(lambda: write_whiteouts(gone))
            self._stack(layer, whole, counted)
            verify(sample, self._store.blobs.directory_of(subtree.digest.function), layer.mounted)
        except BaseException:
            layer.close()
            raise
        if base.counted != counted or not base.whole:
            layer.counted = -1  # of what both have, who knows
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
        data = [self._store.blobs.directory_of(function), *self._blobs.fetching(function, whole)]
        layer.superseded.append(layer.mounted)
        layer.mounted = stack([layer.metadata], data, self._family)
        layer.whole, layer.counted, layer.noted = whole, counted, time.monotonic()

    def _refresh(self, layer: _Layer, counted: int) -> None:
        """See that a kept layer's blobs are here, if that may have changed, and that they count as used."""
        if layer.counted == counted and time.monotonic() - layer.noted < _NOTE_SECONDS:
            return
        with self._store.index.view() as view:
            planned = plan_layer(layer.subtree, partial(list_entries, view))
        _, whole = self._blobs.prepare(planned.parts, layer.subtree.digest.function)
        if layer.below is not None:
            with layer.below.lock:
                if whole < layer.below.whole:
                    self._stack(layer.below, whole, -1)  # what it has beside is looked at when it is used itself
        if whole >= layer.whole:
            # One that could fetch still can.
            layer.counted, layer.noted = counted, time.monotonic()
        else:
            self._stack(layer, whole, counted)

    def _write(self, parts: list[Part]) -> int:
        return self._written(lambda: write_tmpfs(parts, self._family))

    @staticmethod
    def _written(write: Callable[[], int]) -> int:
        try:
            return write()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise NoSpace("there is not enough memory for the names of this tree") from error
            raise MountError(f"can't lay out the names of this tree: {error.strerror}") from error

    def upcalls(self) -> int:
        """See `Layouts`."""
        return self._blobs.upcalls()

    def statistics(self) -> dict[str, int]:
        """How many layers are kept, images and differences among them, and were ever built; bytes they take and may."""
        with self._lock:
            memory = sum(layer.memory for layer in self._kept.values())
            return {
                "layers": len(self._kept),
                "images": sum(layer.memory == _IMAGE_MEMORY for layer in self._kept.values()),
                "differences": sum(layer.below is not None for layer in self._kept.values()),
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
        self._blobs.close()


def _can_be_base(layer: _Layer) -> bool:
    return layer.below is None and layer.subtree.nodes >= ENOUGH
