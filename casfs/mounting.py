"""Mounting a tree: checks, the choice of an engine, the daemon, and unmounting.

`start` returns once the mount is usable. The daemon is a fork of the caller
that has let go of its terminal; it opens the store itself (an LMDB environment
must not cross a fork), holds a lease on the tree as long as it lives, and ends
when it is unmounted. SIGTERM, SIGINT and SIGHUP make it unmount.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import logging.handlers
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from casfs import errors as casfs_errors
from casfs.contents import Contents, PlainGateway, ReadOnlyGateway
from casfs.control import ControlServer
from casfs.errors import BadMountPoint, CasfsError, MissingCapability, MountError
from casfs.fusemount import attach, detach
from casfs.mountinfo import find_mount, resolve_mountpoint
from casfs.session import Session
from casfs.syscalls import has_admin_capability
from casfs.tree import ProjectedTree
from store import errors as store_errors
from store.digest import Digest
from store.errors import StoreError
from store.layout import Layout
from store.repository import SourceOptions, Store
from store.trees import find_directory

log = logging.getLogger("casfs")

ENGINES = ("auto", "kernel", "passthrough", "fuse", "native")
"""What can be asked for. `native` is the native session without passthrough: reads go through the daemon."""

_GRACE_SECONDS = 3.0
"""How long a daemon that was told to end goes on serving files that are still open."""


@dataclass(frozen=True, slots=True)
class MountReport:
    """How a mount came to be. `missing` counts blobs that are not in the store; `pid` is the daemon's, if any."""

    engine: str
    why: str
    missing: int
    pid: int | None


class _Serving(Protocol):
    """What the daemon needs of a session."""

    @property
    def engine(self) -> str: ...
    def begin(self) -> None: ...
    def run(self) -> None: ...
    def statistics(self) -> dict[str, Any]: ...


def check_mountpoint(mountpoint: Path) -> Path:
    """The resolved place for a new mount; what a dead daemon left mounted there is cleared away.

    Raises BadMountPoint.
    """
    path = resolve_mountpoint(mountpoint)
    mounted = find_mount(str(path))
    if mounted is not None and mounted.is_casfs:
        if _is_alive(path):
            raise BadMountPoint(f"{mountpoint} has a casfs mount already; 'casfs umount {mountpoint}' ends it")
        detach(path, lazy=True)
    elif mounted is not None:
        raise BadMountPoint(f"{mountpoint} is a mount point of {mounted.kind} already")
    try:
        if os.listdir(path):
            raise BadMountPoint(f"{mountpoint} is not empty: what is in it would be hidden")
    except FileNotFoundError:
        raise BadMountPoint(f"{mountpoint} does not exist; make it first (mkdir {mountpoint})") from None
    except NotADirectoryError:
        raise BadMountPoint(f"{mountpoint} is not a directory") from None
    except OSError as error:
        raise BadMountPoint(f"can't look into {mountpoint}: {error.strerror}") from error
    if not os.access(path, os.W_OK) and not has_admin_capability():
        raise BadMountPoint(f"{mountpoint} can't be written by this user: without root, mount on a directory of yours")
    return path


def _is_alive(path: Path) -> bool:
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno not in (errno.ENOTCONN, errno.ECONNABORTED)
    return True


def start(
    store_root: Path,
    root: Digest,
    mountpoint: Path,
    *,
    engine: str = "auto",
    name: str | None = None,
    foreground: bool = False,
    sources: SourceOptions | None = None,
    ready: Callable[[MountReport], None] = lambda report: None,
) -> MountReport:
    """Mount the interned tree `root`; `name` is its manifest, for the count of what is missing.

    What is missing is fetched from the store's cold tier or `sources` when it is opened.

    Returns when the mount is usable; in the foreground, when it has ended
    (`ready` is told when it is usable), but for engine kernel, which needs
    nobody. The caller must have no store open.
    Raises BadMountPoint, MissingCapability, MountError, StoreError.
    """
    path = check_mountpoint(mountpoint)
    chosen, why = choose_engine(engine, store_root)
    if chosen == "kernel":
        report = _mount_in_kernel(store_root, root, path, why)
        ready(report)
        return report
    if foreground:
        return _serve(store_root, root, path, chosen, why, name, sources, ready)
    report = _fork_daemon(lambda tell: _serve(store_root, root, path, chosen, why, name, sources, tell))
    ready(report)
    return report


