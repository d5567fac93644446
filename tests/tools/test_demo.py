"""`make demo`, run as people run it: what it claims, how it ends early, and where it can't be given."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import Requirements, find_mounts

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 220

pytestmark = pytest.mark.timeout(SECONDS + 60)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Where the demonstration works: empty afterwards, if it cleans up."""
    path = tmp_path / "demo"
    path.mkdir()
    return path


def start(scratch: Path, before: Sequence[str] = ()) -> subprocess.Popen[str]:
    """In a session of its own, so that signals reach nobody else."""
    return subprocess.Popen(
        [*before, sys.executable, "-m", "tools.demo", "--scratch", str(scratch)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(scratch: Path, before: Sequence[str] = ()) -> tuple[int, str, str]:
    process = start(scratch, before)
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, out, err


def counts_of(out: str, name: str) -> list[int]:
    """A line of the table of upcalls, a number a column."""
    found = re.search(rf"^  {name} +(.*)$", out, re.MULTILINE)
    assert found is not None, out
    return [int(count.replace(",", "")) for count in found[1].split()]


def test_every_claim_holds_and_nothing_is_left(scratch: Path, requires: Requirements) -> None:
    requires.admin()
    requires.fuse()
    requires.programs("g++")
    code, out, err = run(scratch)
    assert (code, err) == (0, ""), out
    assert len(re.findall(r"^  ok   ", out, re.MULTILINE)) == 8
    assert "NOT" not in out
    ingested = re.search(r"^ingested +([\d,]+) files", out, re.MULTILINE)
    assert ingested and int(ingested[1].replace(",", "")) > 1000
    assert re.search(r"^upcalls of the compilation +passthrough +native$", out, re.MULTILINE)
    passed, native = counts_of(out, "READ")
    assert passed == 0 and native > 0
    assert counts_of(out, "OPEN")[0] == counts_of(out, "OPEN")[1] > 100
    assert not list(scratch.iterdir())


def test_ctrl_c_while_something_is_mounted_leaves_nothing(scratch: Path, requires: Requirements) -> None:
    requires.fuse()
    requires.programs("g++")
    process = start(scratch)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("mounted"):
                break
        assert find_mounts(os.fsencode(scratch))
        time.sleep(0.2)  # the compiler is at work now
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT
    assert "taken away again" in err and "Traceback" not in err
    assert not find_mounts(os.fsencode(scratch))
    assert not list(scratch.iterdir())


def test_where_nothing_can_be_mounted_it_says_what_is_missing(scratch: Path, requires: Requirements) -> None:
    requires.admin()
    requires.programs("g++", "setpriv")
    code, out, err = run(scratch, ["setpriv", "--bounding-set=-sys_admin"])
    assert code == 2
    assert "the demonstration can't be given: can't mount" in err and "casfs doctor" in err
    assert "Traceback" not in err
    assert "ingested" not in out, "said before the work is done"
    assert not list(scratch.iterdir())


@pytest.mark.long
def test_without_the_privilege_for_passthrough_it_says_why_and_shows_the_rest(
    scratch: Path, requires: Requirements
) -> None:
    """In a user namespace one may mount, and not register backing files."""
    requires.fuse()
    requires.programs("g++", "unshare")
    into = ["unshare", "--user", "--map-root-user", "--mount"]
    requires.condition(not subprocess.run([*into, "true"], check=False).returncode, "user namespaces")
    code, out, _ = run(scratch, into)
    assert code == 0, out
    assert "passthrough can't be used" in out and "NOT" not in out
    assert counts_of(out, "READ")[0] > 0
    assert len(re.findall(r"^  ok   ", out, re.MULTILINE)) == 7
    assert not list(scratch.iterdir())
