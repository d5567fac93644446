"""Leases of a BuildGrid: the worker's side of google.devtools.remoteworkers.v1test2.Bots.

    with BuildGrid(channel, instance, member) as grid:
        …                                           threads call grid.take()
        grid.drain()                                at the end: see `tools.worker.work`

One thread keeps a session: it tells the server of all leases, and is told of
all leases, again and again. How that goes, read from BuildGrid's source where
the published API leaves it open:

- A lease that comes is begun; one that no longer comes is cancelled, and killed.
- While there is room for another lease and nothing is new, the server holds a
  call for 80% of its deadline. A lease that ends meanwhile is to be told at
  once, so the call is broken off and made anew. It isn't woken by a lease that
  is cancelled, so with leases the deadlines are short.
- `version` counts what the server changed. A call that brings an old one, as
  the answer that had the new one was lost, is told of everything again.
- A session that the server doesn't know any more, or that another worker of
  the same name took over, is over with all its leases; a new one is begun.
- A status of INTERNAL or UNAVAILABLE has the server give the action to
  somebody. To be somebody else, this worker says that it is unhealthy for a while.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Self

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError

from store.digest import Digest, DigestFunction
from store.errors import BadDigest
from tools.cluster.joining import REST_SECONDS, Backoff, BrokenOff, Handout, Member, as_retryable, call_until, is_ours
from tools.reapi import methods
from tools.reapi.generated import bots_pb2 as bots
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.generated import worker_pb2 as workers
from tools.reapi.generated.status_pb2 import Status
from tools.reapi.methods import Method
from tools.server.errors import InvalidArgument
from tools.server.requests import get_function, read_digest
from tools.server.status import faults
from tools.upstream.channel import Channel
from tools.upstream.errors import Refused, Unreachable
from tools.worker.work import Assignment

log = logging.getLogger("casfs.worker")

POLL_SECONDS = 40.0
"""How long a call may take. A channel asks every 30 s whether a silent server lives, and oftener servers mind."""
_POLL_BUSY_SECONDS = 5.0
"""The same while there are leases: so long it may take until one that was cancelled is ended."""
_POLL_LEAST = 4.0
"""With less, BuildGrid gives out no leases: it keeps 20% for the way back, and waits at least 3 s."""
_GOODBYE_SECONDS = 5.0
_END_SECONDS = 10.0
"""How long `close` goes on telling of what is done."""
_TRANSIENT = frozenset({"ABORTED", "INTERNAL", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "UNKNOWN"})
"""Refusals that don't say that a session is over: a database that is being started again, a token that ran out."""


@dataclass(slots=True, eq=False)
class _Lease:
    """One lease; `done` is what is told of it at its end."""

    id: str
    assignment: Assignment | None = None
    done: bots.Lease | None = None


