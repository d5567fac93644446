"""Connections that there is no room for: they wait, aren't given up, and what is begun on them goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from store.repository import Store
from tests.tools.server.overload.bazel import make_uploads
from tests.tools.server.overload.peer import Peer
from tests.tools.server.overload.scenario import World, world
from tests.tools.server.overload.virtual_time import VirtualLoop, run_virtually
from tools.http2 import frames
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.http2_server import _Connection

SECONDS = 200.0
"""Longer than a connection may say nothing, and than a ping may be without an answer."""
WINDOW = 1 << 20
"""Bytes of an answer that a peer takes, if it isn't told otherwise."""


async def connect(here: World) -> tuple[Peer, int]:
    """A connection, and the server's number of it."""
    peer, mine = await join(here)
    return peer, mine._calls.number


async def join(here: World) -> tuple[Peer, _Connection]:
    """A connection, and the server's end of it."""
    known = set(here.server.connections)
    peer = here.connect()
    await peer.call(methods.GET_CAPABILITIES, reapi.GetCapabilitiesRequest().SerializeToString())
    (mine,) = here.server.connections - known
    return peer, mine


@contextmanager
def no_room(here: World, number: int) -> Iterator[None]:
    """Two calls of that connection wait, and those of others fill the server."""
    load = here.server.load
    size = load._bytes_most
    holds = [(number, 0), (number, 0), (-1, size)]
    for owner, held in holds:
        load.hold(owner, held)
    try:
        yield
    finally:
        for owner, held in reversed(holds):
            load.release(owner, held)


def bring(loop: VirtualLoop, peer: Peer, seed: int) -> list[asyncio.Task[bytes]]:
    """More uploads than are read of a connection that has to wait."""
    uploads = make_uploads(60, size=1000, seed=seed)
    return [loop.create_task(peer.call(methods.WRITE, *upload.messages(0))) for upload in uploads]


def test_whoever_is_not_read_is_not_taken_for_silent(store: Store) -> None:
    async def main(loop: VirtualLoop) -> None:
        async with world(store, loop) as here:
            peer, number = await connect(here)
            with no_room(here, number):
                answers = bring(loop, peer, 5)
                await asyncio.sleep(SECONDS)
                assert here.server.load.left == 1
                assert not any(answer.done() for answer in answers)
                assert not peer.over
            await asyncio.gather(*answers)

    run_virtually(main)


def test_whoever_was_asked_for_few_calls_does_not_count_as_calm(store: Store) -> None:
    async def main(loop: VirtualLoop) -> None:
        async with world(store, loop) as here:
            peer, mine = await join(here)
            light = [mine.is_light]
            with no_room(here, mine._calls.number):
                answers = bring(loop, peer, 13)
                await asyncio.sleep(1)
                assert len(mine._connection.streams) == 0
                light.append(mine.is_light)
            await asyncio.gather(*answers)
            await asyncio.sleep(10)
            assert [*light, mine.is_light] == [True, False, True]

    run_virtually(main)


def test_an_answer_goes_on_whose_window_is_opened_behind_calls_that_there_is_no_room_for(store: Store) -> None:
    async def main(loop: VirtualLoop) -> None:
        async with world(store, loop) as here:
            (blob,) = make_uploads(1, size=WINDOW + (WINDOW >> 1), seed=6)
            here.server.services.uploads.add_all([(blob.digest, blob.data)])
            peer, number = await connect(here)
            stream = peer._next
            request = bytestream.ReadRequest(resource_name=str(blob.name._replace(upload="")))
            reading = loop.create_task(peer.call(methods.READ, request.SerializeToString()))
            await asyncio.sleep(1)
            assert not reading.done()
            with no_room(here, number):
                answers = bring(loop, peer, 7)
                peer.pipe.send(frames.window_update(stream, WINDOW))
                await asyncio.wait_for(reading, 1)
                # Nothing waits for their client any more: they do again.
                later = bring(loop, peer, 8)
                await asyncio.sleep(SECONDS)
                assert here.server.load.left == 1
                assert not any(answer.done() for answer in later)
            await asyncio.gather(*answers, *later)

    run_virtually(main)


def test_an_upload_goes_on_whose_bytes_lie_behind_calls_that_there_is_no_room_for(store: Store) -> None:
    async def main(loop: VirtualLoop) -> None:
        async with world(store, loop) as here:
            (blob,) = make_uploads(1, size=WINDOW, seed=9)
            peer, number = await connect(here)
            first, *rest = blob.messages(0)
            stream = peer._next
            writing = loop.create_task(peer.call(methods.WRITE, first, ends=False))
            await asyncio.sleep(1)
            with no_room(here, number):
                answers = bring(loop, peer, 10)
                for message in rest:
                    last = frames.END_STREAM if message is rest[-1] else 0
                    body = bytes(1) + len(message).to_bytes(4, "big") + message
                    peer.pipe.send(frames.frame(frames.DATA, 0, stream, body[: frames.FRAME_LEAST]))
                    peer.pipe.send(frames.frame(frames.DATA, last, stream, body[frames.FRAME_LEAST :]))
                    await asyncio.sleep(0.1)
                await asyncio.wait_for(writing, 10)
            await asyncio.gather(*answers)

    run_virtually(main)


def test_a_message_half_of_which_is_not_read_is_waited_for(store: Store) -> None:
    async def main(loop: VirtualLoop) -> None:
        async with world(store, loop) as here:
            (half,) = make_uploads(1, size=20_000, seed=11)
            peer, number = await connect(here)
            first, second = half.messages(0)
            stream = peer._next
            body = bytes(1) + len(first).to_bytes(4, "big") + first
            writing = loop.create_task(peer.call(methods.WRITE, ends=False))
            await asyncio.sleep(0)
            peer.pipe.send(frames.frame(frames.DATA, 0, stream, body[:100]))
            await asyncio.sleep(1)
            with no_room(here, number):
                answers = bring(loop, peer, 12)
                await asyncio.sleep(SECONDS)
                assert not writing.done()
                body = body[100:] + bytes(1) + len(second).to_bytes(4, "big") + second
                peer.pipe.send(frames.frame(frames.DATA, 0, stream, body[: frames.FRAME_LEAST]))
                peer.pipe.send(frames.frame(frames.DATA, frames.END_STREAM, stream, body[frames.FRAME_LEAST :]))
            await asyncio.gather(writing, *answers)

    run_virtually(main)
