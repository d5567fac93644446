"""File systems on loop devices, and btrfs subvolumes by bare ioctls: what is measured on.

A volume is mounted in the mount namespace of the caller. Where that is its own,
the kernel unmounts it and frees the loop device with the last process, however
that ends. Raises Refused where this kernel or machine can't.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from casfs.mountinfo import mount_of
from tools.bench.machine import lacks_journal
from tools.bench.workers import Refused

_BLOCK = 4096
"""Direct I/O needs the sectors of the loop device to be no smaller than the blocks below it."""
_SECONDS = 120
_JOURNALED_BYTES = 48 << 30
_MADE_AT_ONCE = {"ext4": ("-E", "lazy_itable_init=0,lazy_journal_init=0")}
"""What the kernel would else go on making while somebody measures."""

# linux/btrfs.h: btrfs_ioctl_vol_args (descriptor, name), btrfs_ioctl_vol_args_v2 (…, transid, flags, unused, name).
_SUBVOL_CREATE, _SNAP_DESTROY, _SNAP_CREATE_V2 = 0x5000940E, 0x5000940F, 0x50009417
_ARGUMENTS = struct.Struct("=q4088s")
_ARGUMENTS_V2 = struct.Struct("=qQQ32x4040s")


@contextmanager
def mounted_volume(place: Path, kind: str, size: int) -> Iterator[Path]:
    """A new file system of that kind and size, mounted at `place`; its image is beside it meanwhile. Root only."""
    for program in ("losetup", f"mkfs.{kind}", "mount", "umount"):
        if shutil.which(program) is None:
            raise Refused(f"{program} is not installed")
    image = place.with_name(f"{place.name}.image")
    try:
        with open(image, "wb") as file:
            file.truncate(size)
        _mount(image, place, kind)
        try:
            yield place
        finally:
            _run("umount", place)
    finally:
        image.unlink(missing_ok=True)


@contextmanager
def journaled(directory: Path, size: int = _JOURNALED_BYTES) -> Iterator[Path]:
    """The directory; where it is on an ext4 without a journal, and root asks, a new one with a journal in there.

    `size`: bytes that it has room for; it takes what is written, and for its inodes a sixtieth at once.

    Without a journal ext4 doesn't use the inodes of what was removed in the last
    minutes again, and looks at each of them when it makes a file
    (fs/ext4/ialloc.c, recently_deleted). What one side of a benchmark removes
    would so be paid for by the next, and Bazel's sandboxes, which come and go by
    the hundred links, by themselves: they took five times as long.
    """
    if os.geteuid() or not lacks_journal(mount_of(directory)):
        yield directory
        return
    with mounted_volume(directory / "journaled", "ext4", size) as volume:
        yield volume


def _mount(image: Path, place: Path, kind: str) -> None:
    # Direct: what isn't in the cache of the volume must not come out of the image's.
    device = _run("losetup", "--find", "--show", "--direct-io=on", f"--sector-size={_BLOCK}", image).strip()
    try:
        _run(f"mkfs.{kind}", "-q", *_MADE_AT_ONCE.get(kind, ()), device)
        place.mkdir()
        _run("mount", "-t", kind, device, place)
    finally:
        # While it is mounted, this only has the device freed with the mount.
        _run("losetup", "--detach", device)


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        raise Refused(f"{command[0]}: {words[-1]}")
    return done.stdout


def create_subvolume(path: Path) -> None:
    """An empty subvolume."""
    _call(path.parent, _SUBVOL_CREATE, _ARGUMENTS.pack(0, os.fsencode(path.name)))


def snapshot(subvolume: Path, path: Path) -> None:
    """A writable snapshot of the subvolume."""
    source = os.open(subvolume, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _call(path.parent, _SNAP_CREATE_V2, _ARGUMENTS_V2.pack(source, 0, 0, os.fsencode(path.name)))
    finally:
        os.close(source)


def remove_subvolume(path: Path) -> None:
    """Of the subvolume or snapshot the name goes at once, the rest in the background: see `wait_removed`."""
    _call(path.parent, _SNAP_DESTROY, _ARGUMENTS.pack(0, os.fsencode(path.name)))


def wait_removed(volume: Path) -> None:
    """Until the background has taken away all removed subvolumes of a btrfs."""
    # Wakes the background, which would else begin with the next commit, up to 30 s later.
    _run("btrfs", "filesystem", "sync", volume)
    _run("btrfs", "subvolume", "sync", volume)


def _call(directory: Path, request: int, arguments: bytes) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(descriptor, request, bytearray(arguments))
    finally:
        os.close(descriptor)
