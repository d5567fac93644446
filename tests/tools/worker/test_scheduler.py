"""What the built-in scheduler remembers of executions that are done: all of the answer, and for so many at most."""

from __future__ import annotations

import pytest

from store.digest import DigestFunction
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server import scheduler as module
from tools.server.errors import NotThere
from tools.server.scheduler import Execution, Scheduler

ACTION = DigestFunction.SHA256.of(b"action")


def response_to(execution: Execution) -> reapi.ExecuteResponse:
    response = reapi.ExecuteResponse()
    assert execution.as_message().response.Unpack(response)
    return response


def answer(scheduler: Scheduler, number: int) -> Execution:
    response = reapi.ExecuteResponse(result=reapi.ActionResult(exit_code=number, stdout_raw=b"said"), message="m")
    return scheduler.answer("", ACTION, response)


def test_the_newest_are_kept_and_whoever_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEEP_MOST", 10)
    scheduler = Scheduler()
    watched = answer(scheduler, 0)
    with watched.watch(lambda: None):
        done = [answer(scheduler, number) for number in range(1, 40)]
        # What waits is older than all that are done.
        waiting = scheduler.submit("", ACTION, 0, merge=False)
        done += [answer(scheduler, number) for number in range(40, 60)]
        known = {one.name for one in scheduler.list()}
    assert known >= {watched.name, waiting.name, *(one.name for one in done[-8:])} and len(known) <= 11
    with pytest.raises(NotThere):
        scheduler.get(done[0].name)
    for one in done[-8:]:
        response = response_to(scheduler.get(one.name))
        assert (response.result.exit_code, response.result.stdout_raw, response.message) == (
            done.index(one) + 1,
            b"said",
            "m",
        )


def test_what_is_old_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler()
    old = answer(scheduler, 1)
    monkeypatch.setattr(module, "_KEEP_SECONDS", 0.0)
    with pytest.raises(NotThere):
        scheduler.get(old.name)
