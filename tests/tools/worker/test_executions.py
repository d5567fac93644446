"""Executions as clients follow them: stages, merging, coming back, cancelling, priorities, what is missing, limits."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from store.digest import Digest
from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import SHA256, Server, refused, wait_for
from tests.tools.worker.conftest import (
    Remote,
    executing,
    live_processes,
    make_tree,
    remote_of,
    response_of,
    stage_of,
)
from tools.reapi import methods
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import operations_pb2 as operations
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.generated.error_details_pb2 import PreconditionFailure
from tools.server.requests import write_digest


def missing_of(response: reapi.ExecuteResponse) -> set[tuple[str, str]]:
    """The violations of a failed precondition."""
    assert response.status.code == codes.FAILED_PRECONDITION
    failure = PreconditionFailure()
    [detail] = response.status.details
    assert detail.Unpack(failure)
    return {(violation.type, violation.subject) for violation in failure.violations}


def name_of(digest: Digest) -> tuple[str, str]:
    return "MISSING", f"blobs/{digest.hex}/{digest.size}"


def unique(prefix: str = "wait") -> str:
    """A word that is on the command line of one action's process and nowhere else."""
    return f"{prefix}{os.urandom(6).hex()}"


def sleeping(remote: Remote, word: str, seconds: float = 60, **options: Any) -> Digest:
    """An action whose processes have a word in their command lines, which one can look for."""
    return remote.put(["sh", "-c", f": {word}; sleep {seconds}; echo slept"], **options)


def test_stages_come_in_order(remote: Remote) -> None:
    states = list(remote.begin(remote.put(["true"], salt=os.urandom(8))))
    stages = [stage_of(state) for state in states]
    assert stages == sorted(stages, key=reapi.ExecutionStage.Value.Value)
    assert stages[-1] == "COMPLETED" and states[-1].done
    assert len({state.name for state in states}) == 1
    metadata = response_of(states[-1]).result.execution_metadata
    times = [
        metadata.queued_timestamp,
        metadata.worker_start_timestamp,
        metadata.input_fetch_start_timestamp,
        metadata.input_fetch_completed_timestamp,
        metadata.execution_start_timestamp,
        metadata.execution_completed_timestamp,
        metadata.output_upload_start_timestamp,
        metadata.output_upload_completed_timestamp,
        metadata.worker_completed_timestamp,
    ]
    assert [time.ToNanoseconds() for time in times] == sorted(time.ToNanoseconds() for time in times)
    assert metadata.worker and times[0].seconds > 1_700_000_000


# What is missing


def test_what_is_missing_is_named_and_can_be_brought(remote: Remote) -> None:
    root, blobs = make_tree({"here": b"here\n", "gone": os.urandom(8), "d/e/gone too": os.urandom(8), "d/f": b"f\n"})
    contents = {SHA256.of(blob): blob for blob in blobs}
    gone = [digest for digest, blob in contents.items() if len(blob) == 8]
    remote.add(*(blob for digest, blob in contents.items() if digest not in gone))
    action = remote.put(["sh", "-c", "cat here"], root)
    assert missing_of(remote.execute(action)) == set(map(name_of, gone))
    remote.add(contents[gone[0]])
    assert missing_of(remote.execute(action)) == {name_of(gone[1])}
    remote.add(contents[gone[1]])
    assert remote.execute(action).result.exit_code == 0


def test_missing_messages_are_named(remote: Remote) -> None:
    absent = SHA256.of(os.urandom(9))
    assert missing_of(remote.execute(absent)) == {name_of(absent)}
    root, blobs = make_tree({"d/e/f": os.urandom(9), "d/g": b""})
    assert missing_of(remote.execute(remote.put(["true"], root))) == {name_of(root)}
    # Its subdirectories are gone; their own can't be known yet.
    remote.add(blobs[-1])
    [name] = missing_of(remote.execute(remote.put(["true"], root)))
    assert name[1] != name_of(root)[1]
    command = SHA256.of(b"no such command")
    action = reapi.Action(command_digest=write_digest(command), input_root_digest=write_digest(root))
    [digest] = remote.add(action.SerializeToString())
    assert missing_of(remote.execute(digest)) == {name_of(command)}


