"""What is counted, in the form Prometheus reads; the only module that knows its client library.

With several processes each request for the metrics reaches one of them, which
has to answer for all: the library keeps each process's numbers in files of a
directory that they share (`share_among_processes`, before anything else here
is used), and sums them up when asked.

What comes thousands of times a second is counted in plain numbers, by one
thread, and brought to the library when somebody asks (`refresh`), and now and
then for those who ask another process: the library takes a lock for each count,
and a call has six. All else of a `Metrics` threads may share.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from store.blobs import total_bytes
from store.gc import unindexed_bytes
from tools.server.overload import Pressure

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram
    from prometheus_client.metrics_core import Metric

    from store.gc import Collected
    from store.repository import Store
    from tools.server.address import Address
    from tools.server.overload import Overload
    from tools.worker.report import Report

_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_WAITING = {
    "calls": ("casfs_waiting_calls", "Calls, and blobs of calls, that wait for their turn."),
    "bytes": ("casfs_waiting_bytes", "Their bytes."),
    "uploads": ("casfs_waiting_uploads", "Uploads that wait for a turn."),
    "storing": ("casfs_storing_blobs", "Small blobs that the store's threads have."),
    "unread": ("casfs_unread_connections", "Connections that are not read, as too much waits."),
}
"""Gauges for the fields of a `Pressure`."""
_PEAKS = ("memory_bytes",)
"""Numbers of an action whose sum means nothing."""


def share_among_processes(directory: Path) -> None:
    """Have this process's children count together, in files in that directory."""
    # The library asks for this when it is imported, which the children do.
    os.environ[_DIRECTORY] = str(directory)


class Half(StrEnum):
    """What is looked for in a cache."""

    BLOB = "blob"
    RESULT = "result"

    # That of Enum is a call into Python, for each lookup.
    __hash__ = str.__hash__


class Lookups(NamedTuple):
    """How often something was found, and how often not."""

    hits: float
    misses: float


class Sizes(NamedTuple):
    """How large the store is, in bytes, and may get: 0 for no limit."""

    used: int
    limit: int

    @classmethod
    def of(cls, store: Store, limit: int) -> Sizes:
        """Those of a store now."""
        return cls(total_bytes(store.index) + unindexed_bytes(store.index), limit)


class _Tally:
    """A counter of the library, and by labels what one thread has counted of it."""

    def __init__(self, counter: Counter) -> None:
        self.counts: dict[tuple[str, ...], int] = defaultdict(int)
        self._brought: dict[tuple[str, ...], int] = defaultdict(int)
        self._counter = counter

    def bring(self) -> None:
        """Have the counter show it; by one at a time."""
        for labels, count in list(self.counts.items()):
            self._counter.labels(*labels).inc(count - self._brought[labels])
            self._brought[labels] = count


