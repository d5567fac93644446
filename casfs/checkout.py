"""Checkout: a tree written out as ordinary files and directories.

For those who want files and no mount: packaging, editing, a machine without
FUSE. Reads the index and the blobs; the target is a new or empty directory.

Every path is opened relative to the descriptor of its directory, which was
made here and is never reached through a symbolic link: no link in the tree
can lead a write elsewhere. What can be known to go wrong (blobs that are
missing) is found before anything is written; what goes wrong later removes all
that was made.

One thread lists directories and makes them and the symbolic links; files are
made by a few threads, a chunk of one directory's files at a time. A directory
gets its time, and its descriptor is closed, by whoever finishes it last.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from casfs.contents import Contents, PlainGateway
from casfs.errors import CheckoutError, MissingCapability
from casfs.tree import FIXED_MTIME_NS
from store import kernel
from store.digest import Digest
from store.entries import DirectoryEntry, FileEntry, ReferenceEntry, Stamp, SymlinkEntry, printable
from store.errors import BadInput, MissingBlob, NoSpace, StaleReference
from store.index import Table
from store.layout import blob_path
from store.prefetch import find_absent, prefetch
from store.repository import Store
from store.trees import Directory, Row, get_directory, list_entries, walk

_CHUNK_FILES = 32
_WORKERS_MOST = 8
_NAMED_MOST = 3
"""So many missing or changed files are named in a message; the others are counted."""


class Mode(Enum):
    """How files are made."""

    AUTO = "auto"
    """Reflink where the file systems can, else copy."""
    REFLINK = "reflink"
    """Share the blocks until one side is written; fails where the file systems can't."""
    HARDLINK = "hardlink"
    """A further name of the blob itself: no bytes, no time and mode of its own (0444 or 0555).

    Writing to such a file, as root or after a chmod, would damage the store;
    `casfs verify` would find it. A file whose executable bit isn't the blob's
    (a blob that is a program at one path and data at another) is copied, and
    so are files by reference.
    """
    COPY = "copy"
    """A copy with blocks of its own, also where the file system could share them."""


@dataclass(frozen=True, slots=True)
class CheckedOut:
    """What was made; `bytes` is the size of all files. The last three add up to `files`."""

    directories: int
    files: int
    symlinks: int
    bytes: int
    reflinked: int
    hardlinked: int
    copied: int


Progress = Callable[[int, int], None]
"""Told how many files and bytes have just been made; from several threads, one at a time."""


def check_out(
    store: Store,
    root: Digest,
    target: Path,
    *,
    mode: Mode = Mode.AUTO,
    progress: Progress = lambda files, size: None,
    workers: int | None = None,
) -> CheckedOut:
    """Write the interned tree `root` to `target`, which is made or is an empty directory.

    Files get the mode 0644 or 0755 as the umask has it, and the manifest's
    time or `FIXED_MTIME_NS`. Not synced to disk. Raises BadInput for a target
    that can't be used, MissingBlob or StaleReference naming the first files
    concerned, MissingCapability where `mode` is impossible there, NoSpace,
    CheckoutError. After an error the target is as it was.
    """
    with store.index.view() as view:
        directory = get_directory(view, root)
    with store.leases.acquire("checkout", [root], str(target)):
        # After the lease: from here on no collection takes anything of the tree.
        contents = Contents(store.blobs, PlainGateway(store.blobs))
        # What doesn't come is named by the check.
        prefetch(store, find_absent(store, directory))
        _check_contents(store, directory, contents)
        with _prepared(target, store.layout.root) as descriptor:
            maker = _FileMaker(store, contents, mode, target)
            return _Checkout(store, maker, progress, workers).run(directory, descriptor)


def _check_contents(store: Store, directory: Directory, contents: Contents) -> None:
    """Raise for everything that is missing or has changed, all together."""
    missing: list[tuple[bytes, Digest]] = []
    unknown: list[tuple[bytes, Digest]] = []
    stale: list[StaleReference] = []
    seen: set[bytes] = set()
    with store.index.view() as view:
        for path, entry in walk(view, directory):
            if isinstance(entry, FileEntry) and entry.digest.key not in seen:
                seen.add(entry.digest.key)
                if not store.blobs.has_file(entry.digest):
                    missing.append((path, entry.digest))
                elif view.get(Table.BLOBS, entry.digest.key) is None:
                    unknown.append((path, entry.digest))
            elif isinstance(entry, ReferenceEntry):
                try:
                    contents.check_reference(entry)
                except StaleReference as error:
                    stale.append(error)
    # Hashing those may write to the index, which must not happen within a view.
    missing += [(path, digest) for path, digest in unknown if not store.blobs.has(digest)]
    if missing:
        names = ", ".join(f"{printable(path)} ({digest})" for path, digest in missing[:_NAMED_MOST])
        more = f" and {len(missing) - _NAMED_MOST} more" if len(missing) > _NAMED_MOST else ""
        raise MissingBlob(f"can't check out: blobs missing in {store.layout.root}: {names}{more}; nothing was written")
    if stale:
        more = f" (and {len(stale) - 1} more like it)" if len(stale) > 1 else ""
        raise StaleReference(f"can't check out: {stale[0]}{more}; nothing was written")