def test_broken_trees_and_messages_are_refused(remote: Remote) -> None:
    def execute(directory: reapi.Directory | bytes) -> reapi.ExecuteResponse:
        data = directory if isinstance(directory, bytes) else directory.SerializeToString()
        return remote.execute(remote.put(["true"], remote.add(data)[0]))

    empty = write_digest(SHA256.of(b""))
    for broken in (
        b"\xff\xff no message",
        reapi.Directory(files=[reapi.FileNode(name="../up", digest=empty)]),
        reapi.Directory(files=[reapi.FileNode(name="a", digest=empty), reapi.FileNode(name="a", digest=empty)]),
        reapi.Directory(
            files=[reapi.FileNode(name="a", digest=empty)], symlinks=[reapi.SymlinkNode(name="a", target="b")]
        ),
    ):
        response = execute(broken)
        assert response.status.code == codes.INVALID_ARGUMENT, broken
    [no_action] = remote.add(b"\xff\xff no action")
    assert remote.execute(no_action).status.code == codes.INVALID_ARGUMENT
    [no_digest] = remote.add(reapi.Action(command_digest=reapi.Digest(hash="xyz", size_bytes=3)).SerializeToString())
    assert remote.execute(no_digest).status.code == codes.INVALID_ARGUMENT
    assert refused(lambda: list(remote.call(methods.EXECUTE, reapi.ExecuteRequest()))) == "INVALID_ARGUMENT"


def test_a_tree_that_says_it_contains_itself_is_only_missing(remote: Remote) -> None:
    # Nobody can make a real cycle: a message would have to have its own digest in it.
    loop = reapi.Directory(directories=[reapi.DirectoryNode(name="d", digest=write_digest(SHA256.of(os.urandom(9))))])
    [root] = remote.add(loop.SerializeToString())
    assert len(missing_of(remote.execute(remote.put(["true"], root)))) == 1


# Time


def test_a_timeout_is_told_with_what_there_is(remote: Remote) -> None:
    word = unique()
    action = remote.put(["sh", "-c", f": {word}; echo before; echo 1 > o; sleep 60"], timeout=2.5, output_paths=["o"])
    began = time.monotonic()
    response = remote.execute(action)
    assert response.status.code == codes.DEADLINE_EXCEEDED and "2.5 s" in response.status.message
    assert 2.4 < time.monotonic() - began < 20
    assert remote.blob(response.result.stdout_digest) == b"before\n"
    assert remote.outputs(response) == {"o": b"1\n"}
    assert not live_processes(word)
    assert not remote.execute(action).cached_result


def test_daemons_do_not_outlive_their_action(remote: Remote) -> None:
    word = unique("daemon")
    script = f"(setsid sh -c ': {word}; sleep 300; sleep 1' >/dev/null 2>&1 &); echo started"
    response = remote.sh(script)
    assert remote.blob(response.result.stdout_digest) == b"started\n"
    assert not live_processes(word)


# Several who ask


def test_equal_actions_run_once(remote: Remote, executor: Server) -> None:
    script = ["sh", "-c", "sleep 1; head -c 8 /dev/urandom > o"]
    action = remote.put(script, output_paths=["o"], salt=os.urandom(8))
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda _: remote.execute(action, skip_cache_lookup=True), range(8)))
    assert len({response.result.output_files[0].digest.hash for response in responses}) == 1
    never = remote.put(script, output_paths=["o"], salt=os.urandom(8), do_not_cache=True)
    with ThreadPoolExecutor(2) as pool:
        responses = list(pool.map(lambda _: remote.execute(never), range(2)))
    assert len({response.result.output_files[0].digest.hash for response in responses}) == 2


def test_who_loses_the_connection_comes_back(remote: Remote, executor: Server) -> None:
    action = remote.put(["sh", "-c", "sleep 1.5; echo done"], salt=os.urandom(8))
    with remote_of(executor) as other:
        name = next(other.begin(action)).name
    request = reapi.WaitExecutionRequest(name=name)
    states = list(remote.call(methods.WAIT_EXECUTION, request))
    assert remote.blob(response_of(states[-1]).result.stdout_digest) == b"done\n"
    # And once more, when it is over.
    [state] = remote.call(methods.WAIT_EXECUTION, request)
    assert state.done
    unknown = reapi.WaitExecutionRequest(name="operations/none")
    assert refused(lambda: list(remote.call(methods.WAIT_EXECUTION, unknown))) == "NOT_FOUND"


def test_what_nobody_waits_for_any_more_is_ended(remote: Remote, executor: Server) -> None:
    word = unique()
    with remote_of(executor) as other:
        states = other.begin(sleeping(remote, word))
        name = next(states).name
        wait_for(lambda: live_processes(word))
    wait_for(lambda: remote.operation(name).done, 30)
    assert response_of(remote.operation(name)).status.code == codes.CANCELLED
    assert not live_processes(word)


