"""The process that keeps layers warm between runs: found by the next, killed without harm, gone when it is not used."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Requirements
from tests.tools.conftest import Casfs, end_holders, find_holders, wait_until

CONFIGURATION = 'run.keep-warm = "{}s"\n'


@pytest.fixture(params=["root", "nobody"])
def runner(request: pytest.FixtureRequest, tmp_path: Path, requires: Requirements) -> Casfs:
    """The command, as root and as an ordinary user, with the manifest ``m`` of a tree that is worth keeping warm."""
    requires.programs("bwrap")
    if request.param == "root":
        requires.admin()
    casfs: Casfs = request.getfixturevalue("casfs" if request.param == "root" else "nobody")
    for directory in range(10):
        place = tmp_path / "large" / f"d{directory}"
        place.mkdir(parents=True)
        for number in range(220):
            (place / f"f{number}").write_text(f"{directory}\n")
    (tmp_path / "large" / "top").write_text("the top\n")
    casfs.ok("manifest", "create", "m", tmp_path / "large")
    configure(casfs, 60)
    return casfs


def configure(casfs: Casfs, seconds: int) -> None:
    path = casfs.directory / "casfs.toml"
    path.write_text(CONFIGURATION.format(seconds))
    path.chmod(0o644)
    casfs.environment["CASFS_CONFIG"] = str(path)


def run(casfs: Casfs, *command: str) -> Any:
    return casfs.ok("run", "m", "--host-root", "--json", "--", *(command or ("cat", "d3/f4", "top"))).json


def warmed(casfs: Casfs) -> int:
    """Run once and wait until the holder that was left behind has its layers; returns its process id."""
    assert run(casfs)["laid_out"] > 2000
    wait_until(lambda: run(casfs)["laid_out"] < 100, 30)
    # One that was started beside it finds its place taken, and ends.
    wait_until(lambda: len(find_holders(casfs)) == 1)
    [pid] = find_holders(casfs)
    return pid


@pytest.fixture(autouse=True)
def _no_holder_stays(runner: Casfs) -> Iterator[None]:
    yield
    end_holders(runner)


def test_the_next_run_finds_the_layers_ready_and_sees_the_same(runner: Casfs) -> None:
    warmed(runner)
    done = runner.ok("run", "m", "--host-root", "--output", "made", "--", "sh", "-c", "cat d3/f4 top | tee made; ls")
    assert done.out.splitlines()[:3] == ["3", "the top", "d0"]
    assert "f4" not in os.listdir(runner.store / "scratch"), "and nothing is left but the holder"


def test_what_it_keeps_is_shown(runner: Casfs) -> None:
    assert runner.ok("stats", "--json").json["warm"] is None
    pid = warmed(runner)
    warm = runner.ok("stats", "--json").json["warm"]
    assert (warm["pid"], warm["layers"]) == (pid, 1)
    assert 2_000_000 < warm["bytes"] < warm["budget"]
    assert f"by process {pid}" in runner.ok("stats").out


def test_killed_while_a_sandbox_runs_it_takes_nothing_away_and_the_next_starts_another(runner: Casfs) -> None:
    pid = warmed(runner)
    process = runner.start(
        "run", "m", "--host-root", "--output", "made", "--", "sh", "-c", "cat d1/f1; sleep 1; cat d2/f2 d9/f9 > made"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"1\n"
    os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert b"made  blake3:" in out
    assert run(runner)["laid_out"] > 2000, "nobody keeps them any more"
    wait_until(lambda: find_holders(runner) not in ([], [pid]))


def test_it_ends_when_nobody_uses_it(runner: Casfs) -> None:
    configure(runner, 1)
    run(runner)
    wait_until(lambda: bool(find_holders(runner)))
    wait_until(lambda: not find_holders(runner), 20)


def test_none_is_started_for_a_small_tree_or_when_not_wanted(runner: Casfs) -> None:
    runner.ok("manifest", "create", "small", small_tree(runner))
    runner.ok("run", "small", "--host-root", "--", "true")
    configure(runner, 0)
    run(runner)
    time.sleep(0.5)
    assert find_holders(runner) == []


def small_tree(casfs: Casfs) -> Path:
    place = casfs.directory.parent / "little"
    place.mkdir()
    (place / "file").write_text("1")
    return place
