"""Making manifests: from a directory of the host, a REAPI root, a text, a checklist.

Each returns the interned root; giving it a name is the caller's. Reading files
is spread over the cores; everything else happens in the calling thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from store.blobs import Blobs, unpack_row
from store.digest import Digest, DigestFunction
from store.entries import DirectoryEntry, Entry, FileEntry, ReferenceEntry, path_order, printable, split_path
from store.errors import BadInput, BadManifest, DigestMismatch, MissingBlob
from store.hydration import Hydrator
from store.index import Index, Table
from store.ingest import Ingest, Transfer
from store.interning import intern_few
from store.layout import Layout
from store.manifest_text import (
    ChecklistLine,
    Item,
    check_paths,
    parse_checklist,
    parse_header,
    parse_manifest,
)
from store.messages import Messages
from store.scan import Excluded, ScannedDirectory, ScannedFile, scan_directory
from store.sources import TreeSource
from store.treebuilder import TreeBuilder
from store.trees import Directory

Progress = Callable[[int, int], None]
"""Told how many files and how many bytes have just been done."""


def _no_progress(files: int, size: int) -> None:
    return None


@dataclass(frozen=True, slots=True)
class ScanOptions:
    """How a directory of the host becomes a tree.

    `reference`: leave the files where they are. `keep_mtime`: record the
    modification times; without, the projection shows its fixed time.
    """

    function: DigestFunction = DigestFunction.BLAKE3
    excluded: Excluded = lambda path: False
    reference: bool = False
    keep_mtime: bool = False
    transfer: Transfer = Transfer.AUTO


_CHUNK_FILES = 64
_ROUND_CHUNKS = 64
_ROUND_BYTES = 1 << 30

T = TypeVar("T")
R = TypeVar("R")


class Importer:
    """Makes trees in one store."""

    def __init__(
        self, layout: Layout, index: Index, blobs: Blobs, hydrator: Hydrator, trees: Sequence[TreeSource] = ()
    ) -> None:
        """`trees`: who can be asked for all directories of a tree that is hardly known here."""
        self._trees = trees
        self._layout = layout
        self._index = index
        self._blobs = blobs
        self._hydrator = hydrator

    @contextmanager
    def _building(self, function: DigestFunction) -> Iterator[tuple[Ingest, TreeBuilder]]:
        with Ingest(self._layout, self._index, self._blobs) as ingest:
            yield ingest, TreeBuilder(self._index, ingest, function)

    def from_directories(
        self, grafts: Iterable[tuple[bytes, Path]], options: ScanOptions, progress: Progress = _no_progress
    ) -> Directory:
        """The tree that shows each host directory at its path; the path ``b""`` is the root itself.

        Raises BadInput for what can't be in a tree, BadManifest where two
        grafts have the same path.
        """
        grafts = list(grafts)
        for at, _ in grafts:
            if at:
                split_path(at, "graft")
        scanned = [(at, scan_directory(top, options.excluded, keep_mtime=options.keep_mtime)) for at, top in grafts]
        with self._building(options.function) as (ingest, builder):
            roots = [(at, self._add_scanned(top, options, ingest, builder, progress)) for at, top in scanned]
            if len(roots) == 1 and not roots[0][0]:
                return builder.finish(roots[0][1])
            if any(not at for at, _ in roots):
                raise BadManifest("a directory at the root can't be grafted beside others")
            items: list[tuple[bytes, Entry | None]] = [
                (at, DirectoryEntry(at.rpartition(b"/")[2], root)) for at, root in roots
            ]
            items.sort(key=lambda item: path_order(item[0]))
            return builder.finish(builder.add_paths(items))

    def _add_scanned(
        self,
        top: ScannedDirectory,
        options: ScanOptions,
        ingest: Ingest,
        builder: TreeBuilder,
        progress: Progress,
    ) -> Digest:
        order = top.in_postorder()
        store = os.path.realpath(os.fsencode(self._layout.root))
        if any(directory.path == store for directory in order):
            raise BadInput(f"the store itself lies there: leave {printable(store)} out with --exclude")
        files = [(directory.path, file) for directory in order for file in directory.files]
        roots: dict[int, Digest] = {}
        with ExitStack() as stack:
            digests: Iterator[Digest] | None = None
            if not options.reference:
                running = _in_parallel(
                    files,
                    ingest,
                    lambda item: _add_one(item[0] + b"/" + item[1].name, ingest, options),
                    lambda item: item[1].stamp.size,
                    lambda done: progress(len(done), sum(digest.size for digest in done)),
                )
                digests = stack.enter_context(closing(running))
            for directory in order:
                entries: list[Entry] = list(directory.symlinks)
                for file in directory.files:
                    entries.append(_file_entry(directory.path, file, next(digests) if digests else None, options))
                entries.extend(DirectoryEntry(child.name, roots.pop(id(child))) for child in directory.directories)
                roots[id(directory)] = builder.add_directory(entries)
        return roots[id(top)]

    def from_messages(self, root: Digest) -> Directory:
        """The tree of Directory messages that are in the store, or in a source, under their digests.

        Raises MissingBlob naming a Directory that isn't there, BadTree.
        """
        directory = intern_few(self._index, self._blobs, root)
        if directory is not None:
            return directory
        with self._building(root.function) as (ingest, builder):
            messages = Messages(root, self._index, self._blobs, self._hydrator, self._trees, ingest)
            builder.add_messages(root, messages.read)
            return builder.finish(root)

    def from_text(self, lines: Iterable[str], source: str) -> Directory:
        """The tree a manifest's text says. Its blobs need not be here.

        Raises BadManifest with the number of the line, or for a size that a
        blob which is here contradicts.
        """
        lines = iter(lines)
        function = parse_header(next(lines, ""), source)
        items = sorted(parse_manifest(lines, function, source), key=lambda item: path_order(item.path))
        check_paths(items, source)
        self._check_sizes(items, source)
        with self._building(function) as (_, builder):
            return builder.finish(builder.add_paths((item.path, item.entry) for item in items))

    def _check_sizes(self, items: list[Item], source: str) -> None:
        """Raise BadManifest for a digest whose size is not that of the blob that is here, or that another line says."""
        sizes: dict[bytes, int] = {}
        with self._index.view() as view:
            any_blobs = view.count(Table.BLOBS) > 0
            for _, entry, line in items:
                if not isinstance(entry, FileEntry):
                    continue
                digest = entry.digest
                known = sizes.get(digest.hash)
                if known is None:
                    value = view.get(Table.BLOBS, digest.key) if any_blobs else None
                    known = sizes[digest.hash] = digest.size if value is None else unpack_row(value).size
                if known != digest.size:
                    raise BadManifest(
                        f"{source}:{line}: digest {digest} has a wrong size: "
                        f"the blob with that hash has {known} bytes, here or in another line"
                    )

    def from_checklist(
        self, lines: Iterable[bytes], function: DigestFunction, source: str, base: Path | None = None
    ) -> Directory:
        """The tree that the output of `sha256sum` or `b3sum` names.

        With `base` the files are added from there, and must have the hashes
        the list says; without, the blobs must be in the store, as the list
        doesn't say sizes. Raises BadManifest, MissingBlob or DigestMismatch.
        """
        checklist = list(parse_checklist(lines, function, source))
        functions = {line.function for line in checklist} or {function}
        if len(functions) > 1:
            raise BadManifest(f"{source}: SHA-256 and BLAKE3 lines in one list")
        checklist.sort(key=lambda line: path_order(line.path))
        check_paths((Item(line.path, _LISTED, line.line) for line in checklist), source)
        with self._building(functions.pop()) as (ingest, builder):
            if base is None:
                entries: Generator[FileEntry, None, None] = (self._find_listed(line, source) for line in checklist)
            else:
                root = os.path.realpath(os.fsencode(base))
                entries = _in_parallel(
                    checklist, ingest, lambda line: _add_listed(line, root, ingest, source), lambda line: 0
                )
            with closing(entries):
                return builder.finish(
                    builder.add_paths((line.path, entry) for line, entry in zip(checklist, entries, strict=True))
                )

    def _find_listed(self, line: ChecklistLine, source: str) -> FileEntry:
        with self._index.view() as view:
            value = view.get(Table.BLOBS, Digest(line.function, line.hash, 0).key)
        if value is None:
            size = self._blobs.size_on_disk(line.function, line.hash)
            if size is None:
                raise MissingBlob(
                    f"{source}:{line.line}: no blob {line.function.label}:{line.hash.hex()} in the store, and a "
                    "checklist doesn't say sizes: add the files first, or name the directory they are in with --base"
                )
            return FileEntry(line.path.rpartition(b"/")[2], Digest(line.function, line.hash, size), False)
        row = unpack_row(value)
        return FileEntry(line.path.rpartition(b"/")[2], Digest(line.function, line.hash, row.size), row.executable)


_LISTED = FileEntry(b"", Digest(DigestFunction.SHA256, b"", 0), False)
"""Stands for a file that isn't looked at yet."""


