"""An event loop whose clock is a number: it jumps to the next timer, and moves where somebody charges for work.

Nothing in it waits for anything real, so what runs in it is the same each time.
What would run in a thread runs in the loop, and its result comes a while later.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


class Stuck(RuntimeError):
    """Somebody waits for what will never come: there is no timer any more, and nothing is ready."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """`thread_seconds`: until the result comes of what runs in a thread."""

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

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Call it now, and say later what came of it."""
        future: asyncio.Future[T] = self.create_future()
        settle: Callable[[], None]
        try:
            result = func(*args)
        except BaseException as error:  # noqa: BLE001 - it is the future's
            raised = error

            def settle() -> None:
                if not future.done():
                    future.set_exception(raised)
        else:

            def settle() -> None:
                if not future.done():
                    future.set_result(result)

        self.call_later(self.thread_seconds, settle)
        return future

    @property
    def timers(self) -> list[asyncio.TimerHandle]:
        """Those that will go off."""
        scheduled: Iterable[asyncio.TimerHandle] = getattr(self, "_scheduled")  # noqa: B009 - asyncio's own
        return [timer for timer in scheduled if not timer.cancelled()]


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