class _Times:
    """How often something took so long, by buckets, and all of it together; what of that was brought."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_BUCKETS) + 1)
        self.total = 0.0
        self._brought = [0] * (len(_BUCKETS) + 1)
        self._brought_total = 0.0

    def bring(self, histogram: Histogram) -> None:
        """Have it shown; by one at a time."""
        # Its `observe` takes one at a time, and there is no other way in.
        total, counts = self.total, list(self.counts)
        histogram._sum.inc(total - self._brought_total)
        for bucket, count, brought in zip(histogram._buckets, counts, self._brought, strict=True):
            bucket.inc(count - brought)
        self._brought_total, self._brought = total, counts


class Metrics:
    """The numbers of one server; made once in a process."""

    def __init__(self, sizes: Callable[[], Sizes]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
        from prometheus_client.multiprocess import MultiProcessCollector

        # When each began to count is a second line for each number, and useless in several processes.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        shared = _DIRECTORY in os.environ
        if shared:
            MultiProcessCollector(self._registry)  # type: ignore[no-untyped-call]
        own = None if shared else self._registry
        requests = Counter(
            "casfs_requests", "Requests, by what they ended with.", ("transport", "method", "status"), registry=own
        )
        seconds = Histogram(
            "casfs_request_seconds", "How long they took.", ("transport", "method"), buckets=_BUCKETS, registry=own
        )
        transferred = Counter(
            "casfs_transferred_bytes", "Bytes of bodies and messages.", ("transport", "direction"), registry=own
        )
        lookups = Counter(
            "casfs_lookups", "Blobs and action results that were asked for.", ("half", "outcome"), registry=own
        )
        self._requests = _Tally(requests)
        self._seconds: dict[tuple[str, str], _Times] = defaultdict(_Times)
        self._histogram = seconds
        self._bytes = _Tally(transferred)
        self._lookups = _Tally(lookups)
        self._refreshing = threading.Lock()
        self._evictions = Counter("casfs_evicted_files", "Files that collections removed.", registry=own)
        self._evicted = Counter("casfs_evicted_bytes", "Their bytes.", registry=own)
        self._uploads = Gauge(
            "casfs_open_uploads", "Uploads that are going on.", registry=own, multiprocess_mode="livesum"
        )
        self._open_uploads = 0
        self._actions = Counter(
            "casfs_actions", "Actions that were run, by what they ended with.", ("status", "exit"), registry=own
        )
        self._stages = Histogram(
            "casfs_action_seconds", "How long each stage of them took.", ("stage",), buckets=_BUCKETS, registry=own
        )
        self._numbers = Counter(
            "casfs_action_numbers",
            "Sums over them: bytes and blobs fetched, upcalls and others.",
            ("what",),
            registry=own,
        )
        self._waiting = {
            name: Gauge(*about, registry=own, multiprocess_mode="livesum") for name, about in _WAITING.items()
        }
        self._overloaded = Gauge(
            "casfs_overloaded", "1 while the server is overloaded.", registry=own, multiprocess_mode="livemax"
        )
        self._overloads = Counter("casfs_overloads", "How often that began.", registry=own)
        self._overload: Overload | None = None
        self._registry.register(_Sizes(sizes))

    # By one thread.

    def note_request(self, transport: str, method: str, status: str, seconds: float) -> None:
        """A request ended."""
        self._requests.counts[transport, method, status] += 1
        times = self._seconds[transport, method]
        times.total += seconds
        times.counts[bisect_left(_BUCKETS, seconds)] += 1

    def note_bytes(self, transport: str, received: int, sent: int) -> None:
        """So many bytes came and went."""
        if received:
            self._bytes.counts[transport, "in"] += received
        if sent:
            self._bytes.counts[transport, "out"] += sent

    def note_lookup(self, half: Half, *, hit: bool, number: int = 1) -> None:
        """Something was found, or not."""
        self._lookups.counts[half, "hit" if hit else "miss"] += number

    def note_upload(self, change: int) -> None:
        """One more is open (1), or one less (-1)."""
        self._open_uploads += change

    # By any.

    def note_collection(self, done: Collected) -> None:
        """A collection ended."""
        self._evictions.inc(done.removed_blobs)
        self._evicted.inc(done.removed_bytes)

    def note_action(self, report: Report) -> None:
        """An action was run, or couldn't be."""
        ended = "none" if report.code is None else "zero" if report.code == 0 else "other"
        self._actions.labels(report.status, ended).inc()
        self._stages.labels("queue").observe(report.queued)
        for stage, seconds in report.stages.items():
            self._stages.labels(stage.value).observe(seconds)
        for name, number in report.numbers.items():
            if name not in _PEAKS and number > 0:
                self._numbers.labels(name).inc(number)

    def note_overload(self) -> None:
        """An overload began."""
        self._overloads.inc()

    def watch_overload(self, overload: Overload) -> None:
        """Show what waits, too."""
        self._overload = overload

    def refresh(self) -> None:
        """Show this process's plain numbers: when somebody asks, and now and then for those who ask another one."""
        self._bring()
        self._uploads.set(self._open_uploads)
        if self._overload is not None:
            for name, number in self._overload.pressure()._asdict().items():
                self._waiting[name].set(number)
            self._overloaded.set(self._overload.is_on)

    def _bring(self) -> None:
        """Bring to the library what was counted."""
        with self._refreshing:
            for tally in (self._requests, self._bytes, self._lookups):
                tally.bring()
            for labels, times in list(self._seconds.items()):
                times.bring(self._histogram.labels(*labels))

    def waiting(self) -> tuple[Pressure, bool]:
        """What waits, in all processes, and whether one of them is overloaded."""
        self.refresh()
        found = {
            sample.name: sample.value
            for metric in self._registry.collect()
            for sample in metric.samples
            if not sample.labels
        }
        numbers = {name: int(found.get(_WAITING[name][0], 0)) for name in Pressure._fields}
        return Pressure(**numbers), bool(found.get("casfs_overloaded", 0))

    def watch_queue(self, statistics: Callable[[], Mapping[str, int]]) -> None:
        """Show how many executions there are, too."""
        self._registry.register(_Executions(statistics))

    def watch_source(self, statistics: Callable[[], Mapping[str, int]]) -> None:
        """Show what became of the actions that a scheduler gave out, too."""
        self._registry.register(_Given(statistics))

    def lookups(self) -> Lookups:
        """All so far, of all processes."""
        self._bring()
        found = {"hit": 0.0, "miss": 0.0}
        for metric in self._registry.collect():
            if metric.name == "casfs_lookups":
                for sample in metric.samples:
                    if sample.name == "casfs_lookups_total":
                        found[sample.labels["outcome"]] += sample.value
        return Lookups(found["hit"], found["miss"])

    def render(self) -> tuple[bytes, str]:
        """The text that Prometheus reads, and its content type."""
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

        self.refresh()
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def serve(self, address: Address) -> tuple[int, Callable[[], None]]:
        """Answer over HTTP with that text, whatever the path, in threads; the port, and how to end it. Raises OSError.

        For a process that has no HTTP server of its own: there is nothing else to be had there.
        """
        from prometheus_client import start_http_server

        server, thread = start_http_server(address.port, address.host, self._registry)

        def close() -> None:
            server.shutdown()
            thread.join()
            server.server_close()

        return server.server_port, close


