"""The holder: a process of a user that keeps layers of one store warm between commands.

Layers are mounts attached nowhere, so they end with the process that made them
(`casfs.layers`). A worker lives long and keeps its own; ``casfs run`` does not.
So when it had to lay out much it leaves a holder behind, and the next one gets
the layers' descriptors over a socket, without a name or a place for them:

    holder   in a user namespace (without privilege) and a mount namespace of its own
    client   enters that user namespace, as only there the layers may be stacked,
             a mount namespace of its own, and mounts there; all of it ends with the client

A client needs nothing of the holder once it has its layout but that somebody
fetches what is missing: a holder that is killed takes nothing away, and the
next command starts another. It ends by itself when it was not used for a while.

Messages are JSON objects in packets, with descriptors beside them:

    ← {"version", "pid"}                        descriptor: the user namespace
    → {"op": "lay_out", "root"}                 ← {"ok": {…}}: descriptors: `layers`, then `fetching` of the layout
    → {"op": "statistics"}                      ← {"ok": {…}}
    or                                          ← {"error": class, "text"}

What a connection was given stays in use until it is closed.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from casfs.control import runtime_directory, short_path
from casfs.errors import CasfsError, MountError
from casfs.layers import Layers, Layout
from casfs.overlay import Family
from casfs.syscalls import (
    CLONE_NEWNS,
    MS_REC,
    MS_SLAVE,
    enter_user_namespace,
    is_initial_namespace,
    mount,
    unshare,
)
from store.digest import Digest, DigestFunction
from store.errors import StoreError
from store.repository import SourceOptions, Store

VERSION = 1
"""Of the messages: a client leaves a holder of another version alone."""
WORTH_NODES = 2_000
"""When a command had to lay out so many nodes, the next one shall find them."""
_TIMEOUT_SECONDS = 60.0
_LONGEST = 1 << 16
_DESCRIPTORS_MOST = 253
"""The kernel's SCM_MAX_FD."""


@dataclass(frozen=True, slots=True)
class HolderOptions:
    """What a holder is started with: `idle` seconds until it ends, `budget` bytes of memory, sources of blobs."""

    store: str
    idle: float
    budget: int
    directories: tuple[str, ...]
    timeout: float
    warm: str
    """The root that was just used: its layers are made at once."""
    upstream: str = ""
    """What a program that knows of more sources makes one of; a holder of its own for each."""

    @property
    def sources(self) -> SourceOptions:
        """The directories."""
        return SourceOptions(tuple(map(Path, self.directories)), self.timeout)


def _address(store: Path, upstream: str) -> Path:
    identity = DigestFunction.BLAKE3.of(os.fsencode(os.path.realpath(store)) + b"\0" + upstream.encode()).hex
    return runtime_directory() / f"holder-{identity[:16]}.sock"


# The client


class Holder:
    """A connection to the holder. Implements `casfs.layers.Layouts`."""

    def __init__(self, connection: socket.socket) -> None:
        """Raises OSError, ValueError where there is none that this version can talk to."""
        self._connection = connection
        hello, descriptors = _receive(connection)
        if hello.get("version") != VERSION or len(descriptors) != 1:
            raise ValueError("a holder of another version")
        self.pid: int = hello["pid"]
        self._namespace = descriptors[0]
        self._lock = threading.Lock()
        self._upcalls = 0

    def enter(self) -> None:
        """Take this process, which has one thread, where the holder's layers can be stacked. Raises OSError."""
        if not is_initial_namespace() or os.geteuid():
            enter_user_namespace(self._namespace)
        unshare(CLONE_NEWNS)
        mount("none", "/", "", MS_REC | MS_SLAVE, "")

    def lay_out(self, root: Digest) -> Layout:
        """See `Layouts`."""
        with self._lock:
            answer, descriptors = self._ask({"op": "lay_out", "root": str(root)})
        count = answer["layers"]
        parts = ExitStack()
        for descriptor in descriptors:
            parts.callback(os.close, descriptor)
        sample = [(bytes.fromhex(path), Digest.parse(text)) for path, text in answer["sample"]]
        family = Family[answer["family"]]
        return Layout(family, descriptors[:count], descriptors[count:], sample, answer["fresh_nodes"], parts)

    def upcalls(self) -> int:
        """See `Layouts`. Of a holder that has ended, as it last said."""
        with suppress(MountError):
            self._upcalls = self.statistics()["upcalls"]
        return self._upcalls

    def statistics(self) -> dict[str, int]:
        """Of its layers, and the upcalls it answered."""
        with self._lock:
            answer: dict[str, int] = self._ask({"op": "statistics"})[0]
        return answer

    def _ask(self, request: dict[str, Any]) -> tuple[Any, list[int]]:
        try:
            self._connection.send(json.dumps(request).encode())
            answer, descriptors = _receive(self._connection)
        except OSError as error:
            raise MountError(f"the process that keeps layers warm doesn't answer: {error}") from error
        if "error" in answer:
            from casfs.daemon import revive

            raise revive(answer["error"], answer["text"])
        return answer["ok"], descriptors

    def close(self) -> None:
        """Leave the holder."""
        self._connection.close()
        os.close(self._namespace)


