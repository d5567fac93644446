"""A worker: threads that take actions from a source and run them, each one at a time."""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import ExitStack

from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.status import faults
from tools.worker.executor import Parts, make_executor
from tools.worker.run import Executor, Run
from tools.worker.work import Assignment, WorkSource

_PR_SET_CHILD_SUBREAPER = 36
MEMORY_AT_LEAST = 1 << 30
"""Bytes of memory that there are for each action that may run at a time."""


def adopt_orphans() -> None:
    """Have what a command leaves behind become ours when it dies, so that what it used is known."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def default_jobs() -> int:
    """How many actions run at a time: one a core that we may use, as far as there is memory for them."""
    return max(1, min(len(os.sched_getaffinity(0)), machine_memory() // MEMORY_AT_LEAST))


def machine_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Worker:
    """Runs what a source gives. The source ends it: `join` returns when each thread got None and has finished."""

    def __init__(self, source: WorkSource, parts: Parts, jobs: int) -> None:
        """`jobs`: how many actions run at a time. Raises StoreUnusable."""
        self._source = source
        self._threads: list[threading.Thread] = []
        # Here, where who began the worker is told that an executor can't be made. A thread would end with that, and
        # leave a worker that takes no actions.
        with ExitStack() as made:
            for number in range(jobs):
                executor, close = make_executor(parts)
                made.callback(close)
                self._threads.append(threading.Thread(target=self._run, args=(executor,), name=f"action-{number}"))
            self._made = made.pop_all()

    def start(self) -> None:
        """Begin to take actions. Raises RuntimeError where not all threads can be started: none is left then."""
        for number, thread in enumerate(self._threads):
            try:
                thread.start()
            except RuntimeError:
                del self._threads[number:]
                self._source.drain()
                self.join()
                raise

    def join(self) -> None:
        """Wait for the threads."""
        for thread in self._threads:
            thread.join()
        self._made.close()

    def _run(self, executor: Executor) -> None:
        while (assignment := self._source.take()) is not None:
            self._execute(executor, assignment)

    @staticmethod
    def _execute(executor: Executor, assignment: Assignment) -> None:
        try:
            response = executor.execute(Run(assignment))
        except Exception as error:  # noqa: BLE001 - logged
            # The chain answers for all errors but those of who is told of them; this thread is needed for others.
            faults.note(error, "action %s", assignment.action)
            response = reapi.ExecuteResponse()
            response.status.code = codes.INTERNAL
            response.status.message = "an internal error, see the worker's log"
        try:
            assignment.finish(response)
        finally:
            assignment.stop.close()