class _Executions:
    """Asks the scheduler when it is asked."""

    def __init__(self, statistics: Callable[[], Mapping[str, int]]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        numbers = self._statistics()
        yield GaugeMetricFamily("casfs_executions_queued", "Executions that wait.", value=numbers["queued"])
        yield GaugeMetricFamily("casfs_executions_running", "Executions that run.", value=numbers["running"])
        yield CounterMetricFamily("casfs_executions_merged", "Requests that joined another.", value=numbers["merged"])
        yield CounterMetricFamily(
            "casfs_executions_abandoned", "Ended since nobody waited for them.", value=numbers["abandoned"]
        )


class _Given:
    """Asks a scheduler's client when it is asked."""

    def __init__(self, statistics: Callable[[], Mapping[str, int]]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(
            "casfs_worker_actions", "Actions that the scheduler gave, by what became of them.", labels=["what"]
        )
        for what, number in self._statistics().items():
            # Those that it has now: no counter.
            if what != "leases":
                family.add_metric([what], number)
        yield family


class _Sizes:
    """Asks the store when it is asked: what all processes share has no need to be summed up."""

    def __init__(self, sizes: Callable[[], Sizes]) -> None:
        self._sizes = sizes

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        sizes = self._sizes()
        yield GaugeMetricFamily("casfs_store_bytes", "Bytes in the store.", value=sizes.used)
        yield GaugeMetricFamily("casfs_store_limit_bytes", "What it may get; 0: no limit.", value=sizes.limit)
