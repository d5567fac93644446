"""The built-in scheduler: executions from when they are asked for until a while after their end.

    execution = scheduler.submit(instance, action, …)   an equal one that is under way, or a new one in the queue
    with execution.watch(wake) as watch: …              told of each change, without a thread that waits
    assignment = scheduler.take()                       a worker's thread gets the next (see `tools.worker.work`)

Lower priorities go first, among equals who came first. An execution that
nobody watches for a while is cancelled: its clients have that long to come
back (WaitExecution) after a connection broke. What is done is kept for some
minutes, for those who come back later.

Everything here may be called from any thread; one lock guards it all. `wake`
is called under it, and must only note that there is something to look at.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Self

from store.digest import Digest
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import operations_pb2 as operations
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.errors import Exhausted, NotThere, Unavailable
from tools.server.requests import write_digest
from tools.worker.work import Assignment, Stage, Stop

ABANDON_SECONDS = 10.0
_KEEP_SECONDS = 600.0
_KEEP_MOST = 10_000
_FORGET_AT_ONCE = 64
_QUEUED_MOST = 50_000
"""Actions that wait at a time: some kilobytes each, and days of work for one machine."""
_RESPONSE = f"type.googleapis.com/{reapi.ExecuteResponse.DESCRIPTOR.full_name}"

_Key = tuple[str, Digest]


class Execution:
    """One run of an action, whoever asked for it. Its attributes are read and written under the scheduler's lock."""

    # Thousands are kept when they are done.
    __slots__ = (
        "_scheduler",
        "abandoned",
        "action",
        "ended",
        "instance",
        "name",
        "priority",
        "queued",
        "response",
        "stage",
        "step",
        "stop",
        "version",
        "watches",
    )

    def __init__(self, scheduler: Scheduler, name: str, instance: str, action: Digest, priority: int) -> None:
        self._scheduler = scheduler
        self.name = name
        self.instance = instance
        self.action = action
        self.priority = priority
        self.queued = time.time()
        self.ended = 0.0
        self.stage = reapi.ExecutionStage.QUEUED
        self.step: Stage | None = None
        """What its worker is at."""
        self.response: bytes | None = None
        """An ExecuteResponse; its bytes take a third of the message's memory."""
        self.version = 0
        self.watches: set[Watch] = set()
        self.stop = Stop()
        self.abandoned = 0
        """How often the last watcher has left."""

    @property
    def done(self) -> bool:
        """Whether there is a response."""
        return self.response is not None

    def watch(self, wake: Callable[[], object]) -> Watch:
        """Be told of changes, the present state being the first."""
        return self._scheduler.watch(self, wake)

    def as_message(self) -> operations.Operation:
        """How it is now."""
        metadata = reapi.ExecuteOperationMetadata(
            stage=reapi.ExecutionStage.COMPLETED if self.done else self.stage,
            action_digest=write_digest(self.action),
            digest_function=reapi.DigestFunction.Value.Name(self.action.function),
        )
        metadata.partial_execution_metadata.queued_timestamp.FromNanoseconds(int(self.queued * 1e9))
        message = operations.Operation(name=self.name, done=self.done)
        message.metadata.Pack(metadata)
        if self.response is not None:
            message.response.type_url = _RESPONSE
            message.response.value = self.response
        return message


