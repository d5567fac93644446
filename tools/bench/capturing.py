"""An output of 1 GiB captured into the store from scratch on the same file system, against one of 64 MiB.

The output becomes a blob by a hard link, so what is left beside hashing must
not depend on its size. *hashing alone* is of the same file, in the page cache,
just before. *capture* has the file's bytes on the disk already (as a kernel
writes them back while an action runs); *capture of fresh bytes* has to wait for
the disk, since a blob is durable before it is published. *disk taken* is the
fall of the file system's free blocks, whoever else used them; *copying* writes
a second file by copy_file_range into the page cache.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from casfs.sandbox import Sandbox, Sandboxes, enter_namespace
from store.digest import Digest, DigestFunction
from store.hashing import hash_descriptor
from store.layout import blob_path
from store.repository import Store
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import in_child, ingest

_BLOCK = 1 << 20
_NAME = b"out/big.bin"


@dataclass(frozen=True, slots=True)
class _Captured:
    """Seconds of each, the bytes of disk that went with the capture, and whether the blob is the very file."""

    hashing: float
    copying: float
    capture: float
    fresh: float
    taken: int
    same_file: bool


def run(settings: Settings) -> Outcome:
    """A quick run captures 64 MiB against 4 MiB. Raises RuntimeError if the blob is another file than the output."""
    outcome = Outcome()
    sizes = {
        f"{size >> 20:,} MiB": size for size in (settings.size(64 << 20, 4 << 20), settings.size(1 << 30, 64 << 20))
    }
    small, large = sizes
    for number, side in alternate(list(sizes), settings.rounds(5)):
        place = settings.scratch / f"{number}-{sizes[side]}"
        place.mkdir()
        found = _measure(place, sizes[side])
        shutil.rmtree(place)
        if not found.same_file:
            raise RuntimeError("the blob is not the file that was written")
        outcome.add("hashing alone", side, "ms", found.hashing * 1e3)
        outcome.add("copying", side, "ms", found.copying * 1e3)
        outcome.add("capture", side, "ms", found.capture * 1e3)
        outcome.add("capture, less hashing", side, "ms", (found.capture - found.hashing) * 1e3)
        outcome.add("capture of fresh bytes", side, "ms", found.fresh * 1e3)
        outcome.add("disk taken by the capture", side, "MB", found.taken / 1e6)
    more = outcome.median("capture, less hashing", large) - outcome.median("capture, less hashing", small)
    copying = outcome.median("copying", large)
    outcome.aim(
        f"capture of {large}, beyond hashing and beyond {small}: of a copy", more / copying, 0.1, "", at_most=True
    )
    taken = outcome.median("disk taken by the capture", large)
    outcome.aim(f"disk taken by the capture of {large}", taken, sizes[large] / 1e8, "MB", at_most=True)
    return outcome


def _measure(place: Path, size: int) -> _Captured:
    source = place / "source"
    source.mkdir()
    (source / "input.txt").write_text("an input\n")
    root = ingest(place / "store", [(b"", source)], "tree").root

    def work() -> _Captured:
        enter_namespace()
        with Store.open(place / "store") as store:
            with _written(store, root, size) as (sandbox, _):
                began = time.perf_counter()
                sandbox.capture()
                fresh = time.perf_counter() - began
            with _written(store, root, size) as (sandbox, written):
                return _capture(store, sandbox, written, place / "copy", fresh)

    return in_child(work)


@contextmanager
def _written(store: Store, root: Digest, size: int) -> Iterator[tuple[Sandbox, Path]]:
    """A sandbox in which an action has just written its output; and where the host has that file."""
    with Sandboxes(store) as sandboxes, sandboxes.open(root, outputs=[_NAME]) as sandbox:
        block = os.urandom(_BLOCK)
        with open(sandbox.scratch.merged / os.fsdecode(_NAME), "wb") as out:
            out.writelines(number.to_bytes(8, "big") + block[8:] for number in range(size // _BLOCK))
        yield sandbox, sandbox.scratch.upper / os.fsdecode(_NAME)


def _capture(store: Store, sandbox: Sandbox, written: Path, copy: Path, fresh: float) -> _Captured:
    began = time.perf_counter()
    shutil.copyfile(written, copy)
    copying = time.perf_counter() - began
    copy.unlink()
    with open(written, "rb") as file:
        os.fsync(file.fileno())
        began = time.perf_counter()
        hash_descriptor(file.fileno(), DigestFunction.BLAKE3)
        hashing = time.perf_counter() - began
        inode = os.fstat(file.fileno()).st_ino
    free = _free_bytes(store)
    began = time.perf_counter()
    captured = sandbox.capture()
    capture = time.perf_counter() - began
    taken = free - _free_bytes(store)
    (output,) = captured.outputs
    if output.digest is None:
        raise RuntimeError("the output is not a file")
    blob = os.stat(store.layout.blobs / blob_path(output.digest))
    return _Captured(hashing, copying, capture, fresh, taken, blob.st_ino == inode)


def _free_bytes(store: Store) -> int:
    status = os.statvfs(store.layout.root)
    return status.f_bfree * status.f_frsize