@contextmanager
def _prepared(target: Path, store_root: Path) -> Iterator[int]:
    """A descriptor of the target, made if need be; whatever is in it is removed if this fails."""
    real = Path(os.path.realpath(target))
    if real == store_root or store_root in real.parents:
        raise BadInput(f"{target} is inside the store {store_root}: choose another place")
    try:
        os.mkdir(target)
        made = True
    except FileExistsError:
        made = False
    except OSError as error:
        raise BadInput(f"can't make the directory {target}: {error.strerror}") from error
    try:
        descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BadInput(f"can't check out to {target}: {error.strerror}") from error
    try:
        if not made and os.listdir(descriptor):
            raise BadInput(f"{target} is not empty: choose a new or an empty directory")
        try:
            yield descriptor
        except BaseException as error:
            _remove_below(descriptor)
            if made:
                with suppress(OSError):
                    os.rmdir(target)
            if isinstance(error, OSError):
                raise _explain(error, target) from error
            raise
    finally:
        os.close(descriptor)


def _explain(error: OSError, target: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"the disk of {target} is full; what had been written was removed")
    where = f": {printable(os.fsencode(error.filename))}" if isinstance(error.filename, str | bytes) else ""
    return CheckoutError(f"can't check out to {target}{where}: {error.strerror}; what had been written was removed")


def _remove_below(top: int) -> None:
    """Empty a directory as far as that can be done. With a stack of its own: trees may be deeper than Python's."""
    stack = [(os.dup(top), "")]
    try:
        while stack:
            here, name = stack[-1]
            below = _unlink_files(here)
            if below is not None:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                stack.append((os.open(below, flags, dir_fd=here), below))
                continue
            os.close(stack.pop()[0])
            if stack:
                os.rmdir(name, dir_fd=stack[-1][0])
    except OSError:
        # Somebody is using the target: their files are theirs to remove.
        pass
    finally:
        for descriptor, _ in stack:
            os.close(descriptor)


def _unlink_files(directory: int) -> str | None:
    """Remove what is no directory, until one is found; returns its name."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                return entry.name
            os.unlink(entry.name, dir_fd=directory)
    return None


class _OpenDirectory:
    """A directory being filled. Counts who still needs it; the last one sets its time and closes it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._users = 1
        self._lock = threading.Lock()

    def hold(self) -> None:
        with self._lock:
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            last = not self._users
        if last:
            try:
                os.utime(self.descriptor, ns=(FIXED_MTIME_NS, FIXED_MTIME_NS))
            finally:
                os.close(self.descriptor)


