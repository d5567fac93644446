"""Which parts of a tree are layers that are kept warm, and what is laid out anew: no I/O.

Nearly every action of a build has a root of its own; what comes again are its
subtrees: a toolchain, an external repository, the headers of a library. A layer
is the metadata of one subtree at one path, and costs a mount about 10 µs once
it is there, whatever its size; laying out anew costs about 10 µs a *node*. So:

    ┌─────────────────────┬────────────┬─────────────────────┬──────────────────────┬──────────────────────┐
    │ a subtree of … nodes│ is a layer │ was seen before     │ another was there    │ nothing was there    │
    ├─────────────────────┼────────────┼─────────────────────┼──────────────────────┼──────────────────────┤
    │ under `LEAST`       │ (never)    │ laid out anew       │ laid out anew        │ laid out anew        │
    │ up to `HUGE`        │ take it    │ make it a layer now │ note it, look inside │ note it, look inside │
    │ `HUGE` and more     │ take it    │ make it a layer now │ note it, look inside │ make it a layer now  │
    └─────────────────────┴────────────┴─────────────────────┴──────────────────────┴──────────────────────┘

Where that would lay out over `ENOUGH` nodes there is one more way: a tree of which nearly the same is kept at the same
path is that layer and a *difference* over it, which has what changed (`plan_over`). So a tree in which one file in a
hundred changed, in every directory, isn't laid out anew. But where what differs was mostly seen before it comes again,
in trees that are new each time, and shall be layers (`casfs.layers`).

The second sight is what says that a subtree comes again; a first sight is not
trusted, since an action's own outputs are seen once and would push out what is
useful. What is huge is a layer at once all the same, as a wrong guess costs a
hundredth of what laying it out costs anyway; but where another was before, its
parts are likely to be known. Only the root, which is nearly always new, waits
for its second sight whatever its size; but where all of it had to be laid out,
that is kept for others to differ from (`casfs.layers`). Nothing below a layer is looked at, so
the work is that of the new directories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import NamedTuple

from casfs.metadata import Part
from store.compare import Difference
from store.digest import Digest
from store.entries import DirectoryEntry
from store.trees import Directory, Row

LEAST = 8
"""Nodes below which a subtree is never a layer. At 8 it saves a tenth of a millisecond a mount and takes 100 KiB; what
its making takes, half a millisecond, comes back with the fifth mount."""
HUGE = 16_384
"""Nodes from which a subtree is a layer at first sight."""
MOST_LAYERS = 128
"""In one mount. Each makes a lookup in a directory that layers share a little longer; overlayfs takes 500."""

ENOUGH = 512
"""Nodes to be laid out from which on it is worth looking for something that is nearly the same: a difference costs a
mount more, and a lookup in each directory that it has, a probe more."""
ALIKE = 32
"""One node in so many may differ. When more do, their number has grown over many trees, and new layers pay."""

RowsOf = Callable[[int], Iterable[Row]]
"""The rows of the directory with that id, in order of name."""


class Subtree(NamedTuple):
    """A subtree at its place: path from the root, digest of its directory, its id and its count of nodes."""

    path: bytes
    digest: Digest
    id: int
    nodes: int

    @property
    def key(self) -> tuple[bytes, bytes]:
        """What two subtrees share exactly if one layer can be both."""
        return self.path, self.digest.key


class Sight(Enum):
    """What is known of a subtree: the columns of the table above."""

    LAYER = auto()
    SEEN = auto()
    ALIKE = auto()
    """Nearly the same is a layer, at the same path."""
    CHANGED = auto()
    NEW = auto()


Known = Callable[[Subtree], Sight]


class Plan(NamedTuple):
    """The layers of a mount, what is laid out anew, and the subtrees that were seen for the first time."""

    layers: list[Subtree]
    parts: list[Part]
    noted: list[Subtree]


_TAKEN = frozenset({Sight.LAYER, Sight.SEEN, Sight.ALIKE})


class Over(NamedTuple):
    """What to lay over a tree to have another one: `parts`, the first of which is the root, and paths that are gone."""

    parts: list[Part]
    gone: list[bytes]


def plan(root: Directory, rows_of: RowsOf, known: Known) -> Plan:
    """How to lay out a tree."""
    top = Subtree(b"", root.digest, root.id, root.nodes)
    if top.nodes >= LEAST and known(top) in _TAKEN:
        return Plan([top], [Part(b"", [])], [])

    def takes(inner: Subtree) -> bool:
        sight = known(inner)
        return sight in _TAKEN or (sight is Sight.NEW and inner.nodes >= HUGE)

    planned = _walk(top, rows_of, takes)
    if len(planned.layers) > MOST_LAYERS:
        largest = sorted(planned.layers, key=lambda subtree: subtree.nodes, reverse=True)[:MOST_LAYERS]
        keys = {subtree.key for subtree in largest}
        planned = _walk(top, rows_of, lambda inner: inner.key in keys)
    return planned


def plan_layer(subtree: Subtree, rows_of: RowsOf) -> Plan:
    """How to lay out a subtree as a layer: all of it, below the directories that lead there.

    What is noted are the subtrees inside that can be layers by themselves, once this one has changed.
    """
    leading: list[Part] = []
    above = b""
    for name in subtree.path.split(b"/") if subtree.path else []:
        # Of an entry that leads to the subtree only the name matters.
        leading.append(Part(above, [Row(0, DirectoryEntry(name, subtree.digest))]))
        above = join(above, name)
    whole = _walk(subtree, rows_of, lambda inner: False)
    return whole._replace(parts=leading + whole.parts)


def plan_over(subtree: Subtree, differences: Iterable[Difference]) -> Over | None:
    """How to lay a subtree over another one from which it differs so; None where that is much (`ALIKE`)."""
    left = subtree.nodes // ALIKE
    rows: dict[bytes, list[Row]] = {b"": []}
    gone: list[bytes] = []

    def enter(path: bytes) -> list[Row]:
        """What is made in a directory, which is made if need be, with those above."""
        missing = []
        while path not in rows:
            missing.append(path)
            path = path.rpartition(b"/")[0]
        for inner in reversed(missing):
            # Of an entry that leads on only the name matters.
            rows[path].append(Row(0, DirectoryEntry(inner.rpartition(b"/")[2], subtree.digest)))
            rows[inner] = []
            path = inner
        return rows[path]

    enter(subtree.path)
    covered = b"/"
    for below, old, new in differences:
        left -= 1
        if left < 0:
            return None
        path = join(subtree.path, below)
        if isinstance(new, DirectoryEntry):
            enter(path)
        elif new is not None:
            enter(path.rpartition(b"/")[0]).append(Row(0, new))
        elif not path.startswith(covered):
            gone.append(path)
        if isinstance(old, DirectoryEntry) and not path.startswith(covered):
            # What was in it can't be seen any more.
            covered = path + b"/"
    return Over([Part(path, made) for path, made in rows.items()], gone)


def join(path: bytes, name: bytes) -> bytes:
    """A path of a tree, whose root is b""."""
    return path + b"/" + name if path else name


def _walk(top: Subtree, rows_of: RowsOf, takes: Callable[[Subtree], bool]) -> Plan:
    """Everything below `top`, but for the subtrees of at least `LEAST` nodes that shall be layers."""
    layers: list[Subtree] = []
    parts: list[Part] = []
    noted = [top] if top.nodes >= LEAST else []
    pending = [(top.path, top.id)]
    while pending:
        path, number = pending.pop()
        kept = []
        below = []
        for row in rows_of(number):
            if row.id:
                inner = join(path, row.entry.name)
                if row.nodes >= LEAST:
                    subtree = subtree_of(inner, row)
                    if takes(subtree):
                        layers.append(subtree)
                        continue
                    noted.append(subtree)
                below.append((inner, row.id))
            kept.append(row)
        parts.append(Part(path, kept))
        pending.extend(reversed(below))
    return Plan(layers, parts, noted)


def subtree_of(path: bytes, row: Row) -> Subtree:
    """The subtree of a directory's row."""
    assert isinstance(row.entry, DirectoryEntry)  # noqa: S101 - what has an id is one
    return Subtree(path, row.entry.digest, row.id, row.nodes)
