"""Actions of a Buildbarn: the worker's side of buildbarn.remoteworker.OperationQueue.Synchronize.

    with Buildbarn(channel, instance, member) as barn:
        …                                           threads call barn.take()
        barn.drain()                                at the end: see `tools.worker.work`

To the scheduler each action that runs at a time is a worker of its own, with an
id of its own: a *slot* here, with a thread that says what it is at and is told
what to be at. The rules, as the interface has them:

- Idle, or when an action is completed, the scheduler may take its time to
  answer. While one runs it answers at once, and says when to call again.
- No desired state: go on. Idle: end what runs. Executing: begin, and end what runs.
- Who prefers to be idle is told so without delay: that is how one drains, and
  how a worker that failed by its own fault leaves the next action to others. A
  call that was broken off may have had an action in its answer; the next one
  brings it again.
- The scheduler stores no results: that is the worker's part (`Stored`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from google.protobuf.empty_pb2 import Empty

from store.errors import BadDigest
from tools.cluster.joining import REST_SECONDS, Backoff, BrokenOff, Handout, Member, as_retryable, call_until, is_ours
from tools.reapi import methods
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.generated import remoteworker_pb2 as remoteworker
from tools.reapi.generated.status_pb2 import Status
from tools.server.errors import InvalidArgument
from tools.server.requests import get_function, read_digest
from tools.server.status import faults
from tools.upstream.channel import Channel
from tools.upstream.errors import UpstreamError
from tools.worker.work import Assignment, Stage, Stop

log = logging.getLogger("casfs.worker")

_CALL_SECONDS = 150.0
"""For a call that the scheduler may hold: its own bound is one or two minutes."""
_BUSY_CALL_SECONDS = 30.0
_NEXT_LEAST, _NEXT_MOST = 0.5, 60.0
"""When to call again is a time of the scheduler's clock: within these bounds, whatever ours has."""
_STAGE_SECONDS = 1.0
"""A new stage is told this long after the last call: most actions have ended by then."""
_END_SECONDS = 10.0
"""How long a scheduler that doesn't answer is told that nothing is wanted any more."""

_Executing = remoteworker.CurrentState.Executing


@dataclass(slots=True, eq=False)
class _Run:
    """An action that a slot was given; `state` is what the scheduler is told of it."""

    given: remoteworker.DesiredState.Executing
    state: remoteworker.CurrentState.Executing
    stop: Stop = field(default_factory=Stop)

    @property
    def completed(self) -> bool:
        """Whether there is a response."""
        return self.state.HasField("completed")


class Buildbarn:
    """All slots of this worker. Implements `tools.worker.work.WorkSource`; a context manager, see `close`."""

    def __init__(self, channel: Channel, instance: str, member: Member) -> None:
        """`channel` is closed with it."""
        self._channel = channel
        self._handout = Handout()
        self._slots = [_Slot(channel, instance, member, number, self._handout) for number in range(member.slots)]
        self._drained = False

    def __enter__(self) -> Self:
        for slot in self._slots:
            slot.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self) -> Assignment | None:
        """The next action of any slot."""
        return self._handout.take()

    def drain(self) -> None:
        """Ask for nothing more; what runs goes on. Harmless when repeated.

        Threads get None when no slot can be given anything any more.
        """
        for slot in self._slots:
            slot.drain()
        if not self._drained:
            self._drained = True
            threading.Thread(target=self._end_when_idle, name="drain", daemon=True).start()

    def _end_when_idle(self) -> None:
        for slot in self._slots:
            slot.settled.wait()
        self._handout.end()

    def stop_all(self) -> None:
        """End what runs; its clients may have it run again."""
        for slot in self._slots:
            slot.stop()

    def close(self) -> None:
        """Tell what there is to tell, as far as that goes within some seconds."""
        self.drain()
        until = time.monotonic() + _END_SECONDS
        for slot in self._slots:
            slot.thread.join(max(until - time.monotonic(), 0))
        for slot in self._slots:
            slot.end()
        self._channel.close()

    def statistics(self) -> dict[str, int]:
        """Actions taken, cancelled and completed so far."""
        total = Counter[str]()
        for slot in self._slots:
            total.update(slot.counts)
        return dict(total)


