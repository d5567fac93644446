"""The threads of a worker, apart from what they run."""

from __future__ import annotations

from typing import cast

import pytest

from store.errors import StoreUnusable
from tools.worker import worker
from tools.worker.executor import Parts
from tools.worker.run import Executor
from tools.worker.work import WorkSource
from tools.worker.worker import Worker


def test_an_executor_that_cannot_be_made_is_told_to_who_begins_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    closed: list[int] = []

    def make(_: Parts) -> tuple[Executor, object]:
        number = len(made)
        if number == 2:
            raise StoreUnusable("no room for a session")
        made.append(number)
        return cast("Executor", None), lambda: closed.append(number)

    monkeypatch.setattr(worker, "make_executor", make)
    with pytest.raises(StoreUnusable, match="no room for a session"):
        Worker(cast("WorkSource", None), cast("Parts", None), 3)
    # In a thread it would have ended that thread alone: a worker that seems well and takes fewer actions, or none.
    assert (made, closed) == ([0, 1], [1, 0])