class _FileMaker:
    """Makes single files, in whichever way was asked for. Threads share one."""

    def __init__(self, store: Store, contents: Contents, mode: Mode, target: Path) -> None:
        self._store = store
        self._contents = contents
        self._mode = mode
        self._target = target
        # Set to False once the file systems have said that they can't: asking again costs a call per file.
        self._may_clone = mode in (Mode.AUTO, Mode.REFLINK)

    def make(self, entry: FileEntry | ReferenceEntry, directory: int) -> Mode:
        """Make the file below the directory; returns how."""
        source = self._contents.open(entry)
        try:
            if self._mode is Mode.HARDLINK and isinstance(entry, FileEntry) and self._link(entry, source, directory):
                return Mode.HARDLINK
            return self._fill(entry, source, directory)
        finally:
            os.close(source)

    def _link(self, entry: FileEntry, source: int, directory: int) -> bool:
        """Whether a hard link was made; False where only a copy can have the right mode, or there are too many."""
        if bool(os.fstat(source).st_mode & 0o100) != entry.executable:
            return False
        try:
            os.link(
                os.fsencode(blob_path(entry.digest)),
                entry.name,
                src_dir_fd=self._store.blobs.directory,
                dst_dir_fd=directory,
                follow_symlinks=False,
            )
        except OSError as error:
            if error.errno == errno.EMLINK:
                return False
            if error.errno == errno.EXDEV:
                raise MissingCapability(
                    f"can't make hard links in {self._target}: it is not on the file system of the store "
                    f"{self._store.layout.root}; use --mode copy, or a place on that file system"
                ) from error
            raise
        return True

    def _fill(self, entry: FileEntry | ReferenceEntry, source: int, directory: int) -> Mode:
        """Make a file of its own, by reflink or copy."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        target = os.open(entry.name, flags, 0o755 if entry.executable else 0o644, dir_fd=directory)
        try:
            done = self._transfer(entry, source, target)
            if isinstance(entry, ReferenceEntry):
                if Stamp.of(os.fstat(source)) != entry.stamp:
                    raise StaleReference(f"the file {printable(entry.path)} was changed while it was copied")
                mtime_ns = entry.stamp.mtime_ns
            else:
                mtime_ns = FIXED_MTIME_NS if entry.mtime_ns is None else entry.mtime_ns
            os.utime(target, ns=(mtime_ns, mtime_ns))
        finally:
            os.close(target)
        return done

    def _transfer(self, entry: FileEntry | ReferenceEntry, source: int, target: int) -> Mode:
        if self._may_clone:
            if kernel.try_clone(source, target):
                return Mode.REFLINK
            # A file by reference may be on another volume: that says nothing about the store's.
            if isinstance(entry, FileEntry):
                if self._mode is Mode.REFLINK:
                    raise MissingCapability(
                        f"can't make reflinks from {self._store.layout.root} in {self._target}: both must be on one "
                        "file system that can (btrfs, XFS); use --mode copy or auto"
                    )
                self._may_clone = False
        if self._mode is Mode.COPY:
            kernel.copy_unshared(source, target)
        else:
            kernel.copy(source, target)
        return Mode.COPY


class _Checkout:
    """One run over a tree."""

    def __init__(self, store: Store, maker: _FileMaker, progress: Progress, workers: int | None) -> None:
        self._store = store
        self._maker = maker
        self._progress = progress
        self._workers = workers or min(_WORKERS_MOST, len(os.sched_getaffinity(0)))
        self._lock = threading.Lock()
        self._made: Counter[Mode] = Counter()
        self._directories = self._symlinks = self._bytes = 0
        self._failed = threading.Event()

    def run(self, root: Directory, descriptor: int) -> CheckedOut:
        """Write everything below `root` into the open directory."""
        # One is held for each level of the tree.
        kernel.raise_open_files()
        pool = ThreadPoolExecutor(self._workers, "checkout")
        # In order, not whichever is done first: `concurrent.futures.wait` holds the locks of many futures, and
        # keeps them where a signal's exception interrupts it.
        jobs: deque[Future[None]] = deque()
        try:
            with closing(self._submit(pool, root, descriptor)) as started:
                for job in started:
                    jobs.append(job)
                    if len(jobs) > 4 * self._workers:
                        jobs.popleft().result()
            for job in jobs:
                job.result()
        except BaseException:
            self._failed.set()
            raise
        finally:
            # Jobs not begun are run too, not cancelled: they let go of their directory and see that it failed.
            pool.shutdown(wait=True)
        return CheckedOut(
            directories=self._directories,
            files=self._made.total(),
            symlinks=self._symlinks,
            bytes=self._bytes,
            reflinked=self._made[Mode.REFLINK],
            hardlinked=self._made[Mode.HARDLINK],
            copied=self._made[Mode.COPY],
        )

    def _submit(
        self, pool: ThreadPoolExecutor, root: Directory, descriptor: int
    ) -> Generator[Future[None], None, None]:
        """Make all directories and symbolic links, depth first, and start the making of files.

        Only the directories from the root down to the one at work are open,
        and those whose files are being made.
        """
        stack = [self._enter(root.id, _OpenDirectory(os.dup(descriptor)))]
        try:
            while stack:
                here, files, pending = stack[-1]
                while files:
                    chunk = files[-_CHUNK_FILES:]
                    del files[-_CHUNK_FILES:]
                    here.hold()
                    yield pool.submit(self._make_files, chunk, here)
                if pending:
                    row = pending.pop()
                    child = os.open(
                        row.entry.name,
                        os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                        dir_fd=here.descriptor,
                    )
                    stack.append(self._enter(row.id, _OpenDirectory(child)))
                else:
                    stack.pop()
                    here.release()
        finally:
            for here, _, _ in stack:
                here.release()

    def _enter(
        self, number: int, here: _OpenDirectory
    ) -> tuple[_OpenDirectory, list[FileEntry | ReferenceEntry], list[Row]]:
        """Make the subdirectories and links of a directory; returns its files and subdirectories, last first."""
        with self._store.index.view() as view:
            rows = list(list_entries(view, number))
        files: list[FileEntry | ReferenceEntry] = []
        directories: list[Row] = []
        for row in reversed(rows):
            entry = row.entry
            if isinstance(entry, DirectoryEntry):
                os.mkdir(entry.name, dir_fd=here.descriptor)
                directories.append(row)
            elif isinstance(entry, SymlinkEntry):
                os.symlink(entry.target, entry.name, dir_fd=here.descriptor)
                mtime_ns = FIXED_MTIME_NS if entry.mtime_ns is None else entry.mtime_ns
                os.utime(entry.name, ns=(mtime_ns, mtime_ns), dir_fd=here.descriptor, follow_symlinks=False)
                self._symlinks += 1
            else:
                files.append(entry)
        self._directories += 1
        return here, files, directories

    def _make_files(self, entries: list[FileEntry | ReferenceEntry], directory: _OpenDirectory) -> None:
        try:
            made: Counter[Mode] = Counter()
            size = 0
            for entry in entries:
                if self._failed.is_set():
                    return
                made[self._maker.make(entry, directory.descriptor)] += 1
                size += entry.digest.size if isinstance(entry, FileEntry) else entry.stamp.size
            with self._lock:
                self._made.update(made)
                self._bytes += size
                self._progress(len(entries), size)
        finally:
            directory.release()
