"""What the tests leave behind fails them and is cleaned away; tried on small runs that leave everything behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from casfs.mountinfo import list_mounts
from tests.conftest import Requirements

REPOSITORY = Path(__file__).resolve().parents[2]

LITTER = '''
import os, subprocess, sys, time
from pathlib import Path
import pytest
from casfs.syscalls import mount

def test_leaves_a_mount(tmp_path):
    (tmp_path / "place").mkdir()
    mount("none", str(tmp_path / "place"), "tmpfs", 0, "")

def test_leaves_a_child(tmp_path):
    subprocess.Popen(["sleep", "1000"])

def test_leaves_a_daemon(tmp_path):
    """Its parent ends at once, so nobody's child is left; its directory tells whose it is."""
    (tmp_path / "kept").touch()
    subprocess.run(["sh", "-c", f"exec 9<{tmp_path}/kept; sleep 1001 >/dev/null 2>&1 &"], check=True)

def test_leaves_a_loop_device(tmp_path):
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    subprocess.run(["losetup", "-f", tmp_path / "image"], check=True)

def test_leaves_nothing(tmp_path):
    assert subprocess.run(["true"]).returncode == 0
'''


def run_litter(tmp_path: Path, seconds: str, *options: str) -> tuple[int, str]:
    """Exit code and output of a run of these tests with the project's hygiene; `seconds` marks its daemon."""
    top = tmp_path / "project"
    (top / "tests").mkdir(parents=True)
    (top / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    hygiene = (REPOSITORY / "tests" / "conftest.py").read_text()
    (top / "tests" / "conftest.py").write_text(re.sub(r"(_GRACE_SECONDS) = [\d.]+", r"\1 = 0.3", hygiene))
    (top / "tests" / "test_litter.py").write_text(LITTER.replace("1001", seconds))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--basetemp={tmp_path}/base", "-p", "no:cacheprovider", *options],
        cwd=top,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def processes_named(argument: bytes) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if argument in entry.read_bytes().split(b"\0"):
                found.append(entry.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["alone", "under xdist"])
def test_leftovers_are_named_fail_the_run_and_are_gone(
    tmp_path: Path, requires: Requirements, options: tuple[str, ...]
) -> None:
    requires.loop_devices()
    # A number of our own: the same test may run beside this one.
    seconds = str(100_000 + os.getpid())
    code, output = run_litter(tmp_path, seconds, *options)
    assert code == 1, output
    assert "a tmpfs mount at" in output
    assert "sleep 1000" in output
    assert f"sleep {seconds}" in output
    assert "/dev/loop" in output
    assert "5 passed" in output, "the tests themselves did nothing wrong"
    below = os.fsencode(tmp_path)
    assert not [mount for mount in list_mounts() if mount.path.startswith(below)]
    assert not processes_named(seconds.encode()), output
    loops = subprocess.run(["losetup", "-l", "-O", "BACK-FILE"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in loops


def test_a_lack_is_a_skip_that_says_what_and_a_failure_where_nothing_may_be_lacking() -> None:
    with pytest.raises(pytest.skip.Exception, match="lacking: the program no-such-program"):
        Requirements(strict=False).programs("sh", "no-such-program")
    with pytest.raises(pytest.fail.Exception, match="lacking: the program no-such-program"):
        Requirements(strict=True).programs("no-such-program")
