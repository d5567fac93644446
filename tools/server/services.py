"""All services of one store, made and put together in one place; a transport is given these and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from store.digest import Digest
from store.gc import Collected
from store.presence import Finder
from store.quota import Limits
from store.repository import Store
from store.uploads import StoreElsewhere
from tools.server.actions import ActionResults
from tools.server.bytestream import ByteStream
from tools.server.capabilities import Capabilities
from tools.server.cas import ContentAddressableStorage
from tools.server.desk import Desk
from tools.server.downloads import Downloads
from tools.server.execution import Executions
from tools.server.read_through import Actions, ActionsThrough, Reachable
from tools.server.requests import Instances
from tools.server.scheduler import Scheduler
from tools.server.write_back import ActionsBack, WriteBack
from tools.upstream.sources import Upstream


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """`instances`: the only ones served, all if empty. `limits`: how large the store may get."""

    instances: tuple[str, ...] = ()
    read_only: bool = False
    limits: Limits | None = None
    write_back: bool = False
    """What clients bring goes to the upstream, too."""
    executes: bool = False
    """Actions are taken to be run: somebody has to take them from the scheduler."""


class Services:
    """The services, by name; a context manager. Make it after a fork."""

    def __init__(
        self,
        store: Store,
        options: ServiceOptions | None = None,
        upstream: Upstream | None = None,
        collected: Callable[[Collected], object] = lambda done: None,
        store_elsewhere: StoreElsewhere | None = None,
    ) -> None:
        """`upstream` is one of the store's sources, and asked for the rest, too; it is closed with the store.

        `collected` is told what each collection did; `store_elsewhere`: see `Uploads`.
        """
        options = options or ServiceOptions()
        self.instances = instances = Instances(options.instances)
        self.store = store
        self.space = store.limit(options.limits, collected)
        self.write_back: WriteBack | None = None
        self.uploads = store.uploads(self.space, self._note_added, store_elsewhere)
        self.desk = Desk(self.uploads)
        self.downloads = Downloads(store.blobs, store.presence, store.hydrator, only_here=not store.has_sources)
        self.capabilities = Capabilities(
            instances,
            update_enabled=not options.read_only,
            max_blob_bytes=options.limits.limit if options.limits else 0,
            executes=options.executes,
        )
        reachable = None if upstream is None else Reachable(store.presence, upstream)
        self.finder: Finder = reachable or store.presence
        finder = self.finder
        self.find_seen: Callable[[bytes], Digest | None] = reachable.find_seen if reachable else lambda hash_: None
        self.cas = ContentAddressableStorage(instances, store.presence, finder, self.downloads)
        self.results = results = ActionResults(instances, store.actions, finder, self.downloads, self.space)
        self.actions: Actions = results
        if upstream is not None:
            self.actions = ActionsThrough(results, upstream)
            if options.write_back:
                self.write_back = WriteBack(store.blobs, results, upstream)
                self.actions = ActionsBack(self.actions, self.write_back)
        self.reads_through = upstream is not None
        self.bytestream = ByteStream(instances, store.presence, self.downloads, self.desk)
        self.scheduler: Scheduler | None = None
        self.executions: Executions | None = None
        if options.executes:
            self.scheduler = Scheduler()
            self.executions = Executions(instances, self.scheduler, self.actions, self.downloads)

    def _note_added(self, digests: Sequence[Digest]) -> None:
        if self.write_back is not None:
            self.write_back.add(digests)

    def end_within(self, seconds: float) -> None:
        """What waits for others at the end has that long from now on."""
        if self.write_back is not None:
            self.write_back.end_within(seconds)

    def close(self) -> None:
        """End what runs in the background; the store stays open."""
        self.desk.close()
        self.uploads.close()
        if self.write_back is not None:
            self.write_back.close()
        self.space.close()

    def __enter__(self) -> Services:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
