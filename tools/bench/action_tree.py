"""The input root of the benchmark's action: a C++ source, the headers it includes, and as many files as wanted beside.

    project/main.cc, project/lib0..7/   the action's own sources; two headers and the source differ in each variant
    usr/…                               the compiler's and the system's headers that it includes, as on this machine
    external/…                          what the action declares and never opens

So a variant's root was never seen before, and its big subtrees were, as in a
build that goes on: two of eight libraries have changed. Digests are SHA-256, which buildbox-fuse knows too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from store.digest import Digest, DigestFunction
from store.entries import DirectoryEntry, Entry, FileEntry, path_order
from store.ingest import Ingest
from store.repository import Store
from store.treebuilder import TreeBuilder
from store.trees import find_directory, walk
from tools.bench.toolchain import Toolchain, compile_source

PROJECT = b"project"
FUNCTION = DigestFunction.SHA256

_LIBRARIES = _HEADERS = 8
_WIDTH = 100
_CONTENTS = 20_000
"""So many different files are beside what is read; a larger tree has each several times, under different names."""

_INCLUDES = (
    "bits/stdc++.h",
    "arpa/inet.h",
    "dirent.h",
    "dlfcn.h",
    "fcntl.h",
    "grp.h",
    "netdb.h",
    "netinet/in.h",
    "poll.h",
    "pthread.h",
    "pwd.h",
    "regex.h",
    "sched.h",
    "semaphore.h",
    "signal.h",
    "sys/ioctl.h",
    "sys/mman.h",
    "sys/resource.h",
    "sys/select.h",
    "sys/socket.h",
    "sys/stat.h",
    "sys/uio.h",
    "sys/un.h",
    "sys/wait.h",
    "termios.h",
    "unistd.h",
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One input root; `project` is its subtree that other variants don't have."""

    root: Digest
    project: Digest


class Placed(NamedTuple):
    """A file of a tree: its path and its blob."""

    path: bytes
    digest: Digest


def _source(number: int) -> str:
    """The action's source in variant `number`; it compiles."""
    system = (f"#if __has_include(<{name}>)\n#include <{name}>\n#endif" for name in _INCLUDES)
    own = (f'#include "{library}/{name}"' for library in _libraries() for name in _names())
    return "\n".join([f"// variant {number:06d}", *system, *own, "int main() { return lib0_0(); }", ""])


def _libraries() -> list[str]:
    return [f"lib{library}" for library in range(_LIBRARIES)]


def _names() -> list[str]:
    return [f"part{header}.h" for header in range(_HEADERS)]


def _project(number: int) -> Iterator[tuple[str, str]]:
    """Paths and contents of the action's own sources in variant `number`."""
    changed = {(number % _LIBRARIES, 0), ((number + 3) % _LIBRARIES, 1)}
    for library in range(_LIBRARIES):
        for header, name in enumerate(_names()):
            text = f"#pragma once\ninline int lib{library}_{header}() {{ return 0; }}\n" + "// what it is for\n" * 150
            yield f"lib{library}/{name}", text + f"// variant {number:06d}\n" * ((library, header) in changed)
    yield "main.cc", _source(number)


def find_headers(toolchain: Toolchain, scratch: Path) -> list[Path]:
    """The headers of this machine that the action's source includes, each once. Raises RuntimeError."""
    project = scratch / "project"
    for path, text in _project(0):
        place = project / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    done = compile_source(toolchain, project / "main.cc", None, mount=None, preprocess=True)
    if not done.ok:
        raise RuntimeError(f"the action's source doesn't compile:\n{done.messages}")
    found = {Path(os.path.realpath(header)) for header in done.headers}
    return sorted(header for header in found if not header.is_relative_to(project))


def inputs_read(headers: list[Path]) -> list[bytes]:
    """The paths that the action reads, in the input root."""
    own = [PROJECT + b"/" + os.fsencode(path) for path, _ in _project(0)]
    return [*own, *(os.fsencode(header)[1:] for header in headers)]


class ActionTree:
    """Makes the variants of one tree in a store. Its blobs are added when it is made."""

    def __init__(self, store: Store, headers: list[Path], padding: int) -> None:
        self._store = store
        with store.ingest() as ingest:
            files = [Placed(os.fsencode(header)[1:], ingest.add_file(header, FUNCTION)) for header in headers]
            files += _padding(ingest, padding)
        files.sort(key=lambda file: path_order(file.path))
        self._files = files
        self._unchanged: list[DirectoryEntry] = []

    def variant(self, number: int, *, salt: int = 0) -> Variant:
        """Variant `number`, its new blobs durable.

        With a `salt` (from 1 on) no directory of it is in any other variant:
        one file in each has a time that says so.
        """
        with self._store.ingest() as ingest:
            builder = TreeBuilder(self._store.index, ingest, FUNCTION)
            own = [Placed(os.fsencode(p), ingest.add_bytes(text.encode(), FUNCTION)) for p, text in _project(number)]
            own.sort(key=lambda file: path_order(file.path))
            project = builder.add_paths(_items(own, salt))
            unchanged = self._unchanged
            if salt or not unchanged:
                unchanged = list(self._add_unchanged(builder, salt))
            entries: list[Entry] = [DirectoryEntry(PROJECT, project), *unchanged]
            root = builder.add_directory(entries)
            builder.finish(root)
        if not salt:
            self._unchanged = unchanged
        return Variant(root, project)

    def _add_unchanged(self, builder: TreeBuilder, salt: int) -> Iterator[DirectoryEntry]:
        tops: dict[bytes, list[Placed]] = {}
        for file in self._files:
            top, _, path = file.path.partition(b"/")
            tops.setdefault(top, []).append(Placed(path, file.digest))
        for top, files in tops.items():
            yield DirectoryEntry(top, builder.add_paths(_items(files, salt)))

    def unchanged_files(self) -> list[Placed]:
        """The files that are the same in all variants, in the order of their paths."""
        return self._files

    def own_files(self, variant: Variant) -> list[Placed]:
        """The files of the variant's project, with their paths in the input root."""
        with self._store.index.view() as view:
            directory = find_directory(view, variant.project)
            if directory is None:
                raise RuntimeError("the project is not in the index")
            found = [(path, entry) for path, entry in walk(view, directory) if isinstance(entry, FileEntry)]
        return [Placed(PROJECT + b"/" + path, entry.digest) for path, entry in found]


def _items(files: list[Placed], salt: int) -> Iterator[tuple[bytes, Entry]]:
    above = None
    for path, digest in files:
        parent, _, name = path.rpartition(b"/")
        yield path, FileEntry(name, digest, False, salt if salt and parent != above else None)
        above = parent


def _padding(ingest: Ingest, count: int) -> Iterator[Placed]:
    contents = [
        ingest.add_bytes(b"never opened, number %d\n" % number, FUNCTION) for number in range(min(count, _CONTENTS))
    ]
    for number in range(count):
        outer, inner = divmod(number // _WIDTH, _WIDTH)
        path = b"external/package%03d/part%02d/file%06d.h" % (outer, inner, number)
        yield Placed(path, contents[number % len(contents)])
