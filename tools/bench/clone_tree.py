"""The tree that moves under clones: an action's inputs and files of their sizes beside, then 1% of all changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from store.digest import Digest
from store.entries import FileEntry, path_order
from store.repository import Store
from store.treebuilder import TreeBuilder
from tools.bench.action_tree import FUNCTION, PROJECT, Placed, inputs_read

_CHANGED_ONE_IN = 100
_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Moving:
    """Two input roots in a store, and what both have."""

    first: Digest
    second: Digest
    files: int
    bytes: int
    changed: int
    """So many files of the second differ, spread evenly over the first."""


def make_moving(store: Store, headers: list[Path], scratch: Path, beside: int) -> Moving:
    """Add both trees. `headers` and `scratch` are those of `find_headers`; `beside` files are never read."""
    with store.ingest() as ingest:
        builder = TreeBuilder(store.index, ingest, FUNCTION)
        contents = sorted(_contents(headers, scratch, beside), key=lambda item: path_order(item[0]))
        first = [Placed(path, ingest.add_bytes(data, FUNCTION)) for path, data in contents]
        second = list(first)
        changed = range(_CHANGED_ONE_IN // 2, len(first), _CHANGED_ONE_IN)
        for number in changed:
            path, data = contents[number]
            second[number] = Placed(path, ingest.add_bytes(data + b"// changed\n", FUNCTION))
        roots = []
        for files in (first, second):
            roots.append(builder.add_paths((path, FileEntry(os.path.basename(path), to, False)) for path, to in files))
            builder.finish(roots[-1])
    return Moving(roots[0], roots[1], len(contents), sum(len(data) for _, data in contents), len(changed))


def _contents(headers: list[Path], scratch: Path, beside: int) -> Iterator[tuple[bytes, bytes]]:
    """Paths and contents of the first tree."""
    sizes = []
    for path in inputs_read(headers):
        top = os.fsencode(scratch) if path.startswith(PROJECT + b"/") else b""
        with open(top + b"/" + path, "rb") as file:
            data = file.read()
        sizes.append(len(data))
        yield path, data
    for number, size in enumerate(islice(cycle(sizes), beside)):
        outer, inner = divmod(number // _WIDTH, _WIDTH)
        path = b"external/package%03d/part%02d/file%06d.h" % (outer, inner, number)
        yield path, hashlib.shake_128(b"%d" % number).digest(size)
