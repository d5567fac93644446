"""Real mounts for the tests of `casfs`: made here, and always taken away again.

A store is open only while something is added: the daemon is a fork of this
process, and LMDB must not cross a fork. What is left behind all the same is
found by the hygiene of tests/conftest.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from casfs import control, mounting, mountpoint, syscalls
from casfs.errors import Busy, CasfsError, MissingCapability, NotMounted
from casfs.fusemount import attach, detach
from casfs.mountinfo import list_mounts
from casfs.session import Opener, Session
from casfs.tree import Tree
from casfs.wire import Opcode
from store.blobs import pack_row, unpack_row
from store.digest import Digest, DigestFunction
from store.entries import FileEntry
from store.importing import ScanOptions
from store.index import Change, Table
from store.layout import Layout, blob_path
from store.repository import Store
from store.treebuilder import TreeBuilder
from tests.conftest import FORGETS, Requirements

SERVED_ENGINES = ("passthrough", "native", "fuse")
"""Those with a daemon, which can be asked, stopped and killed."""
ENGINES = ("kernel", *SERVED_ENGINES)


class Mounted:
    """One mount that lives."""

    def __init__(self, path: Path, report: mounting.MountReport) -> None:
        self.path = path
        self.report = report
        self.device = os.stat(path).st_dev

    @property
    def pid(self) -> int:
        """The daemon's."""
        assert self.report.pid is not None, "this engine has no daemon"
        return self.report.pid

    def upcalls(self) -> Counter[str]:
        """The counts so far, without RELEASE, RELEASEDIR and FORGET, which come when the kernel likes."""
        counts = Counter[str](control.statistics(self.path)["upcalls"])
        for opcode in ("RELEASE", "RELEASEDIR", "INTERRUPT", *FORGETS):
            counts.pop(opcode, None)
        return +counts

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """Filled at the end with the upcalls made meanwhile."""
        spent = Counter[str]()
        before = self.upcalls()
        yield spent
        spent.update(self.upcalls() - before)

    def unmount(self) -> None:
        """Unmount; files may have been closed just now, so a busy mount gets a moment."""
        wait_until(self._try_unmount, "the mount to be free")

    def _try_unmount(self) -> bool:
        try:
            daemon = mountpoint.unmount(self.path)
        except Busy:
            return False
        # Another test's namespace can have a copy of the mount for a moment, and the daemon has its leases meanwhile.
        if daemon is not None:
            wait_until(lambda: not mountpoint.is_running(daemon), "the daemon to end")
        return True


