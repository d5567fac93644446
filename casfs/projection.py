"""Where a sandbox's read-only input root is: the one place that knows the engines below a sandbox.

`project` mounts a tree in this process's mount namespace, and nothing of it
outlives this process: engine `kernel` needs nobody, and the FUSE session is a
thread here, whose connection the kernel closes with the process. Any thread
may call; the caller holds the lease on the tree.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from casfs.contents import Contents, PlainGateway, ReadOnlyGateway
from casfs.errors import CasfsError, MissingCapability, MountError
from casfs.fusemount import attach, detach
from casfs.kernel_engine import mount_tree
from casfs.probes import probe_passthrough
from casfs.session import Session
from casfs.syscalls import MNT_DETACH, umount
from casfs.tree import ProjectedTree
from store.digest import Digest
from store.errors import MissingBlob
from store.repository import Store
from store.trees import Directory, find_directory

ENGINES = ("auto", "kernel", "passthrough", "native")
"""What can be below a sandbox. `fuse` (pyfuse3) can't: it allows one mount a process; `native` serves in its place."""


_KERNEL_NODES = 1_000
"""Up to so many nodes `auto` takes engine `kernel`, which makes a metadata layer anew for each mount: 40 us a node."""


class Projection(Protocol):
    """A tree that is mounted for one sandbox; `why` says how the engine was chosen."""

    @property
    def engine(self) -> str: ...
    @property
    def why(self) -> str: ...

    def upcalls(self) -> int:
        """How many requests of the kernel were answered so far."""

    def close(self) -> None:
        """Take the mount away."""


def project(store: Store, root: Digest, place: Path, engine: str = "auto") -> Projection:
    """Mount the interned tree `root` at `place`.

    Raises MissingCapability for an engine that was asked for and can't,
    MountError, StoreError.
    """
    if engine not in ENGINES:
        raise MissingCapability(f"a sandbox can't have engine {engine!r} below it: choose one of {', '.join(ENGINES)}")
    directory = _get_directory(store, root)
    why = "asked for"
    if engine == "auto" and directory.nodes > _KERNEL_NODES:
        why = f"kernel would take long to lay out {directory.nodes:,} nodes"
    elif engine in ("auto", "kernel"):
        try:
            mount_tree(store, root, place)
            return _InKernel(place, why if engine == "kernel" else "the first that can")
        except (MissingCapability, MissingBlob, MountError) as error:
            if engine == "kernel":
                raise
            why = f"kernel can't be used: {error}"
    if engine in ("auto", "passthrough"):
        probe = probe_passthrough(store.layout.marker)
        if probe.ok:
            return _Served(store, directory, place, True, why)
        if engine == "passthrough":
            raise MissingCapability(f"engine passthrough: {probe.detail}; {probe.remedy}")
        why = f"{why}; passthrough can't be used: {probe.detail}"
    return _Served(store, directory, place, False, why)


def _get_directory(store: Store, root: Digest) -> Directory:
    with store.index.view() as view:
        directory = find_directory(view, root)
    if directory is None:
        raise MountError(f"directory {root} is not in the index any more")
    return directory


class _InKernel:
    """A mount that nobody serves."""

    engine = "kernel"

    def __init__(self, place: Path, why: str) -> None:
        self.why = why
        self._place = place

    def upcalls(self) -> int:
        return 0

    def close(self) -> None:
        umount(str(self._place), MNT_DETACH)


class _Served:
    """A native session in a thread of this process."""

    def __init__(self, store: Store, directory: Directory, place: Path, passthrough: bool, why: str) -> None:
        self.engine = "passthrough" if passthrough else "native"
        self.why = why
        self._place = place
        # Before the mount is attached: copies of mounts made afterwards could contain it and keep it alive.
        gateway = ReadOnlyGateway(store.layout) if passthrough else PlainGateway(store.blobs)
        self._contents = Contents(store.blobs, gateway, store.hydrator)
        try:
            self._device = attach(place)
        except BaseException:
            self._contents.close()
            raise
        tree = ProjectedTree(store.index, directory)
        self._session = Session(self._device, tree, self._contents, passthrough=passthrough, fetch=self._contents.fetch)
        try:
            self._session.begin()
        except BaseException:
            self._leave()
            raise
        self._thread = threading.Thread(target=self._session.run, name=f"session {place}", daemon=True)
        self._thread.start()

    def upcalls(self) -> int:
        return sum(self._session.statistics()["upcalls"].values())

    def close(self) -> None:
        with suppress(CasfsError):
            detach(self._place, lazy=True)
        # Ends as soon as the last copy of the mount does, in the namespace of a command that is being killed.
        self._thread.join(5)
        if not self._thread.is_alive():
            os.close(self._device)
            self._contents.close()

    def _leave(self) -> None:
        with suppress(CasfsError):
            detach(self._place, lazy=True)
        os.close(self._device)
        self._contents.close()
