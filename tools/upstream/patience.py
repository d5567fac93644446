"""How long to go on with an upstream that doesn't answer: retries, and then passing it over for a while.

A call that finds nobody is tried again with growing pauses, a third of the
timeout long. Then the upstream counts as dead: for a second nobody asks it,
everybody is told so at once. After that one call, and one at a time, tries
whether it lives again; if not, the pause doubles, up to half a minute.

So a dead upstream costs who needs it first some seconds, once, and nobody else
anything. Threads may share a `Patience`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tools.upstream.errors import PassedOver, Refused, Unreachable

T = TypeVar("T")

_FIRST_DELAY = 0.1
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0


class Patience:
    """With one upstream; `timeout` in seconds is what whoever asks has in all."""

    def __init__(self, timeout: float) -> None:
        self.call_seconds = timeout * 0.8
        """What one question may take, its retries included."""
        self._retry_seconds = timeout / 3
        self._lock = threading.Lock()
        # Under `_lock`:
        self._pause = 0.0
        self._until = 0.0
        self._probing = False
        self._why = ""
        self.passed_over = 0
        """How often nobody was asked, as the upstream was dead just before."""

    def run(self, attempt: Callable[[float], T], seconds: float = 0.0) -> T:
        """Call `attempt` with how many seconds it has, until it works. Raises what it raises, Unreachable."""
        patient = self._begin()
        began = time.monotonic()
        end = began + min(seconds or self.call_seconds, self.call_seconds)
        give_up = began + self._retry_seconds if patient else began
        delay = _FIRST_DELAY
        while True:
            try:
                result = attempt(max(end - time.monotonic(), 0.001))
            except Unreachable as error:
                wait = delay * random.uniform(0.5, 1.0)  # noqa: S311 - so that many don't come back at once
                if time.monotonic() + wait > min(give_up, end) or self._is_dead():
                    self._fail(str(error))
                    raise
                time.sleep(wait)
                delay *= 2
            except Refused:
                self._succeed()
                raise
            except BaseException:
                self._leave()
                raise
            else:
                self._succeed()
                return result

    def _begin(self) -> bool:
        """Whether retries are worth it. Raises Unreachable where it isn't to be asked now."""
        with self._lock:
            if not self._pause:
                return True
            left = self._until - time.monotonic()
            if left > 0 or self._probing:
                self.passed_over += 1
                raise PassedOver(f"passed over for now: {self._why}")
            self._probing = True
            return False

    def _is_dead(self) -> bool:
        with self._lock:
            return self._pause > 0

    def _fail(self, why: str) -> None:
        with self._lock:
            now = time.monotonic()
            if now >= self._until:
                # Of many that fail at once, the first counts.
                self._pause = min(self._pause * 2, _LONGEST_PAUSE) if self._pause else _FIRST_PAUSE
                self._until = now + self._pause
            self._probing = False
            self._why = why

    def _succeed(self) -> None:
        with self._lock:
            self._pause, self._until, self._probing = 0.0, 0.0, False

    def _leave(self) -> None:
        with self._lock:
            self._probing = False
