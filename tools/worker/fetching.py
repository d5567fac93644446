"""The first decorators: what the action is, and whether all that it needs can be had."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from store.digest import Digest
from store.errors import MissingBlob
from store.presence import Finder
from store.repository import Store
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.downloads import Downloads
from tools.server.errors import FailedPrecondition, InvalidArgument
from tools.server.requests import read_digest
from tools.worker.inputs import Inputs, find_missing_messages
from tools.worker.run import Executor, Run
from tools.worker.task import Offer, read_task
from tools.worker.work import Stage

_MESSAGE_MOST = 64 << 20
"""Bytes of an Action or Command: it is read into memory."""
_MISSING_MOST = 10_000
"""Blobs that are named as missing; with those brought, the client is told the rest."""

T = TypeVar("T", bound=Message)


def read_message(downloads: Downloads, digest: Digest, kind: type[T]) -> T:
    """A message that is a blob. Raises FailedPrecondition naming it where it is missing, InvalidArgument."""
    if digest.size > _MESSAGE_MOST:
        raise InvalidArgument(f"{digest} is too large for {kind.DESCRIPTOR.name}")
    try:
        return kind.FromString(downloads.read(digest))
    except MissingBlob as error:
        raise FailedPrecondition(f"the {kind.DESCRIPTOR.name} is missing: {error}", [digest]) from error
    except DecodeError as error:
        raise InvalidArgument(f"{digest} is no {kind.DESCRIPTOR.name}") from error


class Fetched:
    """Reads the action and its command, sees that its inputs can be had, and has another run it."""

    def __init__(self, inner: Executor, store: Store, downloads: Downloads, finder: Finder, offer: Offer) -> None:
        self._inner = inner
        self._store = store
        self._downloads = downloads
        self._finder = finder
        self._inputs = Inputs(store, finder)
        self._offer = offer

    def execute(self, run: Run) -> reapi.ExecuteResponse:
        """Raises FailedPrecondition with what is missing, InvalidArgument, StoreError."""
        metadata = run.metadata
        with run.stage(Stage.FETCHING, metadata.input_fetch_start_timestamp, metadata.input_fetch_completed_timestamp):
            digest = run.assignment.action
            action = run.assignment.message
            if action is None:
                action = read_message(self._downloads, digest, reapi.Action)
            command = read_message(self._downloads, read_digest(action.command_digest, digest.function), reapi.Command)
            task = read_task(action, command, digest.function, self._offer)
            run.task = task
            self._see_to_inputs(run, task.root)
        return self._inner.execute(run)

    def _see_to_inputs(self, run: Run, root: Digest) -> None:
        try:
            directory = self._inputs.open(root)
        except MissingBlob as error:
            missing = find_missing_messages(self._store, root, self._finder)
            raise FailedPrecondition(f"the input root is not whole: {error}", missing or [root]) from error
        missing = self._inputs.find_missing(root)
        if missing:
            raise FailedPrecondition(
                f"{len(missing)} of the action's inputs are missing, among them {missing[0]}", missing[:_MISSING_MOST]
            )
        run.numbers["input_files"] = directory.files
        run.numbers["input_bytes"] = directory.bytes
