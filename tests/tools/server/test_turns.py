"""How the loop's time is shared, by a clock that only work moves."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from itertools import pairwise

import pytest

from tools.server.turns import SLICE_SECONDS, Turns


class Machine:
    """A loop and its clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.soon: deque[Callable[[], None]] = deque()
        self.turns = Turns(lambda: self.now, self.soon.append)
        self.order: list[str] = []

    def spend(self, seconds: float) -> None:
        """Work for so long."""
        self.now += seconds

    def pause(self) -> None:
        """The loop had nothing to do for a while."""
        self.now += 1.0

    def round(self) -> None:
        """Once around the loop: what was to be called by then."""
        for _ in range(len(self.soon)):
            self.soon.popleft()()

    def run(self) -> None:
        """Until nothing is to be done."""
        while self.soon:
            self.round()


class Connection:
    """Has so many seconds of work; `heavy`: much of it is under way."""

    def __init__(self, machine: Machine, name: str, work: float, *, heavy: bool = False) -> None:
        self.used = -1.0
        self.queued = False
        self.name = name
        self.left = work
        self.is_light = not heavy
        self.slices: list[float] = []
        self._machine = machine

    def work(self, seconds: float) -> bool:
        spent = min(seconds, self.left)
        self._machine.spend(spent)
        self._machine.order.append(self.name)
        self.slices.append(seconds)
        self.left -= spent
        return self.left > 1e-9


@pytest.fixture
def machine() -> Machine:
    return Machine()


def busy(machine: Machine) -> None:
    """Have something that waits already, so that nothing is done at once."""
    machine.turns.add(Connection(machine, "busy", 2.5 * SLICE_SECONDS))


def test_where_nobody_waits_a_call_is_done_at_once(machine: Machine) -> None:
    machine.turns.add(Connection(machine, "alone", SLICE_SECONDS / 10))
    assert machine.order == ["alone"]
    assert not machine.soon


def test_what_is_done_at_once_is_bounded_until_the_loop_has_looked_at_its_sockets(machine: Machine) -> None:
    for number in range(100):
        machine.turns.add(Connection(machine, str(number), SLICE_SECONDS / 2))
    assert len(machine.order) == 4
    assert len(machine.turns) == 96
    machine.run()
    assert len(machine.order) == 100
    machine.turns.add(Connection(machine, "too soon", SLICE_SECONDS / 2))
    assert len(machine.turns) == 1
    machine.run()
    machine.pause()
    machine.turns.add(Connection(machine, "later", SLICE_SECONDS / 2))
    assert machine.order[-1] == "later"
    assert not machine.soon


def test_a_long_one_alone_gets_a_slice_at_a_time(machine: Machine) -> None:
    long = Connection(machine, "long", 10 * SLICE_SECONDS)
    machine.turns.add(long)
    assert machine.order == ["long"]
    assert len(machine.turns) == 1
    machine.run()
    assert long.slices == [SLICE_SECONDS] * 10


def test_the_loop_looks_at_its_sockets_between_a_few_slices(machine: Machine) -> None:
    machine.turns.add(Connection(machine, "long", 20 * SLICE_SECONDS))
    rounds = []
    while machine.soon:
        before = machine.now
        machine.round()
        rounds.append(machine.now - before)
    assert max(rounds) <= 5 * SLICE_SECONDS


def test_light_ones_go_before_heavy_ones_and_heavy_ones_are_not_starved(machine: Machine) -> None:
    busy(machine)
    heavy = [Connection(machine, "heavy", 100 * SLICE_SECONDS, heavy=True) for _ in range(3)]
    light = [Connection(machine, "light", SLICE_SECONDS / 2) for _ in range(30)]
    for connection in (*heavy, *light):
        machine.turns.add(connection)
    while any(connection.left > 1e-9 for connection in light):
        machine.round()
    order = [name for name in machine.order if name != "busy"]
    last = max(number for number, name in enumerate(order) if name == "light")
    window = order[: last + 1]
    # One turn in four is theirs, and no more while a light one waits.
    assert 30 // 3 - 2 <= window.count("heavy") <= 30 // 3 + 2
    assert all("heavy" in window[at : at + 5] for at in range(len(window) - 5))


