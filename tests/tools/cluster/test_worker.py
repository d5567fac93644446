"""`casfs worker` processes in a real BuildGrid: commands in sandboxes, inputs and outputs in BuildGrid's storage."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Requirements
from tests.tools.cluster.buildgrid import BuildGridServer
from tests.tools.cluster.conftest import remote_of
from tests.tools.conftest import Casfs, wait_until
from tests.tools.worker.conftest import Remote, live_processes, response_of
from tools.reapi import methods
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import operations_pb2 as operations

# The first installs BuildGrid, if nobody has yet.
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


class WorkerProcess:
    """A `casfs worker`; `err` is what it said, when it has ended."""

    def __init__(self, casfs: Casfs, server: BuildGridServer, *options: str | Path) -> None:
        casfs.directory.mkdir(exist_ok=True)
        self.casfs = casfs
        casfs.environment["PYTHONFAULTHANDLER"] = "1"
        command = ("worker", "--buildgrid", server.url, "--host-root", "--jobs", "2")
        self.process: subprocess.Popen[bytes] = casfs.start(*command, *options)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith(b"working for grpc://"):
            pytest.fail(f"the worker said {line!r} and {self.process.communicate(timeout=30)[1]!r}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.err = self.process.communicate(timeout=60)[1].decode()
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            pytest.fail(f"it didn't end; its threads were at: {self.process.communicate(timeout=30)[1].decode()}")
        return self.process.returncode

    @property
    def log(self) -> str:
        """The log of its store."""
        return (self.casfs.store / "casfs.log").read_text()


@contextmanager
def working(
    directory: Path, server: BuildGridServer, *options: str | Path, prefix: tuple[str, ...] = ()
) -> Iterator[WorkerProcess]:
    """A worker that is stopped at the end; `prefix` are the words that take it to another namespace."""
    worker = WorkerProcess(Casfs(directory, prefix), server, *options)
    try:
        yield worker
    finally:
        worker.stop()


@pytest.fixture
def remote(buildgrid: BuildGridServer, requires: Requirements) -> Iterator[Remote]:
    requires.programs("bwrap")
    with remote_of(buildgrid) as client:
        yield client


def salt() -> bytes:
    """So that nobody has the result yet."""
    return str(time.monotonic_ns()).encode()


def test_inputs_come_from_the_clusters_storage_and_outputs_go_there(
    tmp_path: Path, buildgrid: BuildGridServer, remote: Remote
) -> None:
    large = b"0123456789" * 300_000
    files = {"in/large": large, "in/below/small": b"small", "out": None}
    script = (
        "cat in/large in/below/small > out/both; mkdir -p out/tree/deep; cp in/below/small out/tree/deep/s; echo done"
    )
    with working(tmp_path / "one", buildgrid) as worker:
        response = remote.sh(
            script, files, salt=salt(), output_paths=["out/both", "out/tree"], platform={"OSFamily": "linux"}
        )
        assert response.status.code == codes.OK, response
        assert response.result.exit_code == 0
        # All of it is in BuildGrid, which has never seen the worker's store.
        assert remote.outputs(response) == {"out/both": large + b"small"}
        assert remote.tree(response.result.output_directories[0]) == {"deep/s": b"small"}
        assert remote.blob(response.result.stdout_digest) == b"done\n"
        assert response.result.execution_metadata.worker
        assert worker.stop() == 0
    assert "Traceback" not in worker.log


def test_the_scheduler_keeps_the_result_and_no_worker_is_asked_again(
    tmp_path: Path, buildgrid: BuildGridServer, remote: Remote
) -> None:
    with working(tmp_path / "one", buildgrid):
        action = remote.put(["sh", "-c", "echo a > a"], salt=salt(), output_paths=["a"])
        assert not remote.execute(action).cached_result
    assert remote.execute(action).cached_result


def test_a_missing_input_is_told_as_such(tmp_path: Path, buildgrid: BuildGridServer, remote: Remote) -> None:
    from tests.tools.server.conftest import SHA256
    from tools.reapi.generated import remote_execution_pb2 as reapi
    from tools.reapi.generated.error_details_pb2 import PreconditionFailure
    from tools.server.requests import write_digest

    absent = SHA256.of(salt())
    directory = reapi.Directory()
    directory.files.add(name="absent", digest=write_digest(absent))
    [root] = remote.add(directory.SerializeToString())
    with working(tmp_path / "one", buildgrid):
        response = remote.execute(remote.put(["cat", "absent"], root, salt=salt()))
        assert response.status.code == codes.FAILED_PRECONDITION
        failure = PreconditionFailure()
        assert response.status.details[0].Unpack(failure)
        assert [violation.subject for violation in failure.violations] == [f"blobs/{absent.hex}/{absent.size}"]


def test_cancelling_leaves_nothing_running(tmp_path: Path, buildgrid: BuildGridServer, remote: Remote) -> None:
    word = f"86400.{time.monotonic_ns()}"
    with working(tmp_path / "one", buildgrid):
        states = remote.begin(remote.put(["sh", "-c", f"sleep {word} & sleep {word}"], salt=salt()))
        name = next(iter(states)).name
        wait_until(lambda: live_processes(word))
        remote.call(methods.CANCEL_OPERATION, operations.CancelOperationRequest(name=name))
        wait_until(lambda: not live_processes(word))
        assert remote.sh("exit 3", salt=salt()).result.exit_code == 3


def test_a_killed_workers_action_succeeds_on_the_other(
    tmp_path: Path, buildgrid: BuildGridServer, remote: Remote
) -> None:
    with working(tmp_path / "one", buildgrid) as first:
        action = remote.put(["sh", "-c", "sleep 3; echo made > made"], salt=salt(), output_paths=["made"])
        states = remote.begin(action)
        wait_until(lambda: live_processes("sleep 3"))
        with working(tmp_path / "two", buildgrid):
            first.process.kill()
            response = response_of(list(states)[-1])
            assert response.status.code == codes.OK
            assert remote.outputs(response) == {"made": b"made\n"}


def test_a_terminated_worker_finishes_what_runs(tmp_path: Path, buildgrid: BuildGridServer, remote: Remote) -> None:
    with working(tmp_path / "one", buildgrid) as worker:
        states = remote.begin(remote.put(["sh", "-c", "sleep 4; exit 9"], salt=salt()))
        wait_until(lambda: live_processes("sleep 4"))
        assert worker.stop() == 0
        assert response_of(list(states)[-1]).result.exit_code == 9


def test_a_worker_that_is_terminated_twice_gives_back_what_runs(
    tmp_path: Path, buildgrid: BuildGridServer, remote: Remote
) -> None:
    word = f"5.{time.monotonic_ns()}"
    with working(tmp_path / "one", buildgrid) as worker:
        states = remote.begin(remote.put(["sh", "-c", f"sleep {word}; exit 9"], salt=salt()))
        wait_until(lambda: live_processes(word))
        worker.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert worker.stop() == 0
        assert not live_processes(word)
        with working(tmp_path / "two", buildgrid):
            assert response_of(list(states)[-1]).result.exit_code == 9
