"""What the kernel does with passthrough, asked of the running kernel: the facts that the sessions are built on.

A tiny server answers OPEN as the test says, right or wrong. Where a later
kernel changes its mind, a test here fails before a mount misbehaves.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from casfs import syscalls, wire
from casfs.errors import CasfsError
from casfs.fusemount import attach, detach
from casfs.syscalls import BackingId, clone_read_only, close_backing, register_backing
from casfs.wire import InitFlag, InitReply, Opcode
from tests.casfs.conftest import errno_from, make_writable
from tests.conftest import Requirements

CONTENT = b"the bytes of the backing file\n" * 500
SERVED = b"what the server reads itself\n" * 1000

DIRECT_IO, KEEP_CACHE, NONSEEKABLE, CACHE_DIR, STREAM, NOFLUSH, PARALLEL, PASSTHROUGH = (1 << bit for bit in range(8))
WRITEBACK_CACHE = 1 << 16

Answer = Callable[[int], bytes]
"""The reply to an OPEN, given its `unique`."""


def passed(flags: int, backing_id: int) -> Answer:
    return lambda unique: wire.encode_open(unique, 1, PASSTHROUGH | flags, backing_id)


def served(flags: int = 0) -> Answer:
    return lambda unique: wire.encode_open(unique, 0, flags)


NODES = {b"a": 2, b"b": 3}


class TinyServer:
    """A mount with the files ``a`` and ``b``, whose opens are answered by `answer`."""

    def __init__(self, place: Path, *, depth: int = 1, more_flags: int = 0) -> None:
        self.path = place
        self.counts: Counter[int] = Counter()
        self.answer: Answer = served()
        self.device = attach(place)
        flags = InitFlag.INIT_EXT | InitFlag.PASSTHROUGH | InitFlag(more_flags)
        self._init = InitReply(41, 1 << 17, flags, 64, 4096, 256, depth)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                message = os.read(self.device, 64 << 10)
            except OSError as error:
                if error.errno == errno.ENOENT:  # interrupted before it could be read
                    continue
                if error.errno == errno.ENODEV:
                    return
                raise
            _, opcode, unique, node = struct.unpack_from("<IIQQ", message)
            self.counts[opcode] += 1
            reply = self._reply(opcode, unique, node, message[wire.IN_HEADER_BYTES :])
            if reply:
                with suppress(FileNotFoundError):
                    os.write(self.device, reply)

    def _reply(self, opcode: int, unique: int, node: int, body: bytes) -> bytes:
        if opcode == Opcode.INIT:
            return wire.encode_reply(unique, wire.encode_init(self._init))
        if opcode == Opcode.LOOKUP and (node := NODES.get(body[:-1], 0)):
            return wire.encode_entry(unique, node, stat.S_IFREG | 0o666, len(CONTENT), 0, 1, os.getuid(), os.getgid())
        if opcode == Opcode.GETATTR:
            mode, size = (stat.S_IFDIR | 0o777, 0) if node == 1 else (stat.S_IFREG | 0o666, len(CONTENT))
            return wire.encode_attr(unique, node, mode, size, 0, 1, os.getuid(), os.getgid())
        if opcode == Opcode.OPEN:
            return self.answer(unique)
        if opcode == Opcode.READ:
            offset, size = struct.unpack_from("<8xQI", body)
            return wire.encode_reply(unique, SERVED[offset : min(offset + size, len(CONTENT))])
        if opcode == Opcode.STATFS:
            return wire.encode_statfs(unique, 3, 2 * len(CONTENT))
        if opcode in (Opcode.RELEASE, Opcode.FLUSH):
            return wire.encode_reply(unique)
        return b"" if opcode in wire.NO_REPLY else wire.encode_error(unique, errno.ENOSYS)

    def register(self, path: Path | int) -> BackingId:
        """A backing id for a file, opened in the plainest way."""
        if isinstance(path, int):
            return register_backing(self.device, path)
        with open(path, "rb") as file:
            return register_backing(self.device, file.fileno())

    def close(self) -> None:
        with suppress(CasfsError):
            detach(self.path, lazy=True)
        self._thread.join(30)
        os.close(self.device)


@pytest.fixture
def tiny(tmp_path: Path, requires: Requirements) -> Iterator[Callable[..., TinyServer]]:
    """Start a server: ``tiny(depth=…, more_flags=…)``."""
    requires.fuse()
    requires.admin()
    with ExitStack() as stack:

        def start(**options: int) -> TinyServer:
            place = Path(tempfile.mkdtemp(dir=tmp_path, prefix="tiny-"))
            server = TinyServer(place, **options)
            stack.callback(server.close)
            os.stat(place)  # INIT is over
            return server

        yield start


@pytest.fixture
def server(tiny: Callable[..., TinyServer]) -> TinyServer:
    return tiny()


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    path = tmp_path / "backing"
    path.write_bytes(CONTENT)
    return path


def read(path: Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("flags", [0, PARALLEL, NOFLUSH, PARALLEL | NOFLUSH], ids=lambda flags: f"{flags:#x}")
def test_passthrough_works_with_these_flags(server: TinyServer, backing: Path, flags: int) -> None:
    server.answer = passed(flags, server.register(backing))
    assert read(server.path / "a") == CONTENT
    assert not server.counts[Opcode.READ]
    assert bool(server.counts[Opcode.FLUSH]) != bool(flags & NOFLUSH)


def test_with_direct_io_reads_come_to_the_server_and_mappings_pass_through(server: TinyServer, backing: Path) -> None:
    server.answer = passed(DIRECT_IO, server.register(backing))
    assert read(server.path / "a")[:5] == SERVED[:5]
    assert server.counts[Opcode.READ]
    with opened(server.path / "a") as descriptor:
        with mmap.mmap(descriptor, len(CONTENT), access=mmap.ACCESS_READ) as mapped:
            assert mapped[:] == CONTENT


@pytest.mark.parametrize("flags", [KEEP_CACHE, NONSEEKABLE, CACHE_DIR, STREAM], ids=lambda flags: f"{flags:#x}")
def test_passthrough_with_these_flags_is_an_error(server: TinyServer, backing: Path, flags: int) -> None:
    server.answer = passed(flags, server.register(backing))
    assert errno_from(lambda: read(server.path / "a")) == errno.EIO
    server.answer = passed(0, server.register(backing))
    assert read(server.path / "a") == CONTENT, "and leaves nothing behind"


@pytest.mark.parametrize("backing_id", [0, -1, 12345])
def test_an_id_that_was_never_registered_is_an_error(server: TinyServer, backing_id: int) -> None:
    server.answer = passed(0, backing_id)
    assert errno_from(lambda: read(server.path / "a")) == errno.EIO


def test_a_file_open_in_one_mode_cannot_be_opened_in_the_other(server: TinyServer, backing: Path) -> None:
    through, cached = passed(0, server.register(backing)), served(KEEP_CACHE)
    for first, second in ((through, cached), (cached, through)):
        server.answer = first
        with opened(server.path / "a") as descriptor:
            assert os.read(descriptor, 3) in (CONTENT[:3], SERVED[:3])
            server.answer = second
            assert errno_from(lambda: read(server.path / "a")) == errno.EIO
            assert os.read(descriptor, 3) in (CONTENT[3:6], SERVED[3:6]), "what is open goes on"
        assert read(server.path / "a")[:3] == (SERVED if second is cached else CONTENT)[:3], "free after the close"


def test_opens_of_one_file_need_the_same_id_even_for_the_same_backing_file(server: TinyServer, backing: Path) -> None:
    one, other = server.register(backing), server.register(backing)
    assert one != other
    server.answer = passed(0, one)
    with opened(server.path / "a"):
        assert read(server.path / "a") == CONTENT
        server.answer = passed(0, other)
        assert errno_from(lambda: read(server.path / "a")) == errno.EIO
    assert read(server.path / "a") == CONTENT


def test_two_files_can_share_an_id(server: TinyServer, backing: Path) -> None:
    server.answer = passed(0, server.register(backing))
    with opened(server.path / "a") as a, opened(server.path / "b") as b:
        assert os.read(a, 1 << 20) == os.read(b, 1 << 20) == CONTENT
    assert not server.counts[Opcode.READ]


def test_an_id_closed_before_the_open_is_done_makes_it_fail(server: TinyServer, backing: Path) -> None:
    backing_id = server.register(backing)

    def close_then_answer(unique: int) -> bytes:
        close_backing(server.device, backing_id)
        return passed(0, backing_id)(unique)

    server.answer = close_then_answer
    assert errno_from(lambda: read(server.path / "a")) == errno.EIO


def test_an_id_closed_while_in_use_serves_what_is_open_and_nothing_new(server: TinyServer, backing: Path) -> None:
    backing_id = server.register(backing)
    server.answer = passed(0, backing_id)
    with opened(server.path / "a") as descriptor:
        close_backing(server.device, backing_id)
        assert os.read(descriptor, 1 << 20) == CONTENT
        assert errno_from(lambda: read(server.path / "a")) == errno.EIO
    assert errno_from(lambda: close_backing(server.device, backing_id)) == errno.ENOENT


def test_a_mapping_keeps_the_mode_after_the_close(server: TinyServer, backing: Path) -> None:
    server.answer = passed(0, server.register(backing))
    with opened(server.path / "a") as descriptor:
        mapped = mmap.mmap(descriptor, len(CONTENT), access=mmap.ACCESS_READ)
    # mmap has a duplicate of the descriptor: only with that closed it is the mapping alone.
    server.answer = served(KEEP_CACHE)
    with mapped:
        assert mapped[:] == CONTENT
        assert errno_from(lambda: read(server.path / "a")) == errno.EIO
    assert read(server.path / "a")[:5] == SERVED[:5]


def test_a_backing_file_can_be_removed_and_replaced_and_is_read_on(server: TinyServer, backing: Path) -> None:
    server.answer = passed(0, server.register(backing))
    assert read(server.path / "a") == CONTENT
    backing.unlink()
    backing.write_bytes(b"x" * len(CONTENT))
    assert read(server.path / "a") == CONTENT
    assert not server.counts[Opcode.READ]


@pytest.mark.parametrize("options", [{"depth": 0}, {"more_flags": WRITEBACK_CACHE}], ids=["depth 0", "writeback cache"])
def test_passthrough_is_silently_off_with(
    tiny: Callable[..., TinyServer], backing: Path, options: dict[str, int]
) -> None:
    server = tiny(**options)
    assert errno_from(lambda: server.register(backing)) == errno.EPERM


def test_an_id_needs_a_regular_file(server: TinyServer, tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    reading, writing = os.pipe()
    try:
        for descriptor, expected in ((directory, errno.EINVAL), (reading, errno.EINVAL), (9999, errno.EBADF)):
            number = errno_from(partial(server.register, descriptor))
            assert number in (expected, errno.EOPNOTSUPP, errno.EPERM, errno.EISDIR), errno.errorcode[number]
    finally:
        for descriptor in (directory, reading, writing):
            os.close(descriptor)


def test_the_write_hazard_is_real_and_a_read_only_mount_stops_it(server: TinyServer, backing: Path) -> None:
    """The kernel opens the backing file again with the flags of whoever opens through the mount."""
    make_writable(server.path)
    server.answer = passed(0, server.register(backing))
    descriptor = os.open(server.path / "a", os.O_RDWR)
    try:
        os.pwrite(descriptor, b"EVIL", 0)
    finally:
        os.close(descriptor)
    assert backing.read_bytes()[:4] == b"EVIL", "registered read-only, and yet written"
    backing.write_bytes(CONTENT)

    directory = clone_read_only(str(backing.parent))
    guarded = os.open(backing.name, os.O_RDONLY, dir_fd=directory)
    try:
        server.answer = passed(0, server.register(guarded))
    finally:
        os.close(guarded)
        os.close(directory)
    for flags in (os.O_RDWR, os.O_WRONLY):
        assert errno_from(partial(os.open, server.path / "a", flags)) in (errno.EIO, errno.EROFS)
    assert read(server.path / "a") == backing.read_bytes() == CONTENT


@contextmanager
def overlay(lower: Path, tmp_path: Path) -> Iterator[Path]:
    base = Path(tempfile.mkdtemp(dir=tmp_path, prefix="overlay-"))
    for name in ("upper", "work", "merged"):
        (base / name).mkdir()
    options = f"lowerdir={lower},upperdir={base}/upper,workdir={base}/work"
    syscalls.mount("overlay", str(base / "merged"), "overlay", 0, options)
    try:
        yield base / "merged"
    finally:
        syscalls.umount(str(base / "merged"), syscalls.MNT_DETACH)


def test_depth_1_lets_an_overlay_stand_on_the_mount_but_no_backing_file_lie_on_one(
    tiny: Callable[..., TinyServer], backing: Path, tmp_path: Path
) -> None:
    server = tiny(depth=1)
    server.answer = passed(0, server.register(backing))
    with overlay(server.path, tmp_path) as merged:
        assert read(merged / "a") == CONTENT
    assert not server.counts[Opcode.READ]
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(CONTENT)
    with overlay(source, tmp_path) as merged:
        assert errno_from(lambda: server.register(merged / "file")) == errno.ELOOP


def test_depth_2_lets_the_backing_file_lie_on_an_overlay_but_none_stand_on_the_mount(
    tiny: Callable[..., TinyServer], tmp_path: Path
) -> None:
    server = tiny(depth=2)
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(CONTENT)
    with overlay(source, tmp_path) as merged:
        backing_id = server.register(merged / "file")
        server.answer = passed(0, backing_id)
        assert read(server.path / "a") == CONTENT
        close_backing(server.device, backing_id)
    assert not server.counts[Opcode.READ]
    with pytest.raises(OSError), overlay(server.path, tmp_path):
        pass


def test_one_enosys_to_an_open_ends_opens_and_so_passthrough(server: TinyServer, backing: Path) -> None:
    server.answer = lambda unique: wire.encode_error(unique, errno.ENOSYS)
    assert read(server.path / "a")[:5] == SERVED[:5]
    server.answer = passed(0, server.register(backing))
    assert read(server.path / "b")[:5] == SERVED[:5]
    assert server.counts[Opcode.OPEN] == 1
    assert server.counts[Opcode.READ] >= 2
