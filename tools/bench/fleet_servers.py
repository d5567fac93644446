"""The servers that many clients load: casfs, and the caches of others where they are installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tools.bench.cpu_share import cpu_share
from tools.bench.server import CASFS, Served, casfs_command, read_addresses
from tools.bench.server_http import free_address, wait_for

BAZEL_REMOTE = "bazel-remote"
NATIVELINK = "nativelink"
PEERS = (BAZEL_REMOTE, NATIVELINK)
END_SECONDS = 60.0
"""How long a server may take to end after SIGTERM."""
DRAINED_SECONDS = 25.0
"""How long casfs should take at most: by default it lets calls end for 20 s, and then closes what it has open."""
_CACHE_BYTES = 20 << 30


class LoadedServer:
    """A server process that may be too busy to end."""

    def __init__(self, process: subprocess.Popen[str], served: Served, log: Path) -> None:
        self._process = process
        self.served = served
        self._log = log

    def end(self) -> float | None:
        """Seconds from SIGTERM to its end; None if it had to be killed after `END_SECONDS`."""
        began = time.monotonic()
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return None
        return time.monotonic() - began

    def kill(self) -> None:
        """End it at once; harmless when repeated."""
        self._process.kill()
        self._process.wait()

    def complaint(self) -> str:
        """The last line that it logged."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it logged nothing"


def find_sides() -> tuple[list[str], list[str]]:
    """The servers that can be started here, and a sentence for each that can't."""
    found = [name for name in PEERS if shutil.which(name) is not None]
    return [CASFS, *found], [f"{name} was not found on the PATH." for name in PEERS if name not in found]


def serves_http(side: str) -> bool:
    """Whether it has Bazel's cache over HTTP."""
    return side != NATIVELINK


@contextmanager
def loaded_server(
    side: str, place: Path, *, core_percent: int | None = None, options: Sequence[str] = ()
) -> Iterator[LoadedServer]:
    """A fresh server with a new store below `place`, which goes at the end of the context, whatever state it is in.

    `core_percent` holds it to so much of one core. `options` are casfs's. Raises
    Refused where there is no control group for that, RuntimeError where the server doesn't start.
    """
    place.mkdir()
    log = place / "log"
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        share = stack.enter_context(cpu_share(core_percent)) if core_percent else None
        start = {CASFS: _start_casfs, BAZEL_REMOTE: _start_bazel_remote, NATIVELINK: _start_nativelink}[side]
        command, find = start(place)
        with open(log, "w") as file:
            # Only casfs says there where it serves; what others say there must not fill a pipe.
            output = subprocess.PIPE if side == CASFS else file
            process = subprocess.Popen([*command, *options], stdout=output, stderr=file, text=True)
        stack.enter_context(process)
        stack.callback(process.kill)
        try:
            server = LoadedServer(process, find(process), log)
        except (RuntimeError, OSError) as error:
            process.kill()
            raise RuntimeError(f"{side} doesn't start: {error}; {log.read_text(errors='replace')[-500:]}") from error
        if share is not None:
            for pid in server.served.pids:
                share.take(pid)
        yield server


_Started = tuple[list[str], Callable[[subprocess.Popen[str]], Served]]
"""A command, and what finds out where the process serves, once it does."""


def _start_casfs(place: Path) -> _Started:
    command = [*casfs_command(place / "store"), "--http-listen", "127.0.0.1:0"]
    return [sys.executable, "-m", *command], lambda process: read_addresses(process, command)


def _start_bazel_remote(place: Path) -> _Started:
    grpc, http = free_address(), free_address()
    command = [BAZEL_REMOTE, "--dir", str(place / "cache"), "--max_size", str(_CACHE_BYTES >> 30)]
    command += ["--storage_mode", "uncompressed", "--access_log_level", "none"]
    command += ["--grpc_address", grpc, "--http_address", http]
    return command, lambda process: _wait_listening(process, grpc, http)


def _start_nativelink(place: Path) -> _Started:
    address = free_address()

    def files(name: str) -> dict[str, object]:
        directories = {"content_path": str(place / name), "temp_path": str(place / f"{name}-temporary")}
        return {"filesystem": {**directories, "eviction_policy": {"max_bytes": _CACHE_BYTES}}}

    # As the others do, it checks what it is sent.
    checked = {"verify": {"backend": files("cas"), "verify_size": True, "verify_hash": True}}
    services = {
        "cas": [{"instance_name": "", "cas_store": "CAS"}],
        "ac": [{"instance_name": "", "ac_store": "AC"}],
        "bytestream": {"cas_stores": {"": "CAS"}},
        "capabilities": [{"instance_name": ""}],
    }
    configuration = {
        "stores": [{"name": "CAS", **checked}, {"name": "AC", **files("ac")}],
        "servers": [{"listener": {"http": {"socket_address": address}}, "services": services}],
    }
    file = place / "nativelink.json5"
    file.write_text(json.dumps(configuration))
    return [NATIVELINK, str(file)], lambda process: _wait_listening(process, address)


def _wait_listening(process: subprocess.Popen[str], grpc: str, http: str = "") -> Served:
    for address in filter(None, (grpc, http)):
        wait_for(address)
    return Served(grpc, process.pid, http)
