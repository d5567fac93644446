"""The ways to give an action its inputs, for `tools.bench.clones`: asked for a round of one, it lays out both trees.

What casfs keeps between actions (warm layers, a session), and the checkout
that snapshots are of, last for one round: the first action pays for them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

from casfs.checkout import Mode, check_out
from casfs.errors import CasfsError
from casfs.sandbox import Sandbox, Sandboxes, enter_namespace
from store import kernel
from store.digest import Digest
from store.entries import FileEntry
from store.layout import blob_path
from store.repository import Store
from store.trees import get_directory, walk
from tools.bench.action_methods import OUTPUT
from tools.bench.action_worker import Reader
from tools.bench.casfs_side import ENGINES
from tools.bench.volumes import create_subvolume, remove_subvolume, snapshot, wait_removed
from tools.bench.workers import Refused, serve

SNAPSHOT = "snapshot"
"""A writable btrfs snapshot of a checkout, in which what changed since is replaced."""
CHECKOUTS = {"reflink": Mode.REFLINK, "hardlink": Mode.HARDLINK, "copy": Mode.COPY}


class _Way(Protocol):
    """Lays out one action's inputs after the other, in one round."""

    def set_up(self, root: Digest) -> Path:
        """Where the action finds them."""

    def tear_down(self) -> None:
        """Take them away."""

    def close(self) -> None:
        """Take away what was kept for the next action; harmless when nothing was."""


class _Checkout:
    """`casfs checkout`, whose target has to be empty: each action has one of its own."""

    def __init__(self, store: Store, place: Path, mode: Mode) -> None:
        self._store = store
        self._place = place
        self._mode = mode

    def set_up(self, root: Digest) -> Path:
        check_out(self._store, root, self._place, mode=self._mode)
        return self._place

    def tear_down(self) -> None:
        subprocess.run(["rm", "-rf", self._place], check=True)

    def close(self) -> None:
        pass


class _Snapshot:
    """Snapshots of one checkout. Which files differ from it is known beforehand, which nobody gets for nothing."""

    def __init__(self, store: Store, place: Path, first: Digest, second: Digest) -> None:
        self._store = store
        self._place = place
        self._base = place.with_name(f"{place.name}-base")
        self._changed = {first: [], second: _find_changed(store, first, second)}

    def set_up(self, root: Digest) -> Path:
        if not self._base.exists():
            create_subvolume(self._base)
            check_out(self._store, root, self._base)
        snapshot(self._base, self._place)
        for path, digest in self._changed[root]:
            self._replace(self._place / os.fsdecode(path), digest)
        return self._place

    def _replace(self, path: Path, digest: Digest) -> None:
        os.unlink(path)
        source = os.open(self._store.layout.blobs / blob_path(digest), os.O_RDONLY)
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            kernel.clone_or_copy(source, target)
        finally:
            os.close(source)
            os.close(target)

    def tear_down(self) -> None:
        remove_subvolume(self._place)

    def close(self) -> None:
        with suppress(FileNotFoundError):
            remove_subvolume(self._base)
        # Not the next side's: the file system takes them apart in the background.
        wait_removed(self._place.parent)


class _Projection:
    """Sandboxes of casfs; what actions write goes to the volume where the others lay out their inputs."""

    def __init__(self, store: Store, place: Path, engine: str) -> None:
        self._store = store
        self._place = place
        self._engine = engine
        self._sandboxes: Sandboxes | None = None
        self._sandbox: Sandbox | None = None

    def set_up(self, root: Digest) -> Path:
        if self._sandboxes is None:
            self._sandboxes = Sandboxes(self._store, scratch=self._place, engine=self._engine)
        self._sandbox = self._sandboxes.open(root, outputs=[OUTPUT])
        return self._sandbox.scratch.merged

    def tear_down(self) -> None:
        if self._sandboxes is not None and self._sandbox is not None:
            self._sandbox.close()
            # A worker goes on meanwhile; here it counts as if it had to wait.
            self._sandboxes.wait_closed()
            self._sandbox = None

    def close(self) -> None:
        self.tear_down()
        if self._sandboxes is not None:
            self._sandboxes.close()
            self._sandboxes = None


def _files(store: Store, root: Digest) -> dict[bytes, Digest]:
    with store.index.view() as view:
        found = [(path, entry) for path, entry in walk(view, get_directory(view, root))]
    return {path: entry.digest for path, entry in found if isinstance(entry, FileEntry)}


def _find_changed(store: Store, first: Digest, second: Digest) -> list[tuple[bytes, Digest]]:
    before = _files(store, first)
    return [(path, digest) for path, digest in _files(store, second).items() if before[path] != digest]


class _Rounds:
    """Answers a request with one round: {"way", "check"} → for each tree, seconds by part."""

    def __init__(self, store: Store, volume: Path, roots: list[Digest], reader: Reader) -> None:
        self._store = store
        self._volume = volume
        self._roots = roots
        self._reader = reader
        self._blobs = sorted({digest for root in roots for digest in _files(store, root).values()})

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        way = self._make(request["way"])
        try:
            return {"actions": [self._act(way, root, check=request["check"]) for root in self._roots]}
        finally:
            way.close()

    def _make(self, name: str) -> _Way:
        place = self._volume / f"action-{name}"
        if name in ENGINES:
            return _Projection(self._store, place, name)
        if name == SNAPSHOT:
            return _Snapshot(self._store, place, *self._roots)
        return _Checkout(self._store, place, CHECKOUTS[name])

    def _act(self, way: _Way, root: Digest, *, check: bool) -> dict[str, Any]:
        if check:
            self._warm()
        # Settled: no side pays for what the one before left to be written.
        os.sync()
        used = self._used()
        try:
            began = time.perf_counter()
            top = way.set_up(root)
            set_up = time.perf_counter() - began
            read, size, _ = self._reader.read(top, check=False)
            found = self._reader.read(top, check=True)[2] if check else ""
            self._sync_volume()
            used = self._used() - used
        except CasfsError as error:
            # Which place it was is the same on no machine.
            raise Refused(
                str(error).replace(f"{self._volume}/", "").replace(f"{self._store.layout.root}", "STORE")
            ) from error
        finally:
            began = time.perf_counter()
            way.tear_down()
            tear_down = time.perf_counter() - began
        return {"set_up": set_up, "read": read, "tear_down": tear_down, "used": used, "size": size, "found": found}

    def _warm(self) -> None:
        """Have all blobs in the page cache, as in a build that goes on; there they stay."""
        for digest in self._blobs:
            with open(f"{self._store.layout.blobs}/{blob_path(digest)}", "rb", buffering=0) as blob:
                blob.read()

    def _sync_volume(self) -> None:
        descriptor = os.open(self._volume, os.O_RDONLY | os.O_DIRECTORY)
        try:
            kernel.syncfs(descriptor)
        finally:
            os.close(descriptor)

    def _used(self) -> int:
        """Bytes that the volume of the action holds."""
        status = os.statvfs(self._volume)
        return (status.f_blocks - status.f_bfree) * status.f_frsize


def _begin(stack: ExitStack) -> Callable[[dict[str, Any]], dict[str, Any]]:
    options = json.loads(sys.argv[1])
    enter_namespace()
    reader = Reader([os.fsencode(path) for path in options["read"]])
    stack.callback(reader.close)
    store = stack.enter_context(Store.open(Path(options["store"])))
    roots = [Digest.parse(root) for root in options["roots"]]
    return _Rounds(store, Path(options["volume"]), roots, reader).answer


if __name__ == "__main__":
    serve(_begin)
