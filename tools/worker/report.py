"""What became of an action and what it took, for logs, numbers and pages."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from store.digest import Digest
from store.errors import BadInput
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.worker.run import Executor, Run
from tools.worker.work import Stage

log = logging.getLogger("casfs.worker")
_COMMAND_MOST = 500


@dataclass(frozen=True, slots=True)
class Report:
    """Of one action that ended at `when` (seconds since the epoch). `stages` and `queued` in seconds.

    `status` is a code of google.rpc by name; `code` the command's exit code, if
    it had one. `numbers` has counts and bytes by name.
    """

    when: float
    instance: str
    action: Digest
    command: str
    status: str
    code: int | None
    queued: float
    stages: Mapping[Stage, float]
    numbers: Mapping[str, int | float]
    notes: Sequence[str]
    root: Digest | None = None
    result: reapi.ActionResult | None = None

    def as_json(self) -> str:
        """One line."""
        record = {
            "when": round(self.when, 3),
            "instance": self.instance,
            "action": str(self.action),
            "input_root": None if self.root is None else str(self.root),
            "command": self.command,
            "status": self.status,
            "exit_code": self.code,
            "queued_seconds": round(self.queued, 6),
            **{f"{stage.value}_seconds": round(seconds, 6) for stage, seconds in self.stages.items()},
            **self.numbers,
            "notes": list(self.notes),
        }
        return json.dumps(record)


class ReportTaker(Protocol):
    """Wants to know of each action."""

    def note_action(self, report: Report) -> None: ...


class Reported:
    """Tells of each action, when it has ended."""

    def __init__(self, inner: Executor, takers: Sequence[ReportTaker]) -> None:
        self._inner = inner
        self._takers = takers

    def execute(self, run: Run) -> reapi.ExecuteResponse:
        """The inner executor's response."""
        began = time.time()
        response = self._inner.execute(run)
        if self._takers:
            report = _report(run, response, began)
            for taker in self._takers:
                taker.note_action(report)
        return response


def _report(run: Run, response: reapi.ExecuteResponse, began: float) -> Report:
    assignment, task = run.assignment, run.task
    return Report(
        when=time.time(),
        instance=assignment.instance,
        action=assignment.action,
        command="" if task is None else " ".join(task.arguments)[:_COMMAND_MOST],
        status=codes.Code.Name(codes.Code.ValueType(response.status.code)),
        code=response.result.exit_code if response.HasField("result") else None,
        queued=max(began - assignment.queued, 0.0) if assignment.queued else 0.0,
        stages=run.seconds,
        numbers=run.numbers,
        notes=[*run.notes, *([response.status.message] if response.status.message else [])],
        root=None if task is None else task.root,
        result=response.result if response.HasField("result") else None,
    )


class ActionLog:
    """A file that gets a line of JSON for each action."""

    def __init__(self, path: Path) -> None:
        """Appends. Raises BadInput."""
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise BadInput(f"can't write the action log {path}: {error.strerror}") from error
        self._lock = threading.Lock()

    def note_action(self, report: Report) -> None:
        """Write a line; that it can't be written is logged."""
        line = report.as_json().encode() + b"\n"
        with self._lock:
            try:
                os.write(self._file, line)
            except OSError as error:
                log.warning("can't write the action log: %s", error)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
