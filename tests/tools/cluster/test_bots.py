"""The client of the Bots interface, against a server that is odd in the ways that the interface allows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from tests.tools.cluster.bots_fake import Bots
from tests.tools.cluster.conftest import PROPERTIES, Run, Threads, exited, until_stopped
from tests.tools.cluster.fakes import serving
from tests.tools.conftest import wait_until
from tests.tools.server.conftest import SHA256
from tools.cluster.buildgrid import BuildGrid
from tools.cluster.joining import Member
from tools.reapi.generated import bots_pb2 as bots
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.generated.status_pb2 import Status
from tools.server.requests import write_digest
from tools.upstream.channel import Channel
from tools.upstream.options import UpstreamOptions
from tools.worker.work import Assignment

ACTION = reapi.Action(salt=b"an action")


@pytest.fixture
def server() -> Iterator[Bots]:
    """A server whose worker has to follow the rules."""
    made = Bots()
    yield made
    assert not made.violations


@contextmanager
def worker(server: Bots, run: Run, slots: int = 1) -> Iterator[tuple[BuildGrid, Threads]]:
    with serving(server.handlers()) as port:
        channel = Channel(UpstreamOptions(f"grpc://127.0.0.1:{port}/main"))
        with BuildGrid(channel, "main", Member("one", slots, PROPERTIES)) as source:
            threads = Threads(source, run, slots)
            try:
                yield source, threads
            finally:
                source.drain()
                source.stop_all()
                threads.join()


def ends(server: Bots) -> list[tuple[str, int]]:
    """The leases that ended, with their codes."""
    return [(lease.id, lease.status.code) for lease in server.completed]


def test_a_digest_alone_is_an_action_too(server: Bots) -> None:
    digest = SHA256.of(ACTION.SerializeToString())
    with worker(server, lambda _: exited(3)) as (_, threads):
        server.add("one", write_digest(digest))
        wait_until(lambda: server.completed)
    [assignment] = threads.seen
    assert (assignment.action, assignment.message) == (digest, None)
    result = reapi.ActionResult()
    assert server.completed[0].result.Unpack(result)
    assert result.exit_code == 3


def test_a_pending_lease_is_taken(server: Bots) -> None:
    with worker(server, lambda _: exited()):
        server.add("one", ACTION, bots.PENDING)
        wait_until(lambda: server.completed)
    assert ends(server) == [("one", codes.OK)]


@pytest.mark.parametrize("say", [False, True])
def test_a_lease_that_is_cancelled_is_ended_and_told_of_no_more(server: Bots, say: bool) -> None:
    with worker(server, until_stopped) as (source, threads):
        server.add("one", ACTION)
        wait_until(lambda: threads.seen)
        server.cancel("one", say=say)
        wait_until(lambda: threads.seen[0].stop.is_set)
        wait_until(lambda: source.statistics()["leases"] == 0)
        server.add("two", ACTION)
        wait_until(lambda: len(threads.seen) == 2)
    # The second was stopped with the worker: another may do it.
    assert ends(server) == [("two", codes.UNAVAILABLE)]


def test_a_server_in_trouble_keeps_its_leases(server: Bots) -> None:
    go = threading.Event()

    def run(_: Assignment) -> reapi.ExecuteResponse:
        assert go.wait(20)
        return exited()

    with worker(server, run) as (source, threads):
        server.add("one", ACTION)
        wait_until(lambda: threads.seen)
        server.fail += [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED]
        wait_until(lambda: not server.fail)
        go.set()
        wait_until(lambda: server.completed)
        assert not threads.seen[0].stop.is_set
        assert source.statistics()["sessions"] == 1


def test_a_session_that_is_over_takes_its_leases_along(server: Bots) -> None:
    def run(assignment: Assignment) -> reapi.ExecuteResponse:
        return until_stopped(assignment) if len(threads.seen) == 1 else exited()

    with worker(server, run) as (source, threads):
        server.add("one", ACTION)
        wait_until(lambda: threads.seen)
        server.fail.append(grpc.StatusCode.DATA_LOSS)
        wait_until(lambda: threads.seen[0].stop.is_set)
        # The server gives it again to the session that follows.
        wait_until(lambda: server.completed)
        assert source.statistics()["sessions"] == len(server.sessions) == 2
    assert ends(server) == [("one", codes.OK)]


def test_an_end_is_told_until_the_server_has_taken_note(server: Bots) -> None:
    server.keep = 2
    with worker(server, lambda _: exited()) as (_, threads):
        server.add("one", ACTION)
        wait_until(lambda: server.completed)
        assert len(threads.seen) == 1


def test_a_lease_that_comes_again_with_the_answer_to_its_end_is_run_again(server: Bots) -> None:
    """As BuildGrid does where it has an action tried again, and nobody else is free."""

    def run(_: Assignment) -> reapi.ExecuteResponse:
        if len(threads.seen) == 1:
            server.add("one", ACTION)
        return exited()

    with worker(server, run) as (_, threads):
        server.add("one", ACTION)
        wait_until(lambda: len(server.completed) == 2)
        assert len(threads.seen) == 2


def test_an_answer_that_was_lost_is_asked_for_again(server: Bots) -> None:
    server.lose = 2
    with worker(server, lambda _: exited()) as (_, threads):
        server.add("one", ACTION)
        wait_until(lambda: server.completed)
        assert len(threads.seen) == 1


def test_many_short_actions_are_all_told(server: Bots) -> None:
    with worker(server, lambda _: exited(), slots=4) as (source, _):
        for number in range(200):
            server.add(str(number), ACTION)
        wait_until(lambda: len(server.completed) == 200)
        assert source.statistics()["completed"] >= 196
    assert {code for _, code in ends(server)} == {codes.OK}


def test_a_worker_without_room_or_news_doesnt_call_all_the_time(server: Bots) -> None:
    """A server that doesn't wait for it is asked with growing pauses."""
    with worker(server, until_stopped) as (_, threads):
        server.add("one", ACTION)
        wait_until(lambda: threads.seen)
        before = server.updates
        time.sleep(4)
        assert 2 <= server.updates - before <= 6


