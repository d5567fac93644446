"""What is known of an action while it runs, and the seam between the decorators of the executor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from google.protobuf.timestamp_pb2 import Timestamp

from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.worker.task import Task
from tools.worker.work import Assignment, Stage


@dataclass(slots=True)
class Run:
    """An assignment on its way through the executor. One thread.

    `seconds` has how long each stage took; `numbers` what is reported beside
    that: counts and bytes, by name. `notes` are sentences for a person.
    """

    assignment: Assignment
    worker: str = ""
    task: Task | None = None
    mnemonic: str = ""
    metadata: reapi.ExecutedActionMetadata = field(default_factory=reapi.ExecutedActionMetadata)
    seconds: dict[Stage, float] = field(default_factory=dict)
    numbers: dict[str, int | float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, stage: Stage, begun: Timestamp, completed: Timestamp) -> Iterator[None]:
        """Time a stage, or a part of it, told to whoever watches; the two are fields of the metadata."""
        if stage not in self.seconds:
            self.assignment.note(stage)
            stamp(begun)
        try:
            with self.timed(stage):
                yield
        finally:
            stamp(completed)

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Add to the seconds of a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began


def stamp(timestamp: Timestamp) -> None:
    """Set it to now. Its own way to do so goes through a calendar, and shows in a profile."""
    timestamp.seconds, timestamp.nanos = divmod(time.time_ns(), 1_000_000_000)


class Executor(Protocol):
    """Runs an action, or a part of what that takes around another executor."""

    def execute(self, run: Run) -> reapi.ExecuteResponse:
        """The response. Raises what the outermost turns into a status."""
        ...