def test_those_with_as_much_to_do_share_alike(machine: Machine) -> None:
    busy(machine)
    several = [Connection(machine, name, 40 * SLICE_SECONDS, heavy=True) for name in "abcd"]
    for connection in several:
        machine.turns.add(connection)
    for _ in range(12):
        machine.round()
        left = [connection.left for connection in several]
        assert max(left) - min(left) <= SLICE_SECONDS * 1.01


class Long(Connection):
    """One whose calls can't be cut in slices."""

    def work(self, seconds: float) -> bool:
        return super().work(7 * seconds)


def test_time_is_charged_to_who_used_it_but_for_no_more_than_a_few_slices(machine: Machine) -> None:
    busy(machine)
    long = Long(machine, "long", 70 * SLICE_SECONDS)
    short = Connection(machine, "short", 40 * SLICE_SECONDS)
    machine.turns.add(long)
    machine.turns.add(short)
    machine.run()
    order = [name for name in machine.order if name != "busy"]
    both = order[order.index("long") : len(order) - order[::-1].index("short")]
    turns_between = [len(run) for run in "".join(name[0] for name in both).split("l")[1:-1]]
    # It took seven slices each time, and waits for as many: those that take turns go on from where they were.
    assert turns_between
    assert set(turns_between) <= {6, 7, 8}

    # Who comes again begins anew with a few at most.
    machine.pause()
    long.left = SLICE_SECONDS
    long.used += 1000.0
    busy(machine)
    machine.turns.add(Connection(machine, "other", 20 * SLICE_SECONDS))
    machine.turns.add(long)
    machine.order.clear()
    machine.run()
    assert machine.order.index("long") <= 12


def test_time_that_was_not_used_is_not_saved_up(machine: Machine) -> None:
    away = Connection(machine, "away", 0.1 * SLICE_SECONDS)
    machine.turns.add(away)
    machine.pause()
    steady = Connection(machine, "steady", 100 * SLICE_SECONDS)
    machine.turns.add(steady)
    while steady.left > 50 * SLICE_SECONDS:
        machine.round()
    away.left = 50 * SLICE_SECONDS
    machine.order.clear()
    machine.turns.add(away)
    for _ in range(5):
        machine.round()
    shares = machine.order.count("away"), machine.order.count("steady")
    assert abs(shares[0] - shares[1]) <= 2, shares


def test_slices_are_shorter_where_many_wait(machine: Machine) -> None:
    busy(machine)
    many = [Connection(machine, "many", 3 * SLICE_SECONDS, heavy=True) for _ in range(300)]
    for connection in many:
        machine.turns.add(connection)
    began = machine.now
    while not all(connection.slices for connection in many):
        machine.round()
    assert machine.now - began <= 0.15
    machine.run()
    assert all(connection.left <= 1e-9 for connection in many)


class Waking(Connection):
    """Its work has others added: what it is done with makes room."""

    following: Connection | None = None

    def work(self, seconds: float) -> bool:
        if self.following is not None:
            self._machine.turns.add(self.following)
        return super().work(seconds)


def test_who_is_added_by_another_s_work_waits_for_its_turn(machine: Machine) -> None:
    chain = [Waking(machine, str(number), 0.0) for number in range(2 * sys.getrecursionlimit())]
    for one, following in pairwise(chain):
        one.following = following
    machine.turns.add(chain[0])
    machine.run()
    assert machine.order == [str(number) for number in range(len(chain))]


def test_who_is_added_by_its_own_work_has_one_more_turn(machine: Machine) -> None:
    one = Waking(machine, "one", 0.0)
    one.following = one
    machine.turns.add(one)
    assert machine.order == ["one"]
    one.following = None
    machine.run()
    assert machine.order == ["one", "one"]
