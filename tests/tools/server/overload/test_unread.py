"""Connections that aren't read for long, as there is no room for what they bring: they wait, and aren't given up."""

from __future__ import annotations

import asyncio

from store.repository import Store
from tests.tools.server.overload.bazel import make_uploads
from tests.tools.server.overload.scenario import world
from tests.tools.server.overload.virtual_time import VirtualLoop, run_virtually
from tools.reapi import methods
from tools.reapi.generated import remote_execution_pb2 as reapi

SECONDS = 200.0
"""Longer than a connection may say nothing, and than a ping may be without an answer."""


def test_whoever_is_not_read_is_not_taken_for_silent(store: Store) -> None:
    async def main(loop: VirtualLoop) -> None:
        async with world(store, loop) as here:
            known = set(here.server.connections)
            peer = here.connect()
            await peer.call(methods.GET_CAPABILITIES, reapi.GetCapabilitiesRequest().SerializeToString())
            (mine,) = here.server.connections - known
            load, number = here.server.load, mine._calls.number
            # Two calls of it wait, and somebody else's fill the server.
            for _ in range(2):
                load.hold(number, 0)
            load.hold(-1, load._bytes_most)
            # More than is read of a connection that has to wait.
            uploads = make_uploads(60, size=1000, seed=5)
            answers = [loop.create_task(peer.call(methods.WRITE, *upload.messages(0))) for upload in uploads]
            await asyncio.sleep(SECONDS)
            assert load.left == 1
            assert not any(answer.done() for answer in answers)
            assert not peer.over
            load.release(-1, load._bytes_most)
            for _ in range(2):
                load.release(number, 0)
            await asyncio.gather(*answers)
            assert len(here.server.stored) >= len(uploads)

    run_virtually(main)
