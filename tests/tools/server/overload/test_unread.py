"""Connections that there is no room for: they wait, aren't given up, and what is begun on them goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from store.repository import Store
from tests.tools.server.overload.bazel import Upload, make_uploads
from tests.tools.server.overload.peer import Peer
from tests.tools.server.overload.scenario import World, world
from tests.tools.server.overload.virtual_time import VirtualLoop, run_virtually
from tools.http2 import frames
from tools.http2.stream import STREAM_WINDOW
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.methods import Method
from tools.server.http2_calls import _BEFORE_MOST
from tools.server.http2_server import _Connection
from tools.server.requests import write_digest

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


@pytest.mark.parametrize("method", [methods.READ, methods.BATCH_READ_BLOBS], ids=lambda method: str(method.name))
def test_an_answer_goes_on_whose_window_is_opened_behind_calls_that_there_is_no_room_for(
    store: Store, method: Method
) -> None:
    async def main(loop: VirtualLoop) -> None:
        async with world(store, loop) as here:
            (blob,) = make_uploads(1, size=WINDOW + (WINDOW >> 1), seed=6)
            here.server.services.uploads.add_all([(blob.digest, blob.data)])
            peer, number = await connect(here)
            stream = peer._next
            request: Any = reapi.BatchReadBlobsRequest(digests=[write_digest(blob.digest)])
            if method is methods.READ:
                request = bytestream.ReadRequest(resource_name=str(blob.name._replace(upload="")))
            reading = loop.create_task(peer.call(method, request.SerializeToString()))
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


def make_batch(upload: Upload) -> bytes:
    item = reapi.BatchUpdateBlobsRequest.Request(digest=write_digest(upload.digest), data=upload.data)
    return reapi.BatchUpdateBlobsRequest(requests=[item]).SerializeToString()


def test_who_has_a_call_that_waits_for_its_client_brings_no_more_than_a_few_windows(store: Store) -> None:
    async def main(loop: VirtualLoop) -> None:
        async with world(store, loop) as here:
            (half,) = make_uploads(1, size=20_000, seed=14)
            peer, number = await connect(here)
            load = here.server.load
            begun = loop.create_task(peer.call(methods.WRITE, half.messages(0)[0], ends=False))
            await asyncio.sleep(1)
            with no_room(here, number):
                before = load.bytes
                uploads = make_uploads(400, size=200_000, seed=15)
                answers = [
                    loop.create_task(peer.call(methods.BATCH_UPDATE_BLOBS, make_batch(upload))) for upload in uploads
                ]
                await asyncio.sleep(20)
                assert load.own(number) <= _BEFORE_MOST + 2
                assert load.bytes - before <= 128 * STREAM_WINDOW
                assert not load.coming
            await asyncio.gather(*answers)
            begun.cancel()
            await asyncio.gather(begun, return_exceptions=True)

    run_virtually(main)


def test_messages_that_are_not_whole_are_bounded_too(store: Store) -> None:
    async def main(loop: VirtualLoop) -> None:
        async with world(store, loop) as here:
            load = here.server.load
            load._coming_most = 1 << 20
            peers = [here.connect() for _ in range(4)]
            uploads = make_uploads(80, size=400_000, seed=16)
            calls = [
                loop.create_task(
                    peers[number % 4].call(methods.BATCH_UPDATE_BLOBS, make_batch(upload), ends=number % 3 > 0)
                )
                for number, upload in enumerate(uploads)
            ]
            coming = []
            # A third of them never ends, and is given up after a while.
            for _ in range(1000):
                await asyncio.sleep(0.1)
                coming.append(load.coming)
            assert 700_000 < max(coming) <= load._coming_most
            for call in calls[::3]:
                assert not call.done() or call.exception()
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            assert all(call.exception() is None for number, call in enumerate(calls) if number % 3)
            assert not load.coming

    run_virtually(main)
