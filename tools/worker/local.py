"""A worker beside the services of one store, in their process: for `casfs serve --execute`, and in a cluster.

The process has to be in a namespace of its own (`prepare_process`, before it
starts threads): sandboxes are mounted there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from casfs.guarding import Guard
from casfs.orphans import guard_commands
from casfs.sandbox import Sandboxes, enter_namespace
from store.digest import Digest
from store.presence import Finder
from tools.server.services import Services
from tools.worker.executor import Parts
from tools.worker.limits import Bounds, Limits, find_groups
from tools.worker.report import ActionLog, ReportTaker
from tools.worker.storing import ResultTaker
from tools.worker.task import Offer
from tools.worker.traces import Traces
from tools.worker.work import WorkSource
from tools.worker.worker import Worker, adopt_orphans, default_jobs, machine_memory

_MEMORY_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How actions are run.

    `jobs`: so many at a time, 0 for as many as there are cores and memory for.
    `memory`: bytes that each may have, 0 for a share of the machine's;
    `processes`: that each may have at a time. `scratch`: where commands write,
    else beside the blobs. `prefetch`: which inputs are brought in before a
    command starts, rather than each when it is first opened: "none", "all" or
    those of its "profile". `trace`: a directory for a trace of each action.
    """

    jobs: int = 0
    memory: int = 0
    processes: int = 4096
    scratch: Path | None = None
    engine: str = "auto"
    prefetch: str = "none"
    trace: Path | None = None
    offer: Offer = field(default_factory=Offer)
    action_log: Path | None = None

    @property
    def slots(self) -> int:
        """How many actions run at a time."""
        return self.jobs or default_jobs()

    @property
    def bounds(self) -> Bounds:
        """Of one action."""
        return Bounds(self.memory or int(machine_memory() * _MEMORY_SHARE / self.slots), self.processes)


def prepare_process() -> Guard:
    """Once, before the process starts its second thread. Raises MissingCapability.

    What is returned ends the commands of this process if it is killed.
    """
    enter_namespace()
    adopt_orphans()
    return guard_commands()


@dataclass(frozen=True, slots=True)
class Storage:
    """Whose storage counts: who knows which inputs can be had, who stores results, who is told of durable outputs."""

    finder: Finder
    results: ResultTaker | None
    added: Callable[[Sequence[Digest]], object]


class LocalWorker:
    """Runs what a source has. A context manager, at whose end no action runs."""

    def __init__(
        self,
        services: Services,
        source: WorkSource,
        options: WorkerOptions,
        reports: tuple[ReportTaker, ...] = (),
        storage: Storage | None = None,
        guard: Guard | None = None,
        companions: Collection[int] = (),
    ) -> None:
        """`storage`: the services', if it isn't given. `companions`: other processes of this one's.

        Raises MissingCapability, SandboxError, BadInput, StoreUnusable.
        """
        self._source = source
        storage = storage or Storage(services.finder, services.actions, services.uploads.added)
        with ExitStack() as parts:
            if options.action_log is not None:
                log = ActionLog(options.action_log)
                parts.callback(log.close)
                reports = (*reports, log)
            traces = None if options.trace is None else Traces(options.trace, options.engine)
            sandboxes = Sandboxes(services.store, scratch=options.scratch, engine=options.engine, guard=guard)
            parts.callback(sandboxes.close)
            # After those, which end what a dead worker has left in its groups.
            if guard is not None:
                companions = (*companions, guard.process)
            limits = Limits(options.bounds, find_groups(companions=companions))
            parts.callback(limits.close)
            self._worker = Worker(
                source,
                Parts(
                    store=services.store,
                    sandboxes=sandboxes,
                    downloads=services.downloads,
                    finder=storage.finder,
                    space=services.space,
                    limits=limits,
                    offer=options.offer,
                    prefetch=options.prefetch,
                    traces=traces,
                    results=storage.results,
                    added=storage.added,
                    reports=reports,
                ),
                options.slots,
            )
            self._worker.start()
            self._parts = parts.pop_all()

    def finish(self) -> None:
        """Take nothing more, and wait for what runs."""
        self._source.drain()
        self._worker.join()

    def close(self) -> None:
        """End what runs, and wait for it."""
        # In this order: what was taken between the two would run on.
        self._source.drain()
        self._source.stop_all()
        self.finish()
        self._parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