class Mounts:
    """A store and what is mounted from it; `end` unmounts all, whatever state it is in."""

    def __init__(self, base: Path, requires: Requirements) -> None:
        self.base = base
        self.requires = requires
        self.root = base / "store"
        self.layout = Layout(self.root)
        self._places: list[Path] = []

    def add(self, tree: Path, options: ScanOptions | None = None, name: str | None = None) -> Digest:
        """The root of a directory of the host, now in the store (and named)."""
        with Store.open(self.root) as store:
            root = store.importer.from_directories([(b"", tree)], options or ScanOptions()).digest
            if name:
                store.manifests.put(name, root, "a test", replace=True)
            return root

    def add_files(self, files: dict[str, bytes], options: ScanOptions | None = None) -> Digest:
        """The root of a tree with these files."""
        with tempfile.TemporaryDirectory(dir=self.base, prefix="source-") as source:
            for path, content in files.items():
                place = Path(source, path)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
            return self.add(Path(source), options)

    def add_empty_files(self, paths: Iterable[str]) -> Digest:
        """The root of a tree with very many files, none of which was ever on disk; in order of path."""
        with Store.open(self.root) as store, store.ingest() as ingest:
            builder = TreeBuilder(store.index, ingest, DigestFunction.BLAKE3)
            empty = ingest.add_bytes(b"", DigestFunction.BLAKE3)
            items = [
                (os.fsencode(path), FileEntry(os.path.basename(os.fsencode(path)), empty, False)) for path in paths
            ]
            return builder.finish(builder.add_paths(items)).digest

    def blob(self, content: bytes) -> Path:
        """Where the blob of these bytes lies."""
        return self.layout.blobs / blob_path(DigestFunction.BLAKE3.of(content))

    def place(self) -> Path:
        """An empty directory to mount on, cleared at the end."""
        path = Path(tempfile.mkdtemp(dir=self.base, prefix="mount-"))
        self._places.append(path)
        return path

    def mount(self, root: Digest, engine: str, place: Path | None = None, name: str | None = None) -> Mounted:
        """A new mount of that tree."""
        self.require(engine)
        path = place or self.place()
        if path not in self._places:
            self._places.append(path)
        return Mounted(path, mounting.start(mounting.Request(self.root, root, path, name), engine=engine))

    def require(self, engine: str) -> None:
        """End the test, saying what is lacking, where this machine can't serve an engine."""
        self.requires.fuse()
        if engine == "kernel":
            self.requires.admin()
            return
        try:
            mounting.choose_engine(engine, self.root)
        except MissingCapability as error:
            self.requires.lacking(str(error))

    def leases(self) -> int:
        """How many leases live."""
        with Store.open(self.root) as store:
            return len(store.leases.living())

    def age(self) -> None:
        """Everything was used a day ago: nothing but a lease or a manifest keeps it from collection."""
        day_ago = int(time.time()) - 86_400

        def work(change: Change) -> None:
            for key, value in list(change.scan(Table.BLOBS)):
                change.put(Table.BLOBS, key, pack_row(unpack_row(value)._replace(used=day_ago)))

        with Store.open(self.root) as store:
            store.index.update(work)
            for _, _, entry in store.blobs.files():
                os.utime(entry.path, (day_ago, day_ago))

    def log(self) -> str:
        """What the daemons wrote to the store's log."""
        return self.layout.log.read_text() if self.layout.log.exists() else ""

    def end(self) -> None:
        """Unmount everything and wait for the daemons."""
        for path in reversed(self._places):
            clear(path)


def clear(path: Path) -> None:
    """Unmount whatever is at a place, over and over, lazily if it must be."""
    while any(mount.path == os.fsencode(path) for mount in list_mounts()):
        try:
            mountpoint.unmount(path)
        except CasfsError as error:
            if isinstance(error, NotMounted):
                return
            with contextlib.suppress(CasfsError):
                mountpoint.unmount(path, lazy=True)


def errno_from(call: Callable[[], object]) -> int:
    """The errno a call fails with; 0 where it succeeds."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def make_writable(path: Path) -> None:
    """What root can do to any mount; then only the daemon stands in the way."""
    try:
        syscalls.mount("none", str(path), "", _MS_REMOUNT | syscalls.MS_NOSUID | syscalls.MS_NODEV, "")
    except OSError:
        # An overlay without an upper layer can't be made writable by anybody.
        if control.statistics(path)["engine"] != "kernel":
            raise
    else:
        assert not os.statvfs(path).f_flag & os.ST_RDONLY


_MS_REMOUNT = 32


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Wait for something that will come without our doing; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s for {what}")
        time.sleep(0.005)


@pytest.fixture
def mounts(tmp_path_factory: pytest.TempPathFactory, requires: Requirements) -> Iterator[Mounts]:
    """A store of the test's own."""
    yield from _mounts(tmp_path_factory, requires)


@pytest.fixture(scope="module")
def module_mounts(tmp_path_factory: pytest.TempPathFactory, requires: Requirements) -> Iterator[Mounts]:
    """A store for all tests of a module."""
    yield from _mounts(tmp_path_factory, requires)


def _mounts(factory: pytest.TempPathFactory, requires: Requirements) -> Iterator[Mounts]:
    base = factory.mktemp("casfs")
    mounts = Mounts(base, requires)
    try:
        yield mounts
    finally:
        mounts.end()
        # A daemon whose mount another one covered may still be writing its last line.
        wait_until(lambda: _is_removed(base), "the directory to be let go")


def _is_removed(base: Path) -> bool:
    try:
        shutil.rmtree(base)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
    return not base.exists()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine that shows a tree."""
    return str(request.param)


@pytest.fixture(scope="module", params=ENGINES)
def module_engine(request: pytest.FixtureRequest) -> str:
    """Each engine, for mounts that a module's tests share."""
    return str(request.param)


