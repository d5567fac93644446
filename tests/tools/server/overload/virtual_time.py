"""An event loop whose clock is a number: it jumps to the next timer, and moves where somebody charges for work.

Nothing in it waits for anything real, so what runs in it is the same each time.
What would run in a thread runs in the loop, a while later: beside a real thread
the clock would jump on as if its work took hours, or no time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Stuck(RuntimeError):
    """Somebody waits for what will never come: there is no timer any more, and nothing is ready."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """`thread_seconds`: until what was given to a thread is done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.thread_seconds = 0.01
        super().__init__(_Jump(self))

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self.now

    def charge(self, seconds: float) -> None:
        """What runs now takes so long."""
        self.now += seconds

    @property
    def timers(self) -> list[asyncio.TimerHandle]:
        """Those that will go off."""
        scheduled: Iterable[asyncio.TimerHandle] = getattr(self, "_scheduled")  # noqa: B009 - asyncio's own
        return [timer for timer in scheduled if not timer.cancelled()]


class VirtualThreads(Executor):
    """As many as are needed. They do all their work at the end of its time, and find what became of it meanwhile."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        self._loop.call_later(self._loop.thread_seconds, _run, future, partial(fn, *args, **kwargs))
        return future


def _run(future: Future[T], call: Callable[[], T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is the future's
            future.set_exception(error)


class _Jump(selectors.SelectSelector):
    """Has no events; to wait is to be there already."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stuck("nothing will ever happen again")
        self._loop.now += max(timeout, 0.0)
        return []


def run_virtually(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Its result; whatever an event loop would only log is raised."""
    loop = VirtualLoop()
    wrong: list[str] = []

    def note(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        wrong.append(f"{context['message']}: {context.get('exception')!r}")

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        loop.set_exception_handler(note)
        result = runner.run(main(loop))
        assert not wrong, wrong
    assert not wrong, wrong
    return result
