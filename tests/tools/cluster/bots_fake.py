"""A Bots server of a few lines: it does what BuildGrid seldom does, and notes what a worker does against the rules."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message

from tests.tools.cluster.fakes import Context, Handlers
from tools.reapi import methods
from tools.reapi.generated import bots_pb2 as bots
from tools.reapi.generated import remote_execution_pb2 as reapi

HOLD_SECONDS = 1.0
_DEADLINE_LEAST = 4.0


@dataclass(slots=True)
class Bots:
    """Gives out what is in `queue` to one worker; `completed` has how leases ended, in this order.

    `hold`: how long a call is held. `fail`: statuses that the next updates end
    with; `lose`: as many answers with a new lease are lost; `keep`: as often a
    completed lease is named once more.
    """

    hold: float = HOLD_SECONDS
    queue: list[bots.Lease] = field(default_factory=list)
    completed: list[bots.Lease] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    sessions: list[bots.BotSession] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    leases: dict[str, bots.Lease] = field(default_factory=dict)
    fail: list[grpc.StatusCode] = field(default_factory=list)
    lose: int = 0
    keep: int = 0
    version: int = 0
    updates: int = 0
    _sent: dict[str, frozenset[str]] = field(default_factory=dict)
    """By version, what a worker that has it was told of. A call that was broken off may come after its successor."""
    _call: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def handlers(self) -> Handlers:
        return {methods.CREATE_BOT_SESSION: self.create, methods.UPDATE_BOT_SESSION: self.update}

    # For tests.

    def add(self, name: str, payload: Message, state: Any = bots.ACTIVE) -> None:
        """Have a worker take a lease."""
        lease = bots.Lease(id=name, state=state)
        lease.payload.Pack(payload)
        with self._changed:
            self.queue.append(lease)
            self._changed.notify_all()

    def cancel(self, name: str, *, say: bool = False) -> None:
        """Have a lease be gone; `say`: the worker is told so, once."""
        with self._changed:
            lease = self.leases.pop(name)
            self.version += 1
            if say:
                lease.state = bots.CANCELLED
                self.leases[name] = lease

    # The interface.

    def create(self, request: bots.CreateBotSessionRequest, context: Context) -> bots.BotSession:
        with self._changed:
            session = request.bot_session
            self._check_session(session, context)
            if request.parent != "main" or session.name or session.leases:
                self._object("a new session has a parent, no name, and no leases")
            # Whoever has the name has the place of others with it.
            self.queue += [lease for lease in self.leases.values() if lease.state == bots.ACTIVE]
            self.leases.clear()
            self.sessions.append(session)
            session.name = f"main/{len(self.sessions)}"
            return self._answer(session, context, held=session.status == bots.OK)

    def update(self, request: bots.UpdateBotSessionRequest, context: Context) -> bots.BotSession:
        with self._changed:
            self.updates += 1
            session = request.bot_session
            self._check_session(session, context)
            if request.name != session.name:
                self._object("two names")
            if self.fail:
                context.abort(self.fail.pop(0), "as the test wants it")
            if not self.sessions or session.name != self.sessions[-1].name:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such session")
            if session.version not in self._sent:
                self._object(f"version {session.version!r} is none that was sent")
            self._take(session)
            up_to_date = session.version == str(self.version)
            return self._answer(session, context, held=up_to_date and session.status == bots.OK)

    def _take(self, session: bots.BotSession) -> None:
        told = {lease.id for lease in session.leases}
        delivered = self._sent.get(session.version, frozenset())
        if missing := delivered - told:
            self._object(f"nothing is said of {missing}")
        for lease in session.leases:
            if lease.state not in (bots.ACTIVE, bots.COMPLETED):
                self._object(f"a worker may not say {lease.state}")
            if lease.id not in delivered:
                self._object(f"{lease.id} isn't this worker's")
            if lease.HasField("status") != (lease.state == bots.COMPLETED):
                self._object("a status belongs to COMPLETED")
            if lease.state == bots.COMPLETED:
                self._complete(lease)

    def _complete(self, lease: bots.Lease) -> None:
        ours = self.leases.get(lease.id)
        if not lease.status.code and not lease.result.Is(reapi.ActionResult.DESCRIPTOR):  # type: ignore[arg-type]
            self._object("OK, and no ActionResult")
        self.version += 1
        if ours is not None and self.keep:
            self.keep -= 1
            ours.state = bots.COMPLETED
            return
        if self.leases.pop(lease.id, None) is not None:
            self.completed.append(lease)

    def _answer(self, session: bots.BotSession, context: Context, *, held: bool) -> bots.BotSession:
        self._call += 1
        call, until = self._call, time.monotonic() + self.hold
        slots = int(session.worker.configs[0].value)
        while held and not self.queue and len(self.leases) < slots and time.monotonic() < until:
            self._changed.wait(0.02)
            if not context.is_active() or call != self._call:
                context.abort(grpc.StatusCode.CANCELLED, "nobody waits for this any more")
        while session.status == bots.OK and self.queue and len(self.leases) < slots:
            lease = self.queue.pop(0)
            self.leases[lease.id] = lease
            self.version += 1
        new = self.leases.keys() - self._sent.get(session.version, frozenset())
        if new and self.lose:
            self.lose -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "the answer was lost")
        answer = bots.BotSession()
        answer.CopyFrom(session)
        answer.version = str(self.version)
        del answer.leases[:]
        answer.leases.extend(self.leases.values())
        live = frozenset(lease.id for lease in self.leases.values() if lease.state != bots.CANCELLED)
        self._sent[answer.version] = live
        for name in [lease.id for lease in self.leases.values() if lease.state == bots.CANCELLED]:
            del self.leases[name]
        return answer

    def _check_session(self, session: bots.BotSession, context: Context) -> None:
        self.statuses.append(session.status)
        if not session.bot_id or session.status == bots.BOT_STATUS_UNSPECIFIED:
            self._object("no bot_id, or no status")
        if {item.key for item in session.worker.devices[0].properties} != {"OSFamily", "ISA"}:
            self._object("the first device has the properties")
        if session.status == bots.OK and context.time_remaining() < _DEADLINE_LEAST - 0.5:
            self._object(f"{context.time_remaining():.1f} s are too few for a lease")

    def _object(self, what: str) -> None:
        self.violations.append(what)
