"""What mappings of a sandbox point at on the host: looked up, sorted by what they are and by volume.

Overlayfs takes a file by its path in a *volume* (a mount, and not what is
mounted in it), without symbolic links on the way. So each directory is opened,
which the kernel resolves, and asked for its path and its mount; what is in it
is then one stat a file: also of those that were mapped before, which saves
only to make the same of what it says. What was found is right when `resolve`
returns.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from casfs.errors import MountError, SandboxError
from casfs.mountinfo import Mount, list_mounts
from casfs.sandboxfs_protocol import Mapping, as_bazel_means, map_path
from casfs.syscalls import is_initial_namespace, mount_number
from store.entries import printable

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_EMPTY = os.makedev(1, 3)
"""/dev/null: what Bazel maps for a file that shall be empty. A program wants to see a file there, not a device."""


_PLACES_MOST = 1 << 16
_DIRECTORIES_MOST = 1 << 14
_stamp_of = attrgetter("st_ino", "st_ctime_ns", "st_mtime_ns", "st_size", "st_mode", "st_dev")
"""What is different when a file changed in any way: its owner can't without its time of change."""


class HostFile(NamedTuple):
    """A regular file: `redirect` is its path in the volume. Another one, or one that changed in any way, is unequal."""

    volume: int
    redirect: bytes
    size: int
    mode: int
    user: int
    group: int
    mtime_ns: int
    device: int
    inode: int
    ctime_ns: int


class _Before(NamedTuple):
    """What mappings of files of one directory were found to be, and the stamps that say whether they still are."""

    mappings: Sequence[Mapping]
    volume: int
    inside: bytes
    stamps: list[object]
    files: dict[bytes, HostFile]


class Link(NamedTuple):
    """A symbolic link, to be shown as one."""

    target: bytes


class Opened(NamedTuple):
    """A descriptor of what is to be mounted: a directory, or what is neither file nor directory."""

    descriptor: int
    host: bytes
    directory: bool
    writable: bool


@dataclass(slots=True)
class Resolved:
    """What a sandbox is made of, by path in it; `opened` belongs to whoever asked, and is closed by `close`."""

    files: dict[bytes, HostFile] = field(default_factory=dict)
    links: dict[bytes, Link] = field(default_factory=dict)
    opened: dict[bytes, Opened] = field(default_factory=dict)

    def close(self) -> None:
        """Close the descriptors."""
        for found in self.opened.values():
            os.close(found.descriptor)


