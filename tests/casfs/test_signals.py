"""Signals that come when Python is about to block."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import call
from pathlib import Path

import pytest

from casfs.mountpoint import unmounting_on_signals
from casfs.signals import acting_on_signals, waking_on_signals


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    """SIGTERM has a handler that does nothing."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


@contextmanager
def closing_all(*descriptors: int) -> Iterator[None]:
    """Close them at the end."""
    try:
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_a_signal_makes_the_descriptor_readable() -> None:
    with waking_on_signals() as woken:
        os.kill(os.getpid(), signal.SIGTERM)
        assert os.read(woken, 64) == bytes([signal.SIGTERM])
    assert signal.set_wakeup_fd(-1) == -1


def test_what_acts_is_told_of_each_signal() -> None:
    told: list[int] = []
    twice = threading.Event()

    def act(number: int) -> None:
        told.append(number)
        if len(told) == 2:
            twice.set()

    with acting_on_signals(act):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # between two instructions the first is noted
        assert twice.wait(10)
    assert told == [signal.SIGTERM] * 2
    assert "signals" not in [thread.name for thread in threading.enumerate()]


def test_a_forks_signals_are_not_its_parents() -> None:
    with waking_on_signals() as woken:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        os.waitpid(child, 0)
        os.set_blocking(woken, False)
        with pytest.raises(BlockingIOError):
            os.read(woken, 1)


def missed(descriptor: int) -> bytes:
    """Read a byte, having had SIGTERM without an instruction in between: its handler isn't called before."""
    come = partial(ctypes.PyDLL(None)["raise"], signal.SIGTERM)
    _, read = map(call, [come, partial(os.read, descriptor, 1)])
    assert isinstance(read, bytes)
    return read


def test_one_that_comes_before_a_call_that_blocks_is_acted_on() -> None:
    reading, writing = os.pipe()
    with closing_all(reading, writing), acting_on_signals(lambda number: os.write(writing, bytes([number]))):
        assert missed(reading) == bytes([signal.SIGTERM])


def test_who_unmounts_is_interrupted_by_one_that_came_before(tmp_path: Path) -> None:
    class Heard(Exception):
        pass

    def handle(number: int, _: object) -> None:
        raise Heard(number)

    signal.signal(signal.SIGTERM, handle)
    reading, writing = os.pipe()
    # Nothing is mounted there, so that what was there before handles it.
    with (
        closing_all(reading, writing),
        pytest.raises(Heard),
        unmounting_on_signals(tmp_path) as ending,
        ending.insisted(),
    ):
        missed(reading)
