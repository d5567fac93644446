"""Whose turn is next."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as some

from tools.server.fair import FairQueue


def drained(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_one_owner_s_come_in_the_order_of_arrival() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in "abc":
        queue.push(None, 1, item)
    assert len(queue) == 3
    assert drained(queue) == ["a", "b", "c"]
    with pytest.raises(IndexError):
        queue.pop()


def test_who_has_much_waiting_does_not_hold_up_who_has_little() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(1000):
        queue.push(None, 1, f"much {number}")
    queue.push(None, 2, "little")
    assert drained(queue)[:3] == ["much 0", "little", "much 1"]


def test_a_token_gets_no_more_for_having_many_connections() -> None:
    queue: FairQueue[str] = FairQueue()
    for connection in range(10):
        for number in range(10):
            queue.push("many", connection, f"many {connection}.{number}")
    for number in range(20):
        queue.push("one", 10, f"one.{number}")
    order = [item.partition(".")[0] for item in drained(queue)]
    assert order[1:40:2] == ["one"] * 20
    assert order[0:40:2] == [f"many {connection}" for connection in range(10)] * 2


def test_who_comes_back_is_behind_those_that_wait() -> None:
    queue: FairQueue[str] = FairQueue()
    for token in "ab":
        queue.push(token, 1, f"{token}1")
        queue.push(token, 1, f"{token}2")
    assert queue.pop() == "a1"
    queue.push("c", 1, "c")
    assert drained(queue) == ["b1", "a2", "c", "b2"]


def test_who_gives_up_leaves_at_once_and_nothing_stays_of_it() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1"):
        queue.push("t", ord(item[0]), item)
    queue.push(None, 1, "c1")
    queue.remove("t", ord("a"), "a2")
    queue.remove("t", ord("b"), "b1")
    queue.remove(None, 1, "c1")
    for gone in ("a2", "b1", "never"):
        queue.remove("t", ord(gone[0]), gone)
    assert len(queue) == 2
    assert list(queue) == ["a1", "a3"]
    assert list(queue.heads()) == ["a1"]
    assert drained(queue) == ["a1", "a3"]


@given(some.lists(some.tuples(some.sampled_from(["a", "b", None]), some.integers(0, 3))))
def test_nobody_is_forgotten_and_no_token_is_ahead(pushed: list[tuple[str | None, int]]) -> None:
    queue: FairQueue[tuple[str | None, int, int]] = FairQueue()
    for number, (token, owner) in enumerate(pushed):
        queue.push(token, owner, (token, owner, number))
    left, had = Counter(token for token, _ in pushed), Counter[str | None]()
    popped = []
    while len(queue):
        token, owner, number = queue.pop()
        popped.append((token, owner, number))
        left[token] -= 1
        had[token] += 1
        waiting = [had[other] for other in left if left[other]]
        assert not waiting or had[token] - min(waiting) <= 1
    assert sorted(number for _, _, number in popped) == list(range(len(pushed)))
    for whose in set(pushed):
        numbers = [number for token, owner, number in popped if (token, owner) == whose]
        assert numbers == sorted(numbers)
