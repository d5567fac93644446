"""Mounting a tree: checks, the choice of an engine, the daemon, and unmounting.

`start` returns once the mount is usable. Engine kernel needs no process behind
it unless blobs are missing. Else there is a daemon, a fork of the caller
(`casfs.daemon`); it opens the store itself (an LMDB environment must not cross
a fork), holds a lease on the tree as long as it lives, and ends when it is
unmounted. SIGTERM, SIGINT and SIGHUP make it unmount.
"""

from __future__ import annotations

import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from casfs.changes import NOT_STEERABLE, decode_changes
from casfs.contents import Contents, PlainGateway, ReadOnlyGateway
from casfs.control import ControlServer, remove_stale_socket
from casfs.daemon import logging_to, run_daemon
from casfs.errors import BadChange, MissingCapability
from casfs.fusemount import attach
from casfs.mountpoint import check_mountpoint, find_own, unmounting_on_failure, unmounting_on_signals, wait_unmounted
from casfs.overlay import Upper
from casfs.session_making import make_session
from casfs.steering import Steerable, Steering, not_collecting
from casfs.syscalls import has_admin_capability
from casfs.tree import ProjectedTree
from casfs.writable import cover, opened_upper
from store.digest import Digest
from store.errors import MissingBlob
from store.kernel import raise_open_files
from store.layout import Layout
from store.leases import mount_source
from store.repository import SourceOptions, Store
from store.trees import get_directory

if TYPE_CHECKING:
    from casfs.tracing import Tracer

log = logging.getLogger("casfs")

ENGINES = ("auto", "kernel", "passthrough", "fuse", "native")
"""What can be asked for. `native` is the native session without passthrough: reads go through the daemon."""


@dataclass(frozen=True, slots=True)
class MountReport:
    """How a mount came to be. `missing` counts blobs that are not in the store; `pid` is the daemon's, if any."""

    engine: str
    why: str
    missing: int
    pid: int | None


