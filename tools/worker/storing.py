"""A decorator that stores results worth keeping in an action cache."""

from __future__ import annotations

import logging
from typing import Protocol

from store.errors import StoreError
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.errors import ServeError
from tools.server.requests import write_digest
from tools.worker.run import Executor, Run, stamp
from tools.worker.work import Stage

log = logging.getLogger("casfs.worker")


class ResultTaker(Protocol):
    """Stores results."""

    def update(self, request: reapi.UpdateActionResultRequest) -> object: ...


class Stored:
    """Stores what succeeded and may be cached. That a result can't be stored is nothing to its client."""

    def __init__(self, inner: Executor, results: ResultTaker) -> None:
        self._inner = inner
        self._results = results

    def execute(self, run: Run) -> reapi.ExecuteResponse:
        """The inner executor's response."""
        response = self._inner.execute(run)
        task, action = run.task, run.assignment.action
        if task is None or not task.cacheable or response.status.code or response.result.exit_code:
            return response
        result = reapi.ActionResult()
        result.CopyFrom(response.result)
        result.execution_metadata.CopyFrom(run.metadata)
        stamp(result.execution_metadata.worker_completed_timestamp)
        request = reapi.UpdateActionResultRequest(
            instance_name=run.assignment.instance,
            action_digest=write_digest(action),
            action_result=result,
            digest_function=reapi.DigestFunction.Value.Name(action.function),
        )
        try:
            # Whoever waits for the action waits for this, too.
            with run.timed(Stage.UPLOADING):
                self._results.update(request)
        except (StoreError, ServeError, OSError) as error:
            log.warning("the result of action %s isn't stored: %s", action, error)
        return response
