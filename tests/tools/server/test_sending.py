"""Files to connections by sendfile: how often the selector is asked, and what happens to slow and vanished clients."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from store.errors import MissingBlob
from tools.server.sending import Sending

SIZE = 4 << 20
PIECE = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(bytes(range(256)) * (SIZE // 256))
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    ours.setblocking(False)
    yield ours, client
    ours.close()
    client.close()


def count(loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    registered: list[int] = []
    add_writer: Callable[..., None] = loop.add_writer

    def counted(descriptor: int, callback: Callable[[], object]) -> None:
        registered.append(descriptor)
        add_writer(descriptor, callback)

    monkeypatch.setattr(loop, "add_writer", counted)
    return registered


def test_a_client_that_keeps_up_costs_no_registration(
    file: int, ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def send() -> int:
        registered = count(asyncio.get_running_loop(), monkeypatch)
        sending = Sending(ends[0].fileno(), file)
        for offset in range(0, 64 << 10, 4 << 10):
            assert sending.begin(offset, offset + (4 << 10)) is None
        sending.close()
        return len(registered)

    assert asyncio.run(send()) == 0


def test_a_client_that_is_slower_is_registered_once_for_each_piece_at_most(
    file: int, ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def send() -> tuple[bytes, int]:
        registered = count(asyncio.get_running_loop(), monkeypatch)
        ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        reading = asyncio.create_task(asyncio.to_thread(read_all, ends[1]))
        sending = Sending(ends[0].fileno(), file)
        for offset in range(0, SIZE, PIECE):
            if (done := sending.begin(offset, offset + PIECE)) is not None:
                await done
        sending.close()
        ends[0].shutdown(socket.SHUT_WR)
        return await reading, len(registered)

    data, registered = asyncio.run(send())
    assert data == bytes(range(256)) * (SIZE // 256)
    assert registered <= SIZE // PIECE


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while data := connection.recv(1 << 20):
        parts.append(data)
    return b"".join(parts)


async def send_again(sending: Sending) -> None:
    for _ in range(3):
        if (done := sending.begin(0, SIZE)) is not None:
            await done


def test_a_client_that_vanishes_is_an_error_and_who_gives_up_waits_no_more(
    file: int, ends: tuple[socket.socket, socket.socket]
) -> None:
    async def send() -> None:
        ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        sending = Sending(ends[0].fileno(), file)
        done = sending.begin(0, SIZE)
        if done is None:
            pytest.fail("the kernel took 4 MiB for a client that reads nothing")
        done.cancel()
        await asyncio.sleep(0.01)
        ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        ends[1].close()
        with pytest.raises(ConnectionError):
            await send_again(sending)
        sending.close()
        sending.close()

    asyncio.run(send())


def test_a_file_that_is_too_short_is_told(file: int, ends: tuple[socket.socket, socket.socket]) -> None:
    async def send() -> None:
        sending = Sending(ends[0].fileno(), file)
        with pytest.raises(MissingBlob):
            sending.begin(SIZE, SIZE + 1)
        sending.close()

    asyncio.run(send())
