"""A guard does what a killed process can't do any more, and nothing where it ended by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

_PROCESS = """
import os, signal, sys
from casfs.guarding import Guard

def undo(notes):
    with open(sys.argv[1], "wb") as file:
        file.write(repr(list(notes)).encode())

with Guard(undo, "it was killed") as guard:
    for note in sys.argv[3:]:
        guard.note(os.fsencode(note))
    if sys.argv[2] == "guard too":
        os.kill(guard.process, signal.SIGKILL)
        os.waitpid(guard.process, 0)
        guard.note(b"to nobody")
    else:
        os.kill(os.getpid(), int(sys.argv[2]))
"""


def run(place: Path, how: str, *notes: str) -> subprocess.CompletedProcess[str]:
    """Returns when the guard has ended, too, as it holds standard error."""
    command = [sys.executable, "-c", _PROCESS, str(place), how, *notes]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False)


@pytest.mark.parametrize("notes", [(), ("/a b",), ("/a", "/ü\udcff", "/" + "long" * 500)])
def test_after_a_kill_it_gets_what_was_noted(tmp_path: Path, notes: tuple[str, ...]) -> None:
    done = run(tmp_path / "undone", str(int(signal.SIGKILL)), *notes)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "it was killed\n")
    assert (tmp_path / "undone").read_text() == repr([os.fsencode(note) for note in notes])


def test_it_has_nothing_to_do_where_its_process_ends_by_itself(tmp_path: Path) -> None:
    done = run(tmp_path / "undone", "0", "/a")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "undone").exists()


def test_that_it_was_killed_is_nothing_to_its_process(tmp_path: Path) -> None:
    done = run(tmp_path / "undone", "guard too", "/a")
    assert (done.returncode, done.stderr) == (0, "")


_FORKING = """
import os, signal
from casfs.guarding import Guard

with Guard(lambda notes: print("undone", flush=True)) as guard:
    guard.note(b"/a")
    child = os.fork()
    if child == 0:
        signal.pause()
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
"""


def test_its_end_is_not_that_of_all_forks() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FORKING], capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
