"""What clients of schedulers have in common: who this worker is, actions on their way to its threads, pauses."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.generated.status_pb2 import Status
from tools.reapi.methods import Method
from tools.upstream.channel import Channel
from tools.upstream.errors import UpstreamError
from tools.worker.work import Assignment

REST_SECONDS = 5.0
"""How long a worker asks for nothing after it failed an action through its own fault: others may do better."""

_OURS = frozenset({codes.CANCELLED, codes.INTERNAL, codes.RESOURCE_EXHAUSTED, codes.UNAVAILABLE})


@dataclass(frozen=True, slots=True)
class Member:
    """What a scheduler is told: a `name` that no other worker has, how many actions at a time, platform properties.

    A property may be there several times, with different values. `size_class`: see Buildbarn.
    """

    name: str
    slots: int = 1
    properties: tuple[tuple[str, str], ...] = ()
    size_class: int = 0


class Handout:
    """Actions on their way from a scheduler's client to a worker's threads."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Assignment | None] = queue.SimpleQueue()

    def put(self, assignment: Assignment) -> None:
        """Give it to a thread."""
        self._waiting.put(assignment)

    def take(self) -> Assignment | None:
        """See `WorkSource.take`."""
        while (assignment := self._waiting.get()) is not None:
            if not assignment.stop.is_set:
                return assignment
            # Ended before a thread was free.
            ended = Status(code=codes.CANCELLED, message="it was ended before it began")
            assignment.finish(reapi.ExecuteResponse(status=ended))
            assignment.stop.close()
        self._waiting.put(None)
        return None

    def end(self) -> None:
        """What was put is still taken, then each thread gets None."""
        self._waiting.put(None)


class Backoff:
    """Pauses that grow, in seconds; each is spread at random, so that many workers don't come back at once."""

    def __init__(self, first: float, most: float) -> None:
        self._first = first
        self._most = most
        self._last = 0.0

    def next(self) -> float:
        """The next pause: twice the one before."""
        self._last = min(self._last * 2 or self._first, self._most)
        return self._last * random.uniform(0.75, 1.0)  # noqa: S311 - nobody is kept out by it

    def reset(self) -> None:
        """Begin anew."""
        self._last = 0.0


class BrokenOff(Exception):
    """A call was given up, as there is something new to tell."""


def call_until(
    channel: Channel,
    method: Method,
    request: Message,
    seconds: float,
    *,
    changed: threading.Condition,
    is_over: Callable[[], bool],
    gave_up: type[UpstreamError],
) -> Any:
    """The reply to a call that the server may hold for long; broken off when `is_over` says so, under `changed`.

    Raises UpstreamError; BrokenOff in place of `gave_up` where it was broken off.
    """

    def wake() -> None:
        with changed:
            changed.notify_all()

    pending = channel.begin(method, request, seconds, wake)
    with changed:
        changed.wait_for(lambda: pending.done or is_over())
    broken = not pending.done
    pending.cancel()
    try:
        return pending.result()
    except gave_up:
        if broken:
            raise BrokenOff from None
        raise


def is_ours(status: Status) -> bool:
    """Whether an action failed through this worker's fault, so that another one may be able to run it."""
    return status.code in _OURS


def as_retryable(response: reapi.ExecuteResponse) -> reapi.ExecuteResponse:
    """The same, such that the scheduler has another worker try what this one couldn't run.

    CANCELLED is what a worker that is told to end answers with: its scheduler
    still wants the action done.
    """
    if is_ours(response.status):
        response.status.code = codes.UNAVAILABLE
    return response
