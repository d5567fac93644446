"""Clients that want too much, take it back, and go: what is left of it, and how soon others are served as ever."""

from __future__ import annotations

import asyncio
import random

import pytest

from store.errors import StoreUnusable
from store.repository import Store
from tests.tools.server.overload.bazel import Bazel, Fate, Patience, Upload, make_uploads
from tests.tools.server.overload.paced_server import Costs
from tests.tools.server.overload.peer import DEADLINE_EXCEEDED, Failed
from tests.tools.server.overload.scenario import CALM_SECONDS, CONNECTIONS, PATIENCE, full_rate, world
from tests.tools.server.overload.virtual_time import VirtualLoop, run_virtually
from tools.reapi import methods

STORM_SECONDS = 60.0


async def cancelling(bazel: Bazel, uploads: list[Upload], fraction: float, seed: int = 0) -> None:
    """Begin them all, again and again, and give so many up before the server can have answered."""
    chance = random.Random(seed)

    async def one(number: int) -> None:
        peer = bazel.peers[number % len(bazel.peers)]
        while True:
            upload = uploads[chance.randrange(len(uploads))]
            patience = chance.uniform(0.0, 2.0) if chance.random() < fraction else PATIENCE.deadline
            try:
                await peer.call(methods.WRITE, *upload.messages(0), seconds=patience)
            except Failed as failed:
                if failed.code != DEADLINE_EXCEEDED:
                    raise
            await asyncio.sleep(chance.uniform(0.0, 1.0))

    tasks = [bazel.loop.create_task(one(number)) for number in range(len(uploads))]
    await asyncio.sleep(STORM_SECONDS)
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in ended), ended


@pytest.mark.parametrize(
    "fraction", [pytest.param(0.0, marks=pytest.mark.long), pytest.param(0.3, marks=pytest.mark.long), 1.0]
)
def test_after_a_storm_of_a_minute_a_new_client_is_served_at_full_rate(store: Store, fraction: float) -> None:
    most = full_rate(store)

    async def main(loop: VirtualLoop) -> tuple[float, float, list[float]]:
        async with world(store, loop) as here:
            await cancelling(here.bazel(), make_uploads(800, seed=1), fraction)
            over = loop.time()
            await here.server.wait_idle()
            gone = loop.time()
            await here.bazel(patience=Patience(0)).upload_all(make_uploads(200, seed=2))
            return gone - over, 200 / (loop.time() - gone), here.calm.latencies

    gone, rate, calm = run_virtually(main)
    assert gone <= 2 * PATIENCE.deadline
    assert rate >= 0.8 * most
    assert max(calm) <= CALM_SECONDS


def test_a_new_client_gets_its_share_while_the_backlog_of_others_is_worked_off(store: Store) -> None:
    async def main(loop: VirtualLoop) -> float:
        async with world(store, loop) as here:
            storm = loop.create_task(here.bazel().upload_all(make_uploads(2000)))
            await asyncio.sleep(20)
            began = loop.time()
            await here.bazel(1, Patience(0)).upload_all(make_uploads(20, seed=2))
            took = loop.time() - began
            storm.cancel()
            await asyncio.gather(storm, return_exceptions=True)
            return took

    # One connection of those there are, with twenty uploads.
    fair = 20 * (CONNECTIONS + 1) / full_rate(store)
    assert run_virtually(main) <= 1.5 * fair


@pytest.mark.parametrize(
    ("size", "goes_on"), [pytest.param(150_000, False, id="gathered"), pytest.param(400_000, True, id="written")]
)
def test_uploads_piece_by_piece_that_break_off_leave_nothing(store: Store, size: int, goes_on: bool) -> None:
    async def main(loop: VirtualLoop) -> Fate:
        # So slow that most break off at their first try: while they wait for a turn, for a thread, or for messages.
        async with world(store, loop, Costs(frame=0.01)) as here:
            loop.thread_seconds = 1.0
            bazel = here.bazel(4)
            await bazel.upload_all(make_uploads(40, size))
            return bazel.fate

    fate = run_virtually(main)
    assert (fate.done, fate.failed) == (40, {})
    assert fate.tries > 40
    assert (fate.resumed > 0) == goes_on


def test_a_store_that_fails_is_told_to_all_and_forgotten_when_it_works_again(store: Store) -> None:
    async def main(loop: VirtualLoop) -> tuple[int, int]:
        async with world(store, loop) as here:
            bazel = here.bazel(4)
            here.server.refuse = lambda: StoreUnusable("the disk is gone")
            storm = loop.create_task(bazel.upload_all(make_uploads(200)))
            await asyncio.sleep(1.0)
            here.server.refuse = lambda: None
            await storm
            return bazel.fate.done, bazel.fate.tries

    done, tries = run_virtually(main)
    assert done == 200
    assert tries > 200


def test_connections_that_are_lost_in_a_storm_leave_nothing(store: Store) -> None:
    async def main(loop: VirtualLoop) -> None:
        async with world(store, loop) as here:
            chance = random.Random(0)
            for number in range(10):
                bazel = here.bazel(5)
                uploads = make_uploads(200, chance.choice((200, 60_000)), seed=number)
                storm = loop.create_task(bazel.upload_all(uploads))
                await asyncio.sleep(chance.uniform(0.0, 3.0))
                for peer in bazel.peers:
                    if chance.random() < 0.5:
                        peer.pipe.break_off()
                    else:
                        peer.pipe.finish()
                storm.cancel()
                await asyncio.gather(storm, return_exceptions=True)

    run_virtually(main)
