"""An input root below a sandbox that a FUSE session shows: where engine kernel can't.

The session is a thread of this process: the kernel closes its connection with
the process, so nothing outlives it.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from casfs.contents import Contents, PlainGateway, ReadOnlyGateway
from casfs.errors import CasfsError
from casfs.fusemount import attach, detach
from casfs.scratch import Scratch, opened, unusable
from casfs.session_making import make_session
from casfs.syscalls import MNT_DETACH, MS_NODEV, MS_NOSUID, mount, umount
from casfs.tree import ProjectedTree
from store.digest import Digest
from store.repository import Store
from store.trees import get_directory

if TYPE_CHECKING:
    from casfs.tracing import Tracer, Tracing


class Served:
    """A native session, and an overlay over it. Implements `casfs.projection.Projection`."""

    laid_out = 0

    def __init__(
        self,
        store: Store,
        root: Digest,
        scratch: Scratch,
        volatile: bool,
        passthrough: bool,
        why: str,
        trace: Tracing | None = None,
    ) -> None:
        self.engine = "passthrough" if passthrough else "native"
        self.why = why
        self._place = scratch.lower
        with store.index.view() as view:
            tree = ProjectedTree(store.index, get_directory(view, root))
        os.mkdir(self._place)
        with ExitStack() as parts:
            # Before the mount is attached: copies of mounts made afterwards could contain it and keep it alive.
            gateway = ReadOnlyGateway(store.layout) if passthrough else PlainGateway(store.blobs)
            contents = Contents(store.blobs, gateway, store.hydrator)
            parts.callback(contents.close)
            device = attach(self._place)
            parts.callback(os.close, device)
            self._tracer: Tracer | None = None
            if trace is not None:
                from casfs.tracing import Tracer

                self._tracer = Tracer(trace.path, root, self.engine, trace.outputs)
                parts.callback(self._tracer.close)
            self._session = make_session(device, tree, contents, passthrough, self._tracer)
            self._thread = threading.Thread(target=self._session.run, name=f"session {self._place}", daemon=True)
            parts.callback(self._end)
            self._session.begin()
            self._thread.start()
            mount_writable(scratch, volatile=volatile)
            parts.callback(umount, str(scratch.merged), MNT_DETACH)
            self._parts = parts.pop_all()

    def _end(self) -> None:
        with suppress(CasfsError):
            detach(self._place, lazy=True)
        # Ends as soon as the last copy of the mount does, in the namespace of a command that is being killed.
        if self._thread.is_alive():
            self._thread.join(5)

    def upcalls(self) -> int:
        return sum(self._session.statistics()["upcalls"].values())

    def opened(self) -> int | None:
        return None if self._tracer is None else self._tracer.opened()

    def close(self) -> None:
        self._parts.close()


def mount_writable(scratch: Scratch, *, volatile: bool) -> None:
    """Mount ``upper`` over what is mounted at ``lower``, at ``merged``. Raises MissingCapability.

    By mount(2), as it has to work on kernels that have nothing newer. Paths
    are given as descriptors: in overlayfs's option text a comma or a colon
    would end them.
    """
    # With userxattr there is neither metacopy nor redirect_dir: what is copied up is copied whole.
    options = "userxattr,index=off" + (",volatile" if volatile else "")
    with opened(scratch.lower, scratch.upper, scratch.work) as (lower, upper, work):
        paths = f"lowerdir=/proc/self/fd/{lower},upperdir=/proc/self/fd/{upper},workdir=/proc/self/fd/{work}"
        try:
            mount("casfs-sandbox", str(scratch.merged), "overlay", MS_NOSUID | MS_NODEV, f"{paths},{options}")
        except OSError as error:
            raise unusable(scratch, error) from error
