"""What a transport in an event loop waits for: threads that may wait for disks, and clients, with patience."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from tools.server.errors import TooSlow
from tools.server.waits import Reason, waiting_for

_THREADS = 32
"""They wait for disks, not for the interpreter."""

LOOK_THREADS = 16
"""They look at many files each, or ask an upstream what it has."""
FETCH_THREADS = 64
"""They may wait for sources too, which can be slow or dead: others' uploads and downloads don't wait behind these."""

_T = TypeVar("_T")


class Waiting:
    """A pool of threads and a client's patience. Used in the loop's thread."""

    def __init__(self, idle_seconds: float, threads: int = _THREADS) -> None:
        """`idle_seconds`: how long a client may make no progress."""
        self.idle_seconds = idle_seconds
        self._pool = ThreadPoolExecutor(threads, "serve")

    async def in_thread(
        self, call: Callable[..., _T], *arguments: object, dropped: Callable[[_T], object] = lambda result: None
    ) -> _T:
        """Call it in a thread. What comes back when nobody waits any more is `dropped`."""
        # Shielded: a thread can't be stopped, and what it works on must not be closed under it.
        work = self._pool.submit(call, *arguments)
        future = asyncio.wrap_future(work)
        try:
            with waiting_for(Reason.THREAD, work=work):
                return await asyncio.shield(future)
        except asyncio.CancelledError:
            # However often: a client breaks off when its deadline is over, and soon after it is over here, too.
            while not future.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            if not future.cancelled() and future.exception() is None:
                dropped(future.result())
            raise
        finally:
            # What was raised in a thread refers to this frame, which mustn't refer to it in turn.
            del work, future

    async def patiently(self, step: Awaitable[_T]) -> _T:
        """Wait for a client. Raises TooSlow."""
        try:
            async with asyncio.timeout(self.idle_seconds):
                with waiting_for(Reason.CLIENT):
                    return await step
        except TimeoutError:
            raise TooSlow(f"no progress in {self.idle_seconds:g} s") from None

    def close(self) -> None:
        """End the threads, when they have done what they are at."""
        self._pool.shutdown()
