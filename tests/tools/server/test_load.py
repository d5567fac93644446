"""What a server has taken in: how much that is, and who isn't read on for it."""

from __future__ import annotations

from functools import partial

import pytest

from tools.server.load import Load


class Connections:
    """Notes who is read on."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.read: list[int] = []

    def leave(self, owner: int) -> bool:
        return self.load.leave(owner, partial(self.read.append, owner))

    def hold(self, owner: int, calls: int, size: int = 1) -> None:
        for _ in range(calls):
            self.load.hold(owner, size)

    def release(self, owner: int, calls: int, size: int = 1) -> None:
        for _ in range(calls):
            self.load.release(owner, size)


def test_all_are_read_on_while_there_is_room() -> None:
    connections = Connections(Load(100, 1000))
    connections.hold(1, 99)
    assert not connections.leave(1)
    assert (connections.load.calls, connections.load.bytes, connections.load.left) == (99, 99, 0)


@pytest.mark.parametrize(("calls", "size"), [(100, 1), (50, 20)])
def test_where_there_is_too_much_who_has_nothing_waiting_is_read_on_and_nobody_else(calls: int, size: int) -> None:
    connections = Connections(Load(100, 1000))
    connections.hold(1, calls - 1, size)
    connections.hold(2, 1, size)
    assert connections.load.is_full
    assert connections.leave(1)
    assert not connections.leave(2), "a few calls are nothing"
    assert not connections.leave(3)
    assert connections.load.left == 1


def test_connections_are_read_on_in_the_order_in_which_they_were_left_and_not_all_at_once() -> None:
    connections = Connections(Load(100, 1000))
    for owner in range(10):
        connections.hold(owner, 10)
    for owner in (3, 1, 2, *range(4, 10), 3):
        assert connections.leave(owner)
    # A little room is no reason: all would be left again at once.
    connections.release(0, 9)
    assert connections.read == []
    connections.release(0, 1)
    assert connections.read == []
    connections.release(3, 1)
    assert connections.read == [3]
    connections.release(3, 1)
    assert connections.read == [3, 1]
    connections.release(3, 8)
    assert connections.read == [3, 1, 2, 4, 5, 6, 7, 8, 9]
    assert connections.load.left == 0


def test_who_is_left_because_of_bytes_is_read_on_when_they_are_gone() -> None:
    connections = Connections(Load(100, 1000))
    connections.hold(1, 10, 100)
    assert connections.leave(1)
    connections.release(1, 1, 100)
    assert connections.read == []
    connections.release(1, 1, 100)
    assert connections.read == [1]


def test_nobody_is_left_who_has_nothing_waiting() -> None:
    connections = Connections(Load(400, 1000))
    for owner in range(90):
        connections.hold(owner, 4, 0)
    connections.hold(90, 1, 1000)
    for owner in range(90):
        assert connections.leave(owner)
    # All of theirs is done; what fills the server is one call of somebody else.
    for owner in range(90):
        connections.release(owner, 4, 0)
    assert sorted(connections.read) == list(range(90))
    connections.release(90, 1, 1000)
    assert connections.load.left == 0


def test_who_is_gone_is_not_read_on() -> None:
    connections = Connections(Load(100, 1000))
    connections.hold(1, 100)
    assert connections.leave(1)
    connections.load.forget(1)
    connections.release(1, 100)
    assert connections.read == []
    assert (connections.load.calls, connections.load.bytes) == (0, 0)


def test_a_connection_with_nothing_waiting_any_more_is_read_on_however_much_others_have() -> None:
    connections = Connections(Load(100, 1000))
    connections.hold(1, 98)
    connections.hold(2, 2)
    assert connections.leave(2)
    connections.release(2, 2)
    assert connections.read == [2]
    assert connections.load.left == 0


def test_what_is_asked_of_clients_before_messages_are_whole_is_bounded() -> None:
    load = Load(calls_most=2, coming_most=100)
    granted: list[str] = []

    def ask(name: str, size: int, *, at_once: bool = False) -> None:
        load.ask_for(name, size, lambda: granted.append(name), at_once=at_once)

    # One may be larger than all that may be asked for.
    ask("large", 150)
    ask("second", 60)
    ask("given up", 60)
    ask("third", 40)
    assert (granted, load.coming) == (["large"], 150)
    # Who has begun doesn't wait.
    ask("begun", 10, at_once=True)
    assert (granted, load.coming) == (["large", "begun"], 160)
    load.ask_no_more("given up")
    load.have_come(150)
    assert (granted, load.coming) == (["large", "begun", "second"], 70)
    load.have_come(10)
    assert (granted[3:], load.coming) == (["third"], 100)
    load.have_come(100)
    # Nobody is asked for more while there is no room for what is whole.
    for _ in range(2):
        load.hold("owner", 1)
    ask("fourth", 10)
    ask("begun", 10, at_once=True)
    assert granted[4:] == ["begun"]
    load.release("owner", 1)
    assert granted[4:] == ["begun", "fourth"]