class _Serving(Steerable, Protocol):
    """What the daemon needs of a session."""

    @property
    def engine(self) -> str: ...
    def begin(self) -> None: ...
    def run(self) -> None: ...
    def statistics(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Request:
    """What to mount where. `root` is interned; `name` is its manifest, for the count of what is missing.

    What is missing is fetched from the store's cold tier or `sources` when it
    is opened. With `writable` the mount can be written: what is written goes to
    that scratch directory, and is not synced to the disk while `volatile`.
    `trace` is the file (an absolute path) that gets to know who uses what.
    """

    store_root: Path
    root: Digest
    place: Path
    name: str | None = None
    sources: SourceOptions | None = None
    writable: Path | None = None
    volatile: bool = True
    trace: Path | None = None

    @contextmanager
    def upper(self) -> Iterator[Upper | None]:
        """Its upper layer, if it shall have one. Raises MissingCapability, MountError."""
        if self.writable is None:
            yield None
            return
        with opened_upper(self.writable, volatile=self.volatile) as upper:
            yield upper

    @contextmanager
    def tracer(self, engine: str) -> Iterator[Tracer | None]:
        """Who writes its trace, if there shall be one. Raises AlreadyExists, BadInput."""
        if self.trace is None:
            yield None
            return
        from casfs.tracing import Tracer

        with closing(Tracer(self.trace, self.root, engine)) as tracer:
            yield tracer


def start(
    request: Request,
    *,
    engine: str = "auto",
    foreground: bool = False,
    ready: Callable[[MountReport], None] = lambda report: None,
) -> MountReport:
    """Mount a tree.

    Returns when the mount is usable; in the foreground, when it has ended
    (`ready` is told when it is usable), but where nobody is needed behind it.
    The caller must have no store open.
    Raises BadMountPoint, MissingCapability, MountError, StoreError.
    """
    request = replace(request, place=check_mountpoint(request.place))
    why = "asked for"
    if request.trace is not None:
        from casfs.tracing import check_traceable

        why = check_traceable(engine)
    elif engine in ("auto", "kernel"):
        try:
            return _start_kernel(request, engine, foreground, ready)
        except MissingCapability as error:
            if engine == "kernel":
                raise
            why = f"kernel can't be used: {error}"
    chosen, why = choose_engine(engine, request.store_root, why)
    return _start_serving(lambda tell: _serve(request, chosen, why, tell), foreground, ready)


def _start_serving(
    serve: Callable[[Callable[[MountReport], None]], MountReport],
    foreground: bool,
    ready: Callable[[MountReport], None],
) -> MountReport:
    if foreground:
        return serve(ready)
    report = MountReport(**run_daemon(lambda tell: serve(lambda report: tell(asdict(report)))))
    ready(report)
    return report


def _start_kernel(request: Request, engine: str, foreground: bool, ready: Callable[[MountReport], None]) -> MountReport:
    """With engine kernel; with a daemon only where blobs are missing."""
    from casfs.kernel_engine import check_quick, mount_tree

    why = "asked for" if engine == "kernel" else "it can, and nothing costs an upcall"
    if not has_admin_capability():
        raise MissingCapability(
            "engine kernel needs root (CAP_SYS_ADMIN) for a mount that others see; use --engine fuse, or 'casfs run'"
        )
    with Store.open(request.store_root, create=False) as store, request.upper() as upper:
        if engine == "auto":
            check_quick(store, request.root)
        # From before it is mounted, as whoever sees the mount may send a signal.
        with unmounting_on_signals(request.place) as ending:
            try:
                mount_tree(store, request.root, request.place, upper=upper)
            except MissingBlob as error:
                why = f"{why}; {error}"
            else:
                report = MountReport("kernel", why, missing=0, pid=os.getpid() if foreground else None)
                with unmounting_on_failure(request.place):
                    remove_stale_socket(find_own(request.place))
                    ready(report)
                ending.allow()
                if foreground:
                    with ending.insisted():
                        wait_unmounted(request.place)
                return report
    return _start_serving(lambda tell: _serve_missing(request, why, tell), foreground, ready)


def _serve_missing(request: Request, why: str, ready: Callable[[MountReport], None]) -> MountReport:
    """The life of the daemon behind a mount of engine kernel: it fetches what is missing."""
    from casfs.blob_mount import BlobMount
    from casfs.kernel_engine import mount_tree

    path = request.place
    with Store.open(request.store_root, create=False, sources=request.sources) as store, logging_to(store.layout.log):
        fetching = BlobMount(store, request.root.function)
        with unmounting_on_signals(path) as ending:
            with request.upper() as upper:
                mount_tree(store, request.root, path, fetching=fetching, upper=upper)
            missing = store.manifests.count_missing(request.root, request.name)
            with unmounting_on_failure(path):
                control = _make_control(path, fetching.statistics, why, request.root, missing, store)
            report = MountReport("kernel", why, missing, os.getpid())
            try:
                with unmounting_on_failure(path):
                    ready(report)
                ending.allow()
                with ending.insisted():
                    fetching.wait()
            finally:
                control.close()
                log.info("unmounted %s", path)
    return report


def choose_engine(wanted: str, store_root: Path, reason: str = "asked for") -> tuple[str, str]:
    """The engine with a session to use for blobs of that store and why, having tried what it needs.

    `reason` begins what is said. Raises MissingCapability.
    """
    from casfs.probes import probe_passthrough, probe_pyfuse3

    if wanted not in ENGINES:
        raise MissingCapability(f"there is no engine {wanted!r}: choose one of {', '.join(ENGINES)}")
    if wanted == "native":
        return wanted, reason
    if wanted != "fuse":
        passthrough = probe_passthrough(Layout(store_root).marker)
        if passthrough.ok:
            return "passthrough", passthrough.detail if wanted == "passthrough" else f"{reason}; {passthrough.detail}"
        if wanted == "passthrough":
            raise MissingCapability(f"engine passthrough: {passthrough.detail}; {passthrough.remedy}")
        reason = f"{reason}; passthrough can't be used: {passthrough.detail}"
    pyfuse3 = probe_pyfuse3()
    if pyfuse3.ok:
        return "fuse", reason
    if wanted == "fuse":
        raise MissingCapability(f"engine fuse: {pyfuse3.detail}; {pyfuse3.remedy}")
    return "native", f"{reason}; and {pyfuse3.detail}"


def _serve(request: Request, engine: str, why: str, ready: Callable[[MountReport], None]) -> MountReport:
    """The life of a daemon with a session, in whichever process."""
    path, root = request.place, request.root
    with Store.open(request.store_root, create=False, sources=request.sources) as store, logging_to(store.layout.log):
        with (
            store.leases.acquire("mount", [root], str(path)) as lease,
            request.upper() as upper,
            request.tracer(engine) as tracer,
        ):
            # After the lease: from here on no collection takes anything of the tree.
            with store.index.view() as view:
                directory = get_directory(view, root)
            missing = store.manifests.count_missing(root, request.name)
            # A session that serves reads has one for each open file.
            raise_open_files()
            tree = ProjectedTree(store.index, directory)
            session, contents = _make_session(store, tree, path, engine, tracer)
            report = MountReport(session.engine, why, missing, os.getpid())
            with ExitStack() as ending:
                ending.callback(log.info, "unmounted %s", path)
                ending.callback(contents.close)
                steering = Steering(store, tree, session, str(path)) if upper is None else None
                if steering is not None:
                    ending.callback(steering.close)

                def show() -> None:
                    """Once the session answers: the mount is as it shall be."""
                    if upper is not None:
                        cover(path, upper, mount_source(lease.info))
                    control = _make_control(path, session.statistics, why, root, missing, store, steering)
                    ending.callback(control.close)
                    ready(report)  # fails when whoever asked for the mount was killed meanwhile

                with unmounting_on_signals(path) as by_signal:
                    by_signal.allow()
                    with unmounting_on_failure(path):
                        session.begin()
                        if upper is None:
                            show()
                    # The loop that pyfuse3 runs in sees signals, and has the place of what would insist on them.
                    with nullcontext() if engine == "fuse" else by_signal.insisted():
                        if upper is None:
                            session.run()
                        else:
                            _run_and(session, path, show)
    return report


def _run_and(session: _Serving, path: Path, work: Callable[[], None]) -> None:
    """Serve, and meanwhile do what needs that somebody serves; raises what that raises."""
    failures: list[BaseException] = []

    def attempt() -> None:
        try:
            with unmounting_on_failure(path):
                work()
        except BaseException as error:  # noqa: BLE001 - raised below, when the session has ended
            failures.append(error)

    thread = threading.Thread(target=attempt, name="cover", daemon=True)
    thread.start()
    session.run()
    thread.join()
    if failures:
        raise failures[0]


def _make_session(
    store: Store, tree: ProjectedTree, path: Path, engine: str, tracer: Tracer | None
) -> tuple[_Serving, Contents]:
    if engine == "fuse":
        from casfs.session_pyfuse3 import Pyfuse3Session

        contents = Contents(store.blobs, PlainGateway(store.blobs), store.hydrator)
        return Pyfuse3Session(path, tree, contents, tracer), contents
    passthrough = engine == "passthrough"
    # Before the mount is attached: copies of mounts made afterwards could contain it and keep it alive.
    gateway = ReadOnlyGateway(store.layout) if passthrough else PlainGateway(store.blobs)
    contents = Contents(store.blobs, gateway, store.hydrator)
    return make_session(attach(path), tree, contents, passthrough, tracer), contents


def _make_control(
    path: Path,
    statistics: Callable[[], dict[str, Any]],
    why: str,
    root: Digest,
    missing: int,
    store: Store,
    steering: Steering | None = None,
) -> ControlServer:
    mounted = find_own(path)
    began = time.time()

    def describe(_: dict[str, Any]) -> dict[str, Any]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            **statistics(),
            "hydration": store.hydrator.statistics(),
            "why": why,
            "root": str(root),
            "missing": missing,
            "pid": os.getpid(),
            "seconds": round(time.time() - began, 3),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
            "peak_memory_bytes": usage.ru_maxrss * 1024,
        }

    def remap(request: dict[str, Any]) -> int:
        if steering is None:
            raise BadChange(NOT_STEERABLE)
        with not_collecting():
            return steering.remap(decode_changes(request["changes"]))

    return ControlServer(mounted, {"statistics": describe, "remap": remap})
