"""The client of Buildbarn's scheduler, against one that minds every rule of the interface."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from tests.tools.cluster.conftest import Run, Threads, exited, until_stopped
from tests.tools.cluster.fakes import Scheduler, serving
from tests.tools.conftest import wait_until
from tools.cluster.buildbarn import Buildbarn
from tools.cluster.joining import Member
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.generated.status_pb2 import Status
from tools.upstream.channel import Channel
from tools.upstream.options import UpstreamOptions
from tools.worker.work import Assignment, Stage


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    """A scheduler whose workers have to follow the rules."""
    made = Scheduler()
    yield made
    assert not made.violations


@contextmanager
def barn_worker(scheduler: Scheduler, run: Run, slots: int = 1) -> Iterator[tuple[Buildbarn, Threads]]:
    """A worker of a scheduler that listens, ended as a process ends one."""
    with serving(scheduler.handlers()) as port, joined(port, run, slots) as both:
        yield both


@contextmanager
def joined(port: int, run: Run, slots: int = 1) -> Iterator[tuple[Buildbarn, Threads]]:
    member = Member("one", slots, (("OSFamily", "linux"), ("ISA", "x86-64")), size_class=3)
    channel = Channel(UpstreamOptions(f"grpc://127.0.0.1:{port}/main"))
    with Buildbarn(channel, "main", member) as source:
        threads = Threads(source, run, slots)
        try:
            yield source, threads
        finally:
            source.stop_all()
            source.drain()
            threads.join()


def test_an_action_is_run_as_the_scheduler_says_and_its_result_told(scheduler: Scheduler) -> None:
    def run(assignment: Assignment) -> reapi.ExecuteResponse:
        assert assignment.message is not None
        assert assignment.message.timeout.seconds == 77
        assert assignment.queued == 1_700_000_000
        return exited(4)

    extra = AnyMessage(type_url="type.example/thing", value=b"thing")
    with barn_worker(scheduler, run) as (_, threads):
        name = scheduler.add("told", auxiliary_metadata=[extra], digest_function=reapi.DigestFunction.SHA256)
        wait_until(lambda: name in scheduler.results)
        result = scheduler.results[name].result
        assert result.exit_code == 4
        assert list(result.execution_metadata.auxiliary_metadata) == [extra]
        assert [assignment.action.hex for assignment in threads.seen] == [name]
    [worker] = scheduler.workers.values()
    assert (worker.request.instance_name_prefix, worker.request.size_class) == ("main", 3)
    assert [item.name for item in worker.request.platform.properties] == ["ISA", "OSFamily"]


def test_the_stages_of_a_long_action_are_told(scheduler: Scheduler) -> None:
    def run(assignment: Assignment) -> reapi.ExecuteResponse:
        for stage in (Stage.FETCHING, Stage.RUNNING, Stage.UPLOADING):
            assignment.note(stage)
            time.sleep(1.5)
        return exited()

    with barn_worker(scheduler, run):
        name = scheduler.add("stages")
        wait_until(lambda: name in scheduler.results)
    told = [stage for stage in dict.fromkeys(scheduler.stages[name]) if stage != "started"]
    assert told == ["fetching_inputs", "running", "uploading_outputs", "completed"]


def test_each_slot_is_a_worker(scheduler: Scheduler) -> None:
    together = threading.Barrier(2)

    def run(_: Assignment) -> reapi.ExecuteResponse:
        together.wait(20)
        return exited()

    with barn_worker(scheduler, run, slots=2):
        names = [scheduler.add(f"slots {number}") for number in range(4)]
        wait_until(lambda: all(name in scheduler.results for name in names))
    assert len(scheduler.workers) == 2


def test_what_is_to_be_idle_is_ended_and_the_slot_goes_on(scheduler: Scheduler) -> None:
    def run(assignment: Assignment) -> reapi.ExecuteResponse:
        return until_stopped(assignment) if assignment.action.hex == long else exited()

    long = scheduler.add("long")
    with barn_worker(scheduler, run) as (source, threads):
        wait_until(lambda: threads.seen)
        scheduler.cancel(long)
        wait_until(lambda: threads.seen[0].stop.is_set)
        short = scheduler.add("short")
        wait_until(lambda: short in scheduler.results)
        assert long not in scheduler.results
        wait_until(lambda: source.statistics().get("completed"))
        assert source.statistics() == {"taken": 2, "cancelled": 1, "completed": 1}


def test_another_action_takes_the_place_of_what_runs(scheduler: Scheduler) -> None:
    def run(assignment: Assignment) -> reapi.ExecuteResponse:
        return until_stopped(assignment) if assignment.action.hex == old else exited(5)

    old = scheduler.add("old")
    with barn_worker(scheduler, run) as (_, threads):
        wait_until(lambda: threads.seen)
        new = scheduler.replace(old, "new")
        wait_until(lambda: new in scheduler.results)
        assert scheduler.results[new].result.exit_code == 5
        assert old not in scheduler.results


def test_an_answer_that_was_lost_comes_again(scheduler: Scheduler) -> None:
    scheduler.lose = 2
    with barn_worker(scheduler, lambda _: exited()) as (_, threads):
        name = scheduler.add("lost")
        wait_until(lambda: name in scheduler.results)
        assert len(threads.seen) == 1


def test_an_idle_worker_that_drains_says_so_and_is_done(scheduler: Scheduler) -> None:
    with barn_worker(scheduler, lambda _: exited(), slots=2) as (source, threads):
        wait_until(lambda: len(scheduler.workers) == 2)
        began = time.monotonic()
        source.drain()
        threads.join()
        assert time.monotonic() - began < 5
        assert scheduler.preferred_idle == ["idle", "idle"]
        scheduler.add("late")
        time.sleep(0.5)
        assert not threads.seen


def test_a_worker_that_drains_finishes_and_is_given_nothing(scheduler: Scheduler) -> None:
    go = threading.Event()

    def run(_: Assignment) -> reapi.ExecuteResponse:
        assert go.wait(20)
        return exited(6)

    running = scheduler.add("running")
    with barn_worker(scheduler, run) as (source, threads):
        wait_until(lambda: threads.seen)
        source.drain()
        waiting = scheduler.add("waiting")
        time.sleep(1.5)
        go.set()
        threads.join()
        wait_until(lambda: running in scheduler.results)
        assert scheduler.results[running].result.exit_code == 6
        assert waiting not in scheduler.results
        assert scheduler.given == [running]
    assert set(scheduler.preferred_idle) == {"executing"}


def test_what_is_stopped_at_the_end_can_be_tried_again(scheduler: Scheduler) -> None:
    name = scheduler.add("stopped")
    with barn_worker(scheduler, until_stopped) as (source, threads):
        wait_until(lambda: threads.seen)
        source.drain()
        source.stop_all()
        wait_until(lambda: name in scheduler.results)
        assert scheduler.results[name].status.code == codes.UNAVAILABLE


def test_a_worker_that_fails_by_its_own_fault_rests(scheduler: Scheduler) -> None:
    broken = reapi.ExecuteResponse(status=Status(code=codes.RESOURCE_EXHAUSTED, message="full"))
    with barn_worker(scheduler, lambda _: broken) as (_, threads):
        first = scheduler.add("first")
        wait_until(lambda: first in scheduler.results)
        assert scheduler.results[first].status.code == codes.UNAVAILABLE
        scheduler.add("second")
        time.sleep(2)
        assert len(threads.seen) == 1
        wait_until(lambda: len(threads.seen) == 2)


def test_a_restarted_scheduler_is_found_and_told(scheduler: Scheduler) -> None:
    go = threading.Event()

    def run(_: Assignment) -> reapi.ExecuteResponse:
        assert go.wait(20)
        return exited(8)

    with ExitStack() as stack:
        with serving(scheduler.handlers()) as port:
            _, threads = stack.enter_context(joined(port, run))
            name = scheduler.add("across")
            wait_until(lambda: threads.seen)
        go.set()
        after = scheduler.restart()
        with serving(after.handlers(), port):
            wait_until(lambda: name in after.results)
            other = after.add("after")
            wait_until(lambda: other in after.results)
            stack.close()


def test_actions_of_other_instances_are_refused(scheduler: Scheduler) -> None:
    with barn_worker(scheduler, lambda _: exited()) as (_, threads):
        name = scheduler.add("elsewhere", instance_name_suffix="else/where")
        wait_until(lambda: name in scheduler.results)
        status = scheduler.results[name].status
        assert status.code == codes.INVALID_ARGUMENT
        assert "'main'" in status.message
        assert "'main/else/where'" in status.message
        assert not threads.seen


def test_a_worker_ends_though_its_scheduler_is_gone(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.cluster.buildbarn._END_SECONDS", 1.0)
    with ExitStack() as stack:
        with serving(scheduler.handlers()) as port:
            source, threads = stack.enter_context(joined(port, lambda _: exited(), slots=2))
            wait_until(lambda: len(scheduler.workers) == 2)
        began = time.monotonic()
        source.drain()
        threads.join()
        assert time.monotonic() - began < 10