def _add_listed(line: ChecklistLine, base: bytes, ingest: Ingest, source: str) -> FileEntry:
    # The programs that write such lists follow symbolic links, and list what they found behind them.
    path = os.path.realpath(os.path.join(base, line.path))
    try:
        status = os.stat(path, follow_symlinks=False)
        expected = Digest(line.function, line.hash, status.st_size)
        digest = ingest.add_file(path, line.function, expected=expected)
    except OSError as error:
        raise BadInput(f"{source}:{line.line}: can't read {printable(path)}: {error.strerror}") from error
    except BadInput as error:
        raise BadInput(f"{source}:{line.line}: {error}") from error
    except DigestMismatch as error:
        raise DigestMismatch(
            f"{source}:{line.line}: {error}; it was read as a list of {line.function.label}"
        ) from error
    return FileEntry(line.path.rpartition(b"/")[2], digest, bool(status.st_mode & 0o100))


def _file_entry(directory: bytes, file: ScannedFile, digest: Digest | None, options: ScanOptions) -> Entry:
    if digest is None:
        return ReferenceEntry(file.name, directory + b"/" + file.name, file.stamp, file.executable)
    return FileEntry(file.name, digest, file.executable, file.stamp.mtime_ns if options.keep_mtime else None)


def _in_parallel(
    items: Sequence[T],
    ingest: Ingest,
    add: Callable[[T], R],
    size: Callable[[T], int],
    finished: Callable[[list[R]], None] = lambda done: None,
) -> Generator[R, None, None]:
    """What `add` makes of each, in order, by a thread a core; published whenever enough is pending.

    While a round is made durable, which is waiting for the disk, the next one
    is read. So close it when an error may have come between: what is still
    being read must not go into an ingest that ends. `size` is an item's in bytes; `finished` is told the results of a
    chunk, in the calling thread.
    """

    def add_all(chunk: Sequence[T]) -> list[R]:
        return [add(item) for item in chunk]

    with ThreadPoolExecutor(os.cpu_count() or 1, "ingest") as pool:
        rounds = _rounds(items, size)
        running = [pool.submit(add_all, chunk) for chunk in next(rounds, [])]
        try:
            while running:
                done: list[R] = []
                for future in running:
                    results = future.result()
                    finished(results)
                    done += results
                running = [pool.submit(add_all, chunk) for chunk in next(rounds, [])]
                ingest.flush()
                yield from done
        finally:
            # After an error nothing more is worth reading.
            for future in running:
                future.cancel()


def _rounds(items: Sequence[T], size: Callable[[T], int]) -> Iterator[list[Sequence[T]]]:
    position = 0
    while position < len(items):
        chunks: list[Sequence[T]] = []
        total = 0
        while position < len(items) and len(chunks) < _ROUND_CHUNKS and total < _ROUND_BYTES:
            chunk = items[position : position + _CHUNK_FILES]
            total += sum(map(size, chunk))
            chunks.append(chunk)
            position += len(chunk)
        yield chunks


def _add_one(path: bytes, ingest: Ingest, options: ScanOptions) -> Digest:
    try:
        return ingest.add_file(path, options.function, transfer=options.transfer)
    except OSError as error:
        raise BadInput(f"can't read {printable(path)}: {error.strerror}") from error
