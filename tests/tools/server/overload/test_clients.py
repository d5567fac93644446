"""Each kind of client with its own patience: at a server with too much to do, one that is held up, one that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from store.errors import NoSpace, StoreError, StoreUnusable
from store.repository import Store
from tests.tools.server.overload.bazel import Fate, make_uploads
from tests.tools.server.overload.clients import (
    BAZEL,
    BUILDSTREAM,
    GO_SDK,
    MOON,
    MOON_ENDS_AFTER,
    WAYS,
    Fleet,
    Way,
)
from tests.tools.server.overload.paced_server import COSTS, PacedServer
from tests.tools.server.overload.peer import DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE
from tests.tools.server.overload.scenario import FAST, full_rate, overload, world
from tests.tools.server.overload.virtual_time import VirtualLoop, run_virtually

MINUTE = 60 / FAST
each_way = pytest.mark.parametrize("way", WAYS, ids=[way.name for way in WAYS])


@lru_cache(None)
def most(way: Way) -> float:
    """Uploads a second."""
    with TemporaryDirectory() as directory, Store.open(Path(directory) / "store") as store:
        return full_rate(store, way=way.faster(FAST))


def outcome_of(store: Store, way: Way, count: int, disturb: Callable[[Fleet, PacedServer], object]) -> Fate:
    """What becomes of so many uploads, while `disturb` does something to the server."""

    async def main(loop: VirtualLoop) -> Fate:
        async with world(store, loop) as here:
            fleet = here.fleet(way.faster(FAST))
            disturb(fleet, here.server)
            await fleet.upload_all(make_uploads(count))
            assert len(here.server.stored) == fleet.fate.done
            return fleet.fate

    return run_virtually(main)


def calls_needed(way: Way, count: int) -> int:
    """When none of them has to be made again."""
    if not way.blobs:
        return count
    parts = [len(range(number, count, way.clients)) for number in range(way.clients)]
    return sum(1 + -(-part // way.blobs) for part in parts)


@each_way
@pytest.mark.parametrize("load", [2, 4])
def test_all_of_it_arrives_whatever_is_wanted(store: Store, way: Way, load: int) -> None:
    """A load of 1 is what can be done in a minute, the deadline of those that have a short one."""
    count = int(load * MINUTE * most(way))
    outcome = overload(store, count, seconds=12 * MINUTE, way=way.faster(FAST))
    assert outcome.stored == count
    assert outcome.rate >= 0.8 * most(way)
    assert (outcome.fate.done, outcome.fate.failed) == (count, {})


@each_way
def test_who_gives_up_finds_all_of_it_in_the_next_build(store: Store, way: Way) -> None:
    """With more than five minutes' work the Go SDK is at its end: it begins all of it at once, and has six tries.

    All others have no such end.
    """
    count = int(5.5 * MINUTE * most(way))
    outcome = overload(store, count, seconds=12 * MINUTE, way=way.faster(FAST))
    assert outcome.stored == count
    assert outcome.rate >= 0.8 * most(way)
    assert outcome.fate.done + sum(outcome.fate.failed.values()) == count
    assert set(outcome.fate.failed) == ({DEADLINE_EXCEEDED} if way == GO_SDK else set())


@pytest.mark.long
@pytest.mark.xfail(reason="what is held of so many connections whatever there is lasts longer than a deadline")
def test_a_hundred_connections_with_batches_get_their_answers(store: Store) -> None:
    """All of it is stored in five minutes, and most of what asked for it has been given up six times by then."""
    way = GO_SDK._replace(clients=4)
    count = int(5 * MINUTE * most(GO_SDK))
    outcome = overload(store, count, seconds=12 * MINUTE, way=way.faster(FAST))
    assert outcome.stored == count
    assert outcome.fate.done >= 0.7 * count


def test_who_ends_after_its_build_leaves_only_what_could_not_be_done_by_then(store: Store) -> None:
    """So moon does, which drops what it hasn't uploaded five minutes later; none of it was refused until then."""
    seconds = MOON_ENDS_AFTER / FAST
    outcome = overload(store, int(2 * seconds * most(MOON)), seconds=seconds, way=MOON.faster(FAST))
    assert outcome.stored >= 0.8 * seconds * most(MOON)
    assert outcome.fate.failed == {}


@each_way
@pytest.mark.parametrize("minutes", [0.5, 2])
def test_a_server_that_is_held_up_fails_nobody(store: Store, way: Way, minutes: float) -> None:
    """Its disk takes so long for a sync. Whose deadline is longer, or who has none, doesn't even try again."""

    def hold(_: Fleet, server: PacedServer) -> None:
        server.costs = replace(COSTS, sync=minutes * MINUTE)
        server.loop.call_later(minutes * MINUTE, setattr, server, "costs", COSTS)

    fate = outcome_of(store, way, 100, hold)
    assert (fate.done, fate.failed) == (100, {})
    deadline = way.patience.deadline
    assert (fate.tries == calls_needed(way, 100)) == (not deadline or minutes * 60 < deadline)


@each_way
def test_a_store_that_fails_for_a_while_is_outlived_by_whoever_tries_again(store: Store, way: Way) -> None:
    def fail(_: Fleet, server: PacedServer) -> None:
        server.refuse = lambda: StoreUnusable("the disk is gone")
        server.loop.call_later(3 / FAST, setattr, server, "refuse", lambda: None)

    fate = outcome_of(store, way, 40, fail)
    assert fate.done + sum(fate.failed.values()) == 40
    if way.patience.retries:
        assert fate.failed == {}
    else:
        assert fate.failed.keys() == {UNAVAILABLE}


@pytest.mark.parametrize(
    ("way", "error", "code", "refusals"),
    [
        (BAZEL, StoreUnusable("the disk is gone"), UNAVAILABLE, 6),
        (BAZEL, NoSpace("the disk is full"), RESOURCE_EXHAUSTED, 6),
        (GO_SDK, StoreUnusable("the disk is gone"), UNAVAILABLE, 6),
        (GO_SDK, NoSpace("the disk is full"), RESOURCE_EXHAUSTED, 6),
        (MOON, StoreUnusable("the disk is gone"), UNAVAILABLE, 1),
        (MOON, NoSpace("the disk is full"), RESOURCE_EXHAUSTED, 1),
        # Each of three pushes has five tries; where there is no room, it is no push.
        (BUILDSTREAM, StoreUnusable("the disk is gone"), UNAVAILABLE, 15),
        (BUILDSTREAM, NoSpace("the disk is full"), RESOURCE_EXHAUSTED, 1),
    ],
    ids=lambda value: value.name if isinstance(value, Way) else str(value) if isinstance(value, int) else "",
)
def test_each_ends_after_so_many_refusals(store: Store, way: Way, error: StoreError, code: int, refusals: int) -> None:
    """Of one call, when the store never works again."""

    def fail(_: Fleet, server: PacedServer) -> None:
        server.refuse = lambda: error
        servers.append(server)

    servers: list[PacedServer] = []
    fate = outcome_of(store, way._replace(clients=1), 4, fail)
    assert (fate.done, fate.failed) == (0, {code: 4})
    uploads = {"Write": 4, "BatchUpdateBlobs": 1}
    begun = servers[0].begun
    assert {name: begun[name] / calls for name, calls in uploads.items() if name in begun} == {
        "BatchUpdateBlobs" if way.blobs else "Write": refusals
    }
