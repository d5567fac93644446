"""A real BuildGrid on loopback, with a PostgreSQL of its own: installed once, started and taken away by tests.

pip installs it, in the versions of config/buildgrid-constraints.txt, into a
virtual environment that is kept among the temporary files of this user.
PostgreSQL is Debian's; its files lie in a directory for as long as it runs,
and it listens at a Unix socket there only.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from tests.conftest import Requirements
from tests.tools.conftest import NOBODY, REPOSITORY
from tools.reapi import methods
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.address import Address, reserve
from tools.upstream.channel import open_channel, start

_PINNED = REPOSITORY / "config" / "buildgrid-constraints.txt"
_START_SECONDS = 60.0

KEEPALIVE_SECONDS = 6
"""How long a worker may be silent before its actions are given to others."""

_CONFIGURATION = (REPOSITORY / "config" / "buildgrid.yml").read_text()


def configure(address: str, database: str, directory: Path, instance: str) -> str:
    """The example's configuration, for another place, and with less patience."""
    text = _CONFIGURATION
    for shown, wanted in (
        ("127.0.0.1:50051", address),
        ("postgresql+psycopg2:///buildgrid", database),
        ("!expand-path $HOME/.cache/buildgrid", f"{directory}/cas"),
        ('name: ""', f'name: "{instance}"'),
        ("keepalive-timeout: 60", f"keepalive-timeout: {KEEPALIVE_SECONDS}"),
    ):
        assert text.count(shown) == 1, shown
        text = text.replace(shown, wanted)
    return text


def find_postgresql() -> Path | None:
    """The directory of initdb and postgres; the newest, where there are several."""
    # Debian keeps it off the PATH, as several versions can be installed.
    found = list(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if found:
        return max(found, key=lambda path: int(re.sub(r"\D", "", path.parts[4]) or 0)).parent
    program = shutil.which("initdb")
    return Path(program).resolve().parent if program else None


def get_environment(requires: Requirements) -> Path:
    """The virtual environment; made if there is none of these versions."""
    kept = Path(tempfile.gettempdir()) / f"casfs-test-downloads-{os.getuid()}"
    kept.mkdir(mode=0o700, exist_ok=True)
    pins = re.findall(r"(?m)^[^#\s].*", _PINNED.read_text())
    wanted = hashlib.sha256(f"{sys.version}{pins}".encode()).hexdigest()[:16]
    environment = kept / f"buildgrid-{wanted}"
    with open(kept / "buildgrid.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (environment / "complete").exists():
            shutil.rmtree(environment, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
            command = [sys.executable, "-m", "pip", "--python", f"{environment}/bin/python", "install", "--quiet"]
            command += ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
            command += ["--requirement", str(_PINNED)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            requires.condition(done.returncode == 0, f"BuildGrid from PyPI: pip says {done.stderr.strip()[-300:]}")
            (environment / "complete").touch()
    return environment


@contextmanager
def postgresql(requires: Requirements) -> Iterator[Path]:
    """A database server that is gone at the end, with its files; where its socket is, for the user casfs."""
    programs = find_postgresql()
    requires.condition(programs is not None, "PostgreSQL (Debian: postgresql)")
    assert programs is not None
    # In a short path that others may enter: sockets' names are short, and initdb isn't for root.
    directory = Path(tempfile.mkdtemp(prefix="casfs-pg-"))
    user: dict[str, int | list[int]] = {}
    if os.getuid() == 0:
        os.chown(directory, NOBODY, NOBODY)
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    data = directory / "data"
    try:
        subprocess.run(
            [programs / "initdb", "--auth=trust", "--username=casfs", "--no-sync", "--encoding=UTF8", "-D", data],
            check=True,
            capture_output=True,
            cwd=directory,
            **user,  # type: ignore[call-overload]
        )
        # What a crash would lose, nobody would miss.
        settings = {"listen_addresses": "", "unix_socket_directories": directory, "fsync": "off", "max_connections": 60}
        command = [programs / "postgres", "-D", data, *(f"-c{name}={value}" for name, value in settings.items())]
        with open(directory / "log", "wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory, **user)  # type: ignore[call-overload]
        try:
            _wait_for_socket(directory / ".s.PGSQL.5432", server, directory / "log")
            yield directory
        finally:
            # Of its signals, the one that ends sessions and waits for nobody.
            server.send_signal(signal.SIGINT)
            server.wait(timeout=30)
    finally:
        shutil.rmtree(directory)


def _wait_for_socket(path: Path, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not path.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"PostgreSQL doesn't start: {log.read_text()[-2000:]}")
        time.sleep(0.02)


class BuildGridServer:
    """A BuildGrid at `address`, which can be stopped and started again."""

    def __init__(self, environment: Path, database: str, directory: Path, address: Address, instance: str) -> None:
        self.address = str(address)
        self.instance = instance
        self.directory = directory
        self._program = environment / "bin" / "bgd"
        self._configuration = directory / "buildgrid.yml"
        self._configuration.write_text(configure(self.address, database, directory, instance))
        subprocess.run([self._program, "migrate", "apply", database], check=True, capture_output=True)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """As in ``--buildgrid``."""
        return f"grpc://{self.address}/{self.instance}".removesuffix("/")

    def start(self) -> None:
        """Start it, and return when it answers."""
        with open(self.directory / "log", "ab") as log:
            command = [str(self._program), "server", "start", "-v", str(self._configuration)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory)
        deadline = time.monotonic() + _START_SECONDS
        with open_channel(self.address) as channel:
            while True:
                try:
                    request = reapi.GetCapabilitiesRequest(instance_name=self.instance)
                    start(channel, methods.GET_CAPABILITIES, request, 5.0)
                    return
                except grpc.RpcError as error:
                    if self._process.poll() is not None or time.monotonic() > deadline:
                        pytest.fail(f"BuildGrid doesn't start: {error}\n{self.log[-3000:]}")
                time.sleep(0.1)

    def stop(self, number: int = signal.SIGKILL) -> None:
        """End it."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(timeout=60)
            self._process = None

    @property
    def log(self) -> str:
        """What it has said so far."""
        return (self.directory / "log").read_text()


@contextmanager
def running_buildgrid(
    requires: Requirements, directory: Path, instance: str = "", host: str = "127.0.0.1"
) -> Iterator[BuildGridServer]:
    """A BuildGrid that is gone at the end."""
    environment = get_environment(requires)
    with ExitStack() as stack:
        database = f"postgresql+psycopg2://casfs@/postgres?host={stack.enter_context(postgresql(requires))}"
        taken, address = reserve(Address(host, 0))
        stack.enter_context(taken)
        server = BuildGridServer(environment, database, directory, address, instance)
        stack.callback(server.stop)
        server.start()
        yield server
