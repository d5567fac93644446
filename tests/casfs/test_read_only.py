"""Nothing can be changed through a mount, by nobody, and above all no blob."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from store.digest import DigestFunction
from store.importing import ScanOptions
from tests.casfs.conftest import Mounted, Mounts, errno_from, make_writable

CONTENT = b"the bytes of a blob\n" * 300

libc = ctypes.CDLL(None, use_errno=True)

_FALLOC_PUNCH_HOLE, _FALLOC_KEEP_SIZE = 2, 1
_FICLONE = 0x40049409

MODIFICATIONS: dict[str, Callable[[Path], object]] = {
    "open for writing": lambda top: os.open(top / "file", os.O_WRONLY),
    "open for reading and writing": lambda top: os.open(top / "file", os.O_RDWR),
    "open for appending": lambda top: os.open(top / "file", os.O_WRONLY | os.O_APPEND),
    "open for direct writing": lambda top: os.open(top / "file", os.O_RDWR | os.O_DIRECT),
    "open truncating": lambda top: os.open(top / "file", os.O_RDONLY | os.O_TRUNC),
    "open writing and truncating": lambda top: os.open(top / "file", os.O_WRONLY | os.O_TRUNC),
    "create": lambda top: os.open(top / "new", os.O_WRONLY | os.O_CREAT, 0o644),
    "create below": lambda top: os.open(top / "directory" / "new", os.O_RDWR | os.O_CREAT | os.O_EXCL),
    "create nameless": lambda top: os.open(top, os.O_RDWR | os.O_TMPFILE),
    "unlink": lambda top: os.unlink(top / "file"),
    "rmdir": lambda top: os.rmdir(top / "empty"),
    "mkdir": lambda top: os.mkdir(top / "new"),
    "mkfifo": lambda top: os.mkfifo(top / "new"),
    "mknod": lambda top: os.mknod(top / "new"),
    "symlink": lambda top: os.symlink("target", top / "new"),
    "link": lambda top: os.link(top / "file", top / "new"),
    "rename": lambda top: os.rename(top / "file", top / "new"),
    "rename over": lambda top: os.replace(top / "file", top / "directory" / "inner"),
    "chmod": lambda top: os.chmod(top / "file", 0o777),
    "chown": lambda top: os.chown(top / "file", 1, 1),
    "utime": lambda top: os.utime(top / "file"),
    "truncate": lambda top: os.truncate(top / "file", 0),
    "setxattr": lambda top: os.setxattr(top / "file", "user.name", b"value"),
    "removexattr": lambda top: os.removexattr(top / "file", "user.name"),
    "bind a socket": lambda top: bind(top / "new"),
}


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.fixture(scope="module")
def mounted(module_mounts: Mounts, module_engine: str) -> Iterator[Mounted]:
    with contextlib.ExitStack() as stack:
        root = module_mounts.add_files({"file": CONTENT, "directory/inner": b"inner", "empty/x": b""})
        mounted = module_mounts.mount(root, module_engine)
        stack.callback(mounted.unmount)
        yield mounted


@pytest.mark.parametrize("name", MODIFICATIONS)
def test_every_modification_is_refused_as_on_a_read_only_file_system(mounted: Mounted, name: str) -> None:
    """EROFS from the kernel itself, which doesn't ask the daemon."""
    with mounted.counting() as spent:
        assert errno_from(lambda: MODIFICATIONS[name](mounted.path)) == errno.EROFS
    assert not {"SETATTR", "CREATE", "MKDIR", "UNLINK", "WRITE"} & set(spent)


def descriptor_of(path: Path, flags: int) -> int:
    """Reopen a file that is open for reading through /proc, with other flags."""
    with open(path, "rb") as file:
        return os.open(f"/proc/self/fd/{file.fileno()}", flags)


def reopen_path(path: Path) -> None:
    place = os.open(path, os.O_PATH)
    try:
        write_all(os.open(f"/proc/self/fd/{place}", os.O_WRONLY))
    finally:
        os.close(place)


def map_for_writing(path: Path) -> None:
    with open(path, "rb") as file:
        mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)[0:4] = b"EVIL"


def protect_for_writing(path: Path) -> None:
    """Map for reading, then ask for the right to write (mprotect)."""
    with open(path, "rb") as file:
        libc.mmap.restype = ctypes.c_void_p
        address = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), ctypes.c_long(0))
        try:
            if libc.mprotect(ctypes.c_void_p(address), 4096, mmap.PROT_READ | mmap.PROT_WRITE):
                raise OSError(ctypes.get_errno(), "mprotect")
            ctypes.memmove(address, b"EVIL", 4)
        finally:
            libc.munmap(ctypes.c_void_p(address), 4096)


def punch(path: Path) -> None:
    with open(path, "rb") as file:
        if libc.fallocate(file.fileno(), _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(4096)):
            raise OSError(ctypes.get_errno(), "fallocate")


def clone_into(path: Path) -> None:
    with open(path, "rb") as file, open(path.parent / "other", "rb") as other:
        fcntl.ioctl(file.fileno(), _FICLONE, other.fileno())


def copy_into(path: Path) -> None:
    with open(path, "rb") as file, open(path.parent / "other", "rb") as other:
        os.copy_file_range(other.fileno(), file.fileno(), 4)


def write_all(descriptor: int) -> None:
    try:
        os.pwrite(descriptor, b"EVIL", 0)
    finally:
        os.close(descriptor)


def swap_on(path: Path) -> None:
    if libc.swapon(os.fsencode(path), 0):
        raise OSError(ctypes.get_errno(), "swapon")


