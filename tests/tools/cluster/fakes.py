"""A Buildbarn scheduler of a few lines that notes whatever in a worker's calls is against the rules."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from tests.tools.server.conftest import SHA256
from tools.reapi import methods
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.generated import remoteworker_pb2 as remoteworker
from tools.reapi.methods import Method
from tools.server.requests import write_digest

Context = Any
Handlers = Mapping[Method, Callable[[Any, Context], Any]]

STAGES = ("started", "fetching_inputs", "running", "uploading_outputs", "completed")
INTERVAL_SECONDS = 0.6
HOLD_SECONDS = 1.5


@contextmanager
def serving(handlers: Handlers, port: int = 0) -> Iterator[int]:
    """A server with these methods, in this process; its port."""
    server = grpc.server(ThreadPoolExecutor(20), options=(("grpc.so_reuseport", 1),))
    by_service: dict[str, dict[str, Any]] = {}
    for method, handler in handlers.items():
        by_service.setdefault(method.service, {})[method.name] = grpc.unary_unary_rpc_method_handler(
            handler,
            request_deserializer=method.request.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
    for service, known in by_service.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, known),))
    taken = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield taken
    finally:
        server.stop(0).wait()


@dataclass(slots=True)
class _Worker:
    """What the scheduler knows of one worker. `delivered`: it was told of what it is to be at."""

    request: remoteworker.SynchronizeRequest
    given: remoteworker.DesiredState.Executing | None = None
    delivered: bool = True
    stage: int = 0
    said: bytes = b""
    next_at: float = 0.0
    calls: int = 0
    cancel: bool = False


@dataclass(slots=True)
class Scheduler:
    """Gives out what is in `queue`; `violations` has what workers did wrong, `results` what they completed.

    `lose`: as many answers that give an action out are lost on their way.
    """

    queue: list[remoteworker.DesiredState.Executing] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    results: dict[str, reapi.ExecuteResponse] = field(default_factory=dict)
    stages: dict[str, list[str]] = field(default_factory=dict)
    preferred_idle: list[str] = field(default_factory=list)
    workers: dict[tuple[tuple[str, str], ...], _Worker] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)
    lose: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    # For tests.

    def handlers(self) -> Handlers:
        return {methods.SYNCHRONIZE: self.synchronize}

    def add(self, name: str, **options: Any) -> str:
        """Have an action of that name run; returns its hash."""
        return self.give(make_executing(name, **options))

    def give(self, executing: remoteworker.DesiredState.Executing) -> str:
        """Have that run; returns its action's hash."""
        with self._changed:
            self.queue.append(executing)
            self._changed.notify_all()
        return executing.action_digest.hash

    def cancel(self, hash_: str) -> None:
        """Have whoever runs that action be idle."""
        with self._changed:
            for worker in self.workers.values():
                if worker.given is not None and worker.given.action_digest.hash == hash_:
                    worker.cancel = True

    def replace(self, hash_: str, name: str) -> str:
        """Have whoever runs that action run another one at once."""
        executing = make_executing(name)
        with self._changed:
            for worker in self.workers.values():
                if worker.given is not None and worker.given.action_digest.hash == hash_:
                    worker.given, worker.delivered = executing, False
        return executing.action_digest.hash

    def restart(self) -> Scheduler:
        """One that knows of no workers, and has the same to remember for the test."""
        return Scheduler(self.queue, self.violations, self.results, self.stages, self.preferred_idle)

    # The interface.

    def synchronize(
        self, request: remoteworker.SynchronizeRequest, context: Context
    ) -> remoteworker.SynchronizeResponse:
        with self._changed:
            key = tuple(sorted(request.worker_id.items()))
            known = key in self.workers
            worker = self.workers.setdefault(key, _Worker(request))
            worker.calls += 1
            call = worker.calls
            self._check(worker, request, known)
            response = self._answer(worker, request, context, call)
            if response is None:
                context.abort(grpc.StatusCode.CANCELLED, "nobody waits for this any more")
            assert response is not None
            if response.desired_state.HasField("executing") and self.lose:
                self.lose -= 1
                worker.delivered = False
                context.abort(grpc.StatusCode.UNAVAILABLE, "the answer was lost")
            return response

    def _answer(
        self, worker: _Worker, request: remoteworker.SynchronizeRequest, context: Context, call: int
    ) -> remoteworker.SynchronizeResponse | None:
        state = request.current_state
        completed = state.executing.HasField("completed")
        if worker.cancel:
            worker.given, worker.cancel, worker.delivered = None, False, True
            return self._respond(worker, idle=True)
        if worker.given is not None and not worker.delivered:
            return self._respond(worker)
        if state.HasField("executing"):
            if not completed:
                # An action of a scheduler before this one goes on.
                return self._respond(worker, unset=True)
            self.results[state.executing.action_digest.hash] = state.executing.completed
            worker.given = None
        if request.prefer_being_idle:
            return self._respond(worker, idle=True)
        until = time.monotonic() + HOLD_SECONDS
        while not self.queue and time.monotonic() < until:
            self._changed.wait(0.05)
            if not context.is_active() or worker.calls != call:
                return None
        if not self.queue:
            return self._respond(worker, idle=completed, unset=not completed)
        worker.given = self.queue.pop(0)
        self.given.append(worker.given.action_digest.hash)
        return self._respond(worker)

    def _respond(self, worker: _Worker, *, idle: bool = False, unset: bool = False) -> remoteworker.SynchronizeResponse:
        response = remoteworker.SynchronizeResponse()
        worker.next_at = time.time() + INTERVAL_SECONDS
        response.next_synchronization_at.FromNanoseconds(int(worker.next_at * 1e9))
        if idle:
            response.desired_state.idle.CopyFrom(Empty())
        elif not unset:
            assert worker.given is not None
            response.desired_state.executing.CopyFrom(worker.given)
            worker.delivered, worker.stage, worker.said = True, 0, b""
        return response

    # The rules.

    def _check(self, worker: _Worker, request: remoteworker.SynchronizeRequest, known: bool) -> None:
        state = request.current_state
        kind = state.WhichOneof("worker_state")
        if not request.worker_id or not all(request.worker_id.values()):
            self._object("no id")
        names = [(item.name, item.value) for item in request.platform.properties]
        if names != sorted(names):
            self._object(f"the platform isn't in order: {names}")
        for field_ in ("platform", "size_class", "instance_name_prefix"):
            if getattr(request, field_) != getattr(worker.request, field_):
                self._object(f"{field_} changed")
        if kind is None:
            self._object("no state")
        if state.HasField("executing") and state.executing.prefer_being_idle != request.prefer_being_idle:
            self._object("older and newer schedulers are told different things")
        if request.prefer_being_idle:
            self.preferred_idle.append(str(kind))
        if known:
            self._check_transition(worker, state)

    def _check_transition(self, worker: _Worker, state: remoteworker.CurrentState) -> None:
        if state.HasField("idle"):
            if worker.given is not None and worker.delivered:
                self._object("idle, though it was given an action")
            return
        if worker.given is None:
            self._object("executing what nobody gave it")
            return
        executing = state.executing
        if not worker.delivered:
            return  # it can't know yet that it is to be at something else
        if executing.action_digest != worker.given.action_digest:
            self._object("executing another action than it was given")
        stage = executing.WhichOneof("execution_state")
        if stage is None:
            self._object("executing, but in no stage")
            return
        self.stages.setdefault(executing.action_digest.hash, []).append(stage)
        number = STAGES.index(stage)
        if number < worker.stage:
            self._object(f"from {STAGES[worker.stage]} back to {stage}")
        now = time.time()
        said = executing.SerializeToString()
        if worker.said == said and now < worker.next_at - 0.1:
            self._object(f"called {worker.next_at - now:.1f} s early with nothing to say")
        if now > worker.next_at + 2.0:
            self._object(f"called {now - worker.next_at:.1f} s late")
        if stage == "completed" and not executing.completed.HasField("result") and not executing.completed.status.code:
            self._object("completed, with neither a result nor an error")
        worker.stage, worker.said = number, said

    def _object(self, what: str) -> None:
        self.violations.append(what)


def make_executing(name: str, **options: Any) -> remoteworker.DesiredState.Executing:
    """What a scheduler gives out; `options` are further fields."""
    action = reapi.Action(salt=name.encode())
    digest = write_digest(SHA256.of(action.SerializeToString()))
    # Not what has that digest: the scheduler decides on it.
    action.timeout.seconds = 77
    executing = remoteworker.DesiredState.Executing(action_digest=digest, action=action, **options)
    executing.queued_timestamp.seconds = 1_700_000_000
    return executing
