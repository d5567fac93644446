"""Whether this machine can do what an engine needs, found out by doing it.

A probe leaves nothing behind: mounts are made in a private mount namespace of
a child process, which ends with it.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from casfs.errors import CasfsError
from casfs.fusemount import DEVICE, attach
from casfs.session import Session
from casfs.syscalls import CLONE_NEWNS, MS_PRIVATE, MS_REC, clone_read_only, mount, unshare
from casfs.tree import FIXED_MTIME_NS, ROOT, Node, NodeId
from store.digest import Digest, DigestFunction
from store.entries import FileEntry, ReferenceEntry


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of trying: `detail` says what was found, `remedy` what would help."""

    ok: bool
    detail: str
    remedy: str = ""


class _OneFile:
    """A tree with one file, ``probe``, of so many bytes. Implements `casfs.tree.Tree`."""

    def __init__(self, size: int) -> None:
        self._root = Node(ROOT, stat.S_IFDIR | 0o555, 0, FIXED_MTIME_NS, 2, None, 1, 2)
        entry = FileEntry(b"probe", Digest(DigestFunction.SHA256, bytes(32), size), False)
        self._file = Node(NodeId(2), stat.S_IFREG | 0o444, size, FIXED_MTIME_NS, 1, entry)

    def get_node(self, node_id: NodeId) -> Node:
        return self._root if node_id == ROOT else self._file

    def lookup(self, parent: NodeId, name: bytes) -> Node | None:
        return self._file if name == b"probe" else None

    def list_directory(self, node_id: NodeId, cookie: int) -> Iterator[tuple[int, bytes, Node]]:
        return iter(())

    def path_of(self, node_id: NodeId) -> bytes:
        return b"probe"

    def parent_of(self, node_id: NodeId) -> NodeId:
        return ROOT

    def totals(self) -> tuple[int, int]:
        return 2, self._file.size


class _OneContent:
    """The probe's file, opened through a read-only copy of its mount. Implements `casfs.session.Opener`."""

    def __init__(self, path: Path) -> None:
        self._directory = clone_read_only(str(path.parent))
        self._name = path.name

    def open_now(self, entry: FileEntry | ReferenceEntry) -> int | None:
        return self.open(entry)

    def open(self, entry: FileEntry | ReferenceEntry) -> int:
        return os.open(self._name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)


def probe_passthrough(file: Path) -> Probe:
    """Mount, register `file`, read it through the mount, and see that no READ came.

    The file shall lie where the blobs do: whether the kernel passes through
    depends on that file system too.
    """
    if os.geteuid() != 0:
        return Probe(
            False,
            "FUSE passthrough needs CAP_SYS_ADMIN, and this user is not root",
            "mount as root, or use --engine fuse",
        )
    if not os.path.exists(DEVICE):
        return Probe(False, f"there is no {DEVICE}", "load the fuse module: modprobe fuse")
    return _in_child(lambda: _try_passthrough(file))


def _try_passthrough(file: Path) -> Probe:
    expected = file.read_bytes()
    contents = _OneContent(file)
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE, "")
    # Over the directory the file is in: nothing has to be made, and nobody else sees it.
    session = Session(attach(file.parent), _OneFile(len(expected)), contents, passthrough=True)
    session.begin()
    threading.Thread(target=session.run, daemon=True).start()
    try:
        with open(file.parent / "probe", "rb") as through:
            read = through.read()
    except OSError as error:
        return Probe(False, f"a file passed through could not be opened: {error.strerror}", "use --engine fuse")
    upcalls = session.statistics()["upcalls"]
    if read != expected or upcalls["READ"]:
        return Probe(False, f"a file was read with {upcalls['READ']} READ upcalls", "use --engine fuse")
    return Probe(True, "a registered file was read through a mount with no READ upcall")


def probe_pyfuse3() -> Probe:
    """Whether pyfuse3 can be imported and this user has a way to mount."""
    if not os.path.exists(DEVICE):
        return Probe(False, f"there is no {DEVICE}", "load the fuse module: modprobe fuse")
    try:
        importlib.import_module("casfs.session_pyfuse3")
    except ImportError as error:
        return Probe(False, f"pyfuse3 can't be imported ({error})", "pip install 'casfs[fuse]', which builds it")
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return Probe(False, "fusermount3 is not installed", "install the Debian package fuse3")
    return Probe(True, "pyfuse3 is installed")


_PROBE_SECONDS = 10


def _in_child(probe: Callable[[], Probe]) -> Probe:
    """Run a probe in a child process, which takes its namespaces and mounts with it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_PROBE_SECONDS)
        try:
            try:
                result = probe()
            except (OSError, CasfsError) as error:
                result = Probe(False, str(error), "use --engine fuse")
            os.write(writing, json.dumps(asdict(result)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        return Probe(False, "the probe crashed or hung", "use --engine fuse, and report this")
    return Probe(**json.loads(text))
