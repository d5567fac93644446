"""`casfs worker`: a store, an upstream and a scheduler's client put together, and the process's life."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from casfs.daemon import logging_to
from store.errors import BadInput
from store.repository import SourceOptions, Store
from tools.cluster.buildbarn import Buildbarn
from tools.cluster.buildgrid import BuildGrid
from tools.cluster.joining import Member
from tools.cluster.storage import make_storage
from tools.exits import Exit
from tools.server.address import Address
from tools.server.ending import GRACE_SECONDS, Ending, Step
from tools.server.metrics import Metrics, Sizes
from tools.server.processes import say
from tools.server.services import ServiceOptions, Services
from tools.server.status import faults
from tools.server.store_watch import StoreWatch
from tools.upstream.channel import Channel
from tools.upstream.options import UpstreamOptions
from tools.upstream.sources import Upstream, parts
from tools.worker.local import LocalWorker, WorkerOptions, prepare_process

_GIVE_BACK_SECONDS = 20.0 + GRACE_SECONDS
"""To end what runs, and to tell the scheduler, which is tried for 10 s."""


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
    """Work until SIGTERM or SIGINT; what runs then is finished, or ended by a second signal. Returns an exit code.

    A third signal ends the process at once, as does the end of the time that giving back what runs may take.
    """
    stop = threading.Event()
    upstream = Upstream(options.upstream, options.sources.timeout)
    sources = replace(options.sources, remote=partial(parts, upstream))
    with ExitStack() as stack:
        guard = stack.enter_context(prepare_process())
        store = stack.enter_context(Store.open(options.store, sources=sources))
        watch = stack.enter_context(StoreWatch(options.store))
        stack.enter_context(logging_to(store.layout.log))
        stack.callback(faults.flush)
        counted = stack.enter_context(_counting(options, store))
        told = (counted.metrics.note_collection,) if counted else ()
        services = stack.enter_context(Services(store, options.services, upstream, *told))
        channel = Channel(options.scheduler)
        make: type[Buildbarn | BuildGrid] = Buildbarn if options.buildbarn else BuildGrid
        source: Buildbarn | BuildGrid = make(channel, options.scheduler.instance, options.member)
        stack.enter_context(source)
        storage = make_storage(services, upstream, results=options.buildbarn)
        if counted:
            counted.metrics.watch_source(source.statistics)
        reports = (counted.metrics,) if counted else ()
        worker = stack.enter_context(LocalWorker(services, source, options.worker, reports, storage, guard))

        def give_back() -> None:
            stop.set()
            # It may wait for locks, which the thread that hears signals must not.
            threading.Thread(target=source.stop_all, name="giving back", daemon=True).start()

        def gone(fault: str) -> None:
            say(f"{fault}; the worker ends")
            ending.begin(Exit.STORE, fault, step=1)

        # Until the end of the process, if it was begun. Entered last, as threads that closing waits for are below.
        ending = stack.enter_context(Ending(Step(stop.set), Step(give_back, _GIVE_BACK_SECONDS)))
        watch.start(gone)
        options.announce(f"working for {options.scheduler.url} as {options.member.name}")
        if counted:
            options.announce(f"numbers at http://{counted.address}/metrics")
        stop.wait()
        worker.finish()
        # From here on nothing is waited for that may take long.
        ending.begin(Exit.OK, "what ran is finished", step=1)
    return ending.code


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
