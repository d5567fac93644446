"""Talking to the daemon behind a mount: one JSON object a line over a Unix socket.

The socket's name is the device number of the mount, in a directory that only
the mount's owner may enter, so that it is found from the mount point alone:

    $CASFS_RUNTIME_DIR, $XDG_RUNTIME_DIR/casfs, /run/casfs as root, else /tmp/casfs-<uid>

A request is ``{"op": name, …}``, an answer ``{"ok": …}`` or ``{"error": text, "input": whether the request is wrong}``.
A connection takes one request after the other. The server runs in a thread of its own beside the session, and so does
each connection.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import socketserver
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from casfs.changes import NOT_STEERABLE, Change, encode_changes
from casfs.errors import BadChange, MountError, NotMounted
from casfs.mountinfo import Mount, find_mount_at
from store.errors import BadInput

log = logging.getLogger("casfs")

_TIMEOUT_SECONDS = 5.0
_REMAP_SECONDS = 600.0
_LONGEST = 64 << 20
"""Bytes of a request: some hundred thousand changes."""

Operation = Callable[[dict[str, Any]], Any]


def runtime_directory() -> Path:
    """Where this user's sockets are; made if missing. Raises MountError if somebody else owns it."""
    chosen = os.environ.get("CASFS_RUNTIME_DIR")
    if chosen:
        path = Path(chosen)
    elif os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(os.environ["XDG_RUNTIME_DIR"]) / "casfs"
    elif os.geteuid() == 0:
        path = Path("/run/casfs")
    else:
        path = Path(f"/tmp/casfs-{os.geteuid()}")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat(follow_symlinks=False)
    except OSError as error:
        raise MountError(f"can't use the runtime directory {path}: {error.strerror}; set CASFS_RUNTIME_DIR") from error
    if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
        raise MountError(f"the runtime directory {path} belongs to somebody else; set CASFS_RUNTIME_DIR")
    return path


def _socket_of(mount: Mount) -> Path:
    return runtime_directory() / f"{mount.device[0]}-{mount.device[1]}.sock"


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    # A connect that finds the queue full fails at once (EAGAIN), as a client has a timeout.
    request_queue_size = 128


class ControlServer:
    """Answers requests about one mount until `close`."""

    def __init__(self, mount: Mount, operations: dict[str, Operation]) -> None:
        self._path = _socket_of(mount)
        self._connections = connections = set[socket.socket]()
        self._closing = closing = threading.Event()

        class Handler(socketserver.StreamRequestHandler):
            timeout = _TIMEOUT_SECONDS

            def handle(self) -> None:
                connections.add(self.connection)
                try:
                    line = self.rfile.readline(_LONGEST)
                    while not closing.is_set():
                        self.wfile.write(_answer(line, operations) + b"\n")
                        # Whoever has asked may take as long as they like until they ask again.
                        self.connection.settimeout(None)
                        if not line.endswith(b"\n") or not (line := self.rfile.readline(_LONGEST)):
                            break
                except OSError:
                    pass
                finally:
                    connections.discard(self.connection)

        with _names_locked(self._path.parent), short_path(self._path) as address:
            self._path.unlink(missing_ok=True)  # as `remove_stale_socket` says
            self._server = _Server(address, Handler)
            self._identity = self._path.stat(follow_symlinks=False).st_ino
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # Not `serve_forever`: that looks twice a second whether it shall end, and `close` would wait for it.
        while not self._closing.is_set():
            try:
                connection, address = self._server.get_request()
            except OSError:
                # Closed (EINVAL); or nobody can be served now (EMFILE): not in a busy loop, then.
                if not self._closing.is_set():
                    time.sleep(0.1)
                continue
            self._server.process_request(connection, address)

    def close(self) -> None:
        """Stop answering and remove the socket."""
        self._closing.set()
        # On a listening socket: wakes the thread that waits in accept.
        self._server.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for connection in list(self._connections):
            # Whoever is being answered gets the answer; whoever waits for nothing has to know.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
        with _names_locked(self._path.parent), contextlib.suppress(FileNotFoundError):
            # Our mount is gone already, so a new one may have its device number, and this name.
            if self._path.stat(follow_symlinks=False).st_ino == self._identity:
                self._path.unlink()
        # Last: as long as the socket is open, no other can have its inode number.
        self._server.server_close()


def remove_stale_socket(mount: Mount) -> None:
    """For a new mount that no process serves: nobody would answer at a socket there.

    A daemon that was killed leaves its socket, and the device number of its mount is free for others.
    """
    path = _socket_of(mount)
    with _names_locked(path.parent):
        path.unlink(missing_ok=True)


