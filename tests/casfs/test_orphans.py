"""A process that runs commands is killed just when bubblewrap starts: nothing of it stays, whatever it had come to."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casfs.orphans import end_commands
from casfs.scratch import clear_leftovers
from store.digest import Digest
from store.importing import ScanOptions
from store.repository import Store
from tests.conftest import Requirements

REPOSITORY = Path(__file__).resolve().parents[2]

_OWNER = """
import os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from casfs.orphans import guard_commands
from casfs.sandbox import Sandboxes, enter_namespace
from store.digest import Digest
from store.repository import Store

place, root, command = Path(sys.argv[1]), Digest.parse(sys.argv[2]), sys.argv[3:]
enter_namespace(privileged=False if os.environ["USER_NAMESPACE"] else None)
guard = guard_commands() if os.environ["GUARDED"] else None

def work(number):
    while True:
        with sandboxes.open(root) as sandbox:
            sandbox.run(command, host_root=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

with Store.open(place) as store, Sandboxes(store, guard=guard) as sandboxes, ThreadPoolExecutor(2) as pool:
    print("working", flush=True)
    list(pool.map(work, range(2)))
"""

_BEFORE_IT_IS_BUBBLEWRAP = """#!/bin/sh
echo > {reached}/$$
read line < {fifo}
exec {bwrap} "$@"
"""

_BEFORE_ITS_FIRST_PROCESS_BEGINS = """#!/bin/bash
exec {bwrap} --unshare-user --info-fd 208 --userns-block-fd 209 "$@" 208> {reached}/$$ 209<> {fifo}
"""
"""bubblewrap has said that it dies with its parent, and its first process, which waits for it, has not."""


@pytest.fixture
def root(store: Store, sample_tree: Path) -> Digest:
    """The sample tree, in the store."""
    return store.importer.from_directories([(b"", sample_tree)], ScanOptions()).digest


@pytest.fixture
def scratch(tmp_path: Path, requires: Requirements) -> Iterator[Path]:
    """Where sandboxes are; nothing runs there at the end."""
    requires.admin()
    requires.programs("bwrap", "bash")
    place = tmp_path / "store" / "scratch"
    yield place
    end_commands(place)


class Owner:
    """A process that runs a command again and again, two at a time."""

    def __init__(self, place: Path, root: Digest, *command: str, guarded: bool, privileged: bool, path: str) -> None:
        environment = {
            **os.environ,
            "PATH": path,
            "GUARDED": "yes" if guarded else "",
            "USER_NAMESPACE": "" if privileged else "yes",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _OWNER, str(place), str(root), *command],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line != b"working\n":
            pytest.fail(self._process.communicate(timeout=30)[1].decode())

    def kill(self) -> bytes:
        """Kill it, and return what it has said when its guard, if it had one, has ended."""
        self._process.kill()
        return self._process.communicate(timeout=30)[1]


def commands_of(scratch: Path) -> list[str]:
    """What runs in sandboxes there, bubblewrap included."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(word.startswith(os.fsencode(scratch)) for word in words):
                found.append(name)
    return found


def wait_for(condition: Callable[[], object]) -> None:
    """Return when it holds."""
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.002)


@pytest.mark.parametrize("privileged", [True, False], ids=["as root", "in a user namespace"])
@pytest.mark.parametrize(
    "script", [_BEFORE_IT_IS_BUBBLEWRAP, _BEFORE_ITS_FIRST_PROCESS_BEGINS], ids=["before", "between"]
)
def test_a_kill_before_bubblewrap_can_notice(
    tmp_path: Path, root: Digest, scratch: Path, script: str, privileged: bool
) -> None:
    reached, fifo = tmp_path / "reached", tmp_path / "fifo"
    os.mkfifo(fifo)
    reached.mkdir()
    program = tmp_path / "bin" / "bwrap"
    program.parent.mkdir()
    program.write_text(script.format(reached=reached, fifo=fifo, bwrap=shutil.which("bwrap")))
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    for guarded in (True, False):
        owner = Owner(tmp_path / "store", root, "sleep", "987", guarded=guarded, privileged=privileged, path=path)
        # Both commands: a fork that is no program yet would hold the owner's locks when that is dead, until it is one.
        wait_for(lambda: sum(file.stat().st_size > 0 for file in reached.iterdir()) == 2)
        assert owner.kill() == b""
        if guarded:
            assert not commands_of(scratch)
        else:
            # So it is the guard who has ended it before; now it is who comes next.
            assert commands_of(scratch)
            clear_leftovers(scratch)
            assert not commands_of(scratch)
        for file in reached.iterdir():
            file.unlink()


def kill_at_random(place: Path, root: Digest, scratch: Path, times: int) -> None:
    generator = random.Random(0)
    for number in range(times):
        options = {"guarded": True, "privileged": number % 2 == 0, "path": os.environ["PATH"]}
        owner = Owner(place, root, "sh", "-c", "sleep 0.001", **options)  # type: ignore[arg-type]
        time.sleep(generator.uniform(0, 0.06))
        assert owner.kill() == b""
        assert not commands_of(scratch), f"after kill {number}"


def test_a_kill_at_any_moment(tmp_path: Path, root: Digest, scratch: Path) -> None:
    kill_at_random(tmp_path / "store", root, scratch, 6)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_many_kills_at_any_moment(tmp_path: Path, root: Digest, scratch: Path) -> None:
    kill_at_random(tmp_path / "store", root, scratch, 60)
