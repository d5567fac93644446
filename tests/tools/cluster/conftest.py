"""A BuildGrid for the tests of a session, and workers of a few lines."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.conftest import Requirements
from tests.tools.cluster.buildgrid import BuildGridServer, running_buildgrid
from tests.tools.worker.conftest import Remote
from tools.cluster.buildgrid import BuildGrid
from tools.cluster.joining import Member
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.generated.status_pb2 import Status
from tools.upstream.channel import Channel
from tools.upstream.options import UpstreamOptions
from tools.worker.work import Assignment, WorkSource

Run = Callable[[Assignment], reapi.ExecuteResponse]

PROPERTIES = (("OSFamily", "linux"), ("ISA", "x86-64"))


@pytest.fixture(scope="session")
def buildgrid(tmp_path_factory: pytest.TempPathFactory, requires: Requirements) -> Iterator[BuildGridServer]:
    """A BuildGrid for tests that don't mind each other."""
    with running_buildgrid(requires, tmp_path_factory.mktemp("buildgrid")) as server:
        yield server


@contextmanager
def remote_of(server: BuildGridServer) -> Iterator[Remote]:
    """A client of it."""
    client = Remote(server.address)
    try:
        yield client
    finally:
        client.close()


def wait_for_stop(assignment: Assignment, seconds: float = 20.0) -> bool:
    """Whether the action was to be ended within that time."""
    ready, _, _ = select.select([assignment.stop], [], [], seconds)
    return bool(ready)


def until_stopped(assignment: Assignment) -> reapi.ExecuteResponse:
    """Run until it is ended."""
    stopped = wait_for_stop(assignment)
    return reapi.ExecuteResponse(status=Status(code=codes.CANCELLED if stopped else codes.INTERNAL))


class Threads:
    """Run what a source gives by a function; joined at the end."""

    def __init__(self, source: WorkSource, run: Run, number: int = 1) -> None:
        self._source = source
        self._run = run
        self.seen: list[Assignment] = []
        self._threads = [threading.Thread(target=self._loop, daemon=True) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def _loop(self) -> None:
        while (assignment := self._source.take()) is not None:
            self.seen.append(assignment)
            assignment.finish(self._run(assignment))
            assignment.stop.close()

    def join(self) -> None:
        """Wait until each has got None."""
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()


@contextmanager
def grid_worker(
    server: BuildGridServer, name: str, run: Run, slots: int = 1, properties: tuple[tuple[str, str], ...] = PROPERTIES
) -> Iterator[tuple[BuildGrid, Threads]]:
    """A worker of that BuildGrid, ended as a process ends one."""
    channel = Channel(UpstreamOptions(server.url))
    with BuildGrid(channel, server.instance, Member(name, slots, properties)) as source:
        threads = Threads(source, run, slots)
        try:
            yield source, threads
        finally:
            source.drain()
            source.stop_all()
            threads.join()


def exited(code: int = 0, stdout: bytes = b"") -> reapi.ExecuteResponse:
    """The response to a command that ended."""
    return reapi.ExecuteResponse(result=reapi.ActionResult(exit_code=code, stdout_raw=stdout))
