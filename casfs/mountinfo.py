"""What is mounted where: /proc/self/mountinfo, read and parsed.

A path's mount is found by name and never by stat: a stat on a mount whose
daemon hangs would hang too.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from store.leases import MOUNT_PREFIX

FUSE_TYPE = "fuse.casfs"
_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line: `device` as (major, minor), `path` where it is mounted, `kind` the type of the file system."""

    id: int
    device: tuple[int, int]
    path: bytes
    kind: str
    source: str

    @property
    def is_casfs(self) -> bool:
        """Whether casfs made it."""
        return self.kind == FUSE_TYPE or self.is_of_kernel_engine

    @property
    def is_of_kernel_engine(self) -> bool:
        """Whether it is one of casfs that no process serves."""
        return self.kind == "overlay" and self.source.startswith(MOUNT_PREFIX)


def parse_mountinfo(text: bytes) -> list[Mount]:
    """The mounts in the order of the text, which is that of their making."""
    mounts = []
    for line in text.splitlines():
        fields, _, rest = line.partition(b" - ")
        number, _, device, _, path, *_ = fields.split(b" ")
        kind, source, *_ = rest.split(b" ")
        major, _, minor = device.partition(b":")
        mounts.append(
            Mount(int(number), (int(major), int(minor)), _unescape(path), kind.decode(), os.fsdecode(_unescape(source)))
        )
    return mounts


def list_mounts() -> list[Mount]:
    """What this process can see mounted."""
    with open("/proc/self/mountinfo", "rb") as file:
        return parse_mountinfo(file.read())


def find_mount(path: str | bytes) -> Mount | None:
    """The topmost mount exactly at an absolute path, or None."""
    wanted = os.fsencode(path)
    return next((mount for mount in reversed(list_mounts()) if mount.path == wanted), None)


def resolve_mountpoint(mountpoint: Path) -> Path:
    """The absolute path without symbolic links, found without a stat on what may be a dead mount."""
    return _resolve(mountpoint)[0]


def find_mount_at(mountpoint: Path) -> Mount | None:
    """The topmost mount at a path, relative or with symbolic links in it, or None."""
    path, mount = _resolve(mountpoint)
    return mount or find_mount(str(path))


def _resolve(mountpoint: Path) -> tuple[Path, Mount | None]:
    """The path, and the mount there, if that had to be found on the way."""
    parent = os.path.realpath(mountpoint.absolute().parent)
    path = os.path.normpath(os.path.join(parent, mountpoint.name)) if mountpoint.name else parent
    mount = find_mount(path)
    return Path(path if mount else os.path.realpath(path)), mount


def mount_of(path: Path) -> Mount:
    """The mount that a file or directory lies on."""
    return mount_above(os.fsencode(os.path.realpath(path)), list_mounts())


def mount_above(path: bytes, mounts: list[Mount]) -> Mount:
    """The mount an absolute path without symbolic links lies on."""
    best = None
    for mount in mounts:
        prefix = mount.path.rstrip(b"/") + b"/"
        if (path + b"/").startswith(prefix) and (best is None or len(mount.path) >= len(best.path)):
            best = mount
    if best is None:
        raise LookupError(f"no mount holds {os.fsdecode(path)}")
    return best


def _unescape(field: bytes) -> bytes:
    return _OCTAL.sub(lambda match: bytes((int(match[1], 8),)), field)
