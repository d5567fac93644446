"""`casfs worker`: a store, an upstream and a scheduler's client put together, and the process's life."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from casfs.daemon import logging_to
from casfs.signals import acting_on_signals
from store.errors import BadInput
from store.repository import SourceOptions, Store
from tools.cluster.buildbarn import Buildbarn
from tools.cluster.buildgrid import BuildGrid
from tools.cluster.joining import Member
from tools.cluster.storage import make_storage
from tools.server.address import Address
from tools.server.metrics import Metrics, Sizes
from tools.server.services import ServiceOptions, Services
from tools.upstream.channel import Channel
from tools.upstream.options import UpstreamOptions
from tools.upstream.sources import Upstream, parts
from tools.worker.local import LocalWorker, WorkerOptions, prepare_process


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Everything `casfs worker` was told. `scheduler` is a BuildGrid, or, if `buildbarn` says so, a Buildbarn."""

    store: Path
    scheduler: UpstreamOptions
    upstream: UpstreamOptions
    member: Member
    buildbarn: bool = False
    worker: WorkerOptions = field(default_factory=WorkerOptions)
    services: ServiceOptions = field(default_factory=ServiceOptions)
    sources: SourceOptions = field(default_factory=SourceOptions)
    http_address: Address | None = None
    """Where to show numbers over HTTP."""
    announce: Callable[[str], None] = field(default=print, compare=False)


def work(options: ClusterOptions) -> int:
    """Work until SIGTERM or SIGINT; what runs then is finished, or ended by a second signal. Returns an exit code."""
    stop = threading.Event()
    upstream = Upstream(options.upstream, options.sources.timeout)
    sources = replace(options.sources, remote=partial(parts, upstream))
    with (
        prepare_process() as guard,
        Store.open(options.store, sources=sources) as store,
        logging_to(store.layout.log),
        _counting(options, store) as counted,
        Services(
            store, options.services, upstream, *([counted.metrics.note_collection] if counted else [])
        ) as services,
    ):
        channel = Channel(options.scheduler)
        make = Buildbarn if options.buildbarn else BuildGrid
        with make(channel, options.scheduler.instance, options.member) as source:
            storage = make_storage(services, upstream, results=options.buildbarn)
            if counted:
                counted.metrics.watch_source(source.statistics)
            reports = (counted.metrics,) if counted else ()
            with LocalWorker(services, source, options.worker, reports, storage, guard) as worker:
                with _signals(stop.set, source.stop_all):
                    options.announce(f"working for {options.scheduler.url} as {options.member.name}")
                    if counted:
                        options.announce(f"numbers at http://{counted.address}/metrics")
                    stop.wait()
                    worker.finish()
    return 0


class _Counted(NamedTuple):
    metrics: Metrics
    address: Address


@contextmanager
def _counting(options: ClusterOptions, store: Store) -> Iterator[_Counted | None]:
    """Numbers for whoever asks over HTTP, if anybody may. Raises BadInput where the port can't be had."""
    address, limits = options.http_address, options.services.limits
    if address is None:
        yield None
        return
    metrics = Metrics(lambda: Sizes.of(store, limits.limit if limits else 0))
    try:
        port, close = metrics.serve(address)
    except OSError as error:
        raise BadInput(f"can't listen at {address}: {error.strerror}") from error
    try:
        yield _Counted(metrics, address._replace(port=port))
    finally:
        close()


@contextmanager
def _signals(first: Callable[[], object], more: Callable[[], object]) -> Iterator[None]:
    """Have the first signal that ends a process do one thing, and each further one another; in a thread."""
    came = 0

    def act(_: int) -> None:
        nonlocal came
        came += 1
        (first if came == 1 else more)()

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    try:
        with acting_on_signals(act):
            yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
