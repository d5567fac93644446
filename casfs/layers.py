"""Layers kept warm: what `casfs.planning` cuts out of trees, built once and stacked into every mount that has it.

`Layers.lay_out` gives what a mount of a tree is stacked from: descriptors of
the layers that are kept, of one fresh layer with the rest, of the directories
with the bytes. A kept layer is an overlay of its own (`casfs.overlay`) over
metadata in tmpfs, or for a large one, where EROFS can be mounted, in an image
that the store keeps. Nothing is attached anywhere: layers live as long as
their descriptors here and the mounts made of them, and end with this process.

Which are kept: `casfs.kept_layers`.

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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol, Self

from casfs.errors import MountError
from casfs.kept_layers import KeptLayers, Layer
from casfs.layer_blobs import LayerBlobs, Needed
from casfs.metadata import MEMORY_PER_NODE, Part, write_tmpfs, write_whiteouts
from casfs.overlay import Family, check_showable, find_family, stack, verify
from casfs.planning import (
    ENOUGH,
    LEAST,
    Known,
    Over,
    Plan,
    RowsOf,
    Sight,
    Subtree,
    join,
    plan,
    plan_layer,
    plan_over,
    subtree_of,
)
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
_IMAGE_MEMORY = 1 << 20
_LAYER_MEMORY = 100 << 10
"""What a layer takes beside its nodes: two superblocks."""
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


class _Alike(NamedTuple):
    """What is nearly the same as a subtree, and how they differ; whether the difference is worth keeping.

    `noted`: the subtrees in it that aren't in `base`.
    """

    base: Layer
    over: Over
    keep: bool
    noted: list[Subtree]


class _TooMuch(Exception):
    """A plan would lay out over `ENOUGH` nodes."""


class Layers:
    """The layers of one store that this process keeps. Implements `Layouts`."""

    def __init__(self, store: Store, budget: int | None = None) -> None:
        """`budget`: bytes of memory for what is kept. Raises MissingCapability where nothing can be stacked here."""
        self._store = store
        self._blobs = LayerBlobs(store)
        self._family = find_family()
        self._kept = KeptLayers(default_budget() if budget is None else budget)
        self._images = is_initial_namespace()

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
            self._kept.note(planned.noted)
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
        if not self._kept.has_bases():
            return plan(directory, rows_of, self._kept.sight)

        def sight_alike(subtree: Subtree) -> Sight:
            sight = self._kept.sight(subtree)
            if sight not in (Sight.SEEN, Sight.CHANGED) or subtree.nodes < ENOUGH:
                return sight
            return Sight.ALIKE if self._find_alike(view, subtree, sight, alike, parts) else sight

        # What comes again shall become a layer, unless that is much and a difference will do.
        with suppress(_TooMuch):
            return _plan_little(directory, rows_of, self._kept.sight)
        return plan(directory, rows_of, sight_alike)

    def _find_alike(
        self, view: View, subtree: Subtree, sight: Sight, alike: dict[tuple[bytes, bytes], _Alike], parts: ExitStack
    ) -> bool:
        if subtree.key in alike:
            return True
        after = get_directory(view, subtree.digest)
        for base in self._kept.bases(subtree, parts):
            before = find_directory(view, base.subtree.digest)
            if before is None:
                continue  # it was kept longer than it was in the index
            noted: list[Subtree] = []
            over = plan_over(subtree, compare_trees(view, before, after, partial(_note, noted, subtree.path)))
            if over is None or (sight is Sight.CHANGED and self._come_again(noted)):
                continue
            alike[subtree.key] = _Alike(base, over, sight is Sight.SEEN, noted)
            return True
        return False

    def _come_again(self, parts: Sequence[Subtree]) -> bool:
        """Whether these are mostly what was seen before: a difference made of them would be made each time."""
        known = sum(self._kept.sight(part) in (Sight.SEEN, Sight.LAYER) for part in parts)
        return known * 4 > len(parts) * 3

    def _keep_fresh(self, directory: Directory, fresh: int, sample: list[Needed], counted: int) -> None:
        """Keep a whole tree that was laid out just now, for those to come that are nearly the same."""
        subtree = Subtree(b"", directory.digest, directory.id, directory.nodes)

        def build() -> Layer:
            return self._stacked(Layer(subtree, os.dup(fresh), _memory_of(subtree.nodes), sample), True, counted)

        self._kept.leave(self._kept.take(subtree, build))

    def _take(self, subtree: Subtree, counted: int, alike: _Alike | None, parts: ExitStack) -> Layer:
        """The layer of a subtree, built if need be, in use until `parts` are closed."""
        if alike is not None and not alike.keep:
            layer = self._build_difference(subtree, counted, alike)
            parts.callback(layer.close)
            self._kept.note([subtree])
        else:

            def build() -> Layer:
                return self._build_difference(subtree, counted, alike) if alike else self._build(subtree, counted)

            layer = self._kept.take(subtree, build)
            parts.callback(self._kept.leave, layer)
        with layer.lock:
            self._refresh(layer, counted)
        return layer

    def _build(self, subtree: Subtree, counted: int) -> Layer:
        with self._store.index.view() as view:
            planned = plan_layer(subtree, partial(list_entries, view))
        sample, whole = self._blobs.prepare(planned.parts, subtree.digest.function)
        image = self._image(subtree) if self._images and subtree.nodes >= IMAGE_NODES else None
        if image is not None:
            layer = Layer(subtree, image, _IMAGE_MEMORY, sample, image=True)
        else:
            layer = Layer(subtree, self._write(planned.parts), _memory_of(subtree.nodes), sample)
        self._stacked(layer, whole, counted)
        self._kept.note(planned.noted)
        return layer

    def _build_difference(self, subtree: Subtree, counted: int, alike: _Alike) -> Layer:
        base, (parts, gone), _, noted = alike
        sample, whole = self._blobs.prepare(parts, subtree.digest.function)
        nodes = sum(len(part.rows) for part in parts) + len(gone)
        layer = Layer(subtree, self._write(parts), _memory_of(nodes), sample, below=base)
        if gone:
            try:
                layer.whiteouts = self._written(lambda: write_whiteouts(gone))
            except BaseException:
                layer.close()
                raise
        self._stacked(layer, whole, counted)
        if base.counted != counted or not base.whole:
            layer.counted = -1  # of what both have, who knows
        self._kept.note(noted)
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

    def _stacked(self, layer: Layer, whole: bool, counted: int) -> Layer:
        """A new layer, stacked and verified, or closed where that fails."""
        try:
            self._stack(layer, whole, counted)
            verify(layer.sample, self._store.blobs.directory_of(layer.subtree.digest.function), layer.mounted)
        except BaseException:
            layer.close()
            raise
        return layer

    def _stack(self, layer: Layer, whole: bool, counted: int) -> None:
        function = layer.subtree.digest.function
        data = [self._store.blobs.directory_of(function), *self._blobs.fetching(function, whole)]
        layer.superseded.append(layer.mounted)
        layer.mounted = stack([layer.metadata], data, self._family)
        layer.whole, layer.counted, layer.noted = whole, counted, time.monotonic()

    def _refresh(self, layer: Layer, counted: int) -> None:
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
        return self._kept.statistics()

    def close(self) -> None:
        """Let go of all layers; what is mounted of them lives on."""
        self._kept.close()
        self._blobs.close()


def _note(noted: list[Subtree], above: bytes, path: bytes, row: Row) -> None:
    if row.nodes >= LEAST:
        noted.append(subtree_of(join(above, path), row))


def _memory_of(nodes: int) -> int:
    return _LAYER_MEMORY + nodes * MEMORY_PER_NODE


def _plan_little(directory: Directory, rows_of: RowsOf, known: Known) -> Plan:
    """A plan that lays out `ENOUGH` nodes at most, those that become layers now included. Raises _TooMuch."""
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

    def known_within(subtree: Subtree) -> Sight:
        sight = known(subtree)
        if sight is Sight.SEEN:
            spend(subtree.nodes)
        return sight

    return plan(directory, rows_within, known_within)