class BuildGrid:
    """One session with one server. Implements `tools.worker.work.WorkSource`; a context manager, see `close`."""

    def __init__(self, channel: Channel, instance: str, member: Member, poll_seconds: float = POLL_SECONDS) -> None:
        """`channel` is closed with it. `poll_seconds`: how long a call may take, at least 4."""
        self._channel = channel
        self._instance = instance
        self._member = member
        self._poll_seconds = max(poll_seconds, _POLL_LEAST)
        self._handout = Handout()
        self._changed = threading.Condition()
        # Under `_changed`:
        self._leases: dict[str, _Lease] = {}
        self._news = False
        self._draining = False
        self._ended = False
        self._resting_until = 0.0
        self._counts = Counter[str]()
        # The thread's:
        self._name = ""
        self._version = ""
        self._perhaps_known = False
        """Whether the server may have a session whose name we weren't told."""
        self._took_leave = False
        self._trying = Backoff(0.5, 10.0)
        self._quiet = Backoff(0.5, _POLL_BUSY_SECONDS)
        self._thread = threading.Thread(target=self._run, name="bots", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # For the worker.

    def take(self) -> Assignment | None:
        """The next lease's action."""
        return self._handout.take()

    def drain(self) -> None:
        """Take nothing more, and give back what comes yet; what runs goes on. Harmless when repeated."""
        with self._changed:
            if not self._draining:
                self._draining = True
                self._handout.end()
            self._tell_thread()

    def stop_all(self) -> None:
        """End what runs; others will run it."""
        with self._changed:
            for lease in self._leases.values():
                if lease.assignment is not None and lease.done is None:
                    lease.assignment.stop.set()

    def close(self) -> None:
        """Tell what there is to tell, as far as that goes within some seconds, and end the session."""
        self.drain()
        self._thread.join(_END_SECONDS)
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()
        self._channel.close()

    def statistics(self) -> dict[str, int]:
        """How many leases there are now; sessions begun, leases taken, cancelled, completed and lost so far."""
        with self._changed:
            return {"leases": len(self._leases), **self._counts}

    def _finish(self, lease: _Lease, response: reapi.ExecuteResponse) -> None:
        with self._changed:
            if self._leases.get(lease.id) is not lease:
                return  # nobody wants it any more
            if is_ours(response.status):
                self._resting_until = time.monotonic() + REST_SECONDS
            response = as_retryable(response)
            lease.done = _completed(lease.id, response.status)
            if response.HasField("result"):
                lease.done.result.Pack(response.result)
            self._tell_thread()

    def _tell_thread(self) -> None:
        self._news = True
        self._changed.notify_all()

    # The thread.

    def _run(self) -> None:
        while not self._is_over():
            began = time.monotonic()
            try:
                changed = self._update() if self._name else self._create()
            except BrokenOff:
                continue
            except Unreachable as error:
                self._wait_after(error)
            except Refused as error:
                if self._name and error.code not in _TRANSIENT:
                    self._lose(error)
                self._wait_after(error)
            except Exception as error:  # noqa: BLE001 - logged
                # A reply that can't be: it must not end the thread that leases live by.
                faults.note(error, "%s: unexpected", self._label)
                self._wait(self._trying.next())
            else:
                self._trying.reset()
                if changed:
                    self._quiet.reset()
                elif time.monotonic() - began < 1.0:
                    # It doesn't wait for us where there is no room for another lease.
                    self._wait(self._quiet.next())
        if not self._name and self._perhaps_known:
            self._withdraw()

    def _is_over(self) -> bool:
        with self._changed:
            return self._ended or (self._draining and not self._leases and (not self._name or self._took_leave))

    def _create(self) -> bool:
        request = bots.CreateBotSessionRequest(parent=self._instance, bot_session=self._describe(bots.OK))
        with self._changed:
            self._news = False
            if self._draining:
                return False
        self._perhaps_known = True
        reply = self._call(methods.CREATE_BOT_SESSION, request, self._poll_seconds, breakable=True)
        self._name = reply.name
        self._perhaps_known = False
        self._counts["sessions"] += 1
        log.info("%s: began session %s", self._label, self._name)
        self._apply(reply, frozenset())
        return True

    def _update(self) -> bool:
        with self._changed:
            self._news = False
            leave = self._draining
            rests = time.monotonic() < self._resting_until
            session = self._describe(bots.BOT_TERMINATING if leave else bots.UNHEALTHY if rests else bots.OK)
            session.name, session.version = self._name, self._version
            session.leases.extend(
                lease.done or bots.Lease(id=lease.id, state=bots.ACTIVE) for lease in self._leases.values()
            )
        told = frozenset(lease.id for lease in session.leases if lease.state == bots.COMPLETED)
        request = bots.UpdateBotSessionRequest(name=self._name, bot_session=session)
        seconds = min(self._poll_seconds, _POLL_BUSY_SECONDS) if session.leases else self._poll_seconds
        # One that tells something is answered at once, and has to come through.
        changed = self._apply(self._call(methods.UPDATE_BOT_SESSION, request, seconds, breakable=not told), told)
        self._took_leave = leave
        return changed

    def _describe(self, status: bots.BotStatus) -> bots.BotSession:
        member = self._member
        device = workers.Device(handle=member.name)
        device.properties.extend(workers.Device.Property(key=key, value=value) for key, value in member.properties)
        worker = workers.Worker(
            devices=[device], configs=[workers.Worker.Config(key="capacity", value=str(member.slots))]
        )
        return bots.BotSession(bot_id=member.name, status=status, worker=worker)

    def _call(self, method: Method, request: Any, seconds: float, *, breakable: bool) -> bots.BotSession:
        """The reply. Raises UpstreamError, BrokenOff."""
        reply: bots.BotSession = call_until(
            self._channel,
            method,
            request,
            seconds,
            changed=self._changed,
            is_over=lambda: self._ended or (breakable and self._news),
            gave_up=Unreachable,
        )
        return reply

    def _apply(self, reply: bots.BotSession, told: frozenset[str]) -> bool:
        """Begin and end leases; whether there were any such. `told`: those whose end was told."""
        changed = bool(told)
        self._version = reply.version
        there = set()
        with self._changed:
            for lease in reply.leases:
                if lease.state in (bots.ACTIVE, bots.PENDING):
                    there.add(lease.id)
                    # Of a lease whose end was told: it is to be tried again.
                    if lease.id not in self._leases or lease.id in told:
                        self._begin(lease)
                        changed = True
                elif lease.state == bots.COMPLETED:
                    there.add(lease.id)
            for gone in self._leases.keys() - there:
                ended = self._leases.pop(gone)
                changed = True
                if gone in told:
                    self._counts["completed"] += 1
                else:
                    self._counts["cancelled"] += 1
                    log.info("lease %s is cancelled", gone)
                    if ended.assignment is not None:
                        ended.assignment.stop.set()
        return changed

    def _begin(self, given: bots.Lease) -> None:
        lease = self._leases[given.id] = _Lease(given.id)
        self._counts["taken"] += 1
        if self._draining:
            lease.done = _completed(given.id, Status(code=codes.UNAVAILABLE, message="this worker is ending"))
            self._news = True
            return
        try:
            action, message = read_payload(given.payload)
        except (InvalidArgument, BadDigest) as error:
            log.warning("lease %s can't be run: %s", given.id, error)
            lease.done = _completed(given.id, Status(code=codes.INVALID_ARGUMENT, message=str(error)))
            self._news = True
            return
        lease.assignment = Assignment(
            action, self._instance, message=message, finish=lambda response: self._finish(lease, response)
        )
        self._handout.put(lease.assignment)

    def _lose(self, error: Refused) -> None:
        """The session is over, and all leases are somebody else's."""
        log.warning("%s: session %s is over: %s", self._label, self._name, error)
        self._name = self._version = ""
        with self._changed:
            for lease in self._leases.values():
                if lease.assignment is not None:
                    lease.assignment.stop.set()
            self._counts["lost"] += len(self._leases)
            self._leases.clear()

    def _withdraw(self) -> None:
        """Close a session whose name we weren't told: one that takes its place gets no leases, and nobody misses it."""
        request = bots.CreateBotSessionRequest(parent=self._instance, bot_session=self._describe(bots.BOT_TERMINATING))
        try:
            self._channel.call(methods.CREATE_BOT_SESSION, request, _GOODBYE_SECONDS)
        except (Refused, Unreachable) as error:
            log.info("%s: couldn't take leave: %s", self._label, error)

    def _wait_after(self, error: Exception) -> None:
        pause = self._trying.next()
        log.warning("%s: %s; trying again", self._label, error)
        self._wait(pause)

    def _wait(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._news, seconds)

    @property
    def _label(self) -> str:
        return f"BuildGrid instance {self._instance!r}"


def _completed(lease: str, status: Status) -> bots.Lease:
    return bots.Lease(id=lease, state=bots.COMPLETED, status=status)


def read_payload(payload: AnyMessage) -> tuple[Digest, reapi.Action | None]:
    """The action of a lease, and its message if that came along. Raises InvalidArgument, BadDigest.

    A message that was parsed and written by its server may have another digest
    than the client's; it names an action for people, the server knows its own.
    """
    try:
        if payload.TypeName() == reapi.Action.DESCRIPTOR.full_name:
            return DigestFunction.SHA256.of(payload.value), reapi.Action.FromString(payload.value)
        if payload.TypeName() == reapi.Digest.DESCRIPTOR.full_name:
            message = reapi.Digest.FromString(payload.value)
            return read_digest(message, get_function(0, [message.hash])), None
    except DecodeError as error:
        raise InvalidArgument(f"the payload is no {payload.TypeName()}: {error}") from error
    raise InvalidArgument(f"the payload is a {payload.TypeName() or 'nothing'}, neither an Action nor a Digest")
