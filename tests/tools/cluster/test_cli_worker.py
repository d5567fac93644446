"""`casfs worker` on the command line: what it refuses, and what it says."""

from __future__ import annotations

import pytest

from tests.tools.conftest import Casfs, wait_until
from tools.exits import Exit

GRID = ("--buildgrid", "grpc://127.0.0.1:1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "for whom? give --buildgrid URL or --buildbarn URL"),
        (("--buildgrid", "http://127.0.0.1"), "write grpc://HOST[:PORT][/INSTANCE]"),
        (("--buildbarn", "grpc://127.0.0.1:1"), "--buildbarn needs --upstream"),
        ((*GRID, "--token", "absent"), "can't read"),
        (("--buildgrid", "grpc://192.0.2.1:1", "--token", "token"), "a token would be sent in plain text"),
        ((*GRID, "--tls-ca", "token"), "TLS files are for grpcs://"),
        ((*GRID, "--jobs", "0"), "--jobs 0"),
        ((*GRID, "--property", "pool"), "write NAME=VALUE"),
        ((*GRID, "--size-class", "-1"), "--size-class -1"),
        ((*GRID, "--max-size", "much"), "not a size"),
        ((*GRID, "--http-listen", "0.0.0.0:0"), "give --insecure if the network is to be trusted"),
        ((*GRID, "--http-listen", ":0"), "can be reached from other machines, in plain text"),
        ((*GRID, "--http-listen", "here"), "no place to listen at"),
    ],
)
def test_what_cant_be_is_refused_in_a_line(casfs: Casfs, arguments: tuple[str, ...], said: str) -> None:
    (casfs.directory / "token").write_text("secret\n")
    assert said in casfs.fails(Exit.USAGE, "worker", *arguments)


def test_a_configuration_may_name_the_scheduler_and_but_one(casfs: Casfs) -> None:
    place = casfs.directory / "config" / "casfs"
    place.mkdir(parents=True)
    (place / "config.toml").write_text('[worker]\nbuildgrid = "grpc://a"\nbuildbarn = "grpc://b"\n')
    assert "not both" in casfs.fails(Exit.USAGE, "worker")
    (place / "config.toml").write_text('[worker]\nbuildbarn = "grpc://b"\n')
    assert "--buildbarn needs --upstream" in casfs.fails(Exit.USAGE, "worker")
    # The command line says it anew, whichever of the two it names.
    assert "can't read" in casfs.fails(Exit.USAGE, "worker", *GRID, "--token", "absent")
    (place / "config.toml").write_text('[worker]\nhttp-listen = "0.0.0.0:0"\n')
    assert "--insecure" in casfs.fails(Exit.USAGE, "worker", *GRID)


def test_a_scheduler_that_isnt_there_is_waited_for(casfs: Casfs) -> None:
    exposed = ("--http-listen", "0.0.0.0:0", "--insecure")
    worker = casfs.start("worker", *GRID, "--name", "nobody's", "--jobs", "2", *exposed)
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"working for grpc://127.0.0.1:1 as nobody's\n"
        assert worker.stdout.readline().startswith(b"numbers at http://0.0.0.0:")
        wait_until(lambda: "trying again" in (casfs.store / "casfs.log").read_text())
        assert worker.poll() is None
    finally:
        worker.terminate()
        _, err = worker.communicate(timeout=30)
    assert (worker.returncode, err) == (0, b"")


def test_a_worker_whose_store_is_gone_says_so_and_ends(casfs: Casfs) -> None:
    worker = casfs.start("worker", *GRID, "--name", "nobody's")
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"working for grpc://127.0.0.1:1 as nobody's\n"
        casfs.store.rename(casfs.directory / "away")
        _, err = worker.communicate(timeout=60)
    finally:
        worker.kill()
        worker.communicate()
    assert worker.returncode == Exit.STORE
    # Its log is in the store: that it can't be written may be said, too.
    said = [line for line in err.decode().splitlines() if "can't write to" not in line]
    assert len(said) == 1 and said[0].startswith(f"casfs: the store in {casfs.store} is gone: "), err.decode()
