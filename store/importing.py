"""Making manifests: from a directory of the host, a REAPI root, a text, a checklist.

Each returns the interned root; giving it a name is the caller's. Reading files
is spread over the cores; everything else happens in the calling thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from store.blobs import Blobs, unpack_row
from store.digest import Digest, DigestFunction
from store.entries import DirectoryEntry, Entry, FileEntry, ReferenceEntry, printable
from store.errors import BadInput, BadManifest, MissingBlob
from store.index import Index, Table
from store.ingest import Ingest, Transfer
from store.layout import Layout
from store.manifest_text import ChecklistLine, parse_checklist, parse_manifest, path_order
from store.scan import Excluded, ScannedDirectory, ScannedFile, scan_directory
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


class Importer:
    """Makes trees in one store."""

    def __init__(self, layout: Layout, index: Index, blobs: Blobs) -> None:
        self._layout = layout
        self._index = index
        self._blobs = blobs

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
        files = [(directory.path, file) for directory in order for file in directory.files]
        if options.reference:
            digests: Iterator[Digest | None] = iter([None] * len(files))
        else:
            digests = _in_parallel(files, ingest, options, progress)
        roots: dict[int, Digest] = {}
        for directory in order:
            entries: list[Entry] = list(directory.symlinks)
            for file, digest in zip(directory.files, digests if directory.files else (), strict=False):
                entries.append(_file_entry(directory.path, file, digest, options))
            entries.extend(DirectoryEntry(child.name, roots.pop(id(child))) for child in directory.directories)
            roots[id(directory)] = builder.add_directory(entries)
        return roots[id(top)]

    def from_messages(self, root: Digest) -> Directory:
        """The tree of Directory messages that are in the store under their digests.

        Raises MissingBlob naming a Directory that isn't there, BadTree.
        """
        with self._building(root.function) as (_, builder):
            builder.add_messages(root, self._read_message)
            return builder.finish(root)

    def _read_message(self, digest: Digest) -> bytes:
        if not digest.size:
            return b""  # the empty blob always exists
        descriptor = self._blobs.open(digest)
        with open(descriptor, "rb") as file:
            return file.read()

    def from_text(self, lines: Iterable[str], source: str) -> Directory:
        """The tree a manifest's text says. Its blobs need not be here.

        Raises BadManifest with the number of the line, or for a size that a
        blob which is here contradicts.
        """
        lines = iter(lines)
        head = list(islice(lines, 1))
        items = parse_manifest([*head, *lines], source)
        ordered = sorted(items, key=lambda item: path_order(item[0]))
        function = DigestFunction.named(head[0].split()[3])
        with self._building(function) as (_, builder):
            self._check_sizes(ordered, source)
            return builder.finish(_named_source(source, builder, ordered))

    def _check_sizes(self, items: Iterable[tuple[bytes, Entry | None]], source: str) -> None:
        """Raise BadManifest for a digest whose size is not that of the blob that is here."""
        with self._index.view() as view:
            for path, entry in items:
                if isinstance(entry, FileEntry) and (value := view.get(Table.BLOBS, entry.digest.key)) is not None:
                    size = unpack_row(value).size
                    if size != entry.digest.size:
                        raise BadManifest(
                            f"{source}: {printable(path)} has the digest {entry.digest}, "
                            f"but the blob with that hash has {size} bytes"
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
        with self._building(functions.pop()) as (ingest, builder):
            items: list[tuple[bytes, Entry | None]] = []
            for line in checklist:
                entry = self._find_listed(line, source) if base is None else _add_listed(line, base, ingest, source)
                items.append((line.path, entry))
                if ingest.is_full:
                    ingest.flush()
            items.sort(key=lambda item: path_order(item[0]))
            return builder.finish(_named_source(source, builder, items))

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


def _named_source(source: str, builder: TreeBuilder, items: list[tuple[bytes, Entry | None]]) -> Digest:
    try:
        return builder.add_paths(items)
    except BadManifest as error:
        raise BadManifest(f"{source}: {error}") from error


def _add_listed(line: ChecklistLine, base: Path, ingest: Ingest, source: str) -> FileEntry:
    path = os.path.join(os.fsencode(base), line.path)
    try:
        status = os.stat(path, follow_symlinks=False)
        expected = Digest(line.function, line.hash, status.st_size)
        digest = ingest.add_file(path, line.function, expected=expected)
    except OSError as error:
        raise BadInput(f"{source}:{line.line}: can't read {printable(path)}: {error.strerror}") from error
    return FileEntry(line.path.rpartition(b"/")[2], digest, bool(status.st_mode & 0o100))


def _file_entry(directory: bytes, file: ScannedFile, digest: Digest | None, options: ScanOptions) -> Entry:
    if digest is None:
        return ReferenceEntry(file.name, directory + b"/" + file.name, file.stamp, file.executable)
    return FileEntry(file.name, digest, file.executable, file.stamp.mtime_ns if options.keep_mtime else None)


def _in_parallel(
    files: list[tuple[bytes, ScannedFile]], ingest: Ingest, options: ScanOptions, progress: Progress
) -> Iterator[Digest]:
    """The files' digests in order, read by a thread a core; flushed whenever enough is pending."""

    def add(chunk: list[tuple[bytes, ScannedFile]]) -> list[Digest]:
        return [_add_one(directory + b"/" + file.name, ingest, options) for directory, file in chunk]

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers, "ingest") as pool:
        position = 0
        while position < len(files):
            # A round at a time: nothing may be added while a flush runs.
            chunks = []
            size = 0
            while position < len(files) and len(chunks) < 64 and size < 1 << 30:
                chunk = files[position : position + _CHUNK_FILES]
                size += sum(file.stamp.size for _, file in chunk)
                chunks.append(chunk)
                position += len(chunk)
            done: list[Digest] = []
            for digests in pool.map(add, chunks):
                progress(len(digests), sum(digest.size for digest in digests))
                done += digests
            ingest.flush()
            yield from done


def _add_one(path: bytes, ingest: Ingest, options: ScanOptions) -> Digest:
    try:
        return ingest.add_file(path, options.function, transfer=options.transfer)
    except OSError as error:
        raise BadInput(f"can't read {printable(path)}: {error.strerror}") from error