class InProcess:
    """A native session in a thread of this process, so that a test can look into it.

    A test must not touch a page of a mapping that the session has to read by
    itself: the page fault would hold the interpreter's lock.
    """

    def __init__(self, place: Path, tree: Tree, contents: Opener, *, passthrough: bool) -> None:
        self.path = place
        self.device = attach(place)
        self.session = Session(self.device, tree, contents, passthrough=passthrough)
        self.session.begin()
        self._thread = threading.Thread(target=self.session.run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Unmount and end the session."""
        with contextlib.suppress(CasfsError):
            detach(self.path, lazy=True)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the session goes on after its mount is gone"
        os.close(self.device)


@pytest.fixture
def serve(tmp_path: Path, requires: Requirements) -> Iterator[Callable[..., InProcess]]:
    """Serve a tree in this process: ``serve(tree, contents, passthrough=…)``."""
    requires.fuse()
    running: list[InProcess] = []

    def start(tree: Tree, contents: Opener, *, passthrough: bool) -> InProcess:
        if passthrough:
            requires.admin()
        place = Path(tempfile.mkdtemp(dir=tmp_path, prefix="raw-"))
        running.append(InProcess(place, tree, contents, passthrough=passthrough))
        return running[-1]

    try:
        yield start
    finally:
        for session in reversed(running):
            session.close()


class FakeKernel:
    """The other end of a session's connection: requests go in as messages, replies come back; nothing is mounted."""

    def __init__(self, tree: Tree, contents: Opener) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(10)
        self._device = theirs.detach()
        self.session = Session(self._device, tree, contents, passthrough=False)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._unique = 0
        self.failure: CasfsError | None = None

    def _serve(self) -> None:
        try:
            self.session.begin()
            self.session.run()
        except CasfsError as error:
            self.failure = error

    def begin(self, major: int = 7, minor: int = 41, flags: int = 0xFFFF_FFFF, body: bytes | None = None) -> bytes:
        """Send INIT; returns the reply."""
        self._thread.start()
        if body is None:
            body = struct.pack("<IIIII44x", major, minor, 1 << 17, flags, 0xFF)
        return self.ask(Opcode.INIT, 0, body)

    def message(self, opcode: int, node: int, body: bytes) -> bytes:
        """A request with a good header and a number of its own."""
        self._unique += 2
        return struct.pack("<IIQQIIIHH", 40 + len(body), opcode, self._unique, node, 0, 0, 1, 0, 0) + body

    def send(self, message: bytes) -> None:
        """A message as it is, good or bad."""
        self._socket.send(message)

    def receive(self) -> bytes:
        """The next reply."""
        return self._socket.recv(1 << 21)

    def ask(self, opcode: int, node: int, body: bytes = b"") -> bytes:
        """The reply to a request, checked to be one: its length and whose it is."""
        self.send(self.message(opcode, node, body))
        reply = self.receive()
        length, error, unique = struct.unpack_from("<IiQ", reply)
        assert length == len(reply)
        assert unique == self._unique
        assert -4096 < error <= 0
        assert not error or length == 16
        return reply

    def errno_of(self, opcode: int, node: int, body: bytes = b"") -> int:
        """The errno a request is answered with; 0 for success."""
        return -int(struct.unpack_from("<i", self.ask(opcode, node, body), 4)[0])

    def close(self) -> None:
        """The connection ends, and so must the session."""
        self._socket.close()
        if self._thread.is_alive():
            self._thread.join(30)
        assert not self._thread.is_alive(), "the session goes on without a connection"
        os.close(self._device)


@pytest.fixture
def fake_kernel() -> Iterator[Callable[[Tree, Opener], FakeKernel]]:
    """Make a session that a test drives by hand: ``fake_kernel(tree, contents)``."""
    made: list[FakeKernel] = []

    def make(tree: Tree, contents: Opener) -> FakeKernel:
        made.append(FakeKernel(tree, contents))
        return made[-1]

    yield make
    for kernel in made:
        kernel.close()
