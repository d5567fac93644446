"""The command as people meet it: a process, with a store and settings of its own; as root, and as nobody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from casfs.mountinfo import FUSE_TYPE, list_mounts
from casfs.syscalls import MNT_DETACH, has_admin_capability, umount
from tests.conftest import Requirements, find_children, find_processes

REPOSITORY = Path(__file__).resolve().parents[2]
NOBODY = 65534


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Return once the condition holds; fail the test if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("waited in vain")
        time.sleep(0.005)


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
    """Runs ``casfs`` with one store; what it is given is its command line.

    `prefix` is what starts it: nothing, or the words that take it to another namespace and user.
    """

    def __init__(self, directory: Path, prefix: tuple[str, ...] = ()) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.prefix = prefix
        # The runtime directory stays: by it the leftovers of a test are found.
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if name == "CASFS_RUNTIME_DIR" or not name.startswith(("CASFS_", "PYTHONUNBUFFERED", "XDG_"))
        }
        self.environment |= {
            "CASFS_STORE": str(self.store),
            "XDG_CONFIG_HOME": str(directory / "config"),
            "XDG_CACHE_HOME": str(directory / "cache"),
            "PYTHONPATH": str(REPOSITORY),
        }

    def within(self, namespace: Namespace) -> Casfs:
        """The same command, run where that namespace's mounts are seen."""
        # Entering a mount namespace loses the working directory.
        return Casfs(self.directory, (*namespace.prefix, "env", "-C", str(self.directory)))

    @property
    def command(self) -> list[str]:
        """The words that start it."""
        return [*self.prefix, sys.executable, "-m", "tools.main"]

    def __call__(self, *arguments: str | Path, stdin: str = "") -> Done:
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

    def fails(self, code: int, *arguments: str | Path, stdin: str = "") -> str:
        """Run what must end with that code; returns the one line it says."""
        done = self(*arguments, stdin=stdin)
        assert (done.code, done.out) == (code, ""), done
        assert done.err.startswith("casfs: "), done.err
        assert done.err.count("\n") == 1, done.err
        return done.err

    def start(self, *arguments: str | Path, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Begin, and don't wait. In a session of its own, so that signals reach nobody else."""
        return subprocess.Popen(
            [*self.command, *map(str, arguments)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.directory,
            env=self.environment,
            start_new_session=True,
        )


def find_holders(casfs: Casfs) -> list[int]:
    """The processes that keep layers warm for these commands."""
    own = find_children()
    found = find_processes(os.fsencode(casfs.directory))
    return [pid for pid, text in found.items() if "tools.holder" in text and pid not in own]


def end_holders(casfs: Casfs) -> None:
    """Kill them, until none is left: one that had only begun takes the place of the one that was killed."""

    def none_left() -> bool:
        pids = find_holders(casfs)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    wait_until(none_left)


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
def mountpoint(tmp_path: Path, requires: Requirements) -> Iterator[Path]:
    """An empty directory; whatever is mounted there or below when the test ends is taken away."""
    requires.fuse()
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


class Namespace:
    """A mount namespace that a process keeps: what is mounted in it is seen nowhere else, and goes with it."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "infinity"])
        self._name = Path(f"/proc/{self._holder.pid}/ns/mnt")
        # unshare(1) makes mounts private after it has made the namespace, and is sleep after that.
        wait_until(lambda: Path(f"/proc/{self._holder.pid}/comm").read_text() == "sleep\n")
        self._id = os.readlink(self._name)
        # Copies of the mounts of tests that run beside this one: their daemons would live as long as this.
        for mount in reversed(list_mounts()):
            if mount.kind == FUSE_TYPE:
                subprocess.run([*self.prefix, "umount", "--lazy", mount.path], check=False, stderr=subprocess.DEVNULL)

    @property
    def prefix(self) -> tuple[str, ...]:
        """The words that run a command in there."""
        return ("nsenter", f"--mount={self._name}", "--")

    def run(self, script: str) -> None:
        """Run shell commands in there."""
        subprocess.run([*self.prefix, "sh", "-euc", script], check=True)

    def open_ways_to(self, *paths: Path) -> None:
        """Let everybody reach these places: directories above that keep others out are covered by ones that don't."""
        script = ["mount -t tmpfs -o mode=755 tmpfs /mnt"]
        covers = set()
        for number, path in enumerate(paths):
            script += [f"mkdir /mnt/{number}", f"mount --rbind '{path}' /mnt/{number}"]
            covers |= {next((d for d in reversed(path.parents) if not d.stat().st_mode & 0o001), None)}
        script += [f"mount -t tmpfs -o mode=755 tmpfs '{cover}'" for cover in covers if cover is not None]
        for number, path in enumerate(paths):
            script += [f"mkdir -p '{path}'", f"mount --rbind /mnt/{number} '{path}'"]
        self.run("\n".join(script))

    def close(self) -> None:
        """End every process in there."""

        def inhabitants() -> list[int]:
            found = []
            for entry in os.listdir("/proc"):
                with suppress(OSError):
                    if entry.isdigit() and os.readlink(f"/proc/{entry}/ns/mnt") == self._id:
                        found.append(int(entry))
            return found

        for pid in inhabitants():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._holder.wait()
        wait_until(lambda: not inhabitants())


@pytest.fixture
def namespace(requires: Requirements) -> Iterator[Namespace]:
    """A mount namespace for this test."""
    requires.admin()
    requires.programs("unshare", "nsenter")
    space = Namespace()
    yield space
    space.close()


@pytest.fixture
def nobody(namespace: Namespace, requires: Requirements, tmp_path: Path) -> Casfs:
    """The command as an ordinary user has it: in a home of its own, with a FUSE device that everybody may open."""
    requires.fuse()
    requires.programs("setpriv", "fusermount3")
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    tmp_path.chmod(0o755)
    namespace.open_ways_to(tmp_path, REPOSITORY, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve())
    namespace.run("mknod -m 666 /mnt/fuse c 10 229; mount --bind /mnt/fuse /dev/fuse")
    drop = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--")
    command = Casfs(home, (*namespace.prefix, *drop, "env", "-C", str(home)))
    command.environment |= {"HOME": str(home), "CASFS_RUNTIME_DIR": str(home / "run")}
    return command
