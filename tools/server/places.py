"""Whose turn it is to upload: a client that begins more uploads than it may have open waits with the rest of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tools.server.errors import Exhausted


class Places:
    """So many places for each client. Used in the loop's thread.

    A build that begins to upload has thousands of streams, and a few of its
    pieces each; refused ones come again and again, and after some times the
    build fails. So they wait, the first that came first.
    """

    def __init__(self, most: int, seconds: float) -> None:
        """`most` places for a client, for one of which a call waits so many seconds."""
        self._most = most
        self._seconds = seconds
        self._clients: dict[str, _Client] = {}

    @asynccontextmanager
    async def one(self, client: str) -> AsyncIterator[None]:
        """Have a place. Raises Exhausted where none became free."""
        places = self._clients.setdefault(client, _Client(self._most))
        places.calls += 1
        try:
            if places.free.locked():
                await self._wait(places.free)
            else:
                await places.free.acquire()
            try:
                yield
            finally:
                places.free.release()
        finally:
            places.calls -= 1
            if not places.calls:
                del self._clients[client]

    async def _wait(self, free: asyncio.Semaphore) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await free.acquire()
        except TimeoutError:
            raise Exhausted(
                f"this client has {self._most} uploads open already, and none ended in {self._seconds:g} s: "
                "finish one first"
            ) from None


class _Client:
    """`calls`: those that have a place, or wait for one."""

    def __init__(self, most: int) -> None:
        self.free = asyncio.Semaphore(most)
        self.calls = 0