class _Slot:
    """One worker, as the scheduler sees it."""

    def __init__(self, channel: Channel, instance: str, member: Member, number: int, handout: Handout) -> None:
        self._channel = channel
        self._handout = handout
        self._instance = instance
        self._base = remoteworker.SynchronizeRequest(
            worker_id={"worker": member.name, "slot": str(number)},
            instance_name_prefix=instance,
            size_class=member.size_class,
        )
        # Platforms are equal if they are in the same order, which has to be this one.
        self._base.platform.properties.extend(
            reapi.Platform.Property(name=name, value=value) for name, value in sorted(member.properties)
        )
        self._changed = threading.Condition()
        # Under `_changed`:
        self._run: _Run | None = None
        self._news = False
        self._draining = False
        self._ended = False
        self._rests = False
        self._until = 0.0
        """How long there is something to tell, at the end."""
        self.counts = Counter[str]()
        self.settled = threading.Event()
        """From when on it can be given nothing more."""
        # The thread's:
        self._perhaps_given = False
        """Whether the scheduler may think that we run something that we don't know of."""
        self._next = 0.0
        self._trying = Backoff(0.5, 10.0)
        self._quiet = Backoff(0.5, 5.0)
        self.thread = threading.Thread(target=self._loop, name=f"slot-{number}", daemon=True)

    def drain(self) -> None:
        with self._changed:
            self._draining = True
            self._until = time.monotonic() + _END_SECONDS
            self._tell_thread()

    def stop(self) -> None:
        with self._changed:
            if self._run is not None:
                self._run.stop.set()

    def end(self) -> None:
        """Have the thread end, whatever it is at."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self.thread.is_alive():
            self.thread.join()
        self.settled.set()

    # Called by the thread that runs the action.

    def _note(self, run: _Run, stage: Stage) -> None:
        with self._changed:
            if self._run is run:
                _set_stage(run.state, stage)
                self._next = min(self._next, time.monotonic() + _STAGE_SECONDS)
                self._changed.notify_all()

    def _finish(self, run: _Run, response: reapi.ExecuteResponse) -> None:
        if response.HasField("result"):
            response.result.execution_metadata.auxiliary_metadata.extend(run.given.auxiliary_metadata)
        with self._changed:
            if self._run is not run:
                return  # nobody wants it any more
            self._rests = is_ours(response.status)
            run.state.completed.CopyFrom(as_retryable(response))
            self._until = time.monotonic() + _END_SECONDS
            self._tell_thread()

    def _tell_thread(self) -> None:
        self._news = True
        self._changed.notify_all()

    # The slot's thread.

    def _loop(self) -> None:
        while self._wait_for_turn():
            began = time.monotonic()
            try:
                changed = self._synchronize()
            except BrokenOff:
                continue
            except UpstreamError as error:
                log.warning("%s; trying again", error)
                self._wait(self._trying.next())
            except Exception as error:  # noqa: BLE001 - logged
                faults.note(error, "slot %s: unexpected", self._base.worker_id["slot"])
                self._wait(self._trying.next())
            else:
                self._trying.reset()
                if changed:
                    self._quiet.reset()
                elif self._run is None or self._run.completed:
                    # It should have waited. Who prefers to be idle is to stay so for a while.
                    if time.monotonic() - began < 1.0:
                        self._wait(REST_SECONDS if self._rests else self._quiet.next())
                    self._rests = False
        self.settled.set()

    def _wait_for_turn(self) -> bool:
        """Until it is time to call, which it is at once where nothing runs; False at the end."""
        with self._changed:
            if self._run is not None and not self._run.completed:
                while not (self._ended or self._news) and (left := self._next - time.monotonic()) > 0:
                    self._changed.wait(left)
            elif self._draining:
                told = self._run is None and not self._perhaps_given
                return not (self._ended or told or time.monotonic() > self._until)
            return not self._ended

    def _synchronize(self) -> bool:
        """One call; whether its answer had something new."""
        request = remoteworker.SynchronizeRequest()
        request.CopyFrom(self._base)
        with self._changed:
            self._news = False
            run = self._run
            idle = request.prefer_being_idle = self._draining or self._rests
            if run is None:
                request.current_state.idle.CopyFrom(Empty())
            else:
                request.current_state.executing.CopyFrom(run.state)
                request.current_state.executing.prefer_being_idle = idle
        held = not idle and (run is None or run.completed)
        self._perhaps_given = self._perhaps_given or held
        reply = self._call(request, _CALL_SECONDS if held else _BUSY_CALL_SECONDS, breakable=run is None and held)
        self._next = _as_local(reply)
        desired = reply.desired_state.WhichOneof("worker_state")
        with self._changed:
            match desired:
                case "executing":
                    self._replace(reply.desired_state.executing)
                case "idle":
                    self._replace(None)
            self._perhaps_given = self._run is not None
        return desired == "executing" or (desired == "idle" and run is not None)

    def _call(
        self, request: remoteworker.SynchronizeRequest, seconds: float, *, breakable: bool
    ) -> remoteworker.SynchronizeResponse:
        """The reply. Raises UpstreamError, BrokenOff."""
        reply: remoteworker.SynchronizeResponse = call_until(
            self._channel,
            methods.SYNCHRONIZE,
            request,
            seconds,
            changed=self._changed,
            is_over=lambda: self._ended or (breakable and self._news),
            gave_up=UpstreamError,
        )
        return reply

    def _replace(self, given: remoteworker.DesiredState.Executing | None) -> None:
        """End what runs, and begin what is given."""
        old, self._run = self._run, None
        if old is not None:
            if old.completed:
                self.counts["completed"] += 1
            else:
                self.counts["cancelled"] += 1
                log.info("action %s is cancelled", old.given.action_digest.hash)
                old.stop.set()
        if given is None:
            return
        self.counts["taken"] += 1
        state = _Executing(action_digest=given.action_digest, started=Empty())
        run = self._run = _Run(given, state)
        try:
            assignment = self._as_assignment(run)
        except (InvalidArgument, BadDigest) as error:
            log.warning("an action can't be run: %s", error)
            run.stop.close()
            state.completed.status.CopyFrom(Status(code=codes.INVALID_ARGUMENT, message=str(error)))
            return
        self._handout.put(assignment)

    def _as_assignment(self, run: _Run) -> Assignment:
        """Raises InvalidArgument, BadDigest."""
        given = run.given
        if given.instance_name_suffix:
            # Its blobs may be elsewhere, and this worker has one place to fetch from.
            whole = "/".join(filter(None, (self._instance, given.instance_name_suffix)))
            raise InvalidArgument(f"this worker runs actions of instance {self._instance!r}, and none of {whole!r}")
        function = get_function(given.digest_function, [given.action_digest.hash])
        return Assignment(
            read_digest(given.action_digest, function),
            queued=given.queued_timestamp.ToNanoseconds() / 1e9,
            message=given.action if given.HasField("action") else None,
            note=lambda stage: self._note(run, stage),
            finish=lambda response: self._finish(run, response),
            stop=run.stop,
        )

    def _wait(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._news, seconds)


_STAGES: dict[Stage, Callable[[remoteworker.CurrentState.Executing], Empty]] = {
    Stage.FETCHING: lambda state: state.fetching_inputs,
    Stage.RUNNING: lambda state: state.running,
    Stage.UPLOADING: lambda state: state.uploading_outputs,
}


def _set_stage(state: remoteworker.CurrentState.Executing, stage: Stage) -> None:
    _STAGES[stage](state).SetInParent()


def _as_local(reply: remoteworker.SynchronizeResponse) -> float:
    """When to call again, by our monotonic clock."""
    left = reply.next_synchronization_at.ToNanoseconds() / 1e9 - time.time()
    return time.monotonic() + min(max(left, _NEXT_LEAST), _NEXT_MOST)
