"""The outermost decorator: whatever happens becomes a response, and who may be blamed for it is in its code."""

from __future__ import annotations

import logging
import os
import socket

from casfs.errors import CasfsError
from store.errors import StoreError
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.generated.status_pb2 import Status
from tools.server.errors import ServeError
from tools.server.status import as_status, faults
from tools.worker.errors import Cancelled, ScratchFull, WorkerError
from tools.worker.run import Executor, Run, stamp

log = logging.getLogger("casfs.worker")


class Answered:
    """Turns errors into statuses, and completes the metadata. Never raises."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self._name = f"{socket.gethostname()}/{os.getpid()}"

    def execute(self, run: Run) -> reapi.ExecuteResponse:
        """A response, whatever happens."""
        metadata = run.metadata
        metadata.worker = run.worker = self._name
        if run.assignment.queued:
            metadata.queued_timestamp.FromNanoseconds(int(run.assignment.queued * 1e9))
        stamp(metadata.worker_start_timestamp)
        try:
            response = self._inner.execute(run)
        except Exception as error:  # noqa: BLE001 - told to whoever waits
            response = reapi.ExecuteResponse(status=_explain(run, error))
        stamp(metadata.worker_completed_timestamp)
        if response.HasField("result"):
            response.result.execution_metadata.CopyFrom(metadata)
        if run.notes:
            response.message = "\n".join(run.notes)
        return response


def _explain(run: Run, error: Exception) -> Status:
    match error:
        case Cancelled():
            return Status(code=codes.CANCELLED, message=str(error))
        case ScratchFull():
            code = codes.RESOURCE_EXHAUSTED
        case StoreError() | ServeError():
            # Theirs have codes.
            return as_status(error)
        case WorkerError() | CasfsError() | OSError():
            # Another worker may be able to, or this one later.
            code = codes.UNAVAILABLE
        case _:
            faults.note(error, "action %s: unexpected", run.assignment.action)
            return Status(code=codes.INTERNAL, message="an internal error, see the worker's log")
    log.warning("action %s: %s", run.assignment.action, error)
    return Status(code=code, message=f"the worker {run.worker} couldn't run the action: {error}")
