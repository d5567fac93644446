"""What lies below a sandbox: the one place that knows its engines.

A `Projection` shows one input root, with a sandbox's scratch over it, in this
process's mount namespace; nothing of it outlives this process. Engine `kernel`
stacks layers that are kept warm (`casfs.layers`); the others have a session in
this process (`casfs.served`, imported only then). Any thread may call; the
caller holds the lease on the tree.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from casfs.errors import MissingCapability, MountError
from casfs.layers import Layers, Layout, Layouts
from casfs.newmount import attach_mount
from casfs.overlay import Upper, stack, verify
from casfs.scratch import Scratch, opened, unusable
from casfs.syscalls import MNT_DETACH, umount
from store.digest import Digest
from store.repository import Store

if TYPE_CHECKING:
    from casfs.tracing import Tracing

ENGINES = ("auto", "kernel", "passthrough", "native")
"""What can be below a sandbox. `fuse` (pyfuse3) can't: it allows one mount a process; `native` serves in its place."""


class Projection(Protocol):
    """An input root below one sandbox; `why` says how the engine was chosen."""

    @property
    def engine(self) -> str: ...
    @property
    def why(self) -> str: ...

    @property
    def laid_out(self) -> int:
        """How many nodes had to be laid out for it alone; what was kept warm doesn't count."""

    def upcalls(self) -> int:
        """How many requests of the kernel were answered for it so far."""

    def opened(self) -> int | None:
        """How many of its files were opened so far, where that is known: where it is traced."""

    def close(self) -> None:
        """Take the mounts away."""


class Projector:
    """Makes projections of one store's trees, with the engine that was asked for."""

    def __init__(self, store: Store, engine: str = "auto", layouts: Layouts | None = None) -> None:
        """`layouts`: where engine `kernel` gets its layers from, if not of this process, and ours from now on.

        Raises MissingCapability for an engine that can't be below a sandbox.
        """
        if engine not in ENGINES:
            raise MissingCapability(
                f"a sandbox can't have engine {engine!r} below it: choose one of {', '.join(ENGINES)}"
            )
        self._store = store
        self._engine = engine
        self._layouts = layouts
        self._lock = threading.Lock()
        # Under the lock; None where it wasn't tried yet, else what is lacking.
        self._no_layers: MissingCapability | None = None
        self._no_passthrough: str | None = None

    def project(self, root: Digest, scratch: Scratch, *, volatile: bool, trace: Tracing | None = None) -> Projection:
        """Show the interned tree `root` at ``scratch.merged``, writable, and traced if that is asked for.

        Raises MissingCapability for an engine that was asked for and can't,
        MountError, StoreError.
        """
        why = "asked for"
        if trace is not None:
            from casfs.tracing import check_traceable

            why = check_traceable(self._engine)
        elif self._engine in ("auto", "kernel"):
            try:
                why = "the first that can" if self._engine == "auto" else why
                return _Layered(self._store, self.get_layouts(), root, scratch, volatile, why)
            except (MissingCapability, MountError) as error:
                if self._engine == "kernel":
                    raise
                why = f"kernel can't be used: {error}"
                scratch.renew_work()
        passthrough = self._engine != "native"
        if passthrough and (lacking := self._probe_passthrough()):
            if self._engine == "passthrough":
                raise MissingCapability(f"engine passthrough: {lacking}")
            passthrough, why = False, f"{why}; passthrough can't be used: {lacking}"
        from casfs.served import Served

        return Served(self._store, root, scratch, volatile, passthrough, why, trace)

    def get_layouts(self) -> Layouts:
        """Where layers come from. Raises MissingCapability where there can be none."""
        with self._lock:
            if self._no_layers is not None:
                raise self._no_layers
            if self._layouts is None:
                try:
                    self._layouts = Layers(self._store)
                except MissingCapability as error:
                    self._no_layers = error
                    raise
            return self._layouts

    def _probe_passthrough(self) -> str:
        """What passthrough lacks here; empty if nothing. Found out once: it takes a mount in a process of its own."""
        with self._lock:
            if self._no_passthrough is None:
                from casfs.probes import probe_passthrough

                probe = probe_passthrough(self._store.layout.marker)
                self._no_passthrough = "" if probe.ok else f"{probe.detail}; {probe.remedy}"
            return self._no_passthrough

    def close(self) -> None:
        """Let go of the layers."""
        if self._layouts is not None:
            self._layouts.close()


class _Layered:
    """Layers and scratch in one overlay, that nobody serves."""

    engine = "kernel"
    laid_out: int

    def __init__(
        self, store: Store, layouts: Layouts, root: Digest, scratch: Scratch, volatile: bool, why: str
    ) -> None:
        self.why = why
        self._layouts = layouts
        self._before = layouts.upcalls()
        with ExitStack() as parts:
            layout = parts.enter_context(layouts.lay_out(root))
            self.laid_out = layout.fresh_nodes
            here = store.blobs.directory_of(root.function)
            mounted = _stack_writable(layout, here, scratch, volatile)
            try:
                verify(layout.sample, here, mounted)
                attach_mount(mounted, scratch.merged)
            except OSError as error:
                raise MountError(f"can't mount on {scratch.merged}: {error.strerror}") from error
            finally:
                os.close(mounted)
            parts.callback(umount, str(scratch.merged), MNT_DETACH)
            self._parts = parts.pop_all()

    def upcalls(self) -> int:
        """Those for blobs that were missing, for all sandboxes meanwhile that share the layers."""
        return self._layouts.upcalls() - self._before

    def opened(self) -> int | None:
        return None

    def close(self) -> None:
        self._parts.close()


def _stack_writable(layout: Layout, blobs: int, scratch: Scratch, volatile: bool) -> int:
    with opened(scratch.upper, scratch.work) as (upper, work):
        try:
            over = Upper(upper, work, volatile)
            return stack(layout.layers, [blobs, *layout.fetching], layout.family, "casfs-sandbox", over)
        except OSError as error:
            raise unusable(scratch, error) from error
