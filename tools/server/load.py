"""What a server has taken in and isn't done with: bounded, and every connection's part of it known.

Where there is too much, connections that have something waiting here aren't
read on: what else they want stays with the kernel and the client, and costs
nothing here. Those that have nothing waiting are always read, so the bound is
passed by a few calls a connection. What is done makes room, and connections
are read on in the order in which they were left.

Used in the loop's thread.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable

_CALLS_MOST = 4_000
_BYTES_MOST = 24 << 20
_UNPARSED_MUCH = 4 << 20
"""Bytes of all connections that were read and wait for their connection's turn, from which little is read at a time."""
_OWN_LEAST = 2
"""Calls that a connection may have waiting, however much there is."""
_COMING_MOST = 64 << 20
"""Bytes of messages that don't fit into a stream's window, and were asked for before they are whole. Not of those that
wait: whoever is slow to send them doesn't keep others from being read."""
FEW_STREAMS = _OWN_LEAST
"""That a connection which isn't read on may have, beside those that are being answered."""
_AT_A_TIME = 16
"""Calls that a connection is likely to bring when it is read on."""


class Load:
    """Of one loop. `calls`: those that are whole and wait for their turn; `bytes`: of them."""

    def __init__(
        self, calls_most: int = _CALLS_MOST, bytes_most: int = _BYTES_MOST, coming_most: int = _COMING_MOST
    ) -> None:
        self.calls = 0
        self.bytes = 0
        self.coming = 0
        """Bytes that clients were asked for, of messages that aren't whole yet."""
        self._coming_most = coming_most
        self._wanted: dict[Hashable, tuple[int, Callable[[], object]]] = {}
        self.unparsed = 0
        """Bytes that were read, and that their connections haven't had a turn to work on."""
        self._calls_most = calls_most
        self._bytes_most = bytes_most
        self._own: Counter[Hashable] = Counter()
        self._left: dict[Hashable, Callable[[], object]] = {}
        self.was_full = False
        """A connection was not read on, since this was last set back."""
        self._restrained: OrderedDict[Hashable, Callable[[], object]] = OrderedDict()

    @property
    def is_full(self) -> bool:
        """Nothing more should be taken in where that can be helped."""
        return self.calls >= self._calls_most or self.bytes >= self._bytes_most

    @property
    def is_much(self) -> bool:
        """What is read has to wait, so it should be little at a time."""
        return (
            self.calls >= self._calls_most >> 3
            or self.bytes >= self._bytes_most >> 3
            or self.unparsed >= _UNPARSED_MUCH
        )

    @property
    def left(self) -> int:
        """Connections that aren't read on."""
        return len(self._left)

    def own(self, owner: Hashable) -> int:
        """Calls of it that wait."""
        return self._own.get(owner, 0)

    def ask_for(self, call: Hashable, size: int, grant: Callable[[], object], *, at_once: bool) -> None:
        """Have `grant` called when so many bytes of a message may be asked of a client; then `have_come` is due.

        `at_once`: they are of a call that is begun.
        """
        self._wanted[call] = size, grant
        if at_once:
            self._give(call)
        else:
            self._grant()

    def ask_no_more(self, call: Hashable) -> None:
        """It doesn't want them any more."""
        self._wanted.pop(call, None)

    def have_come(self, size: int) -> None:
        """So many bytes that were asked for have come, or won't."""
        self.coming -= size
        self._grant()

    def _grant(self) -> None:
        while self._wanted and not self.is_full:
            call, (size, _) = next(iter(self._wanted.items()))
            if self.coming and self.coming + size > self._coming_most:
                return
            self._give(call)

    def _give(self, call: Hashable) -> None:
        size, grant = self._wanted.pop(call)
        self.coming += size
        grant()

    def hold(self, owner: Hashable, size: int) -> None:
        """A call of `owner` with so many bytes begins to wait."""
        self.calls += 1
        self.bytes += size
        self._own[owner] += 1

    def release(self, owner: Hashable, size: int) -> None:
        """It waits no more."""
        self.calls -= 1
        self.bytes -= size
        if self._own[owner] > 1:
            self._own[owner] -= 1
        else:
            del self._own[owner]
        if self._wanted:
            self._grant()
        if self._left:
            if self.own(owner) < _OWN_LEAST and (again := self._left.pop(owner, None)) is not None:
                again()
            self._read_on()
        if self._restrained and not self.calls:
            # Who is restrained may have left this server without work. One at a time: what it holds back comes at once.
            self._restrained.popitem(last=False)[1]()

    def leave(self, owner: Hashable, again: Callable[[], object]) -> bool:
        """Whether `owner` shouldn't be read on for now; `again` is called when it should."""
        if not self.is_full or self._own[owner] < _OWN_LEAST:
            return False
        self._left.setdefault(owner, again)
        self.was_full = True
        return True

    def restrain(self, owner: Hashable, relax: Callable[[], object]) -> bool:
        """Whether `owner` is to ask for few streams; `relax` is called once when that is over."""
        if owner in self._restrained:
            return False
        self._restrained[owner] = relax
        return True

    def ease(self, owner: Hashable) -> None:
        """Some time has passed: if `owner` has nothing waiting here, it needn't be restrained."""
        if owner in self._restrained and not self._own[owner]:
            self._restrained.pop(owner)()

    def forget(self, owner: Hashable) -> None:
        """It is gone; what it has waiting is released all the same."""
        self._left.pop(owner, None)
        self._restrained.pop(owner, None)

    def _read_on(self) -> None:
        room: float = self._calls_most - self._calls_most // 10 - self.calls
        if self.bytes >= self._bytes_most - self._bytes_most // 10:
            return
        if self.calls < max(self._calls_most >> 3, 1):
            # All of them: those that are read on may bring nothing, and there may be nothing left to be released.
            room = math.inf
        while room > 0 and self._left:
            owner = next(iter(self._left))
            self._left.pop(owner)()
            room -= _AT_A_TIME
