"""The native session, driven by hand over a socket: every operation without a mount, and requests no kernel sends."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casfs import wire
from casfs.contents import Contents, PlainGateway
from casfs.errors import MissingCapability
from casfs.session import Opener
from casfs.tree import ROOT, ProjectedTree, Tree
from casfs.wire import Opcode
from store.entries import FileEntry, ReferenceEntry
from store.importing import ScanOptions
from store.repository import Store
from tests.casfs.conftest import FakeKernel, wait_until

Make = Callable[[Tree, Opener], FakeKernel]

CONTENT = b"0123456789" * 1000
READ_HERE = 1 << 32


@pytest.fixture
def projected(store: Store, tmp_path: Path) -> ProjectedTree:
    """``directory/inner``, ``file``, ``link``: ids 2, 3, 4, 5."""
    top = tmp_path / "tree"
    (top / "directory").mkdir(parents=True)
    (top / "directory" / "inner").write_bytes(b"inner")
    (top / "file").write_bytes(CONTENT)
    (top / "link").symlink_to("directory/inner")
    return ProjectedTree(store.index, store.importer.from_directories([(b"", top)], ScanOptions()))


DIRECTORY, INNER, FILE, LINK = 2, 3, 4, 5


@pytest.fixture
def contents(store: Store) -> Contents:
    return Contents(store.blobs, PlainGateway(store.blobs))


@pytest.fixture
def kernel(fake_kernel: Make, projected: ProjectedTree, contents: Contents) -> FakeKernel:
    """A session that has answered INIT."""
    kernel = fake_kernel(projected, contents)
    kernel.begin()
    return kernel


def open_body(flags: int = os.O_RDONLY) -> bytes:
    return struct.pack("<II", flags, 0)


def read_body(handle: int, offset: int, size: int) -> bytes:
    return struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0)


def handle_of(reply: bytes) -> int:
    handle = wire.decode_opened(reply)
    assert handle is not None
    return handle


def test_init_is_answered_with_what_both_sides_know(
    fake_kernel: Make, projected: ProjectedTree, contents: Contents
) -> None:
    kernel = fake_kernel(projected, contents)
    reply = kernel.begin(minor=99, flags=0)
    major, minor, _, flags = struct.unpack_from("<IIII", reply, 16)
    assert (major, minor, flags) == (wire.MAJOR, wire.MINOR, 0)
    assert len(reply) == 16 + 64


def test_a_newer_major_version_is_asked_to_come_again_with_ours(
    fake_kernel: Make, projected: ProjectedTree, contents: Contents
) -> None:
    kernel = fake_kernel(projected, contents)
    assert struct.unpack_from("<I", kernel.begin(major=8), 16) == (7,)
    assert kernel.errno_of(Opcode.INIT, 0, struct.pack("<IIII", 7, 41, 0, 0)) == 0
    assert kernel.errno_of(Opcode.GETATTR, ROOT) == 0


@pytest.mark.parametrize(("major", "minor"), [(7, 30), (6, 99)])
def test_a_kernel_that_is_too_old_is_told_so(
    fake_kernel: Make, projected: ProjectedTree, contents: Contents, major: int, minor: int
) -> None:
    kernel = fake_kernel(projected, contents)
    assert struct.unpack_from("<i", kernel.begin(major=major, minor=minor), 4)[0] == -errno.EPROTO
    wait_until(lambda: kernel.failure is not None, "the session to give up")
    assert isinstance(kernel.failure, MissingCapability)
    assert f"{major}.{minor}" in str(kernel.failure)


@pytest.mark.parametrize("body", [b"", b"\7\0\0\0", bytes(15)])
def test_a_cut_short_init_ends_the_session_with_an_error(
    fake_kernel: Make, projected: ProjectedTree, contents: Contents, body: bytes
) -> None:
    kernel = fake_kernel(projected, contents)
    kernel._thread.start()
    kernel.send(kernel.message(Opcode.INIT, 0, body))
    wait_until(lambda: kernel.failure is not None, "the session to give up")


def test_lookups_attributes_and_links(kernel: FakeKernel) -> None:
    reply = kernel.ask(Opcode.LOOKUP, ROOT, b"file\0")
    node, _, valid = struct.unpack_from("<QQQ", reply, 16)
    assert (node, valid) == (FILE, wire.FOREVER)
    assert struct.unpack_from("<QQ", reply, 56) == (FILE, len(CONTENT))
    assert struct.unpack_from("<Q", kernel.ask(Opcode.LOOKUP, ROOT, b"absent\0"), 16) == (0,)
    assert struct.unpack_from("<QQ", kernel.ask(Opcode.GETATTR, INNER), 32) == (INNER, 5)
    assert kernel.ask(Opcode.READLINK, LINK)[16:] == b"directory/inner"
    assert kernel.errno_of(Opcode.READLINK, FILE) == errno.EINVAL
    assert kernel.errno_of(Opcode.LOOKUP, FILE, b"x\0") == errno.ENOTDIR
    for opcode, body in (
        (Opcode.GETATTR, b""),
        (Opcode.READLINK, b""),
        (Opcode.OPEN, open_body()),
        (Opcode.LOOKUP, b"n\0"),
    ):
        assert kernel.errno_of(opcode, 999, body) == errno.ESTALE


def test_open_read_release(kernel: FakeKernel) -> None:
    handle = handle_of(kernel.ask(Opcode.OPEN, FILE, open_body()))
    assert kernel.ask(Opcode.READ, FILE, read_body(handle, 5, 20))[16:] == CONTENT[5:25]
    assert kernel.ask(Opcode.READ, FILE, read_body(handle, len(CONTENT) - 3, 100))[16:] == CONTENT[-3:]
    assert kernel.ask(Opcode.READ, FILE, read_body(handle, 1 << 40, 100))[16:] == b""
    assert kernel.errno_of(Opcode.RELEASE, FILE, struct.pack("<QIIQ", handle, 0, 0, 0)) == 0
    assert kernel.errno_of(Opcode.READ, FILE, read_body(7, 0, 1)) == errno.EBADF
    assert kernel.errno_of(Opcode.OPEN, DIRECTORY, open_body()) == errno.EISDIR
    assert kernel.errno_of(Opcode.OPEN, LINK, open_body()) == errno.EISDIR
    statistics = kernel.session.statistics()
    assert statistics["served_bytes"] == 23
    assert statistics["upcalls"]["READ"] == 4


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_ACCMODE, os.O_TRUNC, os.O_RDWR | os.O_TRUNC])
def test_an_open_for_writing_is_refused_before_anything_else(kernel: FakeKernel, flags: int) -> None:
    assert kernel.errno_of(Opcode.OPEN, FILE, open_body(flags)) == errno.EROFS


MODIFYING = [
    "SETATTR",
    "SYMLINK",
    "MKNOD",
    "MKDIR",
    "UNLINK",
    "RMDIR",
    "RENAME",
    "RENAME2",
    "LINK",
    "WRITE",
    "SETXATTR",
    "REMOVEXATTR",
    "CREATE",
    "FALLOCATE",
    "COPY_FILE_RANGE",
    "TMPFILE",
]


@pytest.mark.parametrize("name", MODIFYING)
def test_requests_that_would_change_something_are_refused(kernel: FakeKernel, name: str) -> None:
    for node in (ROOT, FILE, 999):
        assert kernel.errno_of(Opcode[name], node, bytes(64)) == errno.EROFS


def test_what_the_kernel_shall_not_ask_again_is_answered_enosys(kernel: FakeKernel) -> None:
    for opcode in (Opcode.GETXATTR, Opcode.LISTXATTR, Opcode.OPENDIR, Opcode.FLUSH, Opcode.ACCESS, Opcode.STATX):
        assert kernel.errno_of(opcode, FILE, bytes(16)) == errno.ENOSYS


@pytest.mark.parametrize("opcode", [0, 7, 19, 53, 63, 64, 4096, 1 << 20, (1 << 32) - 1])
def test_unknown_opcodes_are_answered_enosys(kernel: FakeKernel, opcode: int) -> None:
    assert kernel.errno_of(opcode, ROOT, bytes(40)) == errno.ENOSYS
    assert kernel.errno_of(Opcode.GETATTR, ROOT) == 0


def test_forgets_are_not_answered(kernel: FakeKernel) -> None:
    kernel.send(kernel.message(Opcode.FORGET, FILE, struct.pack("<Q", 1)))
    kernel.send(kernel.message(Opcode.BATCH_FORGET, 0, struct.pack("<IIQQ", 1, 0, FILE, 1)))
    kernel.send(kernel.message(Opcode.INTERRUPT, 0, struct.pack("<Q", 12345)))
    kernel.send(kernel.message(Opcode.INTERRUPT, 0, b"cut"))
    # `ask` sees that the next reply is that of its own request.
    assert kernel.errno_of(Opcode.GETATTR, FILE) == 0
    upcalls = kernel.session.statistics()["upcalls"]
    assert (upcalls["FORGET"], upcalls["BATCH_FORGET"], upcalls["INTERRUPT"]) == (1, 1, 2)


@pytest.mark.parametrize("opcode", [Opcode.READDIR, Opcode.READDIRPLUS])
@pytest.mark.parametrize("size", [0, 10, 152, 200, 400, 4096, (1 << 32) - 1])
def test_a_listing_in_pages_of_any_size_gives_every_name_once(kernel: FakeKernel, opcode: Opcode, size: int) -> None:
    listed, cookie = [], 0
    while page := kernel.ask(opcode, ROOT, read_body(0, cookie, size))[16:]:
        assert len(page) <= size
        offset = 0
        while offset < len(page):
            offset += 128 if opcode == Opcode.READDIRPLUS else 0
            node, cookie, length, _ = struct.unpack_from("<QQII", page, offset)
            listed.append((page[offset + 24 : offset + 24 + length], node))
            offset += 24 + (length + 7 & ~7)
    everything = [(b".", ROOT), (b"..", ROOT), (b"directory", DIRECTORY), (b"file", FILE), (b"link", LINK)]
    # An entry with attributes takes at least 160 bytes, "directory" 168.
    needed = 168 if opcode == Opcode.READDIRPLUS else 40
    assert listed == everything if size >= needed else listed == everything[: len(listed)]
    assert kernel.errno_of(opcode, FILE, read_body(0, 0, 4096)) == errno.ENOTDIR


def _is_safe(opcode: int, body: bytes) -> bool:
    """Not a handle that, made up, stands for a descriptor of this very process."""
    if opcode not in (Opcode.READ, Opcode.RELEASE) or len(body) < 8:
        return True
    return int.from_bytes(body[:8], "little") & ~READ_HERE >= 1 << 31


bodies = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=30).map(lambda name: name + b"\0"),
    st.tuples(*[st.integers(0, (1 << 64) - 1)] * 2, st.integers(0, 1 << 20)).map(lambda t: read_body(*t)),
    st.sampled_from([os.O_RDONLY, os.O_PATH, os.O_DIRECT]).map(open_body),
)
answered = st.one_of(st.sampled_from([op for op in Opcode if op not in wire.NO_REPLY]), st.integers(0, (1 << 32) - 1))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeKernel]:
    """One session for all examples: none may leave it broken."""
    base = tmp_path_factory.mktemp("fuzz")
    (base / "tree" / "directory").mkdir(parents=True)
    (base / "tree" / "file").write_bytes(CONTENT)
    with Store.open(base / "store") as store:
        root = store.importer.from_directories([(b"", base / "tree")], ScanOptions())
        tree = ProjectedTree(store.index, root)
        kernel = FakeKernel(tree, Contents(store.blobs, PlainGateway(store.blobs)))
        kernel.begin()
        yield kernel
        kernel.close()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    opcode=answered.filter(lambda opcode: opcode not in wire.NO_REPLY),
    node=st.one_of(st.integers(0, 6), st.integers(0, (1 << 64) - 1)),
    body=bodies,
)
def test_every_request_is_answered_once_whatever_its_body(
    fuzzed: FakeKernel, opcode: int, node: int, body: bytes
) -> None:
    if not _is_safe(opcode, body):
        return
    reply = fuzzed.ask(opcode, node, body)
    if (handle := wire.decode_opened(reply)) is not None and opcode == Opcode.OPEN:
        assert fuzzed.errno_of(Opcode.RELEASE, node, struct.pack("<QIIQ", handle, 0, 0, 0)) == 0
    assert fuzzed.errno_of(Opcode.GETATTR, ROOT) == 0


@settings(max_examples=200, deadline=None)
@given(message=st.binary(min_size=1, max_size=300))
def test_messages_that_are_no_requests_are_dropped(fuzzed: FakeKernel, message: bytes) -> None:
    if len(message) >= 40:
        message = (len(message) + 1).to_bytes(4, "little") + message[4:]
    fuzzed.send(message)
    assert fuzzed.errno_of(Opcode.GETATTR, ROOT) == 0


class SlowContents:
    """Contents of which each open waits until it may go on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entered = threading.Semaphore(0)
        self.may_go_on = threading.Event()
        self.opened: list[int] = []
        self.error: Exception | None = None

    def open_now(self, entry: FileEntry | ReferenceEntry) -> int | None:
        return None

    def open(self, entry: FileEntry | ReferenceEntry) -> int:
        self.entered.release()
        assert self.may_go_on.wait(30)
        if self.error is not None:
            raise self.error
        self.opened.append(os.open(self._path, os.O_RDONLY))
        return self.opened[-1]


