"""A decorator that brings in all inputs before the command starts, rather than each when it is first opened."""

from __future__ import annotations

from store.digest import Digest
from store.prefetch import Prefetched as Brought
from store.prefetch import prefetch
from store.repository import Store
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.worker.errors import InputFailed
from tools.worker.inputs import Inputs
from tools.worker.run import Executor, Run
from tools.worker.work import Stage


def bring_in(store: Store, digests: list[Digest], run: Run) -> Brought:
    """Fetch blobs for a run, whose report has how many. Raises NoSpace."""
    done = prefetch(store, digests)
    run.numbers["prefetched_blobs"] = done.fetched_blobs
    run.numbers["prefetched_bytes"] = done.fetched_bytes
    return done


class Prefetched:
    """Pays where most inputs are read and a source is far away: many come in few calls."""

    def __init__(self, inner: Executor, store: Store, here: Inputs) -> None:
        """`here` knows which inputs are in the store."""
        self._inner = inner
        self._store = store
        self._here = here

    def execute(self, run: Run) -> reapi.ExecuteResponse:
        """Raises InputFailed, NoSpace."""
        task, metadata = run.task, run.metadata
        assert task is not None  # noqa: S101 - it was fetched
        with run.stage(Stage.FETCHING, metadata.input_fetch_start_timestamp, metadata.input_fetch_completed_timestamp):
            missing = self._here.find_missing(task.root)
            if missing:
                done = bring_in(self._store, missing, run)
                if done.failed:
                    first = next(iter(done.failed.values()))
                    raise InputFailed(f"{len(done.failed)} of the action's inputs can't be fetched: {first}")
        return self._inner.execute(run)
