"""Looking after one command: its limits, its end before its time, and how long fetching held it up."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from store.hydration import Hydrator
from tools.worker.limits import Limits, Slot
from tools.worker.work import Stop

GRACE_LEAST = 30.0
"""Seconds of fetching that never count against a timeout; of longer timeouts, as much again as they are."""


class Watching:
    """Implements `casfs.bubblewrap.Watcher`; a context manager, around one command."""

    def __init__(self, stop: Stop, limits: Limits, hydrator: Hydrator, timeout: float) -> None:
        """`timeout`: the command's, in seconds."""
        self._stop = stop
        self._limits = limits
        self._hydrator = hydrator
        self._bound = max(timeout, GRACE_LEAST)
        self._slot: Slot | None = None
        self._busy_before = hydrator.busy_seconds()
        self.peak = 0
        """Bytes of memory it took at most, 0 where nobody knows."""
        self.notes: list[str] = []

    def begin(self, process: int) -> None:
        """Put its first process under the limits, before it starts another."""
        if self._slot is not None:
            self._slot.take(process)

    @property
    def stop(self) -> int:
        """See `Stop`."""
        return self._stop.fileno()

    def held_up(self) -> float:
        """Seconds during which something was being fetched: by this command or another, which nobody can tell apart."""
        return min(self._hydrator.busy_seconds() - self._busy_before, self._bound)

    def __enter__(self) -> Self:
        self._slot = self._limits.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._slot is not None:
            self.peak = self._slot.peak()
            self.notes += self._slot.leave()
