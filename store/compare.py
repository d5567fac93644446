"""How two trees differ. Only reads the index; what is equal in both is not looked into.

Equal subtrees are known by their digest, so comparing two trees of a million
files that differ in one reads as many directories as that file is deep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from store.entries import Entry
from store.index import View
from store.trees import Directory, Row, differing_entries


class Difference(NamedTuple):
    """A path at which the trees differ, and what each has there (None: nothing)."""

    path: bytes
    old: Entry | None
    new: Entry | None


def compare_trees(
    view: View, old: Directory, new: Directory, entered: Callable[[bytes, Row], object] = lambda path, row: None
) -> Iterator[Difference]:
    """The differences in order of the paths' components.

    A directory that both have is never one, only what is in it. One that only
    one of them has comes with everything below it. `entered` is told the
    directories of the new tree that the old one hasn't as they are.
    """
    if old.digest == new.digest:
        return
    stack = [(b"", differing_entries(view, old.id, new.id))]
    while stack:
        prefix, pairs = stack[-1]
        for before, after in pairs:
            old_entry, new_entry = before and before.entry, after and after.entry
            entry = old_entry or new_entry
            if entry is None or old_entry == new_entry:
                continue
            below = before.id if before else 0, after.id if after else 0
            if not all(below):
                yield Difference(prefix + entry.name, old_entry, new_entry)
            if after is not None and after.id:
                entered(prefix + entry.name, after)
            if any(below):
                stack.append((prefix + entry.name + b"/", differing_entries(view, *below)))
                break
        else:
            stack.pop()