class Volumes:
    """The volumes that files were found on, by number: a directory each, of which overlayfs sees one mount only.

    That is where the mount begins; in a user namespace, whose kernel shows nobody what lies below the mounts that it
    came with, the uppermost directory without another mount in it.
    """

    def __init__(self, source: str) -> None:
        """`source`: that of mounts of ours, which don't count."""
        self._source = source
        self._whole = is_initial_namespace()
        self._mounts: dict[int, Mount] = {}
        self._numbers: dict[bytes, int] = {}
        self._roots: list[int] = []
        self._tops: list[bytes] = []
        self._kinds: list[str] = []
        self._places: dict[tuple[int, bytes], tuple[int, bytes]] = {}
        self._before: dict[bytes, _Before] = {}

    def find(self, directory: int) -> tuple[int, bytes]:
        """The volume of an open directory, and its path in there, with a slash at its end. Raises MountError."""
        mount = mount_number(directory)
        path = os.readlink(b"/proc/self/fd/%d" % directory)
        found = self._places.get((mount, path))
        if found is None:
            if len(self._places) > _PLACES_MOST:
                self._places.clear()
            top = self._top(mount, path)
            found = self._places[mount, path] = (self._number(top, mount), _slash(path[len(top.rstrip(b"/")) :]))
        return found

    def root(self, volume: int) -> int:
        """A descriptor of the volume's root."""
        return self._roots[volume]

    def path(self, volume: int) -> bytes:
        """Where the volume's root is."""
        return self._tops[volume]

    def mounted_in(self, volume: int, directory: int) -> frozenset[bytes] | None:
        """Names in an open directory on which something is mounted; None where a file's device number tells that.

        In an overlay over several file systems files have other device numbers than their directory.
        """
        if self._kinds[volume] != "overlay":
            return None
        above = _slash(os.readlink(b"/proc/self/fd/%d" % directory))
        paths = (mount.path for mount in list_mounts() if mount.path.startswith(above))
        return frozenset(path[len(above) :] for path in paths)

    def kind(self, directory: int) -> str:
        """The type of the file system that an open directory is on; empty where that can't be seen."""
        number = mount_number(directory)
        return next((mount.kind for mount in list_mounts() if mount.id == number), "")

    def _top(self, number: int, path: bytes) -> bytes:
        if number not in self._mounts:
            self._mounts = {mount.id: mount for mount in list_mounts()}
        mount = self._mounts.get(number)
        if mount is None or not _slash(path).startswith(_slash(mount.path)):
            raise MountError(f"{printable(path)} can't be mapped: it is on a mount that this process doesn't see")
        if self._whole:
            return mount.path
        others = [_slash(m.path) for m in self._mounts.values() if m.source != self._source and m.path != mount.path]
        top = mount.path
        for name in [b"", *path[len(_slash(mount.path)) :].split(b"/")]:
            top = _slash(top) + name if name else top
            if not any(other.startswith(_slash(top)) for other in others):
                return top
        raise MountError(
            f"files of {printable(path)} can't be mapped in a user namespace, as something is mounted in that directory"
        )

    def _number(self, top: bytes, mount: int) -> int:
        number = self._numbers.get(top)
        if number is None:
            root = os.open(top, _DIRECTORY)
            if mount_number(root) != mount:
                os.close(root)
                raise MountError(f"files of the volume at {printable(top)} can't be mapped: another mount covers it")
            number = self._numbers[top] = len(self._roots)
            self._roots.append(root)
            self._tops.append(top)
            self._kinds.append(self.kind(root))
        return number

    def remember(self, directory: bytes, before: _Before) -> None:
        """For `find_before`."""
        if len(self._before) > _DIRECTORIES_MOST:
            self._before.clear()
        self._before[directory] = before

    def find_before(
        self, directory: bytes, mappings: Sequence[Mapping], volume: int, inside: bytes, opened: int
    ) -> dict[bytes, HostFile] | None:
        """What these mappings of files were found to be, where that is what they are; `opened` is the directory."""
        before = self._before.get(directory)
        if before is None or before[1:3] != (volume, inside) or before.mappings != mappings:
            return None
        try:
            found = [os.stat(name, dir_fd=opened, follow_symlinks=False) for _, _, name, _ in mappings]
        except OSError:
            return None
        return before.files if list(map(_stamp_of, found)) == before.stamps else None

    def close(self) -> None:
        """Close the descriptors."""
        for root in self._roots:
            os.close(root)
        self._roots.clear()


def resolve(mappings: Sequence[Mapping], volumes: Volumes) -> Resolved:
    """What the mappings point at now. Raises SandboxError naming the mapping that can't be, MountError."""
    resolved = Resolved()
    try:
        by_directory: defaultdict[bytes, list[Mapping]] = defaultdict(list)
        for mapping in mappings:
            by_directory[mapping.directory].append(mapping)
        links: list[tuple[Mapping, bytes]] = []
        for above, found in by_directory.items():
            _resolve_in(above, found, resolved, links, volumes)
        if links:
            _resolve_links(links, mappings, resolved, volumes)
        if len(resolved.files) + len(resolved.links) + len(resolved.opened) != len(mappings):
            _refuse_twice(mappings)
    except BaseException:
        resolved.close()
        raise
    return resolved


