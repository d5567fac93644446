"""A server whose clock is set back a day while it runs: for it alone, by libfaketime; files have the kernel's times."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import HTTP, SHA256, HttpClient, connected, running, wait_for
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.requests import write_digest

SIZE = 100_000
DAY = 86400


@pytest.fixture
def set_clock(casfs: Casfs, requires: Requirements) -> Callable[[int], None]:
    """Set what the command's clock says, in seconds from the right time."""
    libraries = list(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    requires.condition(libraries, "libfaketime")
    file = casfs.directory / "clock"

    def write(seconds: int) -> None:
        new = file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.rename(file)

    write(0)
    casfs.environment |= {
        "LD_PRELOAD": str(libraries[0]),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }
    return write


def blobs(first: int, number: int) -> list[bytes]:
    return [bytes((value,)) * SIZE for value in range(first, first + number)]


def test_a_clock_that_is_set_back_costs_neither_hits_nor_the_room_for_new_blobs(
    casfs: Casfs, set_clock: Callable[[int], None]
) -> None:
    action = SHA256.of(b"an action")
    with (
        running(casfs, *HTTP, "--max-size", "1MB", "--grace", "1s") as server,
        HttpClient(server) as web,
        connected(server) as client,
    ):
        digests = client.add(*blobs(0, 8))
        result = reapi.ActionResult(output_files=[reapi.OutputFile(path="o", digest=write_digest(digests[0]))])
        client.put_result(action, result)
        assert client.result(action) == result

        set_clock(-DAY)
        assert client.result(action) == result
        assert client.missing(digests) == []
        assert client.read(digests[1]) == blobs(1, 1)[0]
        assert web("GET", "/").status == 200

        # All that is here seems to have been used tomorrow. It goes, but only as far as it has to.
        for data in blobs(8, 4):
            path = f"/cas/{SHA256.of(data).hex}"
            wait_for(lambda path=path, data=data: web("PUT", path, data).status == 200)  # type: ignore[misc]
            assert web("GET", path).body == data
        left = len(digests) - len(client.missing(digests))
        numbers = web.metrics()
        assert 4 <= left < len(digests), numbers
        assert numbers["casfs_store_bytes"] <= numbers["casfs_store_limit_bytes"]
        page = web("GET", "/").body.decode()
        assert not re.search(r"[>( ]-\d", page), "a negative age"
        assert server.stop() == 0
    set_clock(0)
    assert casfs.ok("verify").code == 0
