"""Layers of files that lie on the host: laid out in tmpfs, and those that come again kept warm.

An overlay of one layer: metadata in tmpfs over the volume that the files lie on (`casfs.overlay`), a layer for each
volume. Sizes and times are those that were found when the sandbox was asked for; bytes are the host's own.

Bazel names every file of every action. Laying a file out takes about 17 µs, finding that it is as before about 3; and
actions of one library, or with one toolchain, have most of their inputs in common. So each file has a number, which
stands for its path in the sandbox, its place on the host and its stamp, and a layer is a set of numbers:

    kept layers that are subsets of what is asked for    are taken, the largest first
    of the rest, files that were asked for before        become a layer that is kept, if they are `LEAST` or more
    all other files                                      are laid out for this sandbox alone

A file that changed in any way has another number, so no layer that was made before has it. What is kept stays below a
budget of files, least recently used first. For one thread.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from casfs.host_files import HostFile, Link, Volumes
from casfs.metadata import MEMORY_PER_NODE
from casfs.overlay import Family, new_tmpfs, stack, write_file
from casfs.syscalls import is_initial_namespace

LEAST = 32
"""Files from which a layer is worth keeping: it costs a mount 0.3 ms."""
MOST = 12
"""Kept layers in one sandbox: each makes looking up a name a little longer."""
_NUMBERS_MOST = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(eq=False, slots=True)
class _Kept:
    numbers: frozenset[int]
    mounted: int


class HostLayers:
    """Gives what sandboxes are stacked from; `close` lets go of what is kept."""

    def __init__(self, volumes: Volumes, family: Family, budget: int) -> None:
        """`budget`: bytes of memory for layers that are kept."""
        self._volumes = volumes
        self._family = family
        self._most_files = budget // MEMORY_PER_NODE
        self._numbers: dict[bytes, tuple[HostFile, int]] = {}
        self._next = 0
        self._seen: set[int] = set()
        # Under the volume and the numbers; least recently used first.
        self._kept: OrderedDict[frozenset[int], _Kept] = OrderedDict()
        self._kept_by_volume: dict[int, set[frozenset[int]]] = {}
        self._files = 0
        self._chown = is_initial_namespace() and os.geteuid() == 0
        self.laid_out = 0
        """Files laid out so far, those of kept layers included."""
        self.taken = 0
        """Files that were ready in a kept layer."""

    def lay_out(
        self,
        files: Mapping[bytes, HostFile],
        links: Mapping[bytes, Link],
        directories: Collection[bytes],
        places: Collection[bytes],
        opened: ExitStack,
    ) -> list[int]:
        """Descriptors of layers, the uppermost first, which together have those files, links and directories.

        `places` are empty files, for what is mounted on them. What isn't kept is closed by `opened`. Raises OSError,
        where the kernel can't have a volume below an overlay or memory is short; MountError.
        """
        layers: list[int] = []
        by_volume: dict[int, dict[int, bytes]] = {}
        for path, file in files.items():
            by_volume.setdefault(file.volume, {})[self._number(path, file)] = path
        if links or directories or places:
            layers.append(self._fresh([], files, opened, links, directories, places))
        for volume, numbers in by_volume.items():
            rest = set(numbers)
            for kept in self._take(volume, rest):
                rest -= kept.numbers
                layers.append(kept.mounted)
                self.taken += len(kept.numbers)
            again = rest & self._seen
            if len(again) >= LEAST:
                rest -= again
                layers.append(self._keep(volume, frozenset(again), [numbers[number] for number in again], files))
            if rest:
                layers.append(self._fresh([numbers[number] for number in rest], files, opened))
                self._seen |= rest
        return layers

    def trim(self) -> None:
        """Let go of what is too much; only between sandboxes, as one that is being made may have it."""
        while self._files > self._most_files and self._kept:
            self._forget(next(iter(self._kept)))
        if len(self._numbers) > _NUMBERS_MOST:
            self.close()

    def close(self) -> None:
        """Let go of everything; sandboxes go on having what they have."""
        for numbers in list(self._kept):
            self._forget(numbers)
        self._numbers.clear()
        self._seen.clear()

    def _number(self, path: bytes, file: HostFile) -> int:
        known = self._numbers.get(path)
        if known is not None:
            if known[0] == file:
                return known[1]
            self._seen.discard(known[1])
        self._next += 1
        self._numbers[path] = (file, self._next)
        return self._next

    def _take(self, volume: int, wanted: set[int]) -> Iterable[_Kept]:
        """Kept layers that have nothing but what is wanted, and no file twice."""
        left = set(wanted)
        fitting = sorted(
            (numbers for numbers in self._kept_by_volume.get(volume, ()) if numbers <= wanted), key=len, reverse=True
        )
        for numbers in fitting[:MOST]:
            if numbers <= left:
                left -= numbers
                self._kept.move_to_end(numbers)
                yield self._kept[numbers]

    def _keep(
        self, volume: int, numbers: frozenset[int], paths: Collection[bytes], files: Mapping[bytes, HostFile]
    ) -> int:
        kept = self._kept.get(numbers)
        if kept is None:  # else one sandbox has too many layers already for it to be taken
            kept = self._kept[numbers] = _Kept(numbers, self._mount(paths, files))
            self._kept_by_volume.setdefault(volume, set()).add(numbers)
            self._files += len(numbers)
        return kept.mounted

    def _forget(self, numbers: frozenset[int]) -> None:
        kept = self._kept.pop(numbers)
        os.close(kept.mounted)
        self._files -= len(numbers)
        for layers in self._kept_by_volume.values():
            layers.discard(numbers)

    def _fresh(
        self,
        paths: Collection[bytes],
        files: Mapping[bytes, HostFile],
        opened: ExitStack,
        links: Mapping[bytes, Link] | None = None,
        directories: Collection[bytes] = (),
        places: Collection[bytes] = (),
    ) -> int:
        if paths:
            layer = self._mount(paths, files)
        else:
            layer = write_layer({}, links or {}, directories, places, self._family, chown=self._chown)
        opened.callback(os.close, layer)
        return layer

    def _mount(self, paths: Collection[bytes], files: Mapping[bytes, HostFile]) -> int:
        """Files of one volume: an overlay of metadata over that volume, attached nowhere."""
        chosen = {path: files[path] for path in sorted(paths)}
        metadata = write_layer(chosen, {}, (), (), self._family, chown=self._chown)
        self.laid_out += len(chosen)
        try:
            volume = next(iter(chosen.values())).volume
            return stack([metadata], [self._volumes.root(volume)], self._family, "casfs-sandboxfs")
        finally:
            os.close(metadata)


def write_layer(
    files: Mapping[bytes, HostFile],
    links: Mapping[bytes, Link],
    directories: Iterable[bytes],
    places: Iterable[bytes],
    family: Family,
    *,
    chown: bool,
) -> int:
    """A new tmpfs with these files, links, directories, and the directories above them; a descriptor of its root.

    The process's umask must be 0. Raises OSError.
    """
    top = new_tmpfs("casfs-sandboxfs")
    own = os.geteuid(), os.getegid()
    made = {b""}
    at, directory = b"", os.open(".", _DIRECTORY, dir_fd=top)
    try:
        for path, file in files.items():
            above, _, name = path.rpartition(b"/")
            if above != at:
                os.close(directory)
                directory = -1
                at, directory = above, _make_directory(top, above, made)
            size = file.size if file.redirect else 0
            write_file(directory, name, family, file.redirect, size, file.mode, file.mtime_ns)
            if chown and (file.user, file.group) != own:
                os.chown(name, file.user, file.group, dir_fd=directory)
        for path in sorted(directories):
            os.close(_make_directory(top, path, made))
        for path in places:
            above, _, name = path.rpartition(b"/")
            inside = _make_directory(top, above, made)
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o444, dir_fd=inside))
            os.close(inside)
        for path, link in links.items():
            above, _, name = path.rpartition(b"/")
            inside = _make_directory(top, above, made)
            os.symlink(link.target, name, dir_fd=inside)
            os.close(inside)
    except BaseException:
        os.close(top)
        raise
    finally:
        if directory >= 0:
            os.close(directory)
    return top


def _make_directory(top: int, path: bytes, made: set[bytes]) -> int:
    """A descriptor of that directory, made if need be, as those above it."""
    if path not in made:
        above = path.rpartition(b"/")[0]
        if above not in made:
            os.close(_make_directory(top, above, made))
        os.mkdir(path, 0o755, dir_fd=top)
        made.add(path)
    return os.open(path or b".", _DIRECTORY, dir_fd=top)
