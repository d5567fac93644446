"""Signals that are not missed by who waits.

Python notes a signal at once, but calls its handler only between two instructions of the main thread. One that comes
after the last of those and before a call that blocks doesn't interrupt that call: it is acted on when the call has
ended, which may be never. What the interpreter writes to a descriptor as it notes the signal is always seen.

    with waking_on_signals() as woken:          # for who waits with poll(2)
    with acting_on_signals(act):                # for who can't: `act` is called in a thread

Both are for the main thread, one at a time; the signals need handlers, if only ones that do nothing.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def waking_on_signals() -> Iterator[int]:
    """A descriptor that each signal makes readable: its number is a byte there."""
    reading, writing = _begin()
    try:
        yield reading
    finally:
        _end(writing)
        os.close(reading)


@contextmanager
def acting_on_signals(act: Callable[[int], object]) -> Iterator[None]:
    """Have `act` called, in one thread, with the number of each signal that comes."""
    reading, writing = _begin()

    def listen() -> None:
        while number := os.read(reading, 1):
            act(number[0])

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    try:
        listener.start()
        yield
    finally:
        _end(writing)
        listener.join()
        os.close(reading)


_in_use: set[int] = set()


def _begin() -> tuple[int, int]:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _in_use.add(writing)
    return reading, writing


def _end(writing: int) -> None:
    _in_use.discard(writing)
    signal.set_wakeup_fd(-1)
    os.close(writing)


def _let_go() -> None:
    """In a child that isn't another program yet: it would write to its parent's descriptor."""
    if _in_use:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_let_go)
