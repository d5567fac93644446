"""A `casfs worker` process of a Buildbarn: commands in sandboxes, storage that is another's, numbers over HTTP."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from store.digest import Digest
from tests.conftest import Requirements
from tests.tools.cluster.fakes import Scheduler, serving
from tests.tools.conftest import Casfs, wait_until
from tests.tools.server.conftest import running
from tests.tools.worker.conftest import Remote, remote_of
from tools.exits import Exit
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.generated import remoteworker_pb2 as remoteworker
from tools.server.requests import write_digest


@contextmanager
def barn(casfs: Casfs, scheduler: Scheduler, *options: str) -> Iterator[tuple[Remote, str]]:
    """A storage, and where a worker that works for the scheduler shows its numbers."""
    above, here = (Casfs(casfs.directory / name) for name in ("above", "here"))
    for place in (above, here):
        place.directory.mkdir()
    with serving(scheduler.handlers()) as port, running(above) as storage, remote_of(storage) as remote:
        addresses = ("--buildbarn", f"grpc://127.0.0.1:{port}", "--upstream", f"grpc://{storage.address}")
        worker = here.start("worker", *addresses, "--host-root", "--jobs", "1", "--name", "one", *options)
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline().startswith(b"working for grpc://")
            numbers = re.fullmatch(r"numbers at (http://\S+)\n", worker.stdout.readline().decode())
            assert numbers is not None
            yield remote, numbers[1]
        finally:
            worker.terminate()
            _, err = worker.communicate(timeout=60)
    assert (worker.returncode, err) == (0, b"")


def give(scheduler: Scheduler, remote: Remote, action: Digest) -> reapi.ExecuteResponse:
    """Have an action run that is in the storage."""
    message = reapi.Action.FromString(remote.read(action))
    hash_ = scheduler.give(remoteworker.DesiredState.Executing(action_digest=write_digest(action), action=message))
    wait_until(lambda: hash_ in scheduler.results)
    return scheduler.results[hash_]


def read_numbers(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if x[0] != "#")}


def test_actions_run_in_sandboxes_and_are_numbers(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    requires.fuse()
    scheduler = Scheduler()
    with barn(casfs, scheduler, "--http-listen", "127.0.0.1:0", "--max-size", "10GiB") as (remote, url):
        assert url.endswith("/metrics")
        action = remote.put(["sh", "-c", "cat d/in > o"], {"d/in": b"in\n"}, output_paths=["o"])
        response = give(scheduler, remote, action)
        assert (response.status.code, response.result.exit_code) == (codes.OK, 0), response
        assert remote.outputs(response) == {"o": b"in\n"}
        # Its scheduler stores no results: that was the worker.
        assert remote.result(action).output_files == response.result.output_files
        assert give(scheduler, remote, remote.put(["sh", "-c", "exit 3"])).result.exit_code == 3
        numbers = read_numbers(url)
    assert numbers['casfs_actions_total{exit="zero",status="OK"}'] == 1
    assert numbers['casfs_actions_total{exit="other",status="OK"}'] == 1
    for stage in ("fetch", "run", "upload", "queue"):
        assert numbers[f'casfs_action_seconds_count{{stage="{stage}"}}'] == 2
    assert numbers['casfs_action_numbers_total{what="input_files"}'] == 1
    assert numbers['casfs_worker_actions_total{what="taken"}'] == 2
    assert numbers["casfs_store_limit_bytes"] == 10 << 30
    assert numbers["casfs_store_bytes"] > 0
    assert not scheduler.violations


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:70000", "192.0.2.1:0"])
def test_where_numbers_cant_be_shown_is_said_in_a_line(casfs: Casfs, address: str) -> None:
    said = casfs.fails(Exit.USAGE, "worker", "--buildgrid", "grpc://127.0.0.1:1", "--http-listen", address)
    assert address in said
