"""The load of many clients: that its program counts what is there, and that servers come up, are held, and end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Requirements
from tools.bench import fleet_builds, fleet_load
from tools.bench.cpu_share import cpu_share
from tools.bench.fleet_load import choose_rows
from tools.bench.fleet_program import PROGRAM, Load, Result, storming
from tools.bench.fleet_servers import PEERS, find_sides, loaded_server, serves_http
from tools.bench.load import get_generator
from tools.bench.measuring import FleetSettings, Settings
from tools.bench.server import CASFS, Served
from tools.bench.workers import Refused

SOURCES = Path(__file__).resolve().parents[2] / "tools" / "bench" / "fleet"
WAYS = ("write", "batch", "http", "read", "mixed")


@pytest.fixture
def program(requires: Requirements) -> Path:
    """The load generator, as `make bench-tools` built it."""
    try:
        return get_generator(PROGRAM)
    except Refused as error:
        requires.lacking(str(error))


def load_server(program: Path, load: Load, server: Served) -> Result:
    with storming(program, load, server) as storm:
        storm.wait_begun()
        return storm.result()


@pytest.mark.long
@pytest.mark.parametrize("how", WAYS)
def test_a_small_load_is_stored_whole(tmp_path: Path, program: Path, how: str) -> None:
    with loaded_server(CASFS, tmp_path / "server") as server:
        result = load_server(program, Load(how, 1, 200, connections=4), server.served)
        assert (result.stored, result.failed, result.cancelled) == (200, 0, 0), result
        assert result.calm["all"].calls > 0 and result.calm["all"].failed == 0
        assert result.health_by == "GET /healthz"
        assert server.end() is not None
        # The calm client has one of its own.
        assert len(list((tmp_path / "server/store/blobs/cas").glob("??/*"))) == 201
    assert not (tmp_path / "server").exists()


@pytest.mark.long
def test_calls_that_the_client_cancels_are_neither_stored_nor_failed(tmp_path: Path, program: Path) -> None:
    with loaded_server(CASFS, tmp_path / "server") as server:
        load = Load("write", 1, 200, connections=4, cancelled=0.5)
        result = load_server(program, load, server.served)
        assert result.stored + result.cancelled == 200 and result.failed == 0
        assert 50 < result.cancelled < 150
        # What was cut off can be stored afterwards.
        again = load_server(program, Load("write", 1, 200, connections=4), server.served)
        assert again.stored == 200


@pytest.mark.long
def test_without_a_server_the_program_says_so(program: Path) -> None:
    with storming(program, Load("write", 1, 10, connections=1), Served("127.0.0.1:9", 0)) as storm:
        with pytest.raises(RuntimeError, match=r"storing a small blob: .*refused"):
            storm.wait_begun()


@pytest.mark.long
@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("-how=nothing", "unknown -how"),
        ("-how=http", "needs the HTTP address"),
        ("-size=3", "-size must be at least 64, got 3"),
        ("-cancel=2", "-cancel must be between 0 and 1, got 2"),
    ],
)
def test_the_program_refuses_wrong_options(program: Path, option: str, complaint: str) -> None:
    done = subprocess.run([str(program), option], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2 and complaint in done.stderr


@pytest.mark.long
@pytest.mark.timeout(480)
def test_the_sources_of_the_program_are_in_order(requires: Requirements) -> None:
    requires.programs("go", "gofmt")
    # Only what `make bench-tools` has fetched: a test doesn't ask the network.
    offline = os.environ | {"GOPROXY": "off", "GOFLAGS": "-mod=readonly"}
    listed = subprocess.run(["go", "list", "-deps", "."], cwd=SOURCES, env=offline, capture_output=True, check=False)
    requires.condition(listed.returncode == 0, "the Go modules of tools/bench/fleet ('make bench-tools' fetches them)")
    for command in (["gofmt", "-l", "."], ["go", "vet", "./..."], ["go", "test", "./..."]):
        done = subprocess.run(command, cwd=SOURCES, env=offline, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert command[0] == "go" or done.stdout == ""


@pytest.mark.long
def test_each_row_is_measured_and_nothing_fails(tmp_path: Path, program: Path) -> None:
    outcome = fleet_load.run(Settings(tmp_path, quick=True))
    for how in ("write", "http", "batch", "read"):
        assert outcome.median(f"1 x 200 {how}: stored", CASFS) == 200
        assert outcome.median(f"1 x 200 {how}: failed", CASFS) == 0
        assert outcome.median(f"1 x 200 {how}: peak memory", CASFS) > 10
        assert outcome.find(f"1 x 200 {how}: from SIGTERM in mid-storm to the end", CASFS) is not None
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.timeout(480)
def test_bazels_build_at_once(tmp_path: Path, requires: Requirements) -> None:
    requires.admin()
    requires.programs("bazel", "bwrap")
    outcome = fleet_builds.run(Settings(tmp_path, quick=True))
    assert outcome.median("2 x 50 files: builds that succeeded", CASFS) == 2, outcome.notes
    held = outcome.find("1 x 50 files, 50% of a core: builds that succeeded", CASFS)
    assert held is not None or any("no control group for the CPU" in note for note in outcome.notes)


def test_a_process_is_held_to_a_part_of_a_core_until_it_ends(requires: Requirements) -> None:
    try:
        with cpu_share(20) as share, subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
            try:
                share.take(process.pid)
                assert f"casfs-bench-{os.getpid()}" in Path(f"/proc/{process.pid}/cgroup").read_text()
            finally:
                process.kill()
    except Refused as error:
        requires.lacking(str(error))
    assert not list(Path("/sys/fs/cgroup").glob(f"*/casfs-bench-{os.getpid()}"))


def test_rows_have_the_numbers_that_were_asked_for(tmp_path: Path) -> None:
    titles = [row.title for row in choose_rows(Settings(tmp_path))]
    assert titles[:3] == ["1 x 20,000 write", "4 x 20,000 write", "16 x 20,000 write"] and len(titles) == 6
    asked = choose_rows(Settings(tmp_path, fleet=FleetSettings(clients=2, files=1000)))
    assert [row.title for row in asked] == [f"2 x 1,000 {how}" for how in ("write", "http", "batch", "read")]


def test_servers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_sides() == ([CASFS], [f"{name} was not found on the PATH." for name in PEERS])
    assert [serves_http(side) for side in (CASFS, *PEERS)] == [True, True, False]
