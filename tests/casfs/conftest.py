"""Real mounts for the tests of `casfs`: made here, and always taken away again.

A store is open only while something is added: the
daemon is a fork of this process, and LMDB must not cross a fork.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casfs import control, mounting, syscalls
from casfs.errors import Busy, CasfsError, MissingCapability, NotMounted
from casfs.fusemount import attach, detach
from casfs.mountinfo import list_mounts
from casfs.session import Opener, Session
from casfs.tree import Tree
from store.digest import Digest, DigestFunction
from store.importing import ScanOptions
from store.layout import Layout, blob_path
from store.repository import Store

ENGINES = ("passthrough", "native", "fuse")


@pytest.fixture(scope="session", autouse=True)
def runtime_directory() -> Iterator[None]:
    """The daemons' sockets lie in a directory of the tests' own."""
    before = os.environ.get("CASFS_RUNTIME_DIR")
    with tempfile.TemporaryDirectory(prefix="casfs-run-") as directory:
        os.environ["CASFS_RUNTIME_DIR"] = directory
        yield
        if before is None:
            del os.environ["CASFS_RUNTIME_DIR"]
        else:
            os.environ["CASFS_RUNTIME_DIR"] = before


def require(engine: str, store_root: Path) -> None:
    """Skip, saying what is lacking, where this machine can't serve an engine."""
    try:
        mounting.choose_engine(engine, store_root)
    except MissingCapability as error:
        pytest.skip(str(error))
    if not os.path.exists("/dev/fuse"):
        pytest.skip("there is no /dev/fuse")


class Mounted:
    """One mount that lives."""

    def __init__(self, path: Path, report: mounting.MountReport) -> None:
        self.path = path
        self.report = report
        self.pid = report.pid
        self.device = os.stat(path).st_dev

    def upcalls(self) -> Counter[str]:
        """The counts so far, without RELEASE and FORGET, which come when the kernel likes."""
        counts = Counter[str](control.statistics(self.path)["upcalls"])
        for opcode in ("RELEASE", "FORGET", "BATCH_FORGET", "INTERRUPT"):
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
            mounting.unmount(self.path)
        except Busy:
            return False
        return True


class Mounts:
    """A store and what is mounted from it; `end` unmounts all, whatever state it is in."""

    def __init__(self, base: Path) -> None:
        self.base = base
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
        require(engine, self.root)
        path = place or self.place()
        if path not in self._places:
            self._places.append(path)
        return Mounted(path, mounting.start(self.root, root, path, engine=engine, name=name))

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
            mounting.unmount(path)
        except CasfsError as error:
            if isinstance(error, NotMounted):
                return
            with contextlib.suppress(CasfsError):
                mounting.unmount(path, lazy=True)


def errno_from(call: Callable[[], object]) -> int:
    """The errno a call fails with; 0 where it succeeds."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def make_writable(path: Path) -> None:
    """What root can do to any mount; then only the daemon stands in the way."""
    syscalls.mount("none", str(path), "", _MS_REMOUNT | syscalls.MS_NOSUID | syscalls.MS_NODEV, "")
    assert not os.statvfs(path).f_flag & os.ST_RDONLY


_MS_REMOUNT = 32


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Wait for something that will come without our doing; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s for {what}")
        time.sleep(0.005)


@pytest.fixture
def mounts() -> Iterator[Mounts]:
    """A store of the test's own."""
    yield from _mounts()


@pytest.fixture(scope="module")
def module_mounts() -> Iterator[Mounts]:
    """A store for all tests of a module."""
    yield from _mounts()


def _mounts() -> Iterator[Mounts]:
    base = Path(tempfile.mkdtemp(prefix="casfs-test-"))
    mounts = Mounts(base)
    try:
        yield mounts
    finally:
        mounts.end()
        shutil.rmtree(base)


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
        self._thread.join(5)
        os.close(self.device)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., InProcess]]:
    """Serve a tree in this process: ``serve(tree, contents, passthrough=…)``."""
    running: list[InProcess] = []

    def start(tree: Tree, contents: Opener, *, passthrough: bool) -> InProcess:
        place = Path(tempfile.mkdtemp(dir=tmp_path, prefix="raw-"))
        running.append(InProcess(place, tree, contents, passthrough=passthrough))
        return running[-1]

    try:
        yield start
    finally:
        for session in reversed(running):
            session.close()
