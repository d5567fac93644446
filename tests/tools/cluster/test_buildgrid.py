"""A real BuildGrid, and workers that run actions by a function: leases, cancellation, sessions that end and begin."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from store.digest import Digest
from tests.conftest import Requirements
from tests.tools.cluster.buildgrid import KEEPALIVE_SECONDS, BuildGridServer, running_buildgrid
from tests.tools.cluster.conftest import PROPERTIES, exited, grid_worker, remote_of, wait_for_stop
from tests.tools.conftest import wait_until
from tests.tools.server.conftest import code_of
from tests.tools.worker.conftest import Remote, response_of
from tools.reapi import methods
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import operations_pb2 as operations
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.generated.status_pb2 import Status
from tools.worker.work import Assignment

# Each begins with BuildGrid's start, and several wait for it to miss a worker.
# The first installs BuildGrid, if nobody has yet.
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

LINUX = {"OSFamily": "linux"}


@pytest.fixture
def remote(buildgrid: BuildGridServer) -> Iterator[Remote]:
    with remote_of(buildgrid) as client:
        yield client


def put(remote: Remote, name: str) -> Digest:
    """An action nobody has asked for before."""
    return remote.put(["true", name], salt=name.encode(), platform=LINUX)


def test_a_lease_of_an_execute_call_is_run_and_its_result_told(buildgrid: BuildGridServer, remote: Remote) -> None:
    action = put(remote, "told")
    with grid_worker(buildgrid, "told", lambda _: exited(7, b"seven")) as (source, threads):
        began = time.monotonic()
        response = remote.execute(action)
        assert time.monotonic() - began < 10
        assert (response.result.exit_code, response.result.stdout_raw) == (7, b"seven")
        assert response.status.code == codes.OK
        [assignment] = threads.seen
        # It sent the action along, and its digest is what the client calls it.
        assert assignment.action == action
        assert assignment.message is not None
        wait_until(lambda: source.statistics()["leases"] == 0)
        counts = source.statistics()
        assert (counts["sessions"], counts["taken"], counts["completed"]) == (1, 1, 1)


def test_as_many_leases_are_taken_at_a_time_as_there_are_slots(buildgrid: BuildGridServer, remote: Remote) -> None:
    actions = [put(remote, f"slots {number}") for number in range(4)]
    together = threading.Barrier(2)

    def run(_: Assignment) -> reapi.ExecuteResponse:
        # Two have to be here at a time, or it breaks.
        together.wait(20)
        return exited()

    with grid_worker(buildgrid, "slots", run, slots=2) as (source, threads):
        calls = [remote.begin(action) for action in actions]
        assert [response_of(list(call)[-1]).result.exit_code for call in calls] == [0] * 4
        wait_until(lambda: source.statistics()["completed"] == len(threads.seen) == 4)
        assert source.statistics()["sessions"] == 1


def test_a_cancelled_operation_kills_and_the_worker_goes_on(buildgrid: BuildGridServer, remote: Remote) -> None:
    stopped = threading.Event()

    def run(assignment: Assignment) -> reapi.ExecuteResponse:
        if assignment.action != long:
            return exited()
        if wait_for_stop(assignment):
            stopped.set()
        return reapi.ExecuteResponse(status=Status(code=codes.CANCELLED))

    long, short = put(remote, "cancel, long"), put(remote, "cancel, short")
    with grid_worker(buildgrid, "cancel", run) as (source, threads):
        states = remote.begin(long)
        name = next(iter(states)).name
        wait_until(lambda: threads.seen)
        remote.call(methods.CANCEL_OPERATION, operations.CancelOperationRequest(name=name))
        assert stopped.wait(15)
        assert list(states)[-1].done
        assert remote.execute(short).result.exit_code == 0
        wait_until(lambda: source.statistics().get("completed"))
        counts = source.statistics()
        assert (counts["cancelled"], counts["completed"], counts["sessions"]) == (1, 1, 1)


def test_an_action_longer_than_the_servers_patience_is_kept_alive(buildgrid: BuildGridServer, remote: Remote) -> None:
    def run(assignment: Assignment) -> reapi.ExecuteResponse:
        return exited(1 if wait_for_stop(assignment, KEEPALIVE_SECONDS * 2) else 0)

    action = put(remote, "long")
    with grid_worker(buildgrid, "alive", run) as (source, threads):
        assert remote.execute(action).result.exit_code == 0
        assert len(threads.seen) == source.statistics()["sessions"] == 1


def test_a_restarted_server_gets_the_result_of_what_ran_meanwhile(tmp_path: Path, requires: Requirements) -> None:
    restarted = threading.Event()

    def run(_: Assignment) -> reapi.ExecuteResponse:
        assert restarted.wait(60)
        return exited(3)

    # One of its own, as a test has to end what it starts.
    with running_buildgrid(requires, tmp_path) as server, remote_of(server) as remote:
        action, after = put(remote, "restart"), put(remote, "after the restart")
        with grid_worker(server, "restart", run) as (source, threads):
            states = remote.begin(action)
            name = next(iter(states)).name
            wait_until(lambda: threads.seen)
            server.stop()
            with pytest.raises(grpc.RpcError):
                list(states)
            server.start()
            restarted.set()
            request = reapi.WaitExecutionRequest(name=name)
            # The session may have expired meanwhile: then the action comes a second time.
            last = list(remote.call(methods.WAIT_EXECUTION, request, timeout=60))[-1]
            assert response_of(last).result.exit_code == 3
            assert remote.execute(after).result.exit_code == 3
            wait_until(lambda: source.statistics().get("completed", 0) >= 2)


def test_a_session_that_the_server_forgot_is_begun_anew(buildgrid: BuildGridServer, remote: Remote) -> None:
    """Another worker of the same name takes it over; the leases go there, and what ran here is killed."""
    killed = threading.Event()

    def hang(assignment: Assignment) -> reapi.ExecuteResponse:
        if wait_for_stop(assignment):
            killed.set()
        return reapi.ExecuteResponse(status=Status(code=codes.CANCELLED))

    action = put(remote, "taken over")
    with grid_worker(buildgrid, "twin", hang) as (source, threads):
        states = remote.begin(action)
        wait_until(lambda: threads.seen)
        with grid_worker(buildgrid, "twin", lambda _: exited()) as (_, others):
            assert response_of(list(states)[-1]).result.exit_code == 0
            assert len(others.seen) == 1
            assert killed.wait(15)
        wait_until(lambda: source.statistics()["sessions"] >= 2)
        assert source.statistics()["lost"] == 1


def test_a_worker_that_drains_finishes_and_takes_nothing_new(buildgrid: BuildGridServer, remote: Remote) -> None:
    go = threading.Event()

    def run(_: Assignment) -> reapi.ExecuteResponse:
        assert go.wait(30)
        return exited()

    running, waiting = put(remote, "drain, running"), put(remote, "drain, waiting")
    with grid_worker(buildgrid, "drain", run, slots=2) as (source, threads):
        first = remote.begin(running)
        wait_until(lambda: threads.seen)
        source.drain()
        # Until the server has heard of it; what came before that is given back.
        time.sleep(1)
        second = remote.begin(waiting)
        time.sleep(2)
        assert [assignment.action for assignment in threads.seen] == [running]
        go.set()
        assert response_of(list(first)[-1]).result.exit_code == 0
        with grid_worker(buildgrid, "after the drain", lambda _: exited(5)):
            assert response_of(list(second)[-1]).result.exit_code == 5


def test_a_worker_that_ends_while_it_joins_leaves_nothing_behind(buildgrid: BuildGridServer, remote: Remote) -> None:
    """A lease that was given to it in the meantime goes to another at once, and not when it is missed."""
    with grid_worker(buildgrid, "brief", lambda _: exited(1)):
        time.sleep(0.5)
    action = put(remote, "brief")
    began = time.monotonic()
    with grid_worker(buildgrid, "stays", lambda _: exited(0)):
        assert remote.execute(action).result.exit_code == 0
    assert time.monotonic() - began < KEEPALIVE_SECONDS


def test_what_fails_by_the_workers_fault_is_done_by_another(buildgrid: BuildGridServer, remote: Remote) -> None:
    broken = reapi.ExecuteResponse(status=Status(code=codes.RESOURCE_EXHAUSTED, message="the scratch disk is full"))
    action = put(remote, "fault")
    with grid_worker(buildgrid, "broken", lambda _: broken) as (_, threads):
        states = remote.begin(action)
        wait_until(lambda: threads.seen)
        with grid_worker(buildgrid, "whole", lambda _: exited(0)):
            assert response_of(list(states)[-1]).result.exit_code == 0
        assert len(threads.seen) == 1


def test_what_the_action_is_to_blame_for_is_told_to_the_client(buildgrid: BuildGridServer, remote: Remote) -> None:
    missing = reapi.ExecuteResponse(status=Status(code=codes.FAILED_PRECONDITION, message="an input is missing"))
    with grid_worker(buildgrid, "blame", lambda _: missing) as (_, threads):
        response = remote.execute(put(remote, "blame"))
        assert (response.status.code, response.status.message) == (codes.FAILED_PRECONDITION, "an input is missing")
        assert len(threads.seen) == 1


def test_properties_decide_which_worker_gets_an_action(buildgrid: BuildGridServer, remote: Remote) -> None:
    big = (*PROPERTIES, ("pool", "big"))
    action = remote.put(["true"], salt=b"properties", platform={**LINUX, "pool": "big"})
    with (
        grid_worker(buildgrid, "small", lambda _: exited(1)),
        grid_worker(buildgrid, "big", lambda _: exited(0), properties=big),
    ):
        assert remote.execute(action).result.exit_code == 0
        with pytest.raises(grpc.RpcError) as refused:
            remote.execute(remote.put(["true"], platform={"colour": "blue"}))
        assert code_of(refused.value) == "FAILED_PRECONDITION"


def test_a_killed_workers_action_is_done_by_another(buildgrid: BuildGridServer, remote: Remote) -> None:
    """Its session ends without a word, as when its machine is gone."""
    action = put(remote, "killed")
    with grid_worker(buildgrid, "killed", lambda a: exited(1) if wait_for_stop(a, 60) else exited(2)) as (source, seen):
        states = remote.begin(action)
        wait_until(lambda: seen.seen)
        source._channel.close()
        with grid_worker(buildgrid, "heir", lambda _: exited(0)):
            assert response_of(list(states)[-1]).result.exit_code == 0
        source._ended = True
