"""Writing down who touched what of a tree, while it is used: `casfs.trace_format` has the format.

A `Tracer` is told of each upcall by a session that traces
(`casfs.session_traced`, `casfs.session_pyfuse3`), before the upcall is answered.
A line is one write to the file: so whatever a process has got an answer for is
in the trace, whoever is killed afterwards. What was written once isn't written
again, as long as it is remembered (`_REMEMBERED`).

Sessions tell the *thread* that asks; here it becomes its process, whose name is
read each time something is written: a shell's child is the compiler a moment
later. Our own process's looks are left out. A process id that is given to
another process counts as the same one.

Any thread may call.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from casfs.errors import MissingCapability
from casfs.trace_format import BEGINNING, Header, Kind, encode_end, encode_event, encode_header, encode_process
from casfs.tree import NodeId, Tree
from store.digest import Digest
from store.errors import AlreadyExists, BadInput

log = logging.getLogger("casfs")

_REMEMBERED = 1 << 18
"""So many events (about 30 MB) aren't written twice; when there are more, all are forgotten."""


def check_traceable(engine: str) -> str:
    """Why another engine than kernel is taken. Raises MissingCapability where there would be nothing to write down."""
    if engine == "kernel":
        raise MissingCapability(
            "engine kernel can't be traced, as the kernel asks nobody for what it has: "
            "take passthrough or native, or leave it to auto"
        )
    return "it shall be traced, which engine kernel can't be" if engine == "auto" else "asked for"


class Tracing(NamedTuple):
    """That a sandbox is to be traced: into which file, and which outputs it declares."""

    path: Path
    outputs: Sequence[bytes] = ()


class Tracer:
    """Writes one trace; `close` ends it."""

    def __init__(self, path: Path, root: Digest, engine: str, outputs: Sequence[bytes] = ()) -> None:
        """Begins a new file, in the place of an older trace of that name.

        Raises AlreadyExists for a file that is something else, BadInput where it can't be written.
        """
        self.path = path
        self._file = _create(path)
        self._own = os.getpid()
        self._lock = threading.Lock()
        # Under the lock:
        self._seen: set[tuple[Kind, int, int]] = set()
        self._missed: set[tuple[int, bytes]] = set()
        self._opened: set[NodeId] = set()
        self._commands: dict[int, str] = {}
        self._write(encode_header(Header(root, engine, outputs)))

    def note(self, kind: Kind, thread: int, tree: Tree, node: NodeId) -> None:
        """A thread did this to a node."""
        key = (kind, thread, node)
        with self._lock:
            if key not in self._seen:
                if len(self._seen) >= _REMEMBERED:
                    self._seen.clear()
                self._seen.add(key)
                process = _process_of(thread)
                if process != self._own:
                    if kind in (Kind.OPEN, Kind.EXEC):
                        self._opened.add(node)
                    self._put(kind, process, tree.path_of(node))

    def note_miss(self, thread: int, tree: Tree, parent: NodeId, name: bytes) -> None:
        """A thread looked for a name that isn't there."""
        key = (parent, name)
        with self._lock:
            if key not in self._missed:
                process = _process_of(thread)
                if process == self._own:
                    return  # whoever comes next shall be seen
                if len(self._missed) >= _REMEMBERED:
                    self._missed.clear()
                self._missed.add(key)
                above = tree.path_of(parent)
                self._put(Kind.MISS, process, above + b"/" + name if above else name)

    def opened(self) -> int:
        """How many files were opened so far."""
        with self._lock:
            return len(self._opened)

    def _put(self, kind: Kind, process: int, path: bytes) -> None:
        command = _command_of(process)
        line = encode_event(kind, process, path)
        if self._commands.get(process) != command:
            if len(self._commands) >= _REMEMBERED:
                self._commands.clear()
            self._commands[process] = command
            line = encode_process(process, command) + line
        self._write(line)

    def _write(self, line: bytes) -> None:
        """Append; what is traced goes on when that fails, and the trace ends without its last line."""
        if self._file < 0:
            return
        try:
            complete = os.write(self._file, line) == len(line)
            why = "no room"
        except OSError as error:
            complete, why = False, str(error)
        if not complete:
            log.error("the trace %s ends here: %s", self.path, why)
            os.close(self._file)
            self._file = -1

    def close(self) -> None:
        """Write the end; harmless when repeated."""
        with self._lock:
            self._write(encode_end())
            if self._file >= 0:
                os.close(self._file)
                self._file = -1


def _create(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        file = os.open(path, flags, 0o644)
        try:
            if (found := os.pread(file, len(BEGINNING), 0)) and found != BEGINNING:
                raise AlreadyExists(f"{path} exists and is no trace: name another file, or remove it")
            os.ftruncate(file, 0)
        except BaseException:
            os.close(file)
            raise
    except OSError as error:
        raise BadInput(f"can't write the trace {path}: {error.strerror}") from error
    return file


def _process_of(thread: int) -> int:
    """The process of a thread that waits for an answer; the thread itself where /proc doesn't show it."""
    with suppress(OSError, ValueError, IndexError):
        with open(f"/proc/{thread}/status", "rb", buffering=0) as file:
            return int(file.read(1024).split(b"\nTgid:", 1)[1].split(None, 1)[0])
    return thread


def _command_of(process: int) -> str:
    """The name of what a process runs, of which the kernel keeps 15 bytes; empty where /proc doesn't show it."""
    with suppress(OSError):
        with open(f"/proc/{process}/comm", "rb", buffering=0) as file:
            return os.fsdecode(file.read(64).removesuffix(b"\n"))
    return ""
