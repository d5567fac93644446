"""Sandboxes below one directory, as Bazel's sandboxfs makes them: files of the host at other paths, and nothing else.

    with Sandboxfs(place) as sandboxfs:
        sandboxfs.create("0", [map_path(b"", b"/…/scratch", True), map_path(b"ws/a.c", b"/home/…/a.c", False), …])
        …
        sandboxfs.destroy("0")

Each sandbox is an overlay of its own, mounted at `place`/ID:

    upper   the writable directory that the sandbox's root is mapped to: Bazel's scratch, written by the kernel itself
    layers  the files that are mapped, by reference (`casfs.host_layers`)

A directory mapped elsewhere in the sandbox is a bind mount; with mappings inside it, an overlay like the root's.
What isn't mapped doesn't exist. A mapped file that is written to is copied to the upper directory first, so the
host's never changes; where there is no upper directory, nothing can be written.

`place` itself is a tmpfs: unmounting it takes all away, whoever does it (`casfs.guarding`). For one thread; sandboxes
that are destroyed are unmounted in the background.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from typing import Self

from casfs.errors import BadMountPoint, CasfsError, MissingCapability, SandboxError
from casfs.host_files import Opened, Volumes, resolve
from casfs.host_layers import SOURCE, HostLayers
from casfs.layers import default_budget
from casfs.mountinfo import Mount, find_mount, resolve_mountpoint
from casfs.mountpoint import check_mountpoint, find_own
from casfs.newmount import NO_DEV, NO_SUID, READ_ONLY, FileSystemContext, attach_mount
from casfs.overlay import find_family, new_tmpfs
from casfs.sandboxfs_protocol import Mapping, encode_name
from casfs.sandboxfs_regions import Region, divide
from casfs.scratch import ScratchSpace, remove_tree
from casfs.syscalls import MNT_DETACH, MS_PRIVATE, UMOUNT_NOFOLLOW, clone_mount, has_admin_capability, mount, umount
from store.entries import printable

log = logging.getLogger("casfs")


class Sandboxfs:
    """The directory with the sandboxes; `close` unmounts it."""

    def __init__(self, place: Path, *, budget: int | None = None) -> None:
        """`budget`: bytes of memory for layers that are kept.

        Clears what a sandboxfs that was killed left at `place`. Raises BadMountPoint, MissingCapability, MountError.
        """
        if not has_admin_capability():
            raise MissingCapability(
                "sandboxfs mounts, which this user may not: run Bazel as root, or in a namespace of its own: "
                "casfs sandboxfs --namespace bazel …"
            )
        family = find_family()
        place = resolve_mountpoint(place)
        clear_place(place)
        self.place = check_mountpoint(place)
        self._volumes = Volumes(SOURCE)
        budget = default_budget() if budget is None else budget
        self.layers = HostLayers(self._volumes, family, budget)
        self._sandboxes: dict[str, _Sandbox] = {}
        self._leaving: dict[str, Future[None]] = {}
        self._spaces: dict[int, ScratchSpace] = {}
        self._serial = count()
        self._closer = ThreadPoolExecutor(1, "unmount")
        self._empty = new_tmpfs(SOURCE)
        with ExitStack() as undo:
            undo.callback(self._let_go)
            top = new_tmpfs(SOURCE)
            attach_mount(top, self.place)
            os.close(top)
            undo.callback(umount, str(self.place), MNT_DETACH | UMOUNT_NOFOLLOW)
            # What is mounted below is nobody else's business: each copy in another namespace would take time.
            mount("none", str(self.place), "", MS_PRIVATE, "")
            self.mounted: Mount = find_own(self.place)
            self._lock = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            undo.pop_all()

    def create(self, name: str, mappings: Sequence[Mapping]) -> None:
        """Make a sandbox. Raises SandboxError naming the mapping that can't be, MountError."""
        if name in self._sandboxes:
            raise SandboxError(f"there is a sandbox {name!r} already")
        if name in self._leaving:
            self._leaving.pop(name).result()
        place = os.path.join(os.fsencode(self.place), encode_name(name))
        with ExitStack() as undo:
            try:
                os.mkdir(place, 0o755)
            except OSError as error:
                raise SandboxError(f"can't make {printable(place)}: {error.strerror}") from error
            undo.callback(os.rmdir, place)
            sandbox = _Sandbox(place)
            undo.callback(sandbox.close)
            if mappings:
                resolved = resolve(mappings, self._volumes)
                try:
                    for path, region in sorted(divide(resolved).items()):
                        self._mount_region(sandbox, path, region)
                    for path, found in resolved.opened.items():
                        if not found.directory:
                            sandbox.attach(clone_mount(found.descriptor, read_only=not found.writable), path)
                finally:
                    resolved.close()
            undo.pop_all()
        self._sandboxes[name] = sandbox
        self.layers.trim()

    def destroy(self, name: str) -> None:
        """Take a sandbox away; files that are open stay open. Raises SandboxError if there is none of that name."""
        sandbox = self._sandboxes.pop(name, None)
        if sandbox is None:
            raise SandboxError(f"there is no sandbox {name!r}")
        for gone in [other for other, future in self._leaving.items() if future.done()]:
            del self._leaving[gone]
        self._leaving[name] = self._closer.submit(_take_away, sandbox)

    def close(self) -> None:
        """Unmount everything, and remove what was made elsewhere. Harmless when repeated."""
        if self._lock >= 0:
            # All at once, before what waits to be taken away one by one.
            with suppress(OSError):
                umount(str(self.place), MNT_DETACH | UMOUNT_NOFOLLOW)
            os.close(self._lock)
            self._lock = -1
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _let_go(self) -> None:
        self._closer.shutdown(wait=True, cancel_futures=True)
        self.layers.close()
        self._volumes.close()
        os.close(self._empty)
        for space in self._spaces.values():
            space.close()

    def _mount_region(self, sandbox: _Sandbox, path: bytes, region: Region) -> None:
        host = region.host
        if host is not None and not region.has_entries:
            sandbox.attach(clone_mount(host.descriptor, read_only=not host.writable), path)
            return
        with ExitStack() as opened:
            try:
                laid = self.layers.lay_out(region.files, region.links, region.directories, region.places, opened)
                if laid.data and host is not None and not host.writable:
                    raise SandboxError(
                        f"can't map files of an overlay into {printable(host.host)}, which is mapped read-only itself"
                    )
                with FileSystemContext("overlay") as context:
                    context.set_string("source", SOURCE)
                    # Without metacopy, which with these there isn't: what is copied up is copied whole.
                    context.set_flag("userxattr")
                    for layer in laid.layers:
                        context.set_descriptor("lowerdir+", layer)
                    for directory in laid.data:
                        context.set_descriptor("datadir+", directory)
                    attributes = NO_SUID | NO_DEV
                    if host is not None and host.writable:
                        upper = os.open(f"/proc/self/fd/{host.descriptor}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                        opened.callback(os.close, upper)
                        context.set_descriptor("upperdir", upper)
                        context.set_descriptor("workdir", sandbox.add_work(self._make_work(host), opened))
                        context.set_string("index", "off")
                        # A sandbox is scratch: nobody reads it after a crash.
                        context.set_flag("volatile")
                    else:
                        attributes |= READ_ONLY
                        if not laid.data:
                            # Overlayfs takes no less than two layers where there is no upper one.
                            context.set_descriptor("lowerdir+", self._empty if host is None else host.descriptor)
                    mounted = context.mount(attributes)
            except OSError as error:
                where = printable(host.host) if host else "the files"
                if host is not None and host.writable and self._volumes.kind(host.descriptor) == "overlay":
                    raise SandboxError(
                        f"can't write to {where}: it is on an overlay, as a container's root directory is, and one "
                        "can't be written through another; have Bazel's --output_base on another file system, such as "
                        "a volume or a tmpfs"
                    ) from error
                raise SandboxError(
                    f"can't lay out {len(region.files)} files over {where}: {error.strerror or error}"
                ) from error
            sandbox.attach(mounted, path)

    def _make_work(self, host: Opened) -> Path:
        """A work directory for overlayfs, which has to be on the upper one's file system and not inside it."""
        device = os.fstat(host.descriptor).st_dev
        space = self._spaces.get(device)
        if space is None:
            beside = self.place.parent
            if os.stat(beside).st_dev != device:
                beside = Path(os.fsdecode(host.host)).parent
            space = self._spaces[device] = ScratchSpace(beside)
        work = space.directory / str(next(self._serial))
        os.mkdir(work, 0o700)
        return work


class _Sandbox:
    """What is mounted for one sandbox."""

    def __init__(self, place: bytes) -> None:
        self._place = place
        self._mounted = False
        self._works: list[Path] = []

    def attach(self, mounted: int, path: bytes) -> None:
        """Show a mount, whose descriptor is closed, at a path of the sandbox."""
        try:
            attach_mount(mounted, os.path.join(self._place, path) if path else self._place)
        except OSError as error:
            raise SandboxError(f"can't mount at {printable(path) or '/'}: {error.strerror}") from error
        finally:
            os.close(mounted)
        self._mounted = True

    def add_work(self, work: Path, opened: ExitStack) -> int:
        self._works.append(work)
        descriptor = os.open(work, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.callback(os.close, descriptor)
        return descriptor

    def close(self) -> None:
        """Unmount, with all that is mounted below; the directory stays."""
        if self._mounted:
            umount(self._place, MNT_DETACH | UMOUNT_NOFOLLOW)
            self._mounted = False
        for work in self._works:
            remove_tree(work)

    def remove(self) -> None:
        """Unmount and remove the directory."""
        self.close()
        os.rmdir(self._place)


def _take_away(sandbox: _Sandbox) -> None:
    try:
        sandbox.remove()
    except FileNotFoundError:
        pass  # everything was unmounted at once meanwhile
    except OSError:
        log.exception("taking a sandbox away")


def clear_place(place: Path) -> None:
    """Unmount what a sandboxfs that was killed left at `place`. Raises BadMountPoint if one is at work there."""
    mounted = find_mount(str(place))
    while mounted is not None and mounted.source == SOURCE:
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadMountPoint(f"a sandboxfs is at work at {place} already") from None
        finally:
            os.close(lock)
        umount(str(place), MNT_DETACH | UMOUNT_NOFOLLOW)
        mounted = find_mount(str(place))


def unmount_place(place: Path, number: int) -> None:
    """Unmount the sandboxes at `place`, if that is still the mount of that number. Raises CasfsError."""
    mounted = find_mount(str(place))
    if mounted is None or mounted.id != number:
        return
    try:
        umount(str(place), MNT_DETACH | UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise CasfsError(f"can't unmount {place}: {error.strerror}") from error
