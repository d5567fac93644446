"""When a daemon polls and when it sleeps, on a clock that only moves when something is done."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casfs import polling
from casfs.polling import WINDOW, DeviceReader

CALL = 1e-6
"""What a system call takes, in seconds of the fake clock."""
WAKE = 40e-6
"""What it takes until a sleeper runs, where its client goes on using the core it was on."""
FAR = 10e-3
NEAR = 20e-6


class FakeDevice:
    """A descriptor whose messages (or errnos) arrive at set times; stands in for `os` and `time` in the module.

    `wake` is what a sleep costs, `hindrance` by how much a client is late that was polled for, in seconds.
    """

    def __init__(self, cores: int = 2, wake: float = WAKE, hindrance: float = 0.0) -> None:
        self.now = 0.0
        self.arrivals: list[tuple[float, bytes | int]] = []
        self.cores = cores
        self.wake = wake
        self.hindrance = hindrance
        self.blocking = True
        self.tried_in_vain = 0.0
        self.was_non_blocking = False

    # As `os`

    def read(self, descriptor: int, size: int) -> bytes:
        self.now += CALL
        at, message = self.arrivals[0]
        if not self.blocking:
            at += self.hindrance
        if at > self.now:
            if not self.blocking:
                self.tried_in_vain += CALL
                raise BlockingIOError
            self.now = at + self.wake
        self.arrivals.pop(0)
        if isinstance(message, int):
            raise OSError(message, os.strerror(message))
        return message

    def set_blocking(self, descriptor: int, blocking: bool) -> None:
        self.blocking = blocking
        self.was_non_blocking |= not blocking

    def sched_getaffinity(self, pid: int) -> set[int]:
        return set(range(self.cores))

    # As `time`

    def perf_counter(self) -> float:
        return self.now


@contextmanager
def on(device: FakeDevice) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(polling, "os", device)
        patch.setattr(polling, "time", device)
        yield


def serve(device: FakeDevice, gaps: list[float], *, poll: bool = True) -> DeviceReader:
    """Read a message after each gap, counted from the moment the one before was answered."""
    with on(device):
        reader = DeviceReader(5, 100, poll=poll)
        for number, gap in enumerate(gaps):
            device.arrivals.append((device.now + gap, b"%d" % number))
            assert reader.read() == b"%d" % number
    return reader


def test_a_burst_is_met_by_polling() -> None:
    device = FakeDevice()
    counts = serve(device, [NEAR] * 200).statistics()
    assert counts["polled"] >= 150
    assert counts["polled"] + counts["slept"] == 200


def test_where_polling_takes_the_core_from_the_client_it_is_hardly_done() -> None:
    """No core is free, so a sleeper would be woken on the client's at once, and who polls only delays the client."""
    device = FakeDevice(wake=2e-6, hindrance=2 * NEAR)
    counts = serve(device, [NEAR] * 2000).statistics()
    assert counts["polled"] <= 250


@pytest.mark.parametrize("gap", [FAR, 5 * WINDOW, 2 * WINDOW], ids=["idle", "compiler", "twice the window"])
def test_a_daemon_whose_clients_think_between_requests_sleeps(gap: float) -> None:
    device = FakeDevice()
    counts = serve(device, [gap] * 200).statistics()
    assert counts["polled"] == 0
    assert device.tried_in_vain == 0


def test_after_a_burst_polling_stops_soon() -> None:
    device = FakeDevice()
    serve(device, [NEAR] * 500 + [FAR] * 500)
    spent_waiting_in_the_burst = 500 * NEAR
    assert device.tried_in_vain - spent_waiting_in_the_burst <= 20 * WINDOW


def test_it_never_polls_longer_than_the_window_for_one_request() -> None:
    device = FakeDevice()
    serve(device, [NEAR] * 200)
    before = device.tried_in_vain
    device.blocking = True
    with on(device):
        reader = serve(device, [NEAR] * 200)
        before = device.tried_in_vain
        device.arrivals.append((device.now + 60, b"late"))
        assert reader.read() == b"late"
    assert 0 < device.tried_in_vain - before <= WINDOW + 2 * CALL


def test_bursts_between_long_pauses_are_still_met_by_polling() -> None:
    """As from `find`, then nothing, then `find` again."""
    device = FakeDevice()
    counts = serve(device, ([FAR] + [NEAR] * 99) * 10).statistics()
    assert counts["polled"] >= 800


@pytest.mark.parametrize(("poll", "cores"), [(False, 2), (True, 1)], ids=["not asked for", "one core"])
def test_it_always_sleeps_where_polling_is_no_use(poll: bool, cores: int) -> None:
    device = FakeDevice(cores)
    serve(device, [NEAR] * 200, poll=poll)
    assert not device.was_non_blocking
    assert device.tried_in_vain == 0


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ECONNABORTED])
@pytest.mark.parametrize("warm", [0, 200], ids=["sleeping", "polling"])
def test_the_end_of_the_mount_is_the_end(number: int, warm: int) -> None:
    device = FakeDevice()
    with on(device):
        reader = serve(device, [NEAR] * warm)
        device.arrivals.append((device.now + NEAR, number))
        assert reader.read() is None


@pytest.mark.parametrize("warm", [0, 200], ids=["sleeping", "polling"])
def test_a_request_that_was_interrupted_before_it_was_read_is_passed_over(warm: int) -> None:
    device = FakeDevice()
    with on(device):
        reader = serve(device, [NEAR] * warm)
        device.arrivals += [(device.now + NEAR, errno.ENOENT)] * 3 + [(device.now + NEAR, b"next")]
        assert reader.read() == b"next"


@pytest.mark.parametrize("warm", [0, 200], ids=["sleeping", "polling"])
def test_other_errors_are_not_swallowed(warm: int) -> None:
    device = FakeDevice()
    with on(device):
        reader = serve(device, [NEAR] * warm)
        device.arrivals.append((device.now, errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            reader.read()


@given(gaps=st.lists(st.sampled_from([0.0, 1e-6, NEAR, WINDOW, 1.01 * WINDOW, FAR]), max_size=300))
def test_nothing_is_lost_nor_out_of_order_however_requests_come(gaps: list[float]) -> None:
    device = FakeDevice()
    serve(device, gaps)
    assert not device.arrivals


def test_on_a_real_descriptor_requests_come_whole_and_in_order() -> None:
    reading, writing = os.pipe()
    try:
        reader = DeviceReader(reading, 1)
        for number in range(300):
            os.write(writing, bytes([number % 256]))
            assert reader.read() == bytes([number % 256])
            if number % 100 == 50:
                time.sleep(0.001)
    finally:
        os.close(reading)
        os.close(writing)