REFUSALS = {errno.EROFS, errno.EACCES, errno.EBADF, errno.EOPNOTSUPP, errno.EINVAL}
LIBFUSE_REFUSALS = {errno.ENOSYS, errno.EPERM}
"""What comes of operations that the pyfuse3 session doesn't have."""

OVERWRITES: dict[str, Callable[[Path], object]] = {
    "write": lambda path: write_all(os.open(path, os.O_WRONLY)),
    "read and write": lambda path: write_all(os.open(path, os.O_RDWR)),
    "append": lambda path: write_all(os.open(path, os.O_WRONLY | os.O_APPEND)),
    "direct": lambda path: write_all(os.open(path, os.O_RDWR | os.O_DIRECT)),
    "access mode 3": lambda path: write_all(os.open(path, os.O_ACCMODE)),
    "truncate at open": lambda path: os.close(os.open(path, os.O_RDONLY | os.O_TRUNC)),
    "truncate": lambda path: os.truncate(path, 0),
    "reopen through /proc": lambda path: write_all(descriptor_of(path, os.O_RDWR)),
    "reopen through /proc truncating": lambda path: os.close(descriptor_of(path, os.O_RDONLY | os.O_TRUNC)),
    "reopen a path descriptor": reopen_path,
    "map shared": map_for_writing,
    "map and protect": protect_for_writing,
    "punch a hole": punch,
    "clone into": clone_into,
    "copy into": copy_into,
    "create over": lambda path: write_all(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)),
    "create": lambda path: write_all(os.open(path.parent / "new", os.O_WRONLY | os.O_CREAT, 0o600)),
    "chmod": lambda path: os.chmod(path, 0o777),
    "rename": lambda path: os.rename(path, path.parent / "new"),
    "unlink": os.unlink,
    "mkdir": lambda path: os.mkdir(path.parent / "new"),
    "link": lambda path: os.link(path, path.parent / "new"),
    "setxattr": lambda path: os.setxattr(path, "user.name", b"value"),
    "swap on": swap_on,
}


@pytest.fixture(scope="module")
def writable(module_mounts: Mounts, module_engine: str) -> Iterator[tuple[Mounts, Mounted]]:
    """A mount that root made writable behind our back: then only the daemon can refuse."""
    root = module_mounts.add_files({"target": CONTENT, "other": b"other" * 1000})
    mounted = module_mounts.mount(root, module_engine)
    make_writable(mounted.path)
    yield module_mounts, mounted
    mounted.unmount()


@pytest.mark.parametrize("warm", [False, True], ids=["closed", "open meanwhile"])
@pytest.mark.parametrize("name", OVERWRITES)
def test_no_overwrite_changes_a_blob_even_on_a_mount_made_writable(
    writable: tuple[Mounts, Mounted], name: str, warm: bool
) -> None:
    """Root remounts the mount writable and tries everything: each is refused and the blob keeps its digest."""
    mounts, mounted = writable
    blob = mounts.blob(CONTENT)
    before = os.stat(blob)
    with contextlib.ExitStack() as stack:
        if warm:
            # Registered for passthrough, in use, and in the page cache.
            assert stack.enter_context(open(mounted.path / "target", "rb")).read() == CONTENT
        number = errno_from(lambda: OVERWRITES[name](mounted.path / "target"))
    allowed = REFUSALS | LIBFUSE_REFUSALS if mounted.report.engine == "fuse" else REFUSALS
    assert number in allowed, errno.errorcode[number]
    content = blob.read_bytes()
    assert content == CONTENT
    assert DigestFunction.BLAKE3.of(content).hex == blob.name
    after = os.stat(blob)
    assert (after.st_mtime_ns, after.st_ctime_ns, after.st_mode) == (before.st_mtime_ns, before.st_ctime_ns, 0o100444)
    assert (mounted.path / "target").read_bytes() == CONTENT
    assert sorted(os.listdir(mounted.path)) == ["other", "target"]


@pytest.mark.parametrize("engine", ["passthrough", "native"])
def test_a_file_by_reference_cannot_be_written_through_the_mount(mounts: Mounts, engine: str, tmp_path: Path) -> None:
    """It is somebody's writable file: through a mount made writable it stays what it is, all the same."""
    original = tmp_path / "target"
    original.write_bytes(CONTENT)
    (tmp_path / "other").write_bytes(b"other" * 1000)
    mounted = mounts.mount(mounts.add(tmp_path, ScanOptions(reference=True)), engine)
    make_writable(mounted.path)
    assert (mounted.path / "target").read_bytes() == CONTENT
    for attempt in OVERWRITES.values():
        assert errno_from(partial(attempt, mounted.path / "target"))
    assert original.read_bytes() == CONTENT
    assert (mounted.path / "target").read_bytes() == CONTENT


def test_blobs_are_registered_through_a_read_only_mount(mounts: Mounts) -> None:
    """The second lock: what the kernel got for passthrough can't be opened for writing, whatever the daemon says."""
    from casfs.contents import ReadOnlyGateway

    mounts.add_files({"file": CONTENT})
    gateway = ReadOnlyGateway(mounts.layout)
    try:
        path = mounts.blob(CONTENT).relative_to(mounts.layout.blobs)
        descriptor = os.open(path, os.O_RDONLY, dir_fd=gateway.blobs())
        for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC):
            with pytest.raises(OSError, match="Read-only"):
                os.open(path, flags, dir_fd=gateway.blobs())
            with pytest.raises(OSError, match="Read-only"):
                os.open(f"/proc/self/fd/{descriptor}", flags)
        os.close(descriptor)
    finally:
        gateway.close()