def test_what_is_no_action_is_refused(server: Bots) -> None:
    with worker(server, lambda _: exited()) as (_, threads):
        server.add("one", reapi.Directory())
        server.add("two", reapi.Digest(hash="zz", size_bytes=3))
        wait_until(lambda: len(server.completed) == 2)
        assert not threads.seen
    assert ends(server) == [("one", codes.INVALID_ARGUMENT), ("two", codes.INVALID_ARGUMENT)]
    assert "Directory" in server.completed[0].status.message


def test_what_comes_while_it_drains_is_given_back(server: Bots) -> None:
    server.hold = 20.0
    with worker(server, lambda _: exited()) as (source, threads):
        wait_until(lambda: server.sessions)
        source.drain()
        threads.join()
    # It joined and left without knowing its session's name: another one took its place.
    assert [session.status for session in server.sessions] == [bots.OK, bots.BOT_TERMINATING]


def test_what_is_stopped_before_a_thread_was_free_is_given_back(server: Bots) -> None:
    with serving(server.handlers()) as port:
        channel = Channel(UpstreamOptions(f"grpc://127.0.0.1:{port}/main"))
        with BuildGrid(channel, "main", Member("one", 1, PROPERTIES)) as source:
            server.add("one", ACTION)
            wait_until(lambda: source.statistics()["leases"])
            source.drain()
            source.stop_all()
            assert source.take() is None
            wait_until(lambda: server.completed)
    assert ends(server) == [("one", codes.UNAVAILABLE)]


def test_a_drained_worker_takes_leave(server: Bots) -> None:
    with worker(server, lambda _: exited()) as (source, _):
        wait_until(lambda: source.statistics().get("sessions"))
    assert server.statuses[-1] == bots.BOT_TERMINATING
    assert len(server.sessions) == 1


def test_a_worker_with_a_fault_of_its_own_is_unhealthy_for_a_while(server: Bots) -> None:
    broken = reapi.ExecuteResponse(status=Status(code=codes.RESOURCE_EXHAUSTED, message="full"))
    with worker(server, lambda _: broken) as (_, threads):
        server.add("one", ACTION)
        wait_until(lambda: server.completed)
        server.add("two", ACTION)
        time.sleep(2)
        assert len(threads.seen) == 1
        assert server.statuses[-1] == bots.UNHEALTHY
        wait_until(lambda: len(server.completed) == 2)
    assert ends(server) == [("one", codes.UNAVAILABLE), ("two", codes.UNAVAILABLE)]