def _mount_in_kernel(store_root: Path, root: Digest, path: Path, why: str) -> MountReport:
    from casfs.kernel_engine import mount_tree

    with Store.open(store_root, create=False) as store:
        mount_tree(store, root, path)
    return MountReport("kernel", why, missing=0, pid=None)


def choose_engine(wanted: str, store_root: Path) -> tuple[str, str]:
    """The engine to use for blobs of that store and why, having tried what it needs. Raises MissingCapability."""
    from casfs.probes import probe_passthrough, probe_pyfuse3

    if wanted not in ENGINES:
        raise MissingCapability(f"there is no engine {wanted!r}: choose one of {', '.join(ENGINES)}")
    if wanted in ("kernel", "native"):
        return wanted, "asked for"
    reason = "asked for"
    if wanted != "fuse":
        passthrough = probe_passthrough(Layout(store_root).marker)
        if passthrough.ok:
            return "passthrough", passthrough.detail
        if wanted == "passthrough":
            raise MissingCapability(f"engine passthrough: {passthrough.detail}; {passthrough.remedy}")
        reason = f"passthrough can't be used: {passthrough.detail}"
    pyfuse3 = probe_pyfuse3()
    if pyfuse3.ok:
        return "fuse", reason
    if wanted == "fuse":
        raise MissingCapability(f"engine fuse: {pyfuse3.detail}; {pyfuse3.remedy}")
    return "native", f"{reason}; and {pyfuse3.detail}"


def _serve(
    store_root: Path,
    root: Digest,
    path: Path,
    engine: str,
    why: str,
    name: str | None,
    sources: SourceOptions | None,
    ready: Callable[[MountReport], None],
) -> MountReport:
    """The daemon's life, in whichever process."""
    with Store.open(store_root, create=False, sources=sources) as store, _logging_to(store.layout.log):
        with store.leases.acquire("mount", [root], str(path)):
            # After the lease: from here on no collection takes anything of the tree.
            with store.index.view() as view:
                directory = find_directory(view, root)
            if directory is None:
                raise MountError(f"directory {root} is not in the index any more")
            missing = store.manifests.count_missing(root, name)
            _raise_descriptor_limit()
            session, contents = _make_session(store, ProjectedTree(store.index, directory), path, engine)
            with _unmounting_on_failure(path):
                session.begin()
                control = _make_control(path, session, why, root, missing, store)
            report = MountReport(session.engine, why, missing, os.getpid())
            try:
                with _unmounting_on_signals(path):
                    with _unmounting_on_failure(path):
                        ready(report)  # fails when whoever asked for the mount was killed meanwhile
                    session.run()
            finally:
                control.close()
                contents.close()
                log.info("unmounted %s", path)
    return report


def _make_session(store: Store, tree: ProjectedTree, path: Path, engine: str) -> tuple[_Serving, Contents]:
    if engine == "fuse":
        from casfs.session_pyfuse3 import Pyfuse3Session

        contents = Contents(store.blobs, PlainGateway(store.blobs), store.hydrator)
        return Pyfuse3Session(path, tree, contents), contents
    passthrough = engine == "passthrough"
    # Before the mount is attached: copies of mounts made afterwards could contain it and keep it alive.
    gateway = ReadOnlyGateway(store.layout) if passthrough else PlainGateway(store.blobs)
    contents = Contents(store.blobs, gateway, store.hydrator)
    return Session(attach(path), tree, contents, passthrough=passthrough, fetch=contents.fetch), contents