def _answer(line: bytes, operations: dict[str, Operation]) -> bytes:
    try:
        request = json.loads(line)
        operation = operations[request["op"]]
    except (ValueError, KeyError, TypeError):
        return json.dumps({"error": f"not a request this daemon knows: {line[:100]!r}"}).encode()
    try:
        return json.dumps({"ok": operation(request)}).encode()
    except (BadChange, BadInput) as error:
        return json.dumps({"error": str(error), "input": True}).encode()
    except Exception as error:
        log.exception("control request %s", request["op"])
        return json.dumps({"error": str(error)}).encode()


class Connection:
    """Asks the daemon behind a mount, as often as one likes; a context manager, for one thread. `steer` makes one."""

    def __init__(self, mountpoint: Path, mount: Mount) -> None:
        """Raises MountError where nobody answers."""
        self._mountpoint = mountpoint
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            with short_path(_socket_of(mount)) as address:
                self._socket.settimeout(_TIMEOUT_SECONDS)
                self._socket.connect(address)
        except OSError as error:
            self._socket.close()
            raise self._unanswered(error) from error
        self._answers = self._socket.makefile("rb")

    def call(self, op: str, *, timeout: float = _TIMEOUT_SECONDS, **arguments: Any) -> Any:
        """Ask, and wait for so many seconds at most.

        Raises BadChange for a request that can't be met as it is, or MountError where nobody answers any more.
        """
        try:
            self._socket.settimeout(timeout)
            self._socket.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
            line = self._answers.readline()
        except OSError as error:
            raise self._unanswered(error) from error
        if not line:
            raise MountError(f"the daemon of {self._mountpoint} ended without an answer")
        answer = json.loads(line)
        if "input" in answer:
            raise BadChange(answer["error"])
        if "error" in answer:
            raise MountError(f"{op} of {self._mountpoint}: {answer['error']}")
        return answer["ok"]

    def remap(self, changes: Iterable[Change], *, timeout: float = _REMAP_SECONDS) -> int:
        """Change what the mount shows, all or nothing; returns how many names the kernel had cached.

        Raises BadChange, MountError.
        """
        return int(self.call("remap", timeout=timeout, changes=encode_changes(changes)))

    def close(self) -> None:
        """End it; harmless when repeated."""
        self._answers.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unanswered(self, error: OSError) -> MountError:
        return MountError(
            f"the daemon of {self._mountpoint} doesn't answer ({error.strerror or error}): it may have been killed, "
            f"or belong to another user; 'casfs umount {self._mountpoint}' clears the mount"
        )


def call(mountpoint: Path, op: str) -> Any:
    """Ask the daemon behind a mount once. Raises NotMounted; as `Connection.call`."""
    with Connection(mountpoint, _get_mount(mountpoint)) as connection:
        return connection.call(op)


def _get_mount(mountpoint: Path) -> Mount:
    mount = find_mount_at(mountpoint)
    if mount is None or not mount.is_casfs:
        raise NotMounted(f"there is no casfs mount at {mountpoint}")
    return mount


def _is_served_by_nobody(mount: Mount) -> bool:
    return mount.is_of_kernel_engine and not _socket_of(mount).exists()


def statistics(mountpoint: Path) -> dict[str, Any]:
    """What the session behind a mount counted: ``engine``, ``upcalls`` by opcode and more.

    Of a mount that no process serves there is nothing more.
    """
    mount = _get_mount(mountpoint)
    if _is_served_by_nobody(mount):
        why = "no process serves this mount"
        return {"engine": "kernel", "why": why, "upcalls": {"READ": 0}, "served_bytes": 0, "failed_opens": 0}
    with Connection(mountpoint, mount) as connection:
        result: dict[str, Any] = connection.call("statistics")
    return result


def steer(mountpoint: Path) -> Connection:
    """For changing what a mount shows many times over: ``with steer(place) as mount: mount.remap([…])``.

    Raises BadChange for a mount that can't be changed, NotMounted, MountError.
    """
    mount = _get_mount(mountpoint)
    if _is_served_by_nobody(mount):
        raise BadChange(NOT_STEERABLE)
    return Connection(mountpoint, mount)


def remap(mountpoint: Path, changes: Iterable[Change], *, timeout: float = _REMAP_SECONDS) -> int:
    """Change what a mount shows once: as `steer` and `Connection.remap`."""
    with steer(mountpoint) as connection:
        return connection.remap(changes, timeout=timeout)


@contextlib.contextmanager
def _names_locked(directory: Path) -> Iterator[None]:
    """Held while a socket gets or loses its name."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for a socket that fits into the 107 bytes there are for it, through its directory's descriptor."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
