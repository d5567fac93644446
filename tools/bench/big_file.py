"""A file of 1 GiB, read in blocks of 1 MiB and mapped, through a mount and on the host.

The host's side reads the blob itself: the same inode, the same page cache, which
is warm; so what differs is the mount alone. *mapped* searches the mapping for a
byte that isn't there (memchr at memory speed, every page touched once).

Then the page cache is counted with cachestat(2) on the blob and on the file in
two mounts of the same tree, after dropping the blob from the cache and reading
it through both: with passthrough the pages are the blob's and the mounts have
none of their own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

from store.digest import Digest
from store.layout import Layout, blob_path
from store.manifests import tree_blobs
from store.repository import Store
from store.trees import find_directory
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import Mounted, in_child, ingest, mounted_tree, observe, usable_engines

_BLOCK = 1 << 20
_ABSENT = b"\xff"
_SYS_CACHESTAT = 451
_NAME = "big.bin"


def run(settings: Settings) -> Outcome:
    """The file's size is 64 MiB in a quick run."""
    outcome = Outcome()
    size = settings.size(1 << 30, 64 << 20)
    store = settings.scratch / "store"
    blob, root = _make_blob(store, settings.scratch, size)
    engines, reasons = usable_engines(settings.scratch, ("passthrough", "native"))
    outcome.notes += reasons
    with mounted_tree(store, root, settings.scratch / "mount", engines[0], "big") as mounted:
        _compare_speed(outcome, settings, blob, mounted, size)
    for engine in engines:
        _count_pages(outcome, settings, store, root, blob, engine)
    return outcome


def _make_blob(store: Path, scratch: Path, size: int) -> tuple[Path, Digest]:
    """A tree with one file; returns where its blob lies, and the tree's root."""
    directory = scratch / "big"
    directory.mkdir()
    block = os.urandom(_BLOCK).replace(_ABSENT, b"\0")
    with open(directory / _NAME, "wb") as out:
        numbers = (number.to_bytes(4, "big") for number in range(size // _BLOCK))
        out.writelines(number.replace(_ABSENT, b"\0") + block[4:] for number in numbers)
    tree = ingest(store, [(b"", directory)], "big")
    (directory / _NAME).unlink()

    def find() -> str:
        with Store.open(store) as opened, opened.index.view() as view:
            directory = find_directory(view, tree.root)
            if directory is None:
                raise RuntimeError("the tree is not in the index")
            (digest,) = tree_blobs(view, directory)
            return blob_path(digest)

    return Layout(store).blobs / in_child(find), tree.root


def _compare_speed(outcome: Outcome, settings: Settings, blob: Path, mounted: Mounted, size: int) -> None:
    through = mounted.path / _NAME
    kinds: dict[str, Callable[[Path], None]] = {"read, 1 MiB blocks": _read, "mapped": _search_mapping}
    for work in kinds.values():
        work(blob)
        work(through)
    for _, side in alternate(("host", mounted.engine), settings.rounds(9)):
        for what, work in kinds.items():
            sample = observe(None, partial(work, blob)) if side == "host" else observe(mounted, partial(work, through))
            outcome.add(what, side, "GB/s", size / sample.seconds / 1e9, sample.upcalls)
            if side != "host":
                outcome.add(f"{what}, daemon CPU", side, "ms", sample.daemon_seconds * 1e3)
    for what in kinds:
        ratio = outcome.median(what, mounted.engine) / outcome.median(what, "host")
        outcome.aim(f"{what}: {mounted.engine} against the host", ratio, 0.95, "", at_most=False)
        cpu = outcome.median(f"{what}, daemon CPU", mounted.engine)
        outcome.aim(f"{what}, daemon CPU", cpu, 2, "ms", at_most=True)


def _read(path: Path) -> None:
    buffer = bytearray(_BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _search_mapping(path: Path) -> None:
    with open(path, "rb", buffering=0) as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        if mapping.find(_ABSENT) >= 0:
            raise RuntimeError("the file has a byte that was not written")


def _count_pages(outcome: Outcome, settings: Settings, store: Path, root: Digest, blob: Path, engine: str) -> None:
    """Pages of the blob and of the file in two mounts, after reading it through both."""
    size = blob.stat().st_size
    one, other = settings.scratch / f"{engine}-one", settings.scratch / f"{engine}-other"
    with mounted_tree(store, root, one, engine, "big"), mounted_tree(store, root, other, engine, "big"):
        with open(blob, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            left = _cached_bytes(blob)
            _read(one / _NAME)
            disk = _bytes_from_disk()
            _read(other / _NAME)
            disk = _bytes_from_disk() - disk
            cached = {"the blob": _cached_bytes(blob), "both mounts": _cached_bytes(one / _NAME, other / _NAME)}
        except OSError as error:
            outcome.notes.append(f"{engine}: the page cache was not counted: {error}")
            return
    for where, amount in cached.items():
        outcome.add(f"page cache of {where}, read through two mounts", engine, "times its size", amount / size)
    total = sum(cached.values()) / size
    outcome.notes.append(
        f"{engine}: {left / size:.2f} of the blob was cached before the first read; afterwards the file is cached "
        f"{total:.2f} times; the second mount's read took {disk / size:.2f} of it from disk"
    )
    if engine == "passthrough":
        outcome.aim("page cache after reading through two mounts", total, 1.01, "times its size", at_most=True)


def _cached_bytes(*paths: Path) -> int:
    """How much of the files is in the page cache, each counted under its own inode. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    total = 0
    for path in paths:
        with open(path, "rb") as file:
            span, found = struct.pack("<QQ", 0, 0), ctypes.create_string_buffer(40)
            if libc.syscall(_SYS_CACHESTAT, file.fileno(), span, found, 0):
                number = ctypes.get_errno()
                raise OSError(number, f"cachestat: {os.strerror(number)}")
            total += struct.unpack_from("<Q", found)[0] * mmap.PAGESIZE
    return total


def _bytes_from_disk() -> int:
    """What this process has caused to be read from disks."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes:"))
