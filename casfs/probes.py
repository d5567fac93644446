"""Whether this machine can do what an engine needs, found out by doing it.

A probe leaves nothing behind: mounts are made in a private mount namespace of
a child process, which ends with it.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from casfs.errors import CasfsError, MountError
from casfs.forking import hear_child
from casfs.fusemount import attach, detach, find_device_problem
from casfs.session import Session
from casfs.syscalls import CLONE_NEWNS, MS_PRIVATE, MS_REC, clone_read_only, has_admin_capability, mount, unshare
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
    """The probe's file, opened through a read-only copy of its mount or as it is. Implements `casfs.session.Opener`."""

    def __init__(self, path: Path, *, read_only: bool) -> None:
        directory = str(path.parent)
        self._directory = clone_read_only(directory) if read_only else os.open(directory, os.O_PATH)
        self._name = path.name

    def read(self) -> bytes:
        with open(os.open(self._name, os.O_RDONLY, dir_fd=self._directory), "rb") as file:
            return file.read()

    def open_now(self, entry: FileEntry | ReferenceEntry) -> int | None:
        return self.open(entry)

    def open(self, entry: FileEntry | ReferenceEntry) -> int:
        return os.open(self._name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)


def probe_passthrough(file: Path) -> Probe:
    """Mount, register `file`, read it through the mount, and see that no READ came.

    The file shall lie where the blobs do: whether the kernel passes through
    depends on that file system too.
    """
    if not has_admin_capability():
        return Probe(
            False,
            "FUSE passthrough needs CAP_SYS_ADMIN, which this process doesn't have",
            "mount as root, or use --engine fuse",
        )
    if problem := find_device_problem():
        return Probe(False, *problem)
    return in_child(lambda: _try_passthrough(file), "use --engine fuse")


def _try_passthrough(file: Path) -> Probe:
    contents = _OneContent(file, read_only=True)
    _leave_mount_namespace()
    try:
        # Over the directory the file is in: nothing has to be made, and nobody else sees it.
        upcalls = _read_through(contents, file.parent, passthrough=True)
    except PermissionError:
        return Probe(
            False,
            "the kernel let this process mount, but not register a file for passthrough: "
            "that needs CAP_SYS_ADMIN in the initial user namespace",
            "mount from outside of the user namespace, or use --engine fuse",
        )
    if upcalls:
        return Probe(False, f"a file was read with {upcalls} READ upcalls in spite of passthrough", "use --engine fuse")
    return Probe(True, "a registered file was read through a mount with no READ upcall")


def probe_mount(file: Path) -> Probe:
    """Mount without passthrough and read `file` through the mount: what any engine needs of the machine.

    Without CAP_SYS_ADMIN the mount is made by fusermount3, in a new directory
    beside the file, and taken away again.
    """
    return in_child(lambda: _try_mount(file), "see the findings above")


def _try_mount(file: Path) -> Probe:
    contents = _OneContent(file, read_only=False)
    if has_admin_capability():
        _leave_mount_namespace()
        _read_through(contents, file.parent, passthrough=False)
        return Probe(True, "a file was read through a mount made with mount(2)")
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="probe-") as place:
        try:
            _read_through(contents, Path(place), passthrough=False)
        finally:
            with suppress(CasfsError):
                detach(Path(place), lazy=True)
    return Probe(True, "a file was read through a mount made by fusermount3")


def _leave_mount_namespace() -> None:
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE, "")


def _read_through(contents: _OneContent, place: Path, *, passthrough: bool) -> int:
    """Read the file through a mount at `place`; returns how many READ upcalls that took. Raises CasfsError, OSError."""
    expected = contents.read()
    session = Session(attach(place), _OneFile(len(expected)), contents, passthrough=passthrough)
    session.begin()
    threading.Thread(target=session.run, daemon=True).start()
    with open(place / "probe", "rb") as through:
        if through.read() != expected:
            raise MountError("a file read through a mount had other bytes")
    upcalls: int = session.statistics()["upcalls"]["READ"]
    return upcalls


def probe_pyfuse3() -> Probe:
    """Whether pyfuse3 can be imported and this user has a way to mount."""
    if problem := find_device_problem():
        return Probe(False, *problem)
    try:
        importlib.import_module("casfs.session_pyfuse3")
    except ImportError as error:
        return Probe(False, f"pyfuse3 can't be imported ({error})", "pip install 'casfs[fuse]', which builds it")
    if not has_admin_capability() and shutil.which("fusermount3") is None:
        return Probe(False, "fusermount3 is not installed", "install the Debian package fuse3")
    return Probe(True, "pyfuse3 is installed")


_PROBE_SECONDS = 10


def in_child(probe: Callable[[], Probe], remedy: str) -> Probe:
    """Run a probe in a child, which takes its namespaces and mounts with it; `remedy` is for what it can't explain."""

    def attempt(writing: int) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_PROBE_SECONDS)
        # What fails is the probe's answer, nothing for a log.
        logging.disable()
        try:
            result = probe()
        except (OSError, CasfsError) as error:
            result = Probe(False, str(error), remedy)
        os.write(writing, json.dumps(asdict(result)).encode())

    text = hear_child(attempt)
    if not text:
        return Probe(False, "the probe crashed or hung", remedy)
    return Probe(**json.loads(text))
