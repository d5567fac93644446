"""How two trees differ. Only reads the index; what is equal in both is not looked into.

Equal subtrees are known by their digest, so comparing two trees of a million
files that differ in one reads as many directories as that file is deep.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from store.entries import Entry
from store.index import View
from store.trees import Directory, Row, list_entries


class Difference(NamedTuple):
    """A path at which the trees differ, and what each has there (None: nothing)."""

    path: bytes
    old: Entry | None
    new: Entry | None


def compare_trees(view: View, old: Directory, new: Directory) -> Iterator[Difference]:
    """The differences in order of the paths' components.

    A directory that both have is never one, only what is in it. One that only
    one of them has comes with everything below it.
    """
    if old.digest == new.digest:
        return
    stack = [(b"", _pair(view, old.id, new.id))]
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
            if any(below):
                stack.append((prefix + entry.name + b"/", _pair(view, *below)))
                break
        else:
            stack.pop()


def _pair(view: View, old: int, new: int) -> Iterator[tuple[Row | None, Row | None]]:
    """The rows of two directories, those of one name together; the id 0 is of a directory that isn't there."""
    before = list_entries(view, old) if old else iter(())
    after = list_entries(view, new) if new else iter(())
    one, other = next(before, None), next(after, None)
    while one or other:
        if other is None or (one is not None and one.entry.name < other.entry.name):
            yield one, None
            one = next(before, None)
        elif one is None or other.entry.name < one.entry.name:
            yield None, other
            other = next(after, None)
        else:
            yield one, other
            one, other = next(before, None), next(after, None)
