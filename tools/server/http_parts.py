"""What `casfs serve` has where it listens for HTTP, too: cache, pages, numbers, put together in one place."""

from __future__ import annotations

from collections.abc import Collection

from store.repository import Store
from tools.server.access import Access
from tools.server.calls_under_way import CallsUnderWay
from tools.server.gate import Gate
from tools.server.grpc_counting import GrpcCounting, read_named
from tools.server.http_adapter import HttpAdapter
from tools.server.http_cache import HttpCache
from tools.server.http_server import HttpLimits, HttpServer
from tools.server.metrics import Metrics, Sizes
from tools.server.pages import Pages
from tools.server.recent import Recent
from tools.server.services import Services
from tools.server.waiting import Waiting
from tools.worker.report import ReportTaker


def make_cache(store: Store, services: Services, *, validate: bool, most: int) -> HttpCache:
    """The cache over HTTP that these services have; `validate` and `most` as there."""
    return HttpCache(
        services.instances,
        store.presence,
        services.downloads,
        services.uploads,
        services.desk,
        services.actions,
        services.results,
        store.actions,
        services.space,
        validate=validate,
        most=most,
        reads_through=services.reads_through,
        find_seen=services.find_seen,
    )


class HttpParts:
    """Numbers that begin before the services do, and a server around them."""

    def __init__(self, store: Store, limit: int) -> None:
        """`limit`: how large the store may get, 0 for no limit."""
        self._store = store
        self._limit = limit
        self.metrics = Metrics(self._sizes)
        self._recent = Recent(self.metrics.lookups, read=read_named)
        self.reports: tuple[ReportTaker, ...] = (self.metrics, self._recent)
        """Who wants to know of actions that are run."""
        self.counting = GrpcCounting(self.metrics, self._recent)

    def _sizes(self) -> Sizes:
        return Sizes.of(self._store, self._limit)

    def make_server(
        self,
        services: Services,
        access: Access,
        limits: HttpLimits,
        gate: Gate,
        *,
        validate: bool,
        most: int,
        names: Collection[str] | None,
        calls: CallsUnderWay,
    ) -> HttpServer:
        """The server, which doesn't listen yet; `validate` and `most` as in `HttpCache`, `names` in `HttpAdapter`.

        `calls`: it shows these, and its own requests are added to them.
        """
        store = self._store
        cache = make_cache(store, services, validate=validate, most=most)
        if services.scheduler is not None:
            self.metrics.watch_queue(services.scheduler.statistics)
        pages = Pages(store, services.downloads, self._sizes, self.metrics, self._recent, services.scheduler, calls.ask)
        waiting = Waiting(limits.idle_seconds)
        adapter = HttpAdapter(cache, pages, access, waiting, gate, self.metrics, self._recent, names)
        server = HttpServer(adapter, limits, self._recent)
        calls.add(server.under_way)
        return server
