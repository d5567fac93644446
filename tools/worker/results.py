"""From what was taken out of a sandbox to an ActionResult. No I/O: blobs go into an ingest session."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from casfs.capture import Output as Found
from casfs.capture import Taken
from store.digest import Digest
from store.directory import encode_directory
from store.entries import DirectoryEntry, Entry, FileEntry, SymlinkEntry, printable
from store.ingest import Ingest
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.requests import write_digest
from tools.worker.task import Output, Task


def add_outputs(result: reapi.ActionResult, task: Task, taken: Taken, ingest: Ingest) -> tuple[list[str], list[Digest]]:
    """Fill a result in with the outputs that are there; Tree messages go into `ingest`.

    Returns sentences on those that are there and can't be named, and the
    digests of all that the result names.
    """
    notes = [f"output {printable(path)} isn't kept: {why}" for path, why in taken.skipped]
    found = {output.path: output for output in taken.outputs}
    inside = _Inside(found, taken.directories)
    trees: dict[Digest, Digest] = {}
    named: list[Digest] = []
    for output in task.outputs:
        there = found.get(output.place) or inside.find(output.place)
        if there is None:
            continue
        if there.kind != "symlink" and output.kind not in ("", there.kind):
            notes.append(f"output {output.path!r} isn't kept: it is declared as a {output.kind}, and is a {there.kind}")
            continue
        if there.kind == "directory" and there.digest is not None:
            _add_directory(result, task, output, there.digest, taken, trees, ingest)
            named += _below(there.digest, taken.directories)
        elif there.digest is not None:
            file = result.output_files.add(path=output.path, is_executable=there.executable)
            file.digest.CopyFrom(write_digest(there.digest))
            named.append(there.digest)
        else:
            _add_link(result, output, os.fsdecode(there.target or b""))
    return notes, [*named, *trees.values()]


def _add_link(result: reapi.ActionResult, output: Output, target: str) -> None:
    result.output_symlinks.add(path=output.path, target=target)
    # Older clients look where they have declared it.
    if output.kind == "file":
        result.output_file_symlinks.add(path=output.path, target=target)
    elif output.kind == "directory":
        result.output_directory_symlinks.add(path=output.path, target=target)


def _add_directory(
    result: reapi.ActionResult,
    task: Task,
    output: Output,
    digest: Digest,
    taken: Taken,
    trees: dict[Digest, Digest],
    ingest: Ingest,
) -> None:
    directory = result.output_directories.add(path=output.path)
    if task.tree:
        if digest not in trees:
            trees[digest] = ingest.add_bytes(make_tree(digest, taken.directories), digest.function)
        directory.tree_digest.CopyFrom(write_digest(trees[digest]))
        directory.is_topologically_sorted = True
    if task.directory_messages:
        directory.root_directory_digest.CopyFrom(write_digest(digest))


class _Inside:
    """Outputs that lie in others: there may be many thousand in one directory."""

    def __init__(self, found: Mapping[bytes, Found], directories: Mapping[Digest, Sequence[Entry]]) -> None:
        self._found = found
        self._directories = directories
        self._by_name: dict[Digest, dict[bytes, Entry]] = {}

    def find(self, place: bytes) -> Found | None:
        components = place.split(b"/")
        for depth in range(1, len(components)):
            outer = self._found.get(b"/".join(components[:depth]))
            if outer is None or outer.kind != "directory":
                continue
            entry = outer.entry
            for name in components[depth:]:
                if not isinstance(entry, DirectoryEntry):
                    return None
                inner = self._names(entry.digest).get(name)
                if inner is None:
                    return None
                entry = inner
            return _as_found(place, entry)
        return None

    def _names(self, directory: Digest) -> dict[bytes, Entry]:
        if directory not in self._by_name:
            self._by_name[directory] = {entry.name: entry for entry in self._directories[directory]}
        return self._by_name[directory]


def _as_found(place: bytes, entry: Entry) -> Found | None:
    match entry:
        case FileEntry(digest=digest, executable=executable):
            return Found(place, "file", digest, executable)
        case DirectoryEntry(digest=digest):
            return Found(place, "directory", digest)
        case SymlinkEntry(target=target):
            return Found(place, "symlink", None, target=target)
    return None


def _order(root: Digest, directories: Mapping[Digest, Sequence[Entry]]) -> list[Digest]:
    """The distinct directories of a tree, each before those in it.

    By depth first, backwards: a directory that is in two others comes after both.
    """
    finished: dict[Digest, None] = {}
    pending: list[tuple[Digest, bool]] = [(root, False)]
    while pending:
        digest, below_done = pending.pop()
        if digest in finished:
            continue
        if below_done:
            finished[digest] = None
            continue
        pending.append((digest, True))
        pending.extend((entry.digest, False) for entry in directories[digest] if isinstance(entry, DirectoryEntry))
    return list(reversed(finished))


def make_tree(root: Digest, directories: Mapping[Digest, Sequence[Entry]]) -> bytes:
    """The Tree message of a directory, topologically sorted."""
    first, *rest = (encode_directory(list(directories[digest])) for digest in _order(root, directories))
    return _field(1, first) + b"".join(_field(2, message) for message in rest)


def _field(number: int, value: bytes) -> bytes:
    """A length-delimited field: the messages are bytes already, and stay what their digests say."""
    head = bytearray((number << 3 | 2,))
    size = len(value)
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head) + value


def _below(root: Digest, directories: Mapping[Digest, Sequence[Entry]]) -> list[Digest]:
    """The files of a tree, and its directories' messages."""
    found: list[Digest] = []
    for digest in _order(root, directories):
        found.append(digest)
        found += [entry.digest for entry in directories[digest] if isinstance(entry, FileEntry)]
    return found
