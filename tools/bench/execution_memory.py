"""Whether memory of `casfs serve --execute` grows with the number of actions: thousands, four in flight.

Each action reads a file that no other has, and all others of its input root, which have been in every root before; its
output is new, too. So each leaves what an action can leave: blobs, directories, a result, an execution to come back to.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from store.digest import Digest, DigestFunction
from tools.bench.measuring import Outcome, Settings
from tools.bench.server import CASFS, casfs_command, serving
from tools.reapi import methods
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.requests import write_digest
from tools.upstream.channel import open_channel, start

_GROWN_MIB_MOST = 16.0
_SHARED = 100
_IN_FLIGHT = 4
_SECONDS = 120.0
_SCRIPT = "cat shared/* new > out"
_SHA256 = DigestFunction.SHA256


class Actions:
    """Makes actions, each of which is new, and has a server run them. Threads may share it."""

    def __init__(self, address: str, inputs: Sequence[bytes], script: str = _SCRIPT) -> None:
        """`inputs`: the files in the directory `shared` of each action's input root."""
        self._channel = open_channel(address)
        self._numbers = count()
        shared = reapi.Directory(
            files=[
                reapi.FileNode(name=f"{number:05}", digest=write_digest(_SHA256.of(data)))
                for number, data in enumerate(inputs)
            ]
        ).SerializeToString()
        command = reapi.Command(
            arguments=["sh", "-euc", script],
            environment_variables=[reapi.Command.EnvironmentVariable(name="PATH", value="/usr/bin:/bin")],
            output_paths=["out"],
        ).SerializeToString()
        self._command, self._shared = _SHA256.of(command), _SHA256.of(shared)
        self._put([command, shared, *inputs])

    def run(self) -> reapi.ExecuteResponse:
        """One more. Raises RuntimeError where it fails."""
        new = b"number %d\n" % next(self._numbers)
        root = reapi.Directory(
            files=[reapi.FileNode(name="new", digest=write_digest(_SHA256.of(new)))],
            directories=[reapi.DirectoryNode(name="shared", digest=write_digest(self._shared))],
        ).SerializeToString()
        action = reapi.Action(
            command_digest=write_digest(self._command), input_root_digest=write_digest(_SHA256.of(root))
        ).SerializeToString()
        self._put([new, root, action])
        return self._execute(_SHA256.of(action))

    def _put(self, blobs: Sequence[bytes]) -> None:
        request = reapi.BatchUpdateBlobsRequest(
            requests=[
                reapi.BatchUpdateBlobsRequest.Request(digest=write_digest(_SHA256.of(blob)), data=blob)
                for blob in dict.fromkeys(blobs)
            ]
        )
        answer = start(self._channel, methods.BATCH_UPDATE_BLOBS, request, _SECONDS)
        if failed := [item for item in answer.responses if item.status.code]:
            raise RuntimeError(f"uploading: {failed[0].status.message}")

    def _execute(self, action: Digest) -> reapi.ExecuteResponse:
        request = reapi.ExecuteRequest(action_digest=write_digest(action), skip_cache_lookup=True)
        *_, last = start(self._channel, methods.EXECUTE, request, _SECONDS)
        response = reapi.ExecuteResponse()
        last.response.Unpack(response)
        if response.status.code or response.result.exit_code:
            raise RuntimeError(f"an action failed: {response}")
        return response

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


def run(settings: Settings) -> Outcome:
    """Without bubblewrap there is nothing to measure."""
    outcome = Outcome()
    if shutil.which("bwrap") is None:
        outcome.notes.append("bwrap is not installed")
        return outcome
    # As many as are remembered for who comes back, and a few more: then it may grow no longer.
    warm, step, steps = settings.size(2_000, 20), settings.size(3_000, 20), 3
    with serving([*casfs_command(settings.scratch / "store"), "--execute", "--host-root"]) as server:
        actions = Actions(server.address, [b"shared %d\n" % number for number in range(_SHARED)])
        try:
            _run_many(actions, warm)
            memory = [server.memory()]
            for _ in range(steps):
                _run_many(actions, step)
                memory.append(server.memory())
        finally:
            actions.close()
    for number, mebibytes in enumerate(memory):
        outcome.add(f"memory after {warm + number * step:,} actions", CASFS, "MiB", mebibytes)
    outcome.aim("memory that many actions add", memory[-1] - memory[0], _GROWN_MIB_MOST, "MiB", at_most=True)
    return outcome


def _run_many(actions: Actions, number: int) -> None:
    left = threading.Semaphore(number)

    def work(_: int) -> None:
        while left.acquire(blocking=False):
            actions.run()

    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        list(pool.map(work, range(_IN_FLIGHT)))
