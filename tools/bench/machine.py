"""The machine a benchmark ran on, described without naming it: no host name, no paths."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from casfs.mountinfo import Mount, mount_of
from tools.bench.toolchain import NoCompiler, find_toolchain

_PACKAGES = ("lmdb", "blake3", "pyfuse3")


def describe(scratch: Path) -> dict[str, str | int]:
    """What a reader needs to judge the numbers; `scratch` is where the stores lie."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": _memory_mib(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "store_file_system": _file_system(scratch),
        "python": platform.python_version(),
        **{package: _package(package) for package in _PACKAGES},
        "libfuse": _libfuse(),
        "compiler": _compiler(),
        "privileged": "yes" if os.geteuid() == 0 else "no",
        "load_before": f"{os.getloadavg()[0]:.2f}",
    }


def _file_system(directory: Path) -> str:
    mount = mount_of(directory)
    if lacks_journal(mount):
        return f"{mount.kind}, without a journal"
    return f"{mount.kind}, on a loop device" if mount.source.startswith("/dev/loop") else mount.kind


def lacks_journal(mount: Mount) -> bool:
    """Whether that is an ext4 that says it has no journal."""
    device = Path("/sys/dev/block/{}:{}".format(*mount.device)).resolve().name
    try:
        return Path(f"/sys/fs/ext4/{device}/journal_task").read_text().strip() == "<none>"
    except OSError:
        return False  # another kind, or a kernel that doesn't say


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.processor() or "unknown"


def _memory_mib() -> int:
    found = re.search(r"^MemTotal:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) >> 10 if found else 0


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _libfuse() -> str:
    try:
        asked = subprocess.run(["pkg-config", "--modversion", "fuse3"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "not installed"
    return asked.stdout.strip() or "not installed"


def _compiler() -> str:
    try:
        return find_toolchain().version
    except NoCompiler:
        return "none"
