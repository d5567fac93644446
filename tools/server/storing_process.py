"""A process beside a server's own, with an interpreter of its own, that hashes, writes, syncs and names whole blobs.

Storing a small blob is four calls into the kernel. Each lets go of the interpreter's lock and takes it again, and in
one process the loop, which talks with all clients, is who waits for it meanwhile. So the loop's process hands over a
few hundred blobs as one message, and has one answer.

Begun by a fork while the process has one thread and nothing open. It ends with the pipes to it, however their other end
went: what it has begun is then stored or cleared away as by any other process that writes to the store. It holds
nothing else of its parent's, not even standard error, so that nobody who reads from that waits for this one.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Self

from casfs.daemon import logging_to
from casfs.forking import keep_only
from store.digest import Digest
from store.errors import StoreError
from store.ingest import Ingest
from store.repository import Store
from store.uploads import STORING_MOST
from tools.server.status import faults

log = logging.getLogger("casfs.serve")

NAME = "casfs storing"
"""What top(1) and `ps -o comm` call it; at most 15 bytes."""
_PR_SET_NAME = 15
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""What terminals and service managers send to all processes of a service: this one ends with its pipes."""

_Request = list[tuple[bytes, int, bytes]]
"""Of each blob its digest's key and size, and its bytes."""
_Answer = list["StoreError | None"] | StoreError | RuntimeError | None
"""Why each was refused; an error concerns all; None: all are stored."""


class StoringProcess:
    """The process. A context manager, at whose end it is gone. Threads may share it."""

    def __init__(self, root: Path) -> None:
        """`root`: the store's directory."""
        root = root.absolute()
        pairs = [Pipe() for _ in range(STORING_MOST)]
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                _run(root, [theirs for _, theirs in pairs])
                code = 0
            finally:
                os._exit(code)
        self._lanes = [ours for ours, _ in pairs]
        self._free: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_gone = False
        for ours, theirs in pairs:
            theirs.close()
            self._free.put(ours)

    def store_all(self, blobs: Sequence[tuple[Digest, bytes]]) -> Sequence[StoreError | None] | None:
        """Store blobs; says of each why it was refused, or None: it is durable.

        None in place of all that: the process has ended, and what became of these blobs isn't known. Raises what
        concerns all of them, as `Ingest.store_all`.
        """
        request: _Request = [(digest.key, digest.size, data) for digest, data in blobs]
        lane = self._free.get()
        try:
            # A lane that broke in the middle is closed: what is left in it would be taken for another group's answer.
            if lane.closed:
                return None
            lane.send(request)
            answer: _Answer = lane.recv()
        except BaseException as error:
            lane.close()
            self._note_gone()
            if isinstance(error, EOFError | OSError):
                return None
            raise
        finally:
            self._free.put(lane)
        if isinstance(answer, Exception):
            raise answer
        return [None] * len(blobs) if answer is None else answer

    def _note_gone(self) -> None:
        with self._lock:
            told, self._is_gone = self._is_gone, True
        if not told:
            log.error("the process that stores has ended; from now on this one stores what comes, more slowly")

    def close(self) -> None:
        """End it, when it has stored what it was given; harmless when repeated."""
        lanes, self._lanes = self._lanes, []
        if lanes:
            for lane in lanes:
                lane.close()
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run(root: Path, lanes: Sequence[Connection]) -> None:
    _let_go([lane.fileno() for lane in lanes])
    gc.freeze()
    with Store.open(root, create=False) as store, logging_to(store.layout.log):
        threads = [threading.Thread(target=_serve, args=(store, lane)) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        faults.flush()


def _let_go(kept: Sequence[int]) -> None:
    """Be nobody's but the pipes': no terminal ends it, and of the parent's descriptors it has these."""
    for ignored in _IGNORED:
        signal.signal(ignored, signal.SIG_IGN)
    keep_only(kept)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, NAME.encode(), 0, 0, 0)


def _serve(store: Store, lane: Connection) -> None:
    """Store what one lane brings, until its end."""
    with ExitStack() as stack:

        @cache
        def ingest() -> Ingest:
            # A session for each lane: threads that make and rename files in one directory spin on its lock.
            made = Ingest(store.layout, store.index, store.blobs, spares=False)
            stack.callback(made.close)
            return made

        try:
            while True:
                request: _Request = lane.recv()
                lane.send(_store_group(ingest, [(Digest.from_key(key, size), data) for key, size, data in request]))
        except (EOFError, OSError):
            pass
        except BaseException:
            # Whoever waits at the other end stores by itself, when it sees that this process is gone.
            log.exception("the process that stores can't go on")
            os._exit(1)


def _store_group(ingest: Callable[[], Ingest], blobs: Sequence[tuple[Digest, bytes]]) -> _Answer:
    try:
        results: list[StoreError | None] = [*ingest().store_all(blobs)]
    except StoreError as error:
        return error
    except Exception as error:  # noqa: BLE001 - logged here, with what it went through
        faults.note(error, "storing %d blobs", len(blobs))
        return RuntimeError(f"the process that stores: {type(error).__name__}: {error}")
    return results if any(results) else None
