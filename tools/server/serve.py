"""`casfs serve`: where a store, the services, their guards and the servers are put together, and a process's life.

With several processes, each has all of it, and they share the ports
(SO_REUSEPORT: the kernel spreads connections) and the store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casfs.daemon import logging_to
from store.errors import BadInput
from store.kernel import raise_open_files
from store.layout import Layout
from store.repository import SourceOptions, Store
from store.sessions import Session
from tools.exits import Exit
from tools.server.address import Address, check_plain, reserve
from tools.server.calls_under_way import CallsUnderWay
from tools.server.ending import GRACE_SECONDS, Ending, Step
from tools.server.fault_log import FaultLog
from tools.server.guards import Guards
from tools.server.notify import READY, STOPPING, notify
from tools.server.overload import LOOK_SECONDS, Overload
from tools.server.processes import say, supervise
from tools.server.services import ServiceOptions, Services
from tools.server.status import faults
from tools.server.store_watch import StoreWatch
from tools.server.storing_process import StoringProcess
from tools.server.tls import TlsFiles
from tools.upstream.options import UpstreamOptions
from tools.upstream.sources import Upstream, parts

if TYPE_CHECKING:
    from casfs.guarding import Guard
    from tools.server.calls import Wrap
    from tools.server.gate import Gate
    from tools.server.grpc_server import GrpcServer
    from tools.server.http_parts import HttpParts
    from tools.server.http_server import HttpServer
    from tools.worker.local import WorkerOptions
    from tools.worker.report import ReportTaker

DRAIN_SECONDS = 20.0
_OPEN_MOST = 1 << 16
"""Files and connections that may be open. Not all that the system allows: actions inherit it, and some programs
close as many when they begin."""
_loop_faults = FaultLog(logging.getLogger("asyncio"))


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
    log_level: str = "info"
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
    """Serve until SIGTERM or SIGINT; what is under way then is finished, until the drain time is over.

    Returns an exit code, unless the process had to be ended as it was: after a second signal, or where something hung
    (see `Ending`). SIGHUP has tokens and certificates read again, SIGUSR1 has the calls that are under way written to
    the log. A service manager is told, if there is one.
    """
    options.check()
    with ExitStack() as stack:
        guard = None
        if options.worker is not None:
            from tools.worker.local import prepare_process

            guard = stack.enter_context(prepare_process())
        # Made, or refused, while there is a terminal to tell it.
        Store.open(options.store).close()
        watch = stack.enter_context(StoreWatch(options.store))
        options = _reserve(options, stack)
        secure = "" if options.tls is None else "s"

        def announce() -> None:
            options.announce(f"serving {options.store} at grpc{secure}://{options.address}")
            if options.http_address is not None:
                options.announce(f"serving {options.store} at http{secure}://{options.http_address}")
            notify(READY)

        if options.processes == 1:
            return _run(options, announce, watch, say, guard=guard)
        if options.http_address is not None:
            _share_numbers(options.store, stack)
        # A process does not insist on its end when there are more signals: a terminal and some service managers signal
        # all processes, so that the one which the supervisor passes on would be the second. That one kills instead.
        return supervise(
            options.processes,
            lambda ready: _run(options, ready, watch, lambda line: None, insist=False),
            options.drain_seconds + GRACE_SECONDS,
            announce,
            lambda code: _gone(watch.find_fault()) if code == Exit.STORE else "",
        )


def _gone(fault: str) -> str:
    return fault and f"{fault}; the server ends"


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


def _run(
    options: ServeOptions,
    announce: Callable[[], None],
    watch: StoreWatch,
    tell_person: Callable[[str], object],
    *,
    guard: Guard | None = None,
    insist: bool = True,
) -> int:
    """One process, from its loop's begin to its end; returns its exit code."""
    with ExitStack() as stack:
        # It is a fork, so before there is a second thread.
        storing = None if options.services.read_only else stack.enter_context(StoringProcess(options.store))
        return _run_loop(options, announce, watch, tell_person, guard, storing, insist=insist)


def _run_loop(
    options: ServeOptions,
    announce: Callable[[], None],
    watch: StoreWatch,
    tell_person: Callable[[str], object],
    guard: Guard | None,
    storing: StoringProcess | None,
    *,
    insist: bool,
) -> int:
    guards = options.guards()
    stop = asyncio.Event()
    runner = asyncio.Runner()
    loop = runner.get_loop()

    def tell(call: Callable[[], object]) -> None:
        # That the loop's socket pair is full does no harm here: the call is in its list already.
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(call)

    calls = CallsUnderWay(loop)

    def gone(fault: str) -> None:
        tell_person(_gone(fault))
        ending.begin(Exit.STORE, fault)

    with (
        Ending(
            Step(lambda: tell(stop.set), options.drain_seconds + GRACE_SECONDS),
            reload=lambda: tell(guards.reload),
            report=calls.report,
            insist=insist,
        ) as ending,
        runner,
    ):
        watch.start(gone)
        runner.run(_serve(options, announce, guards, guard, storing, stop, ending, calls))
    return ending.code


