"""The command as people meet it: a process, with a store and settings of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from casfs.fusemount import DEVICE
from casfs.mountinfo import list_mounts
from casfs.syscalls import MNT_DETACH, has_admin_capability, umount

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Done:
    """What a finished command left: exit code, standard output and error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, read as JSON."""
        return json.loads(self.out)


class Casfs:
    """Runs ``casfs`` with one store; what it is given is its command line."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("CASFS_", "XDG_"))
        }
        self.environment |= {
            "CASFS_STORE": str(self.store),
            "XDG_CONFIG_HOME": str(directory / "config"),
            "XDG_CACHE_HOME": str(directory / "cache"),
            "PYTHONPATH": str(REPOSITORY),
        }

    @property
    def command(self) -> list[str]:
        """The words that start it."""
        return [sys.executable, "-m", "tools.main"]

    def __call__(self, *arguments: str | Path, stdin: str = "", user: int | None = None) -> Done:
        """Run to the end; the test says which exit code it expects."""
        done = subprocess.run(
            [*self.command, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="surrogateescape",
            cwd=self.directory,
            env=self.environment,
            user=user,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def ok(self, *arguments: str | Path, stdin: str = "") -> Done:
        """Run what must succeed."""
        done = self(*arguments, stdin=stdin)
        assert done.code == 0, done.err
        return done

    def start(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        """Begin, and don't wait. In a session of its own, so that signals reach nobody else."""
        return subprocess.Popen(
            [*self.command, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.directory,
            env=self.environment,
            start_new_session=True,
        )


@pytest.fixture
def casfs(tmp_path: Path) -> Casfs:
    """The command, with a new store."""
    return Casfs(tmp_path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with a bit of everything."""
    top = tmp_path / "tree"
    (top / "include" / "deep").mkdir(parents=True)
    (top / "empty").mkdir()
    (top / "include" / "a.h").write_text("#define A 1\n")
    (top / "include" / "deep" / "b.h").write_text("#define B 2\n")
    (top / "same.h").write_text("#define A 1\n")
    (top / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (top / "run.sh").chmod(0o755)
    (top / "nothing").write_bytes(b"")
    (top / "link").symlink_to("include/a.h")
    (top / "outside").symlink_to("/etc/hostname")
    (top / "50% of\nß.txt").write_text("odd\n")
    return top


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """An empty directory; whatever is mounted there or below when the test ends is taken away."""
    reason = why_no_mounts()
    if reason:
        pytest.skip(reason)
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    below = os.fsencode(path)
    for mount in reversed(list_mounts()):
        if mount.path == below or mount.path.startswith(below + b"/"):
            if has_admin_capability():
                umount(mount.path, MNT_DETACH)
            else:
                subprocess.run(["fusermount3", "-uz", mount.path], check=True)


def why_no_mounts() -> str | None:
    """What this machine or user lacks to mount, or None."""
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return f"needs {DEVICE}, readable and writable"
    if not has_admin_capability():
        return "needs CAP_SYS_ADMIN, to mount and to clean up"
    return None


@pytest.fixture
def as_root() -> None:
    """For tests that change users or mount file systems of their own."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
