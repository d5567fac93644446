"""A systemd of one's own: process 1 of namespaces in which there is a unit of ours, and little else.

Its root is a tmpfs in a mount namespace, with the machine's /usr and none of
its units but the targets, so that nothing is set up, loaded or remounted. It
has its own processes, network, control groups (below one that is made for it), and
goes with all that the moment its first process is killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

from tests.conftest import Requirements
from tests.tools.conftest import REPOSITORY, Done, wait_until

_SYSTEMD = "/usr/lib/systemd/systemd"
_PREFIX = "casfs-test-"

_SCRIPT = r"""
set -eu
root=$1 files=$2 repository=$3 environment=$4 python=$5
mount -t tmpfs -o mode=755 tmpfs "$root"
cd "$root"
mkdir -p usr etc proc sys dev run tmp root home var/lib var/tmp opt/casfs opt/environment opt/python old
chmod 1777 tmp var/tmp
mount --rbind /usr usr
for name in bin sbin lib lib32 lib64; do
    if [ -L "/$name" ]; then ln -s "$(readlink "/$name")" "$name"; fi
done
mount --bind "$repository" opt/casfs
mount --bind "$environment" opt/environment
mount --bind "$python" opt/python

mkdir run/targets
cp usr/lib/systemd/system/*.target run/targets
mount -t tmpfs -o mode=755 tmpfs usr/lib/systemd/system
cp run/targets/* usr/lib/systemd/system
mount -t tmpfs -o mode=755 tmpfs usr/lib/systemd/system-generators
mount -t tmpfs -o mode=755 tmpfs usr/local/bin
cp -a "$files"/. .

mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm dev/mqueue
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
for name in null zero full random urandom tty; do
    touch "dev/$name"
    mount --bind "/dev/$name" "dev/$name"
done
pivot_root . old
umount -l old
exec env -i container=casfs-test PATH=/usr/bin:/usr/sbin "$6" --system --unit=basic.target \
    --log-target=null --show-status=no
"""

_PYTHON = """#!/bin/sh
export LD_LIBRARY_PATH=/opt/python/lib PYTHONHOME=/opt/python PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH=/opt/casfs:/opt/environment/{packages}
exec /opt/python/bin/python{version} "$@"
"""
_CASFS = """#!/bin/sh
exec /usr/local/bin/python3 -m tools.main "$@"
"""


class Systemd:
    """A context manager. /usr/local/bin has casfs and python3 there, and nothing else."""

    def __init__(self, directory: Path, requires: Requirements) -> None:
        requires.admin()
        requires.programs("systemctl", "unshare", "nsenter", "setpriv")
        requires.condition(Path(_SYSTEMD).exists(), _SYSTEMD)
        self._files = directory / "files"
        self._root = directory / "root"
        self._group = _make_group(requires)
        packages = Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        self.add("usr/local/bin/python3", _PYTHON.format(packages=packages, version=version), 0o755)
        self.add("usr/local/bin/casfs", _CASFS, 0o755)
        for name, text in (
            ("passwd", "root:x:0:0:root:/root:/bin/sh\n"),
            ("group", "root:x:0:\n"),
            ("machine-id", ""),
            # There is no journal.
            ("systemd/system/service.d/output.conf", "[Service]\nStandardOutput=append:/run/output\n"),
        ):
            self.add(f"etc/{name}", text)

    def add(self, path: str, text: str, mode: int = 0o644) -> None:
        """Put a file into the root to be."""
        file = self._files / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def __enter__(self) -> Systemd:
        self._root.mkdir()
        arguments = [self._root, self._files, REPOSITORY, sys.prefix, sys.base_prefix, _SYSTEMD]
        namespaces = ["--pid", "--mount", "--cgroup", "--uts", "--ipc", "--net", "--propagation", "private"]
        # In the group before the namespace of groups is made, whose root it becomes.
        enter = ["setpriv", "--pdeathsig", "KILL", "sh", "-euc", 'echo $$ >"$0"/cgroup.procs; exec "$@"', self._group]
        unshare = ["unshare", "--fork", "--kill-child", *namespaces]
        self._process = subprocess.Popen(
            [*enter, *unshare, "sh", "-c", _SCRIPT, "sh", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(self._is_up)
        except BaseException:
            self.close()
            raise
        return self

    def _is_up(self) -> bool:
        if self._process.poll() is not None:
            assert self._process.stdout is not None
            raise RuntimeError(f"no systemd: {self._process.returncode} {self._process.stdout.read().decode()}")
        with suppress(OSError, IndexError):
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
            if Path(f"/proc/{children[0]}/comm").read_text() == "systemd\n":
                self.pid = int(children[0])
                return self.run("systemctl", "is-active", "basic.target").code == 0
        return False

    def run(self, *command: str) -> Done:
        """Run a command in there."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--"]
        environment = ["env", "-i", "PATH=/usr/local/bin:/usr/bin", "LC_ALL=C.UTF-8", "SYSTEMD_COLORS=0"]
        done = subprocess.run(
            [*enter, *environment, *command],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def ok(self, *command: str) -> str:
        """Run what must succeed; returns what it says."""
        done = self.run(*command)
        assert done.code == 0, f"{done.out}{done.err}{self.said}"
        return done.out

    @property
    def said(self) -> str:
        """What its services have said."""
        return self.run("cat", "/run/output").out

    def close(self) -> None:
        """Kill everything in there; harmless when repeated."""
        self._process.kill()
        self._process.communicate()
        _remove_group(Path(self._group))

    def __exit__(self, *_: object) -> None:
        self.close()


def _make_group(requires: Requirements) -> str:
    """A new control group of version 2. Those that killed runs have left go now."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    tops = [Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"]
    requires.condition(tops, "control groups of version 2")
    for left in tops[0].glob(f"{_PREFIX}*"):
        if not Path(f"/proc/{left.name.removeprefix(_PREFIX)}").exists():
            _remove_group(left)
    group = tops[0] / f"{_PREFIX}{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        requires.lacking(f"a control group of one's own: {error.strerror}")
    return str(group)


def _remove_group(group: Path) -> None:
    """Remove it and those below, as soon as the kernel has buried who was in there."""
    deadline = time.monotonic() + 30
    while group.exists():
        for directory, _, _ in os.walk(group, topdown=False):
            with suppress(OSError):
                os.rmdir(directory)
        assert time.monotonic() < deadline, f"{group} can't be removed"
        time.sleep(0.01)
