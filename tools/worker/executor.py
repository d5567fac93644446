"""The executor, put together: the one place that knows the order of its decorators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from casfs.sandbox import Sandboxes
from store.digest import Digest
from store.ingest import Ingest
from store.presence import Finder
from store.quota import Space
from store.repository import Store
from tools.server.downloads import Downloads
from tools.worker.answering import Answered
from tools.worker.fetching import Fetched
from tools.worker.inputs import Inputs
from tools.worker.limits import Limits
from tools.worker.prefetching import Prefetched
from tools.worker.profiles import Profiles
from tools.worker.profiling import Profiled
from tools.worker.report import Reported, ReportTaker
from tools.worker.run import Executor
from tools.worker.sandboxed import Sandboxed
from tools.worker.storing import ResultTaker, Stored
from tools.worker.task import Offer
from tools.worker.traces import Traces


@dataclass(frozen=True, slots=True)
class Parts:
    """What executors share. `finder` knows which blobs can be had, `added` is told which became durable."""

    store: Store
    sandboxes: Sandboxes
    downloads: Downloads
    finder: Finder
    space: Space
    limits: Limits
    offer: Offer
    results: ResultTaker | None = None
    """Who stores results; nobody where the scheduler does."""
    prefetch: str = "none"
    """Which inputs are brought in before a command starts: "all", those of its "profile", or none."""
    traces: Traces | None = None
    added: Callable[[Sequence[Digest]], object] = lambda digests: None
    reports: Sequence[ReportTaker] = ()


def make_executor(parts: Parts) -> tuple[Executor, Callable[[], None]]:
    """An executor for one thread, and how to close it."""
    store = parts.store
    # It names nothing but what it brings, so that collections needn't mind how long it lives.
    ingest = Ingest(store.layout, store.index, store.blobs, spares=False)
    executor: Executor = Sandboxed(parts.sandboxes, parts.limits, parts.space, ingest, parts.added, parts.traces)
    if parts.prefetch == "all":
        executor = Prefetched(executor, store, Inputs(store, store.presence))
    elif parts.prefetch == "profile":
        executor = Profiled(executor, store, Profiles(store.layout.profiles))
    executor = Fetched(executor, store, parts.downloads, parts.finder, parts.offer)
    if parts.results is not None:
        executor = Stored(executor, parts.results)
    executor = Answered(executor)
    return Reported(executor, parts.reports), ingest.close
