"""Downloads over HTTP, of blobs in the page cache: wrk is the client, nginx serves the same files beside casfs.

    casfs    `casfs serve --http-listen`, as it is by default
    nginx    one process, sendfile on, no log: the files of the store by their names

One connection, and 32, for two seconds each, on the same cores as the servers.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from store.digest import DigestFunction
from store.repository import Store
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.server import CASFS, Served, casfs_command, serving

NGINX = "nginx"
WRK = "wrk"
_SIZES = {"64 KiB": 64 << 10, "1 MiB": 1 << 20, "4 MiB": 4 << 20}
_CONNECTIONS = (1, 32)
_TO_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_LARGE = 1 << 20
_LEVEL = 0.95
"""Of nginx's rate counts as nginx's speed."""
_CONFIGURATION = """
daemon off; master_process off; worker_processes 1;
pid {place}/nginx.pid; error_log {place}/nginx.log;
events {{ }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000;
  client_body_temp_path {place}/body; proxy_temp_path {place}/proxy; fastcgi_temp_path {place}/fastcgi;
  uwsgi_temp_path {place}/uwsgi; scgi_temp_path {place}/scgi;
  server {{
    listen {address}; root {blobs};
    # As clients of a cache ask for them.
    rewrite "^/((?:ac|cas)/)([0-9a-f]{{2}})([0-9a-f]{{62}})$" /$1$2/$2$3 break;
  }}
}}
"""


def run(settings: Settings) -> Outcome:
    """Without wrk there is nothing to measure, without nginx nothing beside it."""
    outcome = Outcome()
    missing = [program for program in (WRK, NGINX) if shutil.which(program) is None]
    outcome.notes += [f"{program} is not installed (Debian: {program})" for program in missing]
    if WRK in missing:
        return outcome
    generator = random.Random(0)  # noqa: S311 - bytes that can't be compressed
    place = settings.scratch / "store"
    with Store.open(place) as store, store.ingest() as ingest:
        blobs = {
            name: ingest.add_bytes(generator.randbytes(size), DigestFunction.SHA256) for name, size in _SIZES.items()
        }
    sides = [CASFS] if NGINX in missing else [CASFS, NGINX]
    seconds = settings.size(2, 1)
    for _, side in alternate(sides, settings.rounds(3)):
        with _serving(side, settings.scratch, place) as server:
            for name, digest in blobs.items():
                for connections in _CONNECTIONS:
                    what = f"GET {name}, {connections} in flight"
                    _measure(outcome, what, side, server, f"/cas/{digest.hex}", connections, seconds)
    for name, size in _SIZES.items() if len(sides) > 1 else ():
        if size >= _LARGE:
            what = f"GET {name}, 32 in flight"
            limit = _LEVEL * outcome.median(what, NGINX)
            outcome.aim(f"GET {name}: at nginx's speed", outcome.median(what, CASFS), limit, "/s", at_most=False)
    return outcome


@contextmanager
def _serving(side: str, scratch: Path, store: Path) -> Iterator[Served]:
    if side == CASFS:
        with serving([*casfs_command(store), "--http-listen", "127.0.0.1:0"]) as server:
            yield server._replace(address=server.http)
        return
    with serving_by_nginx(scratch, store / "blobs") as server:
        yield server


@contextmanager
def serving_by_nginx(scratch: Path, blobs: Path) -> Iterator[Served]:
    """What nginx makes of a directory in the layout of Bazel's disk cache: a cache to read from."""
    address = free_address()
    configuration = scratch / "nginx.conf"
    configuration.write_text(_CONFIGURATION.format(place=scratch, address=address, blobs=blobs))
    process = subprocess.Popen([NGINX, "-c", str(configuration), "-e", str(scratch / "nginx.log")])
    try:
        wait_for(address)
        yield Served(address, process.pid, address)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def free_address() -> str:
    """Where a server can listen that can't choose a port by itself."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def wait_for(address: str, seconds: float = 30.0) -> None:
    """Until something listens there. Raises ConnectionRefusedError."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


class Got(NamedTuple):
    """What wrk saw: requests, requests a second, and the latencies (ms) that half and 99 in 100 stayed below."""

    requests: int
    rate: float
    p50: float
    p99: float


def _measure(outcome: Outcome, what: str, side: str, server: Served, path: str, connections: int, seconds: int) -> None:
    before = server.cpu()
    got = _load(f"http://{server.address}{path}", connections, seconds)
    cpu = server.cpu() - before
    outcome.add(what, side, "/s", got.rate)
    outcome.add(f"{what}, p50", side, "ms", got.p50)
    outcome.add(f"{what}, p99", side, "ms", got.p99)
    outcome.add(f"{what}, server CPU", side, "ms", 1000 * cpu / got.requests)


def _load(url: str, connections: int, seconds: int) -> Got:
    command = [WRK, "--threads=1", f"--connections={connections}", f"--duration={seconds}s", "--latency", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + seconds, check=False)
    return read_report(done.stdout)


def read_report(text: str) -> Got:
    """What wrk printed. Raises RuntimeError where requests failed."""
    requests = re.search(r"(\d+) requests in", text)
    rate = re.search(r"Requests/sec:\s*([\d.]+)", text)
    p50, p99 = (re.search(rf"^\s*{percent}%\s+([\d.]+)(us|ms|s)$", text, re.MULTILINE) for percent in (50, 99))
    if not (requests and rate and p50 and p99) or "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(f"{WRK}: {text[-500:]}")
    times = [float(found[1]) * _TO_MS[found[2]] for found in (p50, p99)]
    return Got(int(requests[1]), float(rate[1]), times[0], times[1])