async def _serve(
    options: ServeOptions,
    announce: Callable[[], None],
    guards: Guards,
    guard: Guard | None,
    storing: StoringProcess | None,
    stop: asyncio.Event,
    ending: Ending,
    calls: CallsUnderWay,
) -> None:
    """Open all, serve until `stop` is set, drain, close all."""
    _keep_memory()
    raise_open_files(_OPEN_MOST)
    asyncio.get_running_loop().set_exception_handler(_note_exception)
    sources, upstream = options.sources, None
    if options.upstream is not None:
        upstream = Upstream(options.upstream, sources.timeout)
        sources = replace(sources, remote=partial(parts, upstream))
    with ExitStack() as stack:
        store = stack.enter_context(Store.open(options.store, sources=sources))
        stack.enter_context(logging_to(store.layout.log, getattr(logging, options.log_level.upper())))
        stack.callback(faults.flush)
        stack.callback(_loop_faults.flush)
        http = None
        if options.http_address is not None:
            from tools.server.http_parts import HttpParts

            limits = options.services.limits
            http = HttpParts(store, limits.limit if limits else 0)
        told = (lambda done: None) if http is None else http.metrics.note_collection
        store_elsewhere = None if storing is None else storing.store_all
        services = stack.enter_context(Services(store, options.services, upstream, told, store_elsewhere))
        reports = () if http is None else http.reports
        stop_work = stack.enter_context(_working(options, services, guard, storing, reports))
        async with _serving(options, services, guards, http, ending, calls):
            announce()
            await stop.wait()
            notify(STOPPING)
            services.end_within(options.drain_seconds)
            stop_work()


def _note_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What no task or callback has caught: a bug, which each call may meet."""
    error = context.get("exception")
    if error is None:
        loop.default_exception_handler(context)
    else:
        _loop_faults.note(error, "%s", context["message"])


@contextmanager
def _working(
    options: ServeOptions,
    services: Services,
    guard: Guard | None,
    storing: StoringProcess | None,
    reports: tuple[ReportTaker, ...] = (),
) -> Iterator[Callable[[], object]]:
    """A worker, if there shall be one; what is given has it take nothing more."""
    if options.worker is None or services.scheduler is None:
        yield lambda: None
        return
    from tools.worker.local import LocalWorker

    companions = () if storing is None else (storing.pid,)
    with LocalWorker(services, services.scheduler, options.worker, reports, guard=guard, companions=companions):
        yield services.scheduler.drain


@asynccontextmanager
async def _serving(
    options: ServeOptions,
    services: Services,
    guards: Guards,
    http: HttpParts | None,
    ending: Ending,
    calls: CallsUnderWay,
) -> AsyncIterator[None]:
    """Take calls, and watch them; at the end drain, all transports in the same time."""
    seconds = options.drain_seconds
    grpc = _make_grpc(options, services, guards, http)
    calls.add(grpc.under_way)
    calls.watch_gate(grpc.gate.waiting_blobs)
    if http is None:
        overload = Overload(grpc)
        looks: list[Callable[[], object]] = [overload.look, calls.look]
    else:
        overload = Overload(grpc, http.metrics.note_overload)
        http.metrics.watch_overload(overload)
        looks = [overload.look, calls.look, http.metrics.refresh]
    looking = asyncio.create_task(_look(looks))
    drains: list[Callable[[], Awaitable[None]]] = [lambda: grpc.drain(seconds)]
    try:
        await grpc.start(options.address, guards.certificates)
        if http is not None and options.http_address is not None:
            web = _make_http(options, options.http_address, services, guards, http, grpc.gate, calls)
            drains.append(lambda: web.drain(seconds, ending.reason or "the server ends"))
            certificates = guards.certificates
            await web.start(options.http_address, None if certificates is None else certificates.context())
        yield
    finally:
        await asyncio.gather(*(drain() for drain in drains))
        looking.cancel()
        if http is not None:
            # For the other processes, which are asked for this one's numbers as long as they live.
            http.metrics.refresh()
        overload.end()
        grpc.close()


async def _look(looks: Iterable[Callable[[], object]]) -> None:
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        for look in looks:
            try:
                look()
            except Exception as error:  # noqa: BLE001 - watching must not end with one mistake
                faults.note(error, "looking after the calls failed")


def _make_grpc(options: ServeOptions, services: Services, guards: Guards, http: HttpParts | None) -> GrpcServer:
    from tools.server.grpc_server import GrpcServer
    from tools.server.limits import GrpcLimits

    limits = GrpcLimits(
        message_bytes=options.message_bytes,
        streams=options.streams,
        idle_seconds=options.idle_seconds,
        uploads=options.uploads,
    )
    wrap: Wrap = (lambda endpoint: endpoint) if http is None else http.counting.wrap
    return GrpcServer(services, guards, limits, wrap)


def _make_http(
    options: ServeOptions,
    address: Address,
    services: Services,
    guards: Guards,
    parts: HttpParts,
    gate: Gate,
    calls: CallsUnderWay,
) -> HttpServer:
    from tools.server.http_server import HttpLimits

    limits, http = HttpLimits(idle_seconds=options.idle_seconds), options.http
    names = http.names if http.names or address.is_loopback else None
    return parts.make_server(
        services, guards, limits, gate, validate=http.validate, most=http.most, names=names, calls=calls
    )
