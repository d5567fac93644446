"""Layers of files that lie on the host: laid out in tmpfs, and those that come again kept warm.

An overlay of one layer: metadata in tmpfs over the volume that the files lie on (`casfs.overlay`), a layer for each
volume. Sizes and times are those that were found when the sandbox was asked for; bytes are the host's own.

Bazel names every file of every action. Laying a file out takes about 17 µs, finding that it is as before about 3; and
actions of one library, or with one toolchain, have most of their inputs in common. So each file has a number, which
stands for its path in the sandbox, its place on the host and its stamp, and a layer is a set of numbers:

    kept layers that are subsets of what is asked for    are taken, the largest first
    of the rest, files that were asked for before        become a layer that is kept, if they are `LEAST` or more
    all other files                                      are laid out for this sandbox alone

A file that changed in any way has another number, so no layer that was made before has it. Where much would have to be
laid out anew because little has changed (`casfs.planning` has how much that is), the layer that has all but that is
taken too, and what changed is laid out above it, where it hides what was there before. What is kept stays below a
budget of files, least recently used first. For one thread.

Of a volume that is an overlay itself (a container's root directory) no kept layer can be stacked: that would be three
overlays, one over the other, and the kernel takes two. Its files are *flat*: laid out for each sandbox anew, in the
lowest layer of the sandbox's own overlay, which has the volume below.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

from casfs.errors import MountError
from casfs.host_files import HostFile, Link, Volumes
from casfs.metadata import MEMORY_PER_NODE
from casfs.overlay import Family, new_tmpfs, stack, write_file
from casfs.planning import ALIKE, ENOUGH
from casfs.syscalls import is_initial_namespace
from store.entries import printable

LEAST = 32
"""Files from which a layer is worth keeping: it costs a mount 0.3 ms."""
MOST = 12
"""Kept layers in one sandbox: each makes looking up a name a little longer."""
_NUMBERS_MOST = 1 << 20
SOURCE = "casfs-sandboxfs"
"""What mountinfo shows in place of a device."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(eq=False, slots=True)
class _Kept:
    paths: dict[int, bytes]
    """Of its files, by number."""
    mounted: int


class Laid(NamedTuple):
    """What a sandbox is stacked from: descriptors of layers, the uppermost first.

    `data`: directories with the bytes of the lowest layer's files; where there are none, nothing of it is elsewhere.
    """

    layers: list[int]
    data: list[int]


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
        self._flat: dict[int, bool] = {}
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
    ) -> Laid:
        """Layers which together have those files, links and directories.

        `places` are empty files, for what is mounted on them. What isn't kept is closed by `opened`. Raises OSError
        where memory is short, MountError where the kernel can't have a volume below an overlay.
        """
        layers: list[int] = []
        flat: list[int] = []
        by_volume: dict[int, dict[int, bytes]] = {}
        for path, file in files.items():
            by_volume.setdefault(file.volume, {})[self._number(path, file)] = path
        if links or directories or places:
            layers.append(self._fresh([], files, opened, links, directories, places))
        for volume, numbers in by_volume.items():
            if self._is_flat(volume):
                flat.append(volume)
                continue
            rest = set(numbers)
            for kept in self._take(volume, rest):
                rest -= kept.paths.keys()
                layers.append(kept.mounted)
                self.taken += len(kept.paths)
            if len(rest) >= ENOUGH and (found := self._find_alike(volume, numbers, rest)) is not None:
                kept, above = found
                self.taken += len(rest & kept.paths.keys())
                rest -= kept.paths.keys() | above
                if above:
                    layers.insert(0, self._fresh([numbers[number] for number in above], files, opened))
                layers.append(kept.mounted)
                self._seen |= above
            again = rest & self._seen
            if len(again) >= LEAST:
                rest -= again
                layers.append(self._keep(volume, {number: numbers[number] for number in again}, files))
            if rest:
                layers.append(self._fresh([numbers[number] for number in rest], files, opened))
                self._seen |= rest
        if not flat:
            return Laid(layers, [])
        if len(flat) > 1:
            # Overlayfs would take a path from whichever has it, now or later.
            both = " and ".join(printable(self._volumes.path(volume)) for volume in flat[:2])
            raise MountError(f"files of {both} can't be mapped in one sandbox: both are overlays themselves")
        metadata = self._write([*by_volume[flat[0]].values()], files)
        opened.callback(os.close, metadata)
        return Laid([*layers, metadata], [self._volumes.root(flat[0])])

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
            if known[0] is file or known[0] == file:
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

    def _find_alike(self, volume: int, numbers: Mapping[int, bytes], rest: set[int]) -> tuple[_Kept, set[int]] | None:
        """A kept layer that has much of what is left, and nothing beside but files that changed meanwhile.

        Those are wanted as they are now: the numbers that have to lie above it.
        """
        for key in self._kept_by_volume.get(volume, ()):
            stale = key - numbers.keys()
            if len(stale) * ALIKE > len(key) or len(key & rest) < ENOUGH:
                continue
            kept = self._kept[key]
            now = [self._numbers.get(kept.paths[number]) for number in stale]
            above = {known[1] for known in now if known is not None and known[1] in numbers}
            if len(above) == len(stale):
                self._kept.move_to_end(key)
                return kept, above
        return None

    def _keep(self, volume: int, paths: dict[int, bytes], files: Mapping[bytes, HostFile]) -> int:
        numbers = frozenset(paths)
        kept = self._kept.get(numbers)
        if kept is None:  # else one sandbox has too many layers already for it to be taken
            kept = self._kept[numbers] = _Kept(paths, self._mount(paths.values(), files))
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
        metadata = self._write(paths, files)
        try:
            volume = files[next(iter(paths))].volume
            return stack([metadata], [self._volumes.root(volume)], self._family, SOURCE)
        finally:
            os.close(metadata)

    def _write(self, paths: Collection[bytes], files: Mapping[bytes, HostFile]) -> int:
        """The metadata of files of one volume."""
        chosen = {path: files[path] for path in sorted(paths)}
        self.laid_out += len(chosen)
        return write_layer(chosen, {}, (), (), self._family, chown=self._chown)

    def _is_flat(self, volume: int) -> bool:
        """Whether nothing can be stacked over an overlay that has this volume below; found out by trying, once."""
        flat = self._flat.get(volume)
        if flat is None:
            flat = self._flat[volume] = self._try_stacking(volume)
        return flat

    def _try_stacking(self, volume: int) -> bool:
        where = printable(self._volumes.path(volume))
        with ExitStack() as opened:
            layers = [new_tmpfs(SOURCE), new_tmpfs(SOURCE)]
            for layer in layers:
                opened.callback(os.close, layer)
            try:
                one = stack(layers[:1], [self._volumes.root(volume)], self._family, SOURCE)
            except OSError as error:
                raise MountError(
                    f"files of {where} can't be mapped, as the kernel has no overlay over it: {error.strerror}"
                ) from error
            opened.callback(os.close, one)
            try:
                os.close(stack([one, layers[1]], [], self._family, SOURCE))
            except OSError as error:
                if self._family is not Family.USER:
                    raise MountError(
                        f"files of {where} can't be mapped, as it is an overlay itself: that needs Linux 6.16"
                    ) from error
                return True
            return False


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
    top = new_tmpfs(SOURCE)
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