@pytest.fixture
def slow(tmp_path: Path) -> SlowContents:
    path = tmp_path / "slow"
    path.write_bytes(CONTENT)
    return SlowContents(path)


@pytest.fixture
def slow_kernel(fake_kernel: Make, projected: ProjectedTree, slow: SlowContents) -> Iterator[FakeKernel]:
    kernel = fake_kernel(projected, slow)
    kernel.begin()
    yield kernel
    slow.may_go_on.set()


def _is_closed(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return True
    return False


def test_a_slow_open_stalls_nobody_else(slow_kernel: FakeKernel, slow: SlowContents) -> None:
    first = slow_kernel.message(Opcode.OPEN, FILE, open_body())
    slow_kernel.send(first)
    assert slow.entered.acquire(timeout=30)
    for _ in range(5):
        assert slow_kernel.errno_of(Opcode.GETATTR, INNER) == 0
    slow.may_go_on.set()
    reply = slow_kernel.receive()
    assert struct.unpack_from("<IiQ", reply)[2] == struct.unpack_from("<Q", first, 8)[0]
    handle = handle_of(reply)
    assert slow_kernel.ask(Opcode.READ, FILE, read_body(handle, 0, 10))[16:] == CONTENT[:10]
    assert slow_kernel.errno_of(Opcode.RELEASE, FILE, struct.pack("<QIIQ", handle, 0, 0, 0)) == 0
    assert _is_closed(slow.opened[0])


def test_an_interrupted_open_is_answered_at_once_and_its_content_closed_later(
    slow_kernel: FakeKernel, slow: SlowContents
) -> None:
    message = slow_kernel.message(Opcode.OPEN, FILE, open_body())
    slow_kernel.send(message)
    assert slow.entered.acquire(timeout=30)
    unique = struct.unpack_from("<Q", message, 8)[0]
    slow_kernel.send(slow_kernel.message(Opcode.INTERRUPT, 0, struct.pack("<Q", unique)))
    assert struct.unpack("<IiQ", slow_kernel.receive()) == (16, -errno.EINTR, unique)
    slow.may_go_on.set()
    wait_until(lambda: bool(slow.opened) and _is_closed(slow.opened[0]), "the content to be closed")
    # `ask` sees that no second answer to the open has come.
    assert slow_kernel.errno_of(Opcode.GETATTR, FILE) == 0


@pytest.mark.parametrize(
    ("error", "number"), [(OSError(errno.ENOMEM, "no memory"), errno.ENOMEM), (RuntimeError("what?"), errno.EIO)]
)
def test_a_slow_open_that_fails_in_any_way_is_answered(
    slow_kernel: FakeKernel, slow: SlowContents, error: Exception, number: int
) -> None:
    slow.error = error
    slow.may_go_on.set()
    assert slow_kernel.errno_of(Opcode.OPEN, FILE, open_body()) == number
    assert slow_kernel.session.statistics()["failed_opens"] == 1
