"""Writing back: what clients bring goes to the upstream too, in the background.

Clients wait for nothing here. What they brought is noted in a queue, by name;
one thread takes all that waits, asks the upstream what of it is missing, and
uploads that: small blobs in batches, the others as streams, results when the
blobs that they need are there. What the upstream doesn't take is tried again
while it doesn't answer, and dropped after a while, as what the queue has no
room for: with a line in the log, and counted. A result that is uploaded later
brings along what it needs of that.

Threads may share a `WriteBack`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from store.blobs import Blobs
from store.digest import Digest, DigestFunction
from store.presence import as_digest
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.actions import ActionResults
from tools.server.read_through import Actions
from tools.server.requests import get_function, read_digest
from tools.upstream.errors import Unreachable
from tools.upstream.sending import send_blobs
from tools.upstream.sources import Upstream

log = logging.getLogger("casfs.serve")

_ROUND_MOST = 1000
_PAUSE_SECONDS = 1.0
_SAY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class WriteBackLimits:
    """How many names may wait; seconds that one round is tried again, and that the end of the server waits."""

    waiting: int = 100_000
    retry_seconds: float = 60.0
    end_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class Result:
    """The result of an action in an instance."""

    action: Digest
    instance: str


class WriteBack:
    """Uploads to one upstream; `close` it before the store."""

    def __init__(
        self, blobs: Blobs, actions: ActionResults, upstream: Upstream, limits: WriteBackLimits | None = None
    ) -> None:
        self._blobs = blobs
        self._actions = actions
        self._upstream = upstream
        self._limits = limits or WriteBackLimits()
        self._changed = threading.Condition()
        # Under `_changed`:
        self._waiting: deque[Digest | Result] = deque()
        self._thread: threading.Thread | None = None
        self._under_way = 0
        self._closed = False
        self._dropped = 0
        self._said = 0.0
        self._told = 0
        """Dropped ones of which the log knows."""
        # The thread's:
        self._sent_blobs = 0
        self._sent_results = 0
        self._end = float("inf")
        self._late: dict[Result, float] = {}
        """Results that aren't whole yet, as clients may bring one before its blobs; until when that is waited for."""
        # Set before `close`:
        self._latest = float("inf")

    def add(self, items: Sequence[Digest | Result]) -> None:
        """Note what the upstream shall have."""
        with self._changed:
            room = self._limits.waiting - len(self._waiting)
            self._waiting.extend(items[: max(room, 0)])
            if len(items) > room:
                self._drop(len(items) - max(room, 0), "too much waits for it")
            if self._thread is None and not self._closed:
                thread = threading.Thread(target=self._run, name="write back", daemon=True)
                thread.start()
                self._thread = thread
            self._changed.notify_all()

    def statistics(self) -> dict[str, int]:
        """What was sent, dropped, and waits."""
        return {
            "sent_blobs": self._sent_blobs,
            "sent_results": self._sent_results,
            "dropped": self._dropped,
            "waiting": len(self._waiting),
        }

    def end_within(self, seconds: float) -> None:
        """Let `close` send for no longer than that, counted from now."""
        self._latest = time.monotonic() + seconds

    def close(self) -> None:
        """Send what waits, as far as that goes within some seconds."""
        with self._changed:
            self._closed = True
            now = time.monotonic()
            self._end = max(now, min(now + self._limits.end_seconds, self._latest))
            thread = self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join(self._end - now + 1.0)
        with self._changed:
            left = len(self._waiting)
            if thread is not None and thread.is_alive():
                left += self._under_way
            if left or self._dropped > self._told:
                self._drop(left, "this server ends", say=True)
            self._waiting.clear()

    def _drop(self, count: int, why: str, *, say: bool = False) -> None:
        url, now = self._upstream.options.url, time.monotonic()
        with self._changed:
            self._dropped += count
            # Not a line for each blob of a build.
            if say or not self._said or now - self._said > _SAY_SECONDS:
                self._said, self._told = now, self._dropped
                log.warning("%s: %d not written back (%s), %d in all", url, count, why, self._dropped)

    # The thread.

    def _run(self) -> None:
        while items := self._take():
            # In the order in which they came, each once.
            self._send_patiently(list(dict.fromkeys(items)))

    def _take(self) -> list[Digest | Result]:
        with self._changed:
            while not self._waiting and not self._closed:
                if not self._changed.wait(_PAUSE_SECONDS if self._late else None):
                    break
            # Behind what they may wait for.
            items = [self._waiting.popleft() for _ in range(min(len(self._waiting), _ROUND_MOST))] + list(self._late)
            self._under_way = len(items)
            return items

    def _send_patiently(self, items: list[Digest | Result]) -> None:
        until = time.monotonic() + self._limits.retry_seconds
        while True:
            try:
                self._send(items)
                return
            except Unreachable as error:
                if time.monotonic() + _PAUSE_SECONDS > min(until, self._end):
                    self._give_up(items, error)
                    return
            except Exception as error:  # noqa: BLE001 - what is wrong with these may not be with the next
                self._give_up(items, error)
                return
            with self._changed:
                self._changed.wait_for(lambda: self._closed, _PAUSE_SECONDS)

    def _give_up(self, items: list[Digest | Result], error: Exception) -> None:
        for item in items:
            if isinstance(item, Result):
                self._late.pop(item, None)
        self._drop(len(items), str(error))

    def _send(self, items: list[Digest | Result]) -> None:
        results = {item: self._actions.find(item.action, item.instance) for item in items if isinstance(item, Result)}
        wanted = [item for item in items if isinstance(item, Digest)]
        wanted += [as_digest(name) for found in results.values() if found for name in found[1]]
        failed = set[Digest]()
        for function in DigestFunction:
            failed |= self._send_blobs([digest for digest in dict.fromkeys(wanted) if digest.function is function])
        awaited = set[Digest]()
        for item, found in results.items():
            lacking = failed.intersection(map(as_digest, found[1])) if found else set()
            late = self._late.pop(item, None)
            if found and not lacking:
                self._upstream.client().write_result(item.action, item.instance, found[0])
                self._sent_results += 1
            elif not any(map(self._blobs.has_file, lacking)) and self._put_off(item, late):
                awaited |= lacking
            else:
                self._drop(1, f"the result of {item.action} isn't whole")
        unknown = {digest for digest in failed if not self._upstream.client().knows(digest.function)}
        for function in {digest.function for digest in unknown}:
            self._drop(sum(digest.function is function for digest in unknown), f"it has no blobs by {function.label}")
        if left := failed - unknown - awaited:
            self._drop(len(left), "collected meanwhile, or refused")

    def _put_off(self, item: Result, until: float | None) -> bool:
        """Whether to wait for what it lacks; `until`: where that was begun."""
        now = time.monotonic()
        if until is None:
            until = now + self._limits.retry_seconds
        if self._closed or now >= until or len(self._late) >= _ROUND_MOST:
            return False
        self._late[item] = until
        return True

    def _send_blobs(self, digests: list[Digest]) -> set[Digest]:
        """Upload what is missing there; those that it still hasn't."""
        client = self._upstream.client()
        if not digests:
            return set()
        if not client.knows(digests[0].function):
            return set(digests)
        sent, failed = send_blobs(client, self._blobs, digests)
        self._sent_blobs += sent
        return failed


class ActionsBack:
    """The ActionCache service, whose results are written back."""

    def __init__(self, actions: Actions, back: WriteBack) -> None:
        self._actions = actions
        self._back = back

    def get(self, request: reapi.GetActionResultRequest, *, may_wait: bool = True) -> bytes:
        """As without."""
        return self._actions.get(request, may_wait=may_wait)

    def update(self, request: reapi.UpdateActionResultRequest) -> bytes:
        """Store it here; the upstream follows."""
        message = self._actions.update(request)
        function = get_function(request.digest_function, [request.action_digest.hash])
        self._back.add([Result(read_digest(request.action_digest, function), request.instance_name)])
        return message
