"""The innermost executor: one command in one sandbox, and what it made into the store.

One of these a thread.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from casfs.capture import Taken, find_symlink_above
from casfs.errors import SandboxError
from casfs.sandbox import Finished, Sandbox, Sandboxes
from store.digest import Digest
from store.entries import printable
from store.ingest import Ingest, Transfer
from store.quota import Space
from store.trees import find_path, get_directory
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.errors import InvalidArgument
from tools.server.requests import write_digest
from tools.worker.errors import Cancelled, InputFailed, ScratchFull
from tools.worker.limits import Limits
from tools.worker.results import add_outputs
from tools.worker.run import Run
from tools.worker.task import Task
from tools.worker.traces import Traces
from tools.worker.watching import Watching
from tools.worker.work import Stage

NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""Exit codes for a command that can't be begun: the shell's."""
_NAMED_MOST = 20
_LOOKED_AT_MOST = 1000


class Sandboxed:
    """Runs commands on the trees of one store."""

    def __init__(
        self,
        sandboxes: Sandboxes,
        limits: Limits,
        space: Space,
        ingest: Ingest,
        added: Callable[[Sequence[Digest]], object] = lambda digests: None,
        traces: Traces | None = None,
    ) -> None:
        """`space` is asked before outputs are kept, in the session `ingest`, which is this thread's.

        `added` is told which blobs a result names, when they are durable. `traces`: who keeps a trace of each.
        """
        self._sandboxes = sandboxes
        self._store = sandboxes.store
        self._limits = limits
        self._space = space
        self._added = added
        self._ingest = ingest
        self._traces = traces

    def execute(self, run: Run) -> reapi.ExecuteResponse:
        """Raises WorkerError, SandboxError, StoreError, OSError; InvalidArgument where outputs can't be in the tree."""
        task = run.task
        assert task is not None  # noqa: S101 - it was fetched
        metadata = run.metadata
        with run.stage(Stage.FETCHING, metadata.input_fetch_start_timestamp, metadata.input_fetch_completed_timestamp):
            trace = None if self._traces is None else self._traces.begin(run.assignment.action)
            sandbox = self._sandboxes.open(task.root, outputs=task.places, trace=trace)
        with sandbox:
            run.numbers["laid_out"] = sandbox.projection.laid_out
            printed = _Printed(sandbox.scratch.directory)
            finished = self._run(run, task, sandbox, printed)
            with run.stage(
                Stage.UPLOADING, metadata.output_upload_start_timestamp, metadata.output_upload_completed_timestamp
            ):
                return self._keep(run, task, sandbox, printed, finished)

    def _run(self, run: Run, task: Task, sandbox: Sandbox, printed: _Printed) -> Finished:
        _check_directory(sandbox, task.directory)
        metadata, assignment = run.metadata, run.assignment
        hydrator = self._store.hydrator
        before = hydrator.statistics()
        with (
            run.stage(Stage.RUNNING, metadata.execution_start_timestamp, metadata.execution_completed_timestamp),
            Watching(assignment.stop, self._limits, hydrator, task.timeout) as watching,
            printed as (stdout, stderr),
        ):
            try:
                finished = sandbox.run(
                    task.arguments,
                    environment=task.environment,
                    exactly=True,
                    directory=task.directory,
                    timeout=task.timeout,
                    network=task.network,
                    host_root=task.host_root,
                    stdout=stdout,
                    stderr=stderr,
                    watcher=watching,
                )
            except OSError as error:
                if error.errno != errno.E2BIG:
                    raise
                raise InvalidArgument("the command's arguments and environment are longer than Linux takes") from error
        after = hydrator.statistics()
        run.numbers["upcalls"] = sandbox.projection.upcalls()
        if (opened := sandbox.projection.opened()) is not None:
            run.numbers["input_files_opened"] = opened
        run.numbers["fetched_blobs"] = after["fetched_blobs"] - before["fetched_blobs"]
        run.numbers["fetched_bytes"] = after["fetched_bytes"] - before["fetched_bytes"]
        run.numbers["held_up_seconds"] = round(watching.held_up(), 6)
        run.numbers["cpu_seconds"] = round(finished.cpu, 6)
        run.numbers["memory_bytes"] = watching.peak or finished.memory
        run.notes += watching.notes
        ran = max(finished.seconds - watching.held_up(), 0.0)
        metadata.virtual_execution_duration.FromNanoseconds(int(ran * 1e9))
        if finished.stopped:
            raise Cancelled("nobody waits for this action any more")
        if after["failed_fetches"] > before["failed_fetches"]:
            raise InputFailed("an input couldn't be fetched while the command ran; the worker's log says why")
        if finished.disk_full:
            raise ScratchFull(f"the scratch disk of {sandbox.scratch.base} is full")
        return finished

    def _keep(
        self, run: Run, task: Task, sandbox: Sandbox, printed: _Printed, finished: Finished
    ) -> reapi.ExecuteResponse:
        code = finished.code if finished.begun else printed.explain(task.arguments[0])
        result = reapi.ActionResult(exit_code=code)
        taken = sandbox.take(self._ingest)
        notes, named = add_outputs(result, task, taken, self._ingest)
        run.notes += notes
        run.notes += self._describe_changes(task, taken)
        run.numbers["outputs"] = len(taken.outputs)
        with self._space.reserve(printed.size + sum(digest.size for digest in named)):
            named += printed.add_to(result, self._ingest, task.root, self._store.layout.tmp)
            self._ingest.flush()
        self._added(named)
        run.numbers["output_bytes"] = sum(digest.size for digest in named)
        response = reapi.ExecuteResponse(result=result)
        if finished.timed_out:
            response.status.code = codes.DEADLINE_EXCEEDED
            response.status.message = f"the command took longer than {task.timeout:g} s and was ended"
        return response

    def _describe_changes(self, task: Task, taken: Taken) -> list[str]:
        """What the command did to its inputs, of which nobody else will see anything."""
        changed = []
        with self._store.index.view() as view:
            root = get_directory(view, task.root).id
            for path in taken.unexpected[:_LOOKED_AT_MOST]:
                if find_path(view, root, path) is not None:
                    changed.append(path)
        return [
            f"the command {what} {len(paths)} of its inputs: {', '.join(map(printable, paths[:_NAMED_MOST]))}"
            for what, paths in (("changed", changed), ("removed", taken.deleted))
            if paths
        ]


