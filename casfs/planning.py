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

The second sight is what says that a subtree comes again; a first sight is not
trusted, since an action's own outputs are seen once and would push out what is
useful. What is huge is a layer at once all the same, as a wrong guess costs a
hundredth of what laying it out costs anyway; but where another was before, its
parts are likely to be known. Only the root, which is nearly always new, waits
for its second sight whatever its size. Nothing below a layer is looked at, so
the work is that of the new directories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import NamedTuple

from casfs.metadata import Part
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
    CHANGED = auto()
    NEW = auto()


Known = Callable[[Subtree], Sight]


class Plan(NamedTuple):
    """The layers of a mount, what is laid out anew, and the subtrees that were seen for the first time."""

    layers: list[Subtree]
    parts: list[Part]
    noted: list[Subtree]


_TAKEN = frozenset({Sight.LAYER, Sight.SEEN})


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
        above = above + b"/" + name if above else name
    whole = _walk(subtree, rows_of, lambda inner: False)
    return whole._replace(parts=leading + whole.parts)


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
                inner = path + b"/" + row.entry.name if path else row.entry.name
                if row.nodes >= LEAST:
                    subtree = Subtree(inner, _digest_of(row), row.id, row.nodes)
                    if takes(subtree):
                        layers.append(subtree)
                        continue
                    noted.append(subtree)
                below.append((inner, row.id))
            kept.append(row)
        parts.append(Part(path, kept))
        pending.extend(reversed(below))
    return Plan(layers, parts, noted)


def _digest_of(row: Row) -> Digest:
    assert isinstance(row.entry, DirectoryEntry)  # noqa: S101 - what has an id is one
    return row.entry.digest
