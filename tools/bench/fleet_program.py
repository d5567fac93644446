"""Load of many cold clients, by a program of our own in Go (tools/bench/fleet): no Python client measures itself.

`make bench-tools` builds it into .venv; else it is the one on the PATH.
"""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.server import Served

PROGRAM = "casfs-fleet"
_BEGINS = "the load begins"
_MARGIN_SECONDS = 300.0
"""For what is stored before the clock starts, and the deadline of the last calls after the limit."""
_END_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Load:
    """What is done to a server: `how` is write, batch, http, read or mixed; `limit` is in seconds."""

    how: str
    clients: int
    files: int
    connections: int = 100
    streams: int = 100
    seed: int = 1
    limit: int = 300
    cancelled: float = 0.0
    """The fraction of the calls that are cancelled midway."""

    @property
    def title(self) -> str:
        """Such as "4 x 20,000 write"."""
        return f"{self.clients} x {self.files:,} {self.how}"

    def options(self) -> list[str]:
        """For the program's command line."""
        numbers = {
            "how": self.how,
            "clients": self.clients,
            "files": self.files,
            "conns": self.connections,
            "streams": self.streams,
            "seed": self.seed,
            "limit": f"{self.limit}s",
            "cancel": self.cancelled,
        }
        return [f"-{name}={value}" for name, value in numbers.items()]


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of the calm client's calls, in milliseconds; a call that failed counts as its whole deadline."""

    calls: int
    failed: int
    p50: float
    p99: float
    most: float


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a load. `stored`, `failed` and `cancelled` are blobs, `tries` and `queries` are calls."""

    stored: int
    failed: int
    cancelled: int
    tries: int
    queries: int
    seconds: float
    causes: dict[str, int]
    """Failed tries by their gRPC status."""
    sample: str
    """What the last of them said."""
    health_by: str
    calm: dict[str, Latencies]
    """By call, and of all together as "all"."""


class Storm:
    """A load that is on."""

    def __init__(self, process: subprocess.Popen[str], load: Load) -> None:
        self._process = process
        self._load = load
        self._messages: list[str] = []
        self._begun = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_begun(self) -> None:
        """Until the clock has started. Raises RuntimeError where the server couldn't even be prepared."""
        if not self._begun.wait(_MARGIN_SECONDS) or _BEGINS not in self._messages:
            raise RuntimeError(f"{PROGRAM}: {' '.join(self._messages) or 'it never began'}")

    def is_on(self) -> bool:
        """Whether it goes on."""
        return self._process.poll() is None

    def result(self) -> Result:
        """Its result, after the end. Raises RuntimeError."""
        # It prints less than a pipe holds.
        if self._process.wait(self._load.limit + _MARGIN_SECONDS):
            raise RuntimeError(f"{PROGRAM}: {' '.join(self._messages)[-500:]}")
        output = self._process.stdout.read() if self._process.stdout else ""
        return read_result(json.loads(output))

    def _read(self) -> None:
        for line in self._process.stderr or ():
            self._messages.append(line.strip())
            if self._messages[-1] == _BEGINS:
                self._begun.set()
        self._begun.set()


@contextmanager
def storming(program: Path, load: Load, server: Served) -> Iterator[Storm]:
    """The load on a server; what of it is still on at the end of the context is ended."""
    command = [str(program), "-json", "-addr", server.address, *load.options()]
    if server.http:
        command += ["-http", f"http://{server.http}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Storm(process, load)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def read_result(value: dict[str, Any]) -> Result:
    """The program's JSON."""
    calm = {
        name: Latencies(one["calls"], one["failed"], one["p50_ms"], one["p99_ms"], one["max_ms"])
        for name, one in value["calm"].items()
    }
    names = ("stored", "failed", "cancelled", "tries", "queries", "seconds", "causes", "sample", "health_by")
    return Result(**{name: value[name] for name in names}, calm=calm)
