"""`casfs serve`: where a store, the services, their guards and the servers are put together, and a process's life.

With several processes, each has all of it, and they share the ports
(SO_REUSEPORT: the kernel spreads connections) and the store. They are forked
before anything is opened: neither LMDB nor gRPC survives a fork.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from casfs.daemon import logging_to
from casfs.signals import acting_on_signals
from store.errors import BadInput
from store.layout import Layout
from store.repository import SourceOptions, Store
from store.sessions import Session
from tools.server.address import Address, check_plain, reserve
from tools.server.guards import Guards
from tools.server.notify import READY, STOPPING, be_no_main_process, notify
from tools.server.services import ServiceOptions, Services
from tools.server.tls import TlsFiles
from tools.upstream.options import UpstreamOptions
from tools.upstream.sources import Upstream, parts

if TYPE_CHECKING:
    from casfs.guarding import Guard
    from tools.server.calls import Wrap
    from tools.server.gate import Gate
    from tools.server.grpc_counting import GrpcCounting
    from tools.server.grpc_server import GrpcServer
    from tools.server.http_parts import HttpParts
    from tools.worker.local import WorkerOptions
    from tools.worker.report import ReportTaker

DRAIN_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """`validate`: results are ActionResults, all of whose blobs are here. `most`: bytes of one upload, expanded.

    `names`: what the server may be called in requests. Without, and unless only
    this machine can reach it, it isn't looked at.
    """

    validate: bool = False
    most: int = 16 << 30
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Everything `casfs serve` was told. Durations in seconds, sizes in bytes."""

    store: Path
    address: Address
    services: ServiceOptions = field(default_factory=ServiceOptions)
    sources: SourceOptions = field(default_factory=SourceOptions)
    upstream: UpstreamOptions | None = None
    processes: int = 1
    tls: TlsFiles | None = None
    tokens: Path | None = None
    insecure: bool = False
    message_bytes: int = 16 << 20
    streams: int = 1000
    uploads: int = 64
    idle_seconds: float = 60.0
    drain_seconds: float = DRAIN_SECONDS
    http_address: Address | None = None
    http: HttpOptions = field(default_factory=HttpOptions)
    worker: WorkerOptions | None = None
    """Actions are run, too."""
    announce: Callable[[str], None] = field(default=print, compare=False)

    def check(self) -> None:
        """Raises BadInput for what isn't safe or can't be read."""
        for address in filter(None, (self.address, self.http_address)):
            if self.tls is None and not self.insecure:
                check_plain(address, "--tls-certificate and --tls-key, or ")
        self.guards()
        if self.services.write_back and self.upstream is None:
            raise BadInput("--write-back needs an --upstream to write to")
        if self.worker is not None and self.processes > 1:
            raise BadInput("--execute needs one process: --processes has each its own queue of actions")
        if self.worker is not None and self.services.read_only:
            raise BadInput("--execute writes results: it can't be used with --read-only")

    def guards(self) -> Guards:
        """Who may do what, by which certificates. Raises BadInput."""
        return Guards(self.tokens, self.tls, read_only=self.services.read_only)


def serve(options: ServeOptions) -> int:
    """Serve until SIGTERM or SIGINT; what is under way then is finished. Returns an exit code.

    SIGHUP has tokens and certificates read again. A service manager is told, if there is one.
    """
    options.check()
    with ExitStack() as stack:
        guard = None
        if options.worker is not None:
            from tools.worker.local import prepare_process

            guard = stack.enter_context(prepare_process())
        # Made, or refused, while there is a terminal to tell it.
        Store.open(options.store).close()
        options = _reserve(options, stack)
        secure = "" if options.tls is None else "s"

        def announce() -> None:
            options.announce(f"serving {options.store} at grpc{secure}://{options.address}")
            if options.http_address is not None:
                options.announce(f"serving {options.store} at http{secure}://{options.http_address}")
            notify(READY)

        if options.processes == 1:
            asyncio.run(_serve(options, announce, guard))
            return 0
        if options.http_address is not None:
            _share_numbers(options.store, stack)
        return _supervise(options, announce)


def _reserve(options: ServeOptions, stack: ExitStack) -> ServeOptions:
    """The same with the real ports, which are held until the stack unwinds."""
    taken, address = reserve(options.address)
    stack.enter_context(taken)
    if options.http_address is None:
        return replace(options, address=address)
    taken, http_address = reserve(options.http_address)
    stack.enter_context(taken)
    return replace(options, address=address, http_address=http_address)


def _share_numbers(store: Path, stack: ExitStack) -> None:
    """Have the processes to come count together, in files that go with this one, however it ends."""
    from tools.server.metrics import share_among_processes

    session = Session(Layout(store), spares=False)
    stack.callback(session.close)
    share_among_processes(session.directory)