def test_cancelling_ends_it_for_all(remote: Remote) -> None:
    word = unique()
    action = sleeping(remote, word)
    states, others = remote.begin(action), remote.begin(action)
    name = next(states).name
    assert next(others).name == name
    wait_for(lambda: live_processes(word))
    assert name in [
        one.name for one in remote.call(methods.LIST_OPERATIONS, operations.ListOperationsRequest()).operations
    ]
    remote.call(methods.CANCEL_OPERATION, operations.CancelOperationRequest(name=name))
    for following in (states, others):
        assert response_of(list(following)[-1]).status.code == codes.CANCELLED
    assert not live_processes(word)
    assert refused(lambda: remote.operation("none")) == "NOT_FOUND"


def test_what_is_queued_can_be_cancelled_and_priorities_are_kept(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    with executing(casfs, "--jobs", "1") as server, remote_of(server) as remote:
        first = remote.begin(remote.put(["sleep", "2"]))
        wait_for(lambda: stage_of(next(first)) == "EXECUTING")
        began: dict[str, int] = {}

        def follow(name: str, priority: int) -> None:
            policy = reapi.ExecutionPolicy(priority=priority)
            action = remote.put(["sh", "-c", f": {name}"], salt=name.encode())
            response = remote.execute(action, execution_policy=policy)
            # As the worker has it: two that end together are told to their clients in any order.
            began[name] = response.result.execution_metadata.worker_start_timestamp.ToNanoseconds()

        threads = []
        for name, priority in (("late", 5), ("middle", 0), ("urgent", -5)):
            threads.append(threading.Thread(target=follow, args=(name, priority)))
            threads[-1].start()
            time.sleep(0.1)
        waiting = remote.begin(remote.put(["true"], salt=b"waiting"))
        name = next(waiting).name
        remote.call(methods.CANCEL_OPERATION, operations.CancelOperationRequest(name=name))
        assert response_of(list(waiting)[-1]).status.code == codes.CANCELLED
        for thread in threads:
            thread.join()
        assert len(set(began.values())) == 3
        assert sorted(began, key=lambda name: began[name]) == ["urgent", "middle", "late"]
        assert response_of(list(first)[-1]).result.exit_code == 0


def test_operations_are_listed_by_pages_and_instances(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    with executing(casfs) as server, remote_of(server) as remote:
        for number in range(5):
            remote.execute(remote.put(["true"], salt=b"%d" % number), instance_name="a/b" if number % 2 else "")

        def names(**options: object) -> list[str]:
            found: list[str] = []
            token = ""
            while True:
                request = operations.ListOperationsRequest(page_token=token, **options)  # type: ignore[arg-type]
                page = remote.call(methods.LIST_OPERATIONS, request)
                found += [one.name for one in page.operations]
                token = page.next_page_token
                if not token:
                    return found

        assert len(names(page_size=2)) == len(names()) == 5
        assert [name.startswith("a/b/operations/") for name in names(name="a/b")] == [True, True]
        assert refused(lambda: names(filter="x")) == "INVALID_ARGUMENT"


# What an action may take


def test_a_gibibyte_of_output_takes_no_memory(remote: Remote, executor: Server) -> None:
    size = 1 << 30
    response = remote.execute(remote.put(["head", "-c", str(size), "/dev/zero"], salt=os.urandom(8)))
    assert response.result.stdout_digest.size_bytes == size
    status = Path(f"/proc/{executor.process.pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert peak < 400 << 10


def test_memory_and_processes_are_bounded(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap", "python3")
    with executing(
        casfs, "--action-memory", "200MiB", "--action-processes", "50", "--action-log", casfs.directory / "log"
    ) as server:
        with remote_of(server) as remote:
            hog = remote.run(["python3", "-c", "x = bytearray(1 << 30); print(len(x))"])
            assert hog.status.code == 0 and hog.result.exit_code != 0
            word = unique("bomb")
            bomb = remote.sh(f": {word}; f() {{ f | f & }}; f; sleep 1; echo survived || true")
            assert bomb.status.code == 0
            assert not live_processes(word)
            fine = remote.run(["python3", "-c", "x = bytearray(1 << 20); print(len(x))"])
            assert fine.result.exit_code == 0


# The ends of a server


def test_draining_finishes_what_runs_and_sends_away_what_waits(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    with executing(casfs, "--jobs", "1") as server, remote_of(server) as remote:
        running = remote.begin(remote.put(["sh", "-c", "sleep 2; echo done"]))
        wait_for(lambda: stage_of(next(running)) == "EXECUTING")
        queued = remote.begin(remote.put(["true"]))
        next(queued)
        server.process.send_signal(signal.SIGTERM)
        assert response_of(list(queued)[-1]).status.code == codes.UNAVAILABLE
        assert response_of(list(running)[-1]).result.exit_code == 0
        assert server.process.wait(20) == 0  # by the first signal; a second one would end it as it is


def test_draining_has_an_end(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    word = unique()
    with executing(casfs, "--drain-timeout", "1s") as server, remote_of(server) as remote:
        states = remote.begin(sleeping(remote, word))
        next(states)
        wait_for(lambda: live_processes(word))
        assert server.stop() == 0
    assert not live_processes(word)


def test_a_killed_server_leaves_nothing(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    word = unique()
    with executing(casfs) as server, remote_of(server) as remote:
        states = remote.begin(remote.put(["sh", "-c", f"echo > $0; sleep 60; : {word}", "begun"], output_paths=["a/b"]))
        next(states)
        scratch = casfs.store / "scratch"
        wait_for(lambda: list(scratch.glob("*/*/upper/begun")))
        server.stop(signal.SIGKILL)
        wait_for(lambda: not live_processes(word))
    assert str(casfs.store) not in Path("/proc/self/mountinfo").read_text()
    check_next_start(casfs, server.process.pid)


@pytest.mark.parametrize("seconds", [0.0, 0.003, 0.01])
def test_a_server_killed_before_its_command_has_begun_leaves_nothing(
    casfs: Casfs, requires: Requirements, seconds: float
) -> None:
    requires.programs("bwrap")
    word = unique()
    with executing(casfs) as server, remote_of(server) as remote:
        action = sleeping(remote, word)
        states = remote.begin(action)
        wait_for(lambda: live_processes(word))
        time.sleep(seconds)
        server.stop(signal.SIGKILL)
        del states
        wait_for(lambda: not live_processes(word))
    check_next_start(casfs, server.process.pid)


def test_an_ordinary_users_killed_server_leaves_nothing(nobody: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    word = unique()
    for _ in range(3):
        with executing(nobody) as server, remote_of(server) as remote:
            states = remote.begin(sleeping(remote, word))
            wait_for(lambda: live_processes(word))
            server.stop(signal.SIGKILL)
            del states
            wait_for(lambda: not live_processes(word))


def check_next_start(casfs: Casfs, killed: int) -> None:
    """A server that is started where one was killed clears what that has left, and works."""
    with executing(casfs) as server, remote_of(server) as remote:
        [directory] = (casfs.store / "scratch").iterdir()
        assert not list(directory.iterdir()), "what was left is cleared"
        assert not list(Path("/sys/fs/cgroup").rglob(f"casfs-action-{killed}-*"))
        assert remote.sh("echo 1 > o", output_paths=["o"]).result.exit_code == 0
    assert casfs.ok("verify").code == 0


def test_a_full_scratch_disk_is_no_result(casfs: Casfs, requires: Requirements, tmp_path: Path) -> None:
    requires.programs("bwrap")
    requires.admin()
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", small], check=True)
    try:
        with executing(casfs, "--scratch", small) as server, remote_of(server) as remote:
            fill = remote.put(["sh", "-c", "head -c 20000000 /dev/zero > o; true"], output_paths=["o"])
            response = remote.execute(fill)
            assert response.status.code == codes.RESOURCE_EXHAUSTED and "is full" in response.status.message
            assert not response.HasField("result")
            assert not remote.execute(fill).cached_result
            wait_for(lambda: remote.sh("echo 1 > o", output_paths=["o"]).status.code == 0)
    finally:
        subprocess.run(["umount", small], check=True)


def test_an_ordinary_user_runs_actions_too(nobody: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    log = nobody.directory / "log"
    with executing(nobody, "--action-log", log, "--action-processes", "60", "--jobs", "1") as server:
        with remote_of(server) as remote:
            files = {"d/a.txt": b"a\n", "d/b": b""}
            response = remote.sh("cat d/a.txt; id -u; echo x > d/a.txt; echo 1 > d/o", files, output_paths=["d/o"])
            assert response.result.exit_code == 0, response
            assert remote.blob(response.result.stdout_digest).splitlines()[0] == b"a"
            assert remote.outputs(response) == {"d/o": b"1\n"}
            assert "changed 1 of its inputs: 'd/a.txt'" in response.message
            word = unique("bomb")
            assert remote.sh(f": {word}; f() {{ f | f & }}; f; sleep 1; true").status.code == 0
            assert not live_processes(word)
            states = remote.begin(sleeping(remote, word))
            name = next(states).name
            wait_for(lambda: live_processes(word))
            remote.call(methods.CANCEL_OPERATION, operations.CancelOperationRequest(name=name))
            assert response_of(list(states)[-1]).status.code == codes.CANCELLED
            assert not live_processes(word)
        assert server.stop() == 0
