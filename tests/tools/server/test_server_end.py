"""The end of a server in trouble: a loop or threads that hang, impatient people, a store that is gone."""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from casfs.fusemount import attach, detach
from store.repository import Store
from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import (
    HTTP,
    SHA256,
    HttpClient,
    Server,
    alive,
    children,
    connected,
    refused,
    running,
    wait_for,
)
from tests.tools.server.test_ending import APART
from tests.tools.server.test_reload import reload
from tests.tools.server.test_server_life import files_in_tmp, open_upload
from tests.tools.worker.conftest import executing, live_processes, remote_of
from tools.exits import Exit

SHORT = ("--drain-timeout", "1s")
LARGE = bytes(400_000)
"""An upload of it has a file of its own; small ones are gathered in memory."""
LONG = ("--drain-timeout", "200s")
"""A server that waits for it has failed the test."""


def wait(server: Server) -> tuple[int, str]:
    """Its exit code, and what it said on standard error; no signal is sent."""
    _, err = server.process.communicate(timeout=60)
    return server.process.returncode, err.decode()


@contextmanager
def started(casfs: Casfs, *options: str | Path) -> Iterator[Server]:
    """A server that is killed at the end."""
    server = Server(casfs, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


@contextmanager
def dead_disk(place: Path) -> Iterator[Callable[[], object]]:
    """A file system there that answers nothing but how to speak with it; what is yielded waits for a question."""
    device = attach(place)

    def wait_asked() -> None:
        # The question isn't read: who asked could then not even be killed, as on a disk that is really dead.
        with selectors.DefaultSelector() as selector:
            selector.register(device, selectors.EVENT_READ)
            assert selector.select(60), "nobody asked the disk"

    try:
        # FUSE_INIT, answered with a version, sizes and no features: see fuse(4) and linux/fuse.h.
        wait_asked()
        unique = struct.unpack_from("<8xQ", os.read(device, 1 << 20))[0]
        answer = struct.pack("<IIIIHHIIHHI28x", 7, 31, 1 << 17, 0, 16, 12, 1 << 17, 1, 32, 0, 0)
        os.write(device, struct.pack("<IiQ", 16 + len(answer), 0, unique) + answer)
        yield wait_asked
    finally:
        # Whoever waits for it is answered now, with an error.
        os.close(device)
        detach(place, lazy=True)


@contextmanager
def blocked_loop(casfs: Casfs, server: Server) -> Iterator[None]:
    """Inside, its loop reads tokens from a pipe that nobody writes to."""
    tokens = casfs.directory / "tokens"
    tokens.unlink()
    os.mkfifo(tokens)
    server.process.send_signal(signal.SIGHUP)
    ends: list[int] = []

    def is_opened() -> bool:
        with suppress(OSError):  # ENXIO, as long as nobody reads
            ends.append(os.open(tokens, os.O_WRONLY | os.O_NONBLOCK))
        return bool(ends)

    wait_for(is_opened)
    try:
        yield
    finally:
        os.close(ends[0])


@pytest.fixture
def guarded(casfs: Casfs) -> Casfs:
    (casfs.directory / "tokens").write_text("write first-token\n")
    return casfs


def test_a_loop_that_hangs_is_ended_at_the_deadline(guarded: Casfs) -> None:
    with started(guarded, "--tokens", "tokens", *SHORT) as server, blocked_loop(guarded, server):
        server.process.send_signal(signal.SIGTERM)
        code, err = wait(server)
        assert code == Exit.OVERDUE
        assert err.startswith("casfs: not ended in time, SIGTERM came; under way: "), err
        assert "load_tokens" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_server_that_hangs_at_once(guarded: Casfs, number: int) -> None:
    with started(guarded, "--tokens", "tokens", *LONG) as server, blocked_loop(guarded, server):
        server.process.send_signal(signal.SIGTERM)
        time.sleep(APART)
        server.process.send_signal(number)
        assert wait(server) == (128 + number, "")


def test_a_second_signal_ends_a_server_that_drains_at_once(casfs: Casfs) -> None:
    with started(casfs, *LONG) as server, connected(server) as client:
        [digest] = client.add(b"durable")
        call, go_on = open_upload(client, SHA256.of(LARGE), LARGE[:3], "open")
        wait_for(lambda: files_in_tmp(casfs))
        server.process.send_signal(signal.SIGINT)
        time.sleep(APART)
        server.process.send_signal(signal.SIGINT)
        assert wait(server) == (Exit.INTERRUPTED, "")
        go_on.set()
        with pytest.raises(grpc.RpcError):
            call.result(30)
    with Store.open(casfs.store) as store:
        assert store.blobs.has(digest)
    assert files_in_tmp(casfs) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_threads_that_wait_for_a_dead_disk_do_not_hold_up_the_end(
    casfs: Casfs, requires: Requirements, processes: int
) -> None:
    requires.fuse()
    with started(casfs, *SHORT, "--processes", str(processes)) as server, connected(server) as client:
        with dead_disk(casfs.store / "tmp") as wait_asked:
            writing = threading.Thread(target=lambda: refused(lambda: client.write(SHA256.of(b"x"), b"x")))
            writing.start()
            wait_asked()
            server.process.send_signal(signal.SIGTERM)
            code, err = wait(server)
        writing.join(60)
        assert code == Exit.OVERDUE
        assert "not ended in time" in err
        assert "StoringProcess.store_all" in err


def test_processes_that_can_not_end_are_killed_at_the_deadline(casfs: Casfs) -> None:
    with started(casfs, *SHORT, "--processes", "2") as server:
        pids = children(server.process.pid)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        code, err = wait(server)
        assert code == Exit.OVERDUE
        assert err == "casfs: not ended in time, SIGTERM came; under way: 2 of 2 processes\n"
        wait_for(lambda: not any(map(alive, pids)))


def test_a_second_signal_ends_all_processes_at_once(casfs: Casfs) -> None:
    with started(casfs, *LONG, "--processes", "2") as server:
        pids = children(server.process.pid)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(APART)
        assert wait(server) == (Exit.TERMINATED, "")
        wait_for(lambda: not any(map(alive, pids)))


def test_a_signal_to_all_processes_is_one(casfs: Casfs) -> None:
    with started(casfs, *LONG, "--processes", "2") as server, connected(server) as client:
        call, go_on = open_upload(client, SHA256.of(LARGE), LARGE[:2], "open")
        wait_for(lambda: files_in_tmp(casfs))
        # As a terminal does for Ctrl-C: the processes hear it, and then what the first of them passes on.
        os.killpg(server.process.pid, signal.SIGINT)
        time.sleep(APART)
        for pid in children(server.process.pid):
            os.kill(pid, signal.SIGTERM)
        time.sleep(APART)
        go_on.set()
        assert call.result(30).committed_size == 2
        assert wait(server) == (0, "")


def test_a_process_that_dies_ends_all(casfs: Casfs) -> None:
    with started(casfs, "--processes", "2") as server:
        os.kill(children(server.process.pid)[0], signal.SIGKILL)
        assert wait(server) == (Exit.NO, "")


def test_processes_end_with_the_one_that_started_them(casfs: Casfs) -> None:
    with started(casfs, "--processes", "2") as server:
        pids = children(server.process.pid)
        server.process.kill()
        wait_for(lambda: not any(map(alive, pids)))


def test_a_second_signal_ends_the_actions_too(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    word = f"47.{time.monotonic_ns()}"
    with started(casfs, "--execute", "--host-root", *LONG) as server, remote_of(server) as remote:
        states = remote.begin(remote.put(["sh", "-c", f"sleep {word}"]))
        next(states)
        wait_for(lambda: live_processes(word))
        server.process.send_signal(signal.SIGTERM)
        time.sleep(APART)
        server.process.send_signal(signal.SIGTERM)
        assert wait(server) == (Exit.TERMINATED, "")
        wait_for(lambda: not live_processes(word))
        with pytest.raises(grpc.RpcError):
            list(states)
    # What is left in its store is removed by the next.
    with executing(casfs) as server, remote_of(server) as remote:
        assert remote.run(["true"]).result.exit_code == 0
    assert not list((casfs.store / "scratch").glob("*/*"))


def test_tokens_are_read_again_under_load(guarded: Casfs) -> None:
    with running(guarded, "--tokens", "tokens") as server, connected(server, token="first-token") as client:
        ending = threading.Event()

        def load() -> None:
            data = os.urandom(1000)
            while not ending.is_set():
                with suppress(grpc.RpcError):
                    client.write(SHA256.of(data), data)

        threads = [threading.Thread(target=load) for _ in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            reload(server)
        ending.set()
        for thread in threads:
            thread.join()
        assert server.stop() == 0


# The store


def replace_store(store: Path) -> None:
    store.rename(store.with_name("away"))
    Store.open(store).close()


GONE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "deleted": (shutil.rmtree, "it was deleted or renamed"),
    "renamed": (lambda store: store.rename(store.with_name("away")), "it was deleted or renamed"),
    "replaced": (replace_store, "another one is in its place"),
    "emptied": (lambda store: (store / "format").unlink(), "it was deleted or renamed"),
}


@pytest.mark.parametrize(("how", "processes"), [*((how, "1") for how in GONE), ("replaced", "2")])
def test_a_server_whose_store_is_gone_says_so_once_and_ends(casfs: Casfs, how: str, processes: str) -> None:
    lose, said = GONE[how]
    with started(casfs, "--processes", processes) as server, connected(server) as client:
        client.add(b"something")
        lose(casfs.store)
        code, err = wait(server)
        assert (code, err.count("\n")) == (Exit.STORE, 1), err
        assert err.startswith(f"casfs: the store in {casfs.store} is gone: {said}"), err


def test_who_checks_whether_it_lives_is_told_that_the_store_is_gone(casfs: Casfs) -> None:
    with (
        started(casfs, *HTTP, *LONG) as server,
        connected(server) as client,
        HttpClient(server) as web,
    ):
        assert web("GET", "/healthz").status == 200
        health: Any = health_pb2_grpc.HealthStub(client.channel)
        states = health.Watch(health_pb2.HealthCheckRequest())
        assert next(states).status == health_pb2.HealthCheckResponse.SERVING
        # An upload that is on, so that the server has something to wait for.
        host, _, port = server.http_address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=30) as upload:
            head = (
                f"PUT /cas/{SHA256.of(LARGE).hex} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(LARGE)}\r\n\r\n"
            )
            upload.sendall(head.encode() + LARGE[:1])
            wait_for(lambda: files_in_tmp(casfs))
            casfs.store.rename(casfs.directory / "away")
            assert next(states).status == health_pb2.HealthCheckResponse.NOT_SERVING
            answer = web("GET", "/healthz")
            assert answer.status == 503
            assert answer.body.decode().startswith(f"the store in {casfs.store} is gone")
            states.cancel()
        assert wait(server)[0] == Exit.STORE


def test_a_log_that_can_not_be_written_costs_no_reply(casfs: Casfs) -> None:
    with started(casfs) as server, connected(server) as client:
        log = casfs.store / "casfs.log"
        log.unlink()
        log.mkdir()
        # An error that no code is made for.
        (casfs.store / "tmp").rmdir()
        (casfs.store / "tmp").touch()
        for _ in range(3):
            assert refused(lambda: client.write(SHA256.of(b"x"), b"x")) == "INTERNAL"
        assert client.missing([]) == []
        assert server.stop() == 0
        assert server.err == f"casfs: can't write to {log}: Is a directory\n"
