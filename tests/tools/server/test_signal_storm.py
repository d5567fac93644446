"""Signals at every moment of a storm of uploads, hundreds of times: a server ends each time, and leaves nothing."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from store.repository import Store
from tests.conftest import find_processes
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import SHA256, Client, Server, wait_for
from tests.tools.server.test_server_life import files_in_tmp

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

ROUNDS = 120
CLIENTS = 4
MOST_SECONDS = 0.25
"""After it said that it serves: by then the storm is at its height."""


@contextmanager
def storm(address: str, seed: int) -> Iterator[list[bytes]]:
    """Uploads from several connections until nobody answers; what was acknowledged."""
    acknowledged: list[bytes] = []

    def blow(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        client = Client(address)
        try:
            for upload in range(10_000):
                data = rng.randbytes(rng.choice((100, 3_000, 200_000)))
                client.write(SHA256.of(data), data, piece=50_000, upload=f"{number}-{upload}")
                acknowledged.append(data)
        except grpc.RpcError:
            pass
        finally:
            client.close()

    threads = [threading.Thread(target=blow, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield acknowledged
    finally:
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("signals", [1, 2])
def test_a_server_ends_whenever_it_is_told_to(casfs: Casfs, processes: int, signals: int) -> None:
    rng = random.Random(f"{processes} {signals}")
    uploads = 0
    for turn in range(ROUNDS // 4):
        server = Server(casfs, "--processes", str(processes), "--drain-timeout", "100s")
        number = rng.choice((signal.SIGTERM, signal.SIGINT))
        with storm(server.address, turn) as acknowledged:
            time.sleep(rng.uniform(0, MOST_SECONDS))
            server.process.send_signal(number)
            if signals == 2:
                time.sleep(rng.uniform(0, MOST_SECONDS))
                server.process.send_signal(number)
            _, err = server.process.communicate(timeout=60)
        assert b"casfs: " not in err and b"Traceback" not in err, err
        # One that has ended by the time of the second signal doesn't hear it.
        assert server.process.returncode in ((0, 128 + number) if signals == 2 else (0,)), (turn, err)
        wait_for(lambda: not find_processes(os.fsencode(casfs.directory)))
        with Store.open(casfs.store) as store:
            assert all(store.blobs.has(SHA256.of(data)) for data in acknowledged), turn
        assert files_in_tmp(casfs) == [], turn
        uploads += len(acknowledged)
    assert uploads > ROUNDS, "there was no storm"
    assert casfs("verify").code == 0