def _resolve_in(
    above: bytes,
    found: Sequence[Mapping],
    resolved: Resolved,
    links: list[tuple[Mapping, bytes]],
    volumes: Volumes,
) -> None:
    """Mappings of what is in one directory of the host."""
    try:
        directory = os.open(above, _DIRECTORY)
    except OSError as error:
        raise _unmappable(found[0], error) from error
    try:
        volume, inside = volumes.find(directory)
        before = volumes.find_before(above, found, volume, inside, directory)
        if before is not None:
            resolved.files.update(before)
            return
        device = os.fstat(directory).st_dev
        mounted = volumes.mounted_in(volume, directory)
        files: dict[bytes, HostFile] = {}
        stamps: list[object] = []
        for mapping in found:
            path, _, name, writable = mapping
            try:
                status = os.stat(name or b".", dir_fd=directory, follow_symlinks=False)
            except OSError as error:
                once = as_bazel_means(name, sure=False)
                if once == name:
                    raise _unmappable(mapping, error) from error
                try:
                    status = os.stat(once, dir_fd=directory, follow_symlinks=False)
                except OSError:
                    raise _unmappable(mapping, error) from error
                if path.endswith(name):
                    path = path[: -len(name)] + once
                name = once
            mode = status.st_mode
            ours = status.st_dev == device if mounted is None else name not in mounted
            if stat.S_ISREG(mode) and not writable and ours:
                stamps.append(_stamp_of(status))
                files[path] = HostFile(
                    volume,
                    inside + name,
                    status.st_size,
                    mode & 0o7777,
                    status.st_uid,
                    status.st_gid,
                    status.st_mtime_ns,
                    status.st_dev,
                    status.st_ino,
                    status.st_ctime_ns,
                )
            elif stat.S_ISLNK(mode):
                links.append((mapping, os.readlink(name, dir_fd=directory)))
            elif stat.S_ISCHR(mode) and status.st_rdev == _EMPTY and not writable:
                files[path] = HostFile(volume, b"", 0, 0o444, os.geteuid(), os.getegid(), 0, 0, 0, 0)
            else:
                opened = os.open(name or b".", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
                if path in resolved.opened:
                    os.close(opened)
                    continue
                resolved.opened[path] = Opened(opened, mapping.host, stat.S_ISDIR(mode), writable)
        resolved.files.update(files)
        if len(stamps) == len(files) == len(found) > 1 and mounted is None:
            volumes.remember(above, _Before(found, volume, inside, stamps, files))
    finally:
        os.close(directory)


def _resolve_links(
    links: list[tuple[Mapping, bytes]], mappings: Sequence[Mapping], resolved: Resolved, volumes: Volumes
) -> None:
    """A link stays one where it leads to something in the sandbox; else what it leads to is shown in its place.

    So nothing leads out, and what was declared is there: as with remote execution.
    """
    inside = {mapping.path for mapping in mappings}
    for path in list(inside):
        while path:
            path = path.rpartition(b"/")[0]
            if path in inside:
                break
            inside.add(path)
    for mapping, target in links:
        beside = os.path.join(mapping.path.rpartition(b"/")[0], target)
        at = os.path.normpath(b"/" + beside)[1:]
        end = os.path.realpath(mapping.host)
        if (not target.startswith(b"/") and at in inside) or not os.path.exists(end):
            resolved.links[mapping.path] = Link(target)
        else:
            again: list[tuple[Mapping, bytes]] = []
            shown = map_path(mapping.path, end, mapping.writable)
            _resolve_in(shown.directory, [shown], resolved, again, volumes)
            if again:
                raise SandboxError(f"can't map {printable(mapping.host)}: it changes while it is looked at")


def _slash(path: bytes) -> bytes:
    return path if path.endswith(b"/") else path + b"/"


def _unmappable(mapping: Mapping, error: OSError) -> SandboxError:
    reason = "it does not exist" if error.errno == errno.ENOENT else error.strerror
    return SandboxError(f"can't map {printable(mapping.host)} at {printable(mapping.path) or '/'}: {reason}")


def _refuse_twice(mappings: Sequence[Mapping]) -> None:
    """Raise SandboxError for the path that several mappings have."""
    seen: dict[bytes, Mapping] = {}
    for mapping in mappings:
        other = seen.setdefault(mapping.path, mapping)
        if other is not mapping:
            raise SandboxError(
                f"{printable(mapping.path) or '/'} is mapped twice: to {printable(other.host)} and to "
                f"{printable(mapping.host)}"
            )
