"""How a process ends that was told to, whatever hangs in it. The processes are those of ending_program.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.tools.conftest import REPOSITORY
from tools.exits import Exit


class Program:
    """One that runs; `read` is the next line that it says."""

    def __init__(self, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.tools.server.ending_program", name],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def wait(self) -> tuple[int, list[str], str]:
        """Exit code, the lines that were not read yet, what it said on standard error."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out.decode().split(), err.decode()


@contextmanager
def program(name: str) -> Iterator[Program]:
    one = Program(name)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.communicate()


# A repetition within this time is taken for the same signal.
APART = 0.3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_while_the_loop_is_busy_and_can_not_be_woken(number: int) -> None:
    with program("full_loop") as one:
        assert one.read() == "full"
        one.send(number)
        one.go_on()
        assert one.wait() == (0, ["stopped"], "")


def test_a_reload_is_heard_while_the_loop_is_busy_and_can_not_be_woken() -> None:
    with program("full_loop") as one:
        assert one.read() == "full"
        one.send(signal.SIGHUP)
        one.go_on()
        assert one.read() == "reloaded"
        one.send(signal.SIGTERM)
        assert one.wait() == (0, ["stopped"], "")


def test_a_loop_that_hangs_is_ended_and_where_it_hung_is_said() -> None:
    with program("stuck_loop") as one:
        assert one.read() == "ready"
        one.send(signal.SIGTERM)
        code, said, err = one.wait()
        assert (code, said) == (Exit.OVERDUE, ["begun"])
        assert err.startswith("casfs: not ended in time, SIGTERM came; under way: "), err
        assert err.count("\n") == 1


def test_a_thread_that_the_interpreter_joins_at_its_end_does_not_hold_it_up() -> None:
    with program("stuck_pool") as one:
        assert one.read() == "ready"
        one.send(signal.SIGINT)
        assert one.read() == "left"
        code, _, err = one.wait()
        assert (code, err.count("\n")) == (Exit.OVERDUE, 1)


def test_what_keeps_the_interpreter_to_itself_is_ended_by_the_kernel() -> None:
    with program("held_interpreter") as one:
        assert one.read() == "ready"
        one.send(signal.SIGTERM)
        assert one.wait()[0] == -signal.SIGALRM


def test_a_last_word_that_nobody_reads_does_not_hold_up_the_end() -> None:
    with program("stuck_output") as one:
        assert one.read() == "ready"
        one.send(signal.SIGTERM)
        assert one.wait()[0] == Exit.OVERDUE


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_step_ends_it_at_once(second: int) -> None:
    with program("steps") as one:
        assert one.read() == "ready"
        one.send(signal.SIGINT)
        assert one.read() == "first"
        time.sleep(APART)
        one.send(signal.SIGTERM)
        assert one.read() == "second"
        time.sleep(APART)
        one.send(second)
        assert one.wait() == (128 + second, [], "")


def test_a_signal_that_is_sent_to_a_process_and_its_group_is_one() -> None:
    with program("steps") as one:
        assert one.read() == "ready"
        # Together for sure: a process that is stopped takes both when it goes on.
        one.send(signal.SIGSTOP)
        one.send(signal.SIGTERM)
        one.send(signal.SIGINT)
        one.send(signal.SIGCONT)
        assert one.read() == "first"
        time.sleep(APART)
        one.send(signal.SIGTERM)
        assert one.read() == "second"


def test_one_that_does_not_insist_goes_on_ending() -> None:
    with program("patient") as one:
        assert one.read() == "ready"
        one.send(signal.SIGTERM)
        assert one.read() == "first"
        time.sleep(APART)
        one.send(signal.SIGTERM)
        time.sleep(APART)
        one.go_on()
        assert one.wait() == (0, [], "")


def test_an_end_that_it_begins_itself_has_a_code_and_a_deadline() -> None:
    with program("by_itself") as one:
        code, said, err = one.wait()
        assert (code, said) == (4, ["begun"])
        assert err.startswith("casfs: not ended in time, the store is gone; under way: "), err


def test_where_no_end_has_begun_signals_do_what_they_did() -> None:
    with program("left_alone") as one:
        assert one.read() == "ready"
        one.send(signal.SIGTERM)
        assert one.wait() == (-signal.SIGTERM, [], "")