def _make_control(path: Path, session: _Serving, why: str, root: Digest, missing: int, store: Store) -> ControlServer:
    mounted = find_mount(str(path))
    if mounted is None:
        raise MountError(f"{path} was unmounted at once")
    began = time.time()

    def describe(_: dict[str, Any]) -> dict[str, Any]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            **session.statistics(),
            "hydration": store.hydrator.statistics(),
            "why": why,
            "root": str(root),
            "missing": missing,
            "pid": os.getpid(),
            "seconds": round(time.time() - began, 3),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
            "peak_memory_bytes": usage.ru_maxrss * 1024,
        }

    return ControlServer(mounted, {"statistics": describe})


@contextmanager
def _unmounting_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(CasfsError):
            detach(path, lazy=True)
        raise


@contextmanager
def _unmounting_on_signals(path: Path) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP take the mount away; the session then ends by itself, or after a grace period."""

    def end(number: int, _: Any) -> None:
        with suppress(CasfsError):
            detach(path, lazy=True)
        # Files still open would keep the connection, and this process, alive: not for ever.
        signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, _GRACE_SECONDS)

    def give_up(number: int, _: Any) -> None:
        raise SystemExit(0)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Log lines go to the store's log; each is one write, so daemons share the file, and it may be rotated."""
    handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def _raise_descriptor_limit() -> None:
    """A session that serves reads has a descriptor per open file; the default limit is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _fork_daemon(serve: Callable[[Callable[[MountReport], None]], object]) -> MountReport:
    """Run `serve` in a daemon; returns what it reports when ready, or raises what it raised before."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            os._exit(_daemon(serve, writing))
        finally:
            # Not up the stack of what was forked: that is the caller's to unwind.
            os._exit(1)
    os.close(writing)
    with open(reading, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise MountError("the daemon ended before the mount was usable; the store's casfs.log may say why")
    message = json.loads(text)
    if "error" in message:
        raise _revive(message["error"], message["text"])
    return MountReport(**message["report"])


def _daemon(serve: Callable[[Callable[[MountReport], None]], object], writing: int) -> int:
    """In the first child: become a daemon. Only the grandchild does something; returns an exit code."""
    os.setsid()
    if os.fork():
        return 0
    os.chdir("/")
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)

    def tell(message: dict[str, Any]) -> None:
        nonlocal writing
        if writing >= 0:
            os.write(writing, json.dumps(message).encode())
            os.close(writing)
            writing = -1

    # What came through the fork stays as it is: a collection that looked at it would copy all its pages.
    gc.freeze()
    try:
        serve(lambda report: tell({"report": asdict(report)}))
    except (CasfsError, StoreError) as error:
        tell({"error": type(error).__name__, "text": str(error)})
        return 1
    except SystemExit:
        return 0
    except BaseException as error:
        tell({"error": "MountError", "text": f"the daemon failed: {error!r}"})
        log.exception("the daemon failed")
        return 1
    return 0


def _revive(kind: str, text: str) -> Exception:
    """The error of a daemon, as an exception of the same class here."""
    found = getattr(casfs_errors, kind, None) or getattr(store_errors, kind, None)
    if isinstance(found, type) and issubclass(found, CasfsError | StoreError):
        return found(text)
    return MountError(text)


def unmount(mountpoint: Path, *, lazy: bool = False, wait: float = 5.0) -> None:
    """Unmount, and wait (seconds) for the daemon to have let go of the store.

    Works on a mount whose daemon was killed, too. Raises NotMounted, Busy.
    """
    from casfs.control import call

    path = resolve_mountpoint(mountpoint)
    pid = 0
    with suppress(CasfsError):
        pid = int(call(path, "statistics")["pid"])
    detach(path, lazy=lazy)
    deadline = time.monotonic() + wait
    while pid and not lazy and time.monotonic() < deadline and _is_running(pid):
        time.sleep(0.002)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False