def _supervise(options: ServeOptions, announce: Callable[[], None]) -> int:
    """Run the processes; when one ends by itself, all do, and a service manager begins anew."""
    stopping = False
    children: set[int] = set()

    def stop() -> None:
        nonlocal stopping
        stopping = True
        notify(STOPPING)
        send(signal.SIGTERM)

    def send(number: int) -> None:
        for child in children.copy():
            with suppress(ProcessLookupError):
                os.kill(child, number)

    def act(number: int) -> None:
        if number == signal.SIGHUP:
            send(number)
        else:
            stop()

    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    readable, writable = os.pipe()
    for _ in range(options.processes):
        child = os.fork()
        if not child:
            os.close(readable)
            _end_with(_run_child(options, writable))
        children.add(child)
    os.close(writable)
    for number in signals:
        signal.signal(number, lambda *_: None)
    with acting_on_signals(act):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        ready = 0
        while ready < options.processes and (data := os.read(readable, 64)):
            ready += len(data)
        os.close(readable)
        if ready == options.processes:
            announce()
        code = 0
        while children:
            child, status = os.wait()
            children.discard(child)
            code = max(code, os.waitstatus_to_exitcode(status) and 1)
            if not stopping:
                code = 1
                stop()
    return code


def _run_child(options: ServeOptions, ready: int) -> int:
    """One of the processes; returns its exit code."""
    # The parent's death ends it, however that came.
    _die_with_parent()
    be_no_main_process()
    try:
        asyncio.run(_serve(options, lambda: _tell(ready)))
    except Exception as error:  # noqa: BLE001 - the process ends here
        print(f"casfs: {error}", file=sys.stderr)
        return 1
    return 0


def _tell(ready: int) -> None:
    os.write(ready, b".")
    os.close(ready)


def _end_with(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_with_parent() -> None:
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)


def _keep_memory() -> None:
    """Have the C library keep what a message took for the next one, and Python look for garbage less often.

    Blocks of more than 128 KiB go back to the kernel at once by default, and
    come again a page fault for each page: a third of the CPU of a read of 4 MiB.
    Calls that wait are many objects, and none of them is garbage: by default
    Python walked all of them for each thousand new ones, a third of the CPU of
    four cold clients.
    """
    import ctypes
    import gc

    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # of the GNU library
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 16 << 20)
        mallopt(m_trim_threshold, 64 << 20)


async def _serve(options: ServeOptions, announce: Callable[[], None], guard: Guard | None = None) -> None:
    """One process: open all, serve, drain, close all."""
    _keep_memory()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    guards = options.guards()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, guards.reload)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    sources, upstream = options.sources, None
    if options.upstream is not None:
        upstream = Upstream(options.upstream, sources.timeout)
        sources = replace(sources, remote=partial(parts, upstream))
    with Store.open(options.store, sources=sources) as store, logging_to(store.layout.log):
        if options.http_address is None:
            with (
                Services(store, options.services, upstream) as services,
                _working(options, services, guard) as stop_work,
            ):
                async with _serving_grpc(options, services, guards):
                    announce()
                    await stop.wait()
                    notify(STOPPING)
                    stop_work()
            return
        from tools.server.http_parts import HttpParts

        limits = options.services.limits
        http = HttpParts(store, limits.limit if limits else 0)
        with (
            Services(store, options.services, upstream, http.metrics.note_collection) as services,
            _working(options, services, guard, http.reports) as stop_work,
        ):
            async with (
                _serving_grpc(options, services, guards, http.counting) as grpc,
                _serving_http(options, options.http_address, services, guards, http, grpc.gate),
            ):
                announce()
                await stop.wait()
                notify(STOPPING)
                stop_work()


@contextmanager
def _working(
    options: ServeOptions, services: Services, guard: Guard | None, reports: tuple[ReportTaker, ...] = ()
) -> Iterator[Callable[[], object]]:
    """A worker, if there shall be one; what is given has it take nothing more."""
    if options.worker is None or services.scheduler is None:
        yield lambda: None
        return
    from tools.worker.local import LocalWorker

    with LocalWorker(services, services.scheduler, options.worker, reports, guard=guard):
        yield services.scheduler.drain


@asynccontextmanager
async def _serving_grpc(
    options: ServeOptions,
    services: Services,
    guards: Guards,
    counting: GrpcCounting | None = None,
) -> AsyncIterator[GrpcServer]:
    from tools.server.grpc_server import GrpcServer
    from tools.server.limits import GrpcLimits

    limits = GrpcLimits(
        message_bytes=options.message_bytes,
        streams=options.streams,
        idle_seconds=options.idle_seconds,
        uploads=options.uploads,
    )
    wrap: Wrap = (lambda endpoint: endpoint) if counting is None else counting.wrap
    server = GrpcServer(services, guards, limits, wrap)
    try:
        await server.start(options.address, guards.certificates)
        yield server
    finally:
        await server.drain(options.drain_seconds)


@asynccontextmanager
async def _serving_http(
    options: ServeOptions, address: Address, services: Services, guards: Guards, parts: HttpParts, gate: Gate
) -> AsyncIterator[None]:
    from tools.server.http_server import HttpLimits

    limits = HttpLimits(idle_seconds=options.idle_seconds)
    http, certificates = options.http, guards.certificates
    names = http.names if http.names or address.is_loopback else None
    server = parts.make_server(
        services, guards, limits, options.drain_seconds, gate, validate=http.validate, most=http.most, names=names
    )
    try:
        await server.start(address, None if certificates is None else certificates.context())
        yield
    finally:
        await server.drain()
