"""Errors of calls in the log: each once, then counted."""

from __future__ import annotations

import logging
import time

import pytest

from tools.reapi.generated import code_pb2 as codes
from tools.server import status
from tools.server.fault_log import FaultLog

LOG = logging.getLogger("casfs.test")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def faults(clock: Clock) -> FaultLog:
    return FaultLog(LOG, 60.0, clock)


def fail(error: Exception) -> Exception:
    try:
        raise error
    except Exception as raised:  # noqa: BLE001 - the error with its traceback is what is wanted
        return raised


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() + (" +traceback" if record.exc_info else "") for record in caplog.records]
    caplog.clear()
    return found


def test_the_first_has_its_traceback_and_the_rest_are_counted(
    faults: FaultLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(1000):
        faults.note(fail(OSError(number)), "unexpected %s", "OSError")
    assert lines(caplog) == ["unexpected OSError +traceback"]
    clock.now += 59
    faults.note(fail(OSError("late")), "unexpected %s", "OSError")
    assert lines(caplog) == []
    clock.now += 1
    faults.note(fail(OSError("of the next minute")), "unexpected %s", "OSError")
    counted, first = lines(caplog)
    assert counted.startswith("OSError at ") and counted.endswith(": 1000 more times in 60 s")
    assert first == "unexpected OSError +traceback"


def test_other_types_and_other_lines_are_other_faults(faults: FaultLog, caplog: pytest.LogCaptureFixture) -> None:
    def elsewhere() -> Exception:
        try:
            raise OSError("elsewhere")
        except OSError as error:
            return error

    for _ in range(3):
        faults.note(fail(OSError()), "one")
        faults.note(fail(ValueError()), "two")
        faults.note(elsewhere(), "three")
        faults.note(OSError("never raised"), "four")
    assert lines(caplog) == [f"{name} +traceback" for name in ("one", "two", "three", "four")]


def test_the_end_says_what_was_only_counted(faults: FaultLog, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    faults.note(fail(OSError()), "one")
    for _ in range(3):
        faults.note(fail(ValueError()), "two")
    lines(caplog)
    clock.now += 5
    faults.flush()
    [counted] = lines(caplog)
    assert counted.startswith("ValueError at ") and counted.endswith(": 2 more times in 5 s")
    faults.flush()
    assert lines(caplog) == []


def test_the_count_is_said_when_its_time_is_over_also_if_nothing_more_comes(caplog: pytest.LogCaptureFixture) -> None:
    faults = FaultLog(LOG, 0.05)
    faults.note(fail(OSError()), "one")
    faults.note(fail(OSError()), "one")
    until = time.monotonic() + 60
    while len(caplog.records) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert "1 more times" in lines(caplog)[1]


def test_faults_that_are_remembered_have_a_bound(faults: FaultLog, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1000):
        kind = type(f"Kind{number}", (Exception,), {})
        faults.note(fail(kind()), "one")
        faults.note(fail(kind()), "one")
    assert len(faults._faults) <= 128
    faults.flush()
    # None is forgotten without its count having been said.
    assert sum("1 more times" in line for line in lines(caplog)) == 1000


def test_a_repeated_one_is_not_formatted(faults: FaultLog, caplog: pytest.LogCaptureFixture) -> None:
    class Costly(Exception):
        formatted = 0

        def __str__(self) -> str:
            type(self).formatted += 1
            return "costly"

    for _ in range(100):
        faults.note(fail(Costly()), "one")
    formatter = logging.Formatter()
    text = "".join(formatter.format(record) for record in caplog.records)
    before = Costly.formatted
    for _ in range(100):
        faults.note(fail(Costly()), "one")
    faults.flush()
    assert "Costly" in text
    assert Costly.formatted == before


def test_errors_that_become_statuses_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    status.faults.flush()
    for _ in range(50):
        answer = status.as_status(fail(ZeroDivisionError()))
        assert (answer.code, "log" in answer.message) == (codes.INTERNAL, True)
    status.faults.flush()
    first, counted = lines(caplog)
    assert first == "unexpected ZeroDivisionError +traceback"
    assert counted.split(": ")[1].startswith("49 more times")