class Watch:
    """Somebody who follows an execution; a context manager."""

    def __init__(self, scheduler: Scheduler, execution: Execution, wake: Callable[[], object]) -> None:
        self._scheduler = scheduler
        self.execution = execution
        self.wake = wake
        self.seen = -1

    def next(self) -> operations.Operation | None:
        """The state, if it isn't the one that was seen last; `done` says whether it is the last one."""
        return self._scheduler.look(self)

    def close(self) -> None:
        """Follow it no longer; harmless when repeated."""
        self._scheduler.leave(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Scheduler:
    """The executions of one server. Implements `tools.worker.work.WorkSource`."""

    def __init__(self, abandon_seconds: float = ABANDON_SECONDS, queued_most: int = _QUEUED_MOST) -> None:
        """`abandon_seconds`: how long an execution goes on that nobody watches. `queued_most`: actions that wait."""
        self._queued_most = queued_most
        self._abandon_seconds = abandon_seconds
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._queue: list[tuple[int, int, Execution]] = []
        self._serial = 0
        self._running: dict[str, Execution] = {}
        self._mergeable: dict[_Key, Execution] = {}
        self._all: OrderedDict[str, Execution] = OrderedDict()
        self._draining = False
        self.counts = {"merged": 0, "abandoned": 0}

    # For the service.

    def submit(self, instance: str, action: Digest, priority: int, *, merge: bool) -> Execution:
        """An execution in the queue; with `merge` an equal one that isn't done. Raises Unavailable, Exhausted."""
        with self._lock:
            if self._draining:
                raise Unavailable("this server is ending")
            execution = self._mergeable.get((instance, action)) if merge else None
            if execution is not None:
                self.counts["merged"] += 1
                if priority < execution.priority and execution.stage == reapi.ExecutionStage.QUEUED:
                    execution.priority = priority
                    self._push(execution)
                return execution
            if len(self._queue) >= self._queued_most:
                raise Exhausted(f"{len(self._queue)} actions are queued, which are the most: try again later")
            execution = self._new(instance, action, priority)
            if merge:
                self._mergeable[instance, action] = execution
            self._push(execution)
            return execution

    def find_equal(self, instance: str, action: Digest) -> Execution | None:
        """One of the same action that is under way, and may be shared."""
        with self._lock:
            return self._mergeable.get((instance, action))

    def answer(self, instance: str, action: Digest, response: reapi.ExecuteResponse) -> Execution:
        """An execution that is done already."""
        with self._lock:
            execution = self._new(instance, action, 0)
            self._finish(execution, response)
            return execution

    def get(self, name: str) -> Execution:
        """Raises NotThere."""
        with self._lock:
            self._forget_old()
            execution = self._all.get(name)
        if execution is None:
            raise NotThere(f"there is no operation {name[:80]!r}: it may have ended long ago, or this server is new")
        return execution

    def list(self) -> list[operations.Operation]:
        """All that are known, the oldest first."""
        with self._lock:
            self._forget_old()
            return [execution.as_message() for execution in self._all.values()]

    def message_of(self, execution: Execution) -> operations.Operation:
        """How it is now."""
        with self._lock:
            return execution.as_message()

    def cancel(self, execution: Execution, why: str = "it was cancelled") -> None:
        """Have it end; one that is done stays as it is."""
        with self._lock:
            self._cancel(execution, why)

    def watch(self, execution: Execution, wake: Callable[[], object]) -> Watch:
        """See `Execution.watch`."""
        watch = Watch(self, execution, wake)
        with self._lock:
            execution.watches.add(watch)
        return watch

    def look(self, watch: Watch) -> operations.Operation | None:
        """See `Watch.next`."""
        with self._lock:
            if watch.seen == watch.execution.version:
                return None
            watch.seen = watch.execution.version
            return watch.execution.as_message()

    def leave(self, watch: Watch) -> None:
        """See `Watch.close`."""
        execution = watch.execution
        with self._lock:
            if watch not in execution.watches:
                return
            execution.watches.discard(watch)
            if execution.watches or execution.done:
                return
            execution.abandoned += 1
            arguments = (execution, execution.abandoned)
        timer = threading.Timer(self._abandon_seconds, self._give_up, arguments)
        timer.daemon = True
        timer.start()

    def _give_up(self, execution: Execution, abandoned: int) -> None:
        with self._lock:
            if not execution.watches and not execution.done and execution.abandoned == abandoned:
                self.counts["abandoned"] += 1
                self._cancel(execution, "nobody waited for it any more")

    # For workers.

    def take(self) -> Assignment | None:
        """The next execution, as soon as there is one; None from `drain` on."""
        with self._changed:
            while True:
                while self._queue:
                    _, _, execution = heapq.heappop(self._queue)
                    # It may be there twice, or have been cancelled.
                    if execution.stage == reapi.ExecutionStage.QUEUED and not execution.done:
                        return self._assign(execution)
                if self._draining:
                    return None
                self._changed.wait()

    def _assign(self, execution: Execution) -> Assignment:
        execution.stage = reapi.ExecutionStage.EXECUTING
        self._running[execution.name] = execution
        self._tell(execution)
        return Assignment(
            action=execution.action,
            instance=execution.instance,
            queued=execution.queued,
            note=lambda stage: setattr(execution, "step", stage),
            finish=lambda response: self._end(execution, response),
            stop=execution.stop,
        )

    def _end(self, execution: Execution, response: reapi.ExecuteResponse) -> None:
        with self._lock:
            self._finish(execution, response)

    # Its life.

    def statistics(self) -> dict[str, int]:
        """How many are queued and running now, and were merged and abandoned so far."""
        with self._lock:
            queued = sum(execution.stage == reapi.ExecutionStage.QUEUED for execution in self._mergeable.values())
            return {"queued": queued, "running": len(self._running), **self.counts}

    def running(self) -> Iterable[tuple[Execution, Stage | None]]:
        """What workers are at."""
        with self._lock:
            return [(execution, execution.step) for execution in self._running.values()]

    def drain(self) -> None:
        """Take nothing more; what waits in the queue is sent away, to another server. What runs goes on."""
        with self._changed:
            self._draining = True
            queue, self._queue = self._queue, []
            for _, _, execution in queue:
                if execution.stage == reapi.ExecutionStage.QUEUED and not execution.done:
                    self._finish(execution, _refusal(codes.UNAVAILABLE, "this server is ending"))
            self._changed.notify_all()

    def stop_all(self) -> None:
        """End what still runs."""
        with self._lock:
            for execution in list(self._running.values()):
                execution.stop.set()

    # Under the lock.

    def _new(self, instance: str, action: Digest, priority: int) -> Execution:
        # As unguessable as the result it leads to.
        name = f"{instance}/operations/" if instance else "operations/"
        execution = Execution(self, f"{name}{_random()}", instance, action, priority)
        self._all[execution.name] = execution
        return execution

    def _push(self, execution: Execution) -> None:
        self._serial += 1
        heapq.heappush(self._queue, (execution.priority, self._serial, execution))
        self._changed.notify()

    def _cancel(self, execution: Execution, why: str) -> None:
        if execution.done:
            return
        if execution.name in self._running:
            # Its worker answers, when nothing of it runs any more.
            execution.stop.set()
        else:
            self._finish(execution, _refusal(codes.CANCELLED, why))
        if self._mergeable.get((execution.instance, execution.action)) is execution:
            # Who asks for the same from now on wants it done.
            del self._mergeable[execution.instance, execution.action]

    def _finish(self, execution: Execution, response: reapi.ExecuteResponse) -> None:
        if execution.done:
            return
        execution.response = response.SerializeToString()
        execution.ended = time.monotonic()
        if not self._running.pop(execution.name, None):
            execution.stop.close()
        if self._mergeable.get((execution.instance, execution.action)) is execution:
            del self._mergeable[execution.instance, execution.action]
        self._tell(execution)
        self._all.move_to_end(execution.name)
        self._forget_old()

    def _tell(self, execution: Execution) -> None:
        execution.version += 1
        for watch in execution.watches:
            watch.wake()

    def _forget_old(self) -> None:
        limit = time.monotonic() - _KEEP_SECONDS
        old: list[str] = []
        # A few at a time, and without a list of the thousands that are kept.
        for name, execution in islice(self._all.items(), _FORGET_AT_ONCE):
            if not execution.done:
                continue
            if execution.ended >= limit and len(self._all) - len(old) <= _KEEP_MOST:
                break  # those behind it have ended later
            if not execution.watches:
                old.append(name)
        for name in old:
            del self._all[name]


def _random() -> str:
    import uuid

    return str(uuid.uuid4())


def _refusal(code: codes.Code, why: str) -> reapi.ExecuteResponse:
    response = reapi.ExecuteResponse()
    response.status.code = code
    response.status.message = why
    return response
