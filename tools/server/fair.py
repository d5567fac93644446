"""Whose turn is next: first among tokens, then among the connections of one, then in the order of arrival.

Not among addresses: a whole company may come from one, through a proxy. So one
token with many connections gets no more than one with few, and where there are
no tokens connections share alike.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class FairQueue(Generic[T]):
    """Items of owners, which are grouped by tokens; those of one owner differ. Used in the loop's thread."""

    def __init__(self) -> None:
        # Not of deques, as who gives up leaves from the middle.
        self._tokens: OrderedDict[str | None, OrderedDict[int, OrderedDict[T, None]]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        """All items, in no order."""
        return (item for owners in self._tokens.values() for waiting in owners.values() for item in waiting)

    def heads(self) -> Iterator[T]:
        """The first of each owner."""
        return (next(iter(waiting)) for owners in self._tokens.values() for waiting in owners.values())

    def push(self, token: str | None, owner: int, item: T) -> None:
        """Behind what that owner has there."""
        owners = self._tokens.get(token)
        if owners is None:
            owners = self._tokens[token] = OrderedDict()
        waiting = owners.get(owner)
        if waiting is None:
            waiting = owners[owner] = OrderedDict()
        waiting[item] = None
        self._count += 1

    def pop(self) -> T:
        """The next one; its token and its owner go to the end. Raises IndexError where there is none."""
        if not self._count:
            raise IndexError("nothing waits")
        token, owners = next(iter(self._tokens.items()))
        owner, waiting = next(iter(owners.items()))
        item, _ = waiting.popitem(last=False)
        self._count -= 1
        if waiting:
            owners.move_to_end(owner)
        else:
            del owners[owner]
        if owners:
            self._tokens.move_to_end(token)
        else:
            del self._tokens[token]
        return item

    def remove(self, token: str | None, owner: int, item: T) -> None:
        """Take an item out, if it still waits; nobody's turn changes by that."""
        try:
            owners = self._tokens[token]
            waiting = owners[owner]
            del waiting[item]
        except KeyError:
            return
        self._count -= 1
        if not waiting:
            del owners[owner]
        if not owners:
            del self._tokens[token]