def _check_directory(sandbox: Sandbox, directory: str) -> None:
    """Raise InvalidArgument where a command couldn't begin: bubblewrap's failure would look like the command's own."""
    if not directory:
        return
    place = os.path.join(sandbox.scratch.merged, directory)
    link = find_symlink_above(sandbox.scratch.merged, os.fsencode(directory) + b"/.")
    if link is not None:
        raise InvalidArgument(f"working directory {directory!r} is behind the symbolic link {printable(link)}")
    if not os.path.isdir(place):
        raise InvalidArgument(f"working directory {directory!r} is not a directory of the input root")


class _Printed(AbstractContextManager[tuple[int, int]]):
    """What a command prints: files beside its scratch, so that any amount of it takes no memory."""

    def __init__(self, directory: Path) -> None:
        self._paths = (directory / "stdout", directory / "stderr")
        self._open: list[int] = []

    def __enter__(self) -> tuple[int, int]:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        for path in self._paths:
            self._open.append(os.open(path, flags, 0o644))
        return self._open[0], self._open[1]

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.pop())

    @property
    def size(self) -> int:
        """Bytes of both."""
        return sum(path.stat().st_size for path in self._paths)

    def explain(self, program: str) -> int:
        """The exit code for a command that wasn't begun, and a sentence in its standard error.

        Raises SandboxError where that was bubblewrap's failure.
        """
        said = self._paths[1].read_bytes()[-4096:].decode("utf-8", "replace").strip()
        if not said.startswith("bwrap: execvp "):
            raise SandboxError(f"the sandbox can't be set up: {said or 'bubblewrap was killed'}")
        why = said.rpartition(": ")[2]
        self._paths[1].write_text(f"casfs: can't run {program!r}: {why}\n")
        return NOT_FOUND if why == os.strerror(errno.ENOENT) else NOT_EXECUTABLE

    def add_to(self, result: reapi.ActionResult, ingest: Ingest, root: Digest, beside: Path) -> list[Digest]:
        """Have the result name what was printed; on the file system of `beside` the files themselves become blobs."""
        named = []
        for path, digest in zip(self._paths, (result.stdout_digest, result.stderr_digest), strict=True):
            if path.stat().st_size:
                same = path.stat().st_dev == beside.stat().st_dev
                found = ingest.add_file(path, root.function, transfer=Transfer.HARDLINK if same else Transfer.AUTO)
                digest.CopyFrom(write_digest(found))
                named.append(found)
        return named