def find_holder(store: Path, upstream: str = "") -> Holder | None:
    """The holder of this user's layers of a store with that upstream, if one lives and can be talked to."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(_TIMEOUT_SECONDS)
        with short_path(_address(store, upstream)) as address:
            connection.connect(address)
        return Holder(connection)
    except (OSError, ValueError, MountError):
        connection.close()
        return None


def start_holder(options: HolderOptions, program: str = "casfs.holder") -> None:
    """Have a holder started, in this process's user namespace; it is not waited for. `program`: a module to run."""
    subprocess.Popen(
        [sys.executable, "-m", program, json.dumps(asdict(options))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, descriptors, _, _ = socket.recv_fds(connection, _LONGEST, _DESCRIPTORS_MOST)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    if not data:
        raise ConnectionResetError("it has ended")
    message: dict[str, Any] = json.loads(data)
    return message, descriptors


# The holder


class _Server:
    """Answers clients, each in a thread, until nobody has come for a while."""

    def __init__(self, layers: Layers, listener: socket.socket, idle: float) -> None:
        self._layers = layers
        self._listener = listener
        self._idle = idle
        self._namespace = os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        self._clients = 0
        self._lock = threading.Lock()
        self._used = time.monotonic()

    def run(self) -> None:
        self._listener.settimeout(min(self._idle, 1.0) or 1.0)
        while self._clients or time.monotonic() - self._used < self._idle:
            with suppress(TimeoutError):
                connection, _ = self._listener.accept()
                with self._lock:
                    self._clients += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, ExitStack() as given, suppress(OSError, ValueError):
                hello = {"version": VERSION, "pid": os.getpid()}
                socket.send_fds(connection, [json.dumps(hello).encode()], [self._namespace])
                while True:
                    request, _ = _receive(connection)
                    answer, descriptors = self._answer(request, given)
                    socket.send_fds(connection, [json.dumps(answer).encode()], descriptors)
        finally:
            with self._lock:
                self._clients -= 1
                self._used = time.monotonic()

    def _answer(self, request: dict[str, Any], given: ExitStack) -> tuple[dict[str, Any], list[int]]:
        try:
            if request["op"] == "statistics":
                return {"ok": {**self._layers.statistics(), "upcalls": self._layers.upcalls()}}, []
            layout = given.enter_context(self._layers.lay_out(Digest.parse(request["root"])))
        except (CasfsError, StoreError) as error:
            return {"error": type(error).__name__, "text": str(error)}, []
        described = {
            "family": layout.family.name,
            "layers": len(layout.layers),
            "sample": [(path.hex(), str(digest)) for path, digest in layout.sample],
            "fresh_nodes": layout.fresh_nodes,
        }
        return {"ok": described}, [*layout.layers, *layout.fetching]


def main(
    arguments: list[str], find_sources: Callable[[HolderOptions], SourceOptions] = lambda options: options.sources
) -> int:
    """Hold layers until nobody wants them any more; the one argument is a `HolderOptions` as JSON."""
    from casfs.daemon import logging_to
    from casfs.sandbox import enter_namespace

    options = HolderOptions(**json.loads(arguments[0]))
    # A user namespace of its own below the starter's: being started took the privilege there away.
    enter_namespace()
    sources = find_sources(options)
    path = _address(Path(options.store), options.upstream)
    with ExitStack() as ending:
        if not _take_place(path, ending):
            return 0
        listener = ending.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        _listen(listener, path)
        ending.callback(path.unlink, missing_ok=True)
        store = ending.enter_context(Store.open(Path(options.store), create=False, sources=sources))
        ending.enter_context(logging_to(store.layout.log))
        layers = Layers(store, options.budget or None)
        ending.callback(layers.close)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
        _warm(store, layers, Digest.parse(options.warm))
        _Server(layers, listener, options.idle).run()
    return 0


def _take_place(path: Path, ending: ExitStack) -> bool:
    """Be the one holder with that address until `ending`; False if another one is, or is about to be."""
    # A lock and not the address: one that has bound it, and doesn't listen yet, looks like one that was killed.
    place = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    ending.callback(os.close, place)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _listen(listener: socket.socket, path: Path) -> None:
    """Listen at the address, which is this process's; a holder that was killed has left its own behind."""
    path.unlink(missing_ok=True)
    with short_path(path) as address:
        listener.bind(address)
    listener.listen(64)


def _warm(store: Store, layers: Layers, root: Digest) -> None:
    """Make the layers of a root: at the second sight of its subtrees."""
    with suppress(CasfsError, StoreError), store.leases.acquire("holder", [root], "warming"):
        for _ in range(2):
            layers.lay_out(root).close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
