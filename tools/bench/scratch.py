"""Throw-away stores, mounts and child processes: what the scenarios are made of.

Everything made here is taken away again by its context manager, on Ctrl-C and
SIGTERM too (`ending_on_signals`). No store is open in the calling process while
it forks a daemon: what needs a store runs `in_child`, which also keeps its
memory out of the daemons.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

from casfs import control, mounting, mountpoint
from casfs.errors import CasfsError
from casfs.mountinfo import find_mount
from store.digest import Digest
from store.importing import ScanOptions
from store.repository import Store
from store.scan import Excluded

T = TypeVar("T")

_SETTLE_SECONDS = 0.02
"""RELEASE and FORGET come after the system call that caused them has returned."""


class _Ender:
    """Turns signals into SystemExit, but not while a daemon is on its way: it would be forgotten."""

    def __init__(self) -> None:
        self.holding = 0
        self._pending = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.holding:
            self._pending = number
        else:
            raise SystemExit(128 + number)

    @contextmanager
    def held(self) -> Iterator[None]:
        self.holding += 1
        try:
            yield
        finally:
            self.holding -= 1
        if self._pending and not self.holding:
            raise SystemExit(128 + self._pending)


_ender = _Ender()


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end the program through its `finally` clauses."""
    before = {number: signal.signal(number, _ender) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def scratch_directory(parent: Path | None, purpose: str) -> Iterator[Path]:
    """A temporary directory, below `parent` or where temporary files go."""
    with tempfile.TemporaryDirectory(prefix=f"casfs-{purpose}-", dir=parent, ignore_cleanup_errors=True) as name:
        yield Path(os.path.realpath(name))


def in_child(work: Callable[[], T]) -> T:
    """What `work` returns, run in a forked child process. Raises RuntimeError if it fails there."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            with open(writing, "wb") as pipe:
                pickle.dump(work(), pipe)
            code = 0
        except SystemExit:
            code = 1  # told to end
        except BaseException:  # noqa: BLE001 - whatever it is, it must not run on into the parent's code
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    try:
        with open(reading, "rb") as pipe:
            data = pipe.read()
    except BaseException:
        os.kill(child, signal.SIGTERM)
        raise
    finally:
        _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"a child of the benchmark failed ({os.waitstatus_to_exitcode(status)}); see above")
    return cast(T, pickle.loads(data))  # noqa: S301 - our own child wrote it


def _keep_all(path: bytes) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Ingested:
    """A tree in a store: its root, what it holds, and the seconds it took to get it there."""

    root: Digest
    files: int
    bytes: int
    seconds: float


def make_files(top: Path, count: int, directories: int, size: int = 0) -> list[str]:
    """So many files with different contents, of at least `size` bytes; their paths relative to `top`."""
    names = []
    for directory in range(directories):
        (top / f"d{directory:02}").mkdir(parents=True)
        for file in range(count // directories):
            name = f"d{directory:02}/file{file:03}.h"
            (top / name).write_bytes(name.encode().ljust(size, b"."))
            names.append(name)
    os.sync()  # what is written back later would be measured with the first sides
    return names


def ingest(
    store: Path,
    grafts: list[tuple[bytes, Path]],
    name: str,
    *,
    excluded: Excluded = _keep_all,
    reference: bool = False,
) -> Ingested:
    """Add directories to the store (made if missing) as the manifest `name`; timed without the start of a process.

    `reference`: their files stay where they are.
    """

    def work() -> Ingested:
        with Store.open(store) as opened:
            began = time.perf_counter()
            directory = opened.importer.from_directories(grafts, ScanOptions(excluded=excluded, reference=reference))
            opened.manifests.put(name, directory.digest, "a benchmark", replace=True)
            seconds = time.perf_counter() - began
            return Ingested(directory.digest, directory.files, directory.bytes, seconds)

    return in_child(work)


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Have this process run on one core meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_seconds(pid: int) -> float:
    """The processor time a process has used in all its threads, to the nanosecond.

    From its CPU clock (clock_getcpuclockid(3)): /proc/PID/stat counts in hundredths.
    """
    return time.clock_gettime((~pid << 3) | 2)


@dataclass(frozen=True, slots=True)
class Sample:
    """What some work took: wall seconds, the daemon's processor seconds, and upcalls by opcode."""

    seconds: float
    daemon_seconds: float
    upcalls: dict[str, int]


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount with a daemon of its own."""

    path: Path
    engine: str
    why: str
    pid: int

    def upcalls(self) -> Counter[str]:
        """How many upcalls there have been, by opcode."""
        return Counter(control.statistics(self.path)["upcalls"])

    def peak_memory(self) -> int:
        """The most memory the daemon ever had resident, in bytes."""
        return int(control.statistics(self.path)["peak_memory_bytes"])


def observe(mounted: Mounted | None, work: Callable[[], object]) -> Sample:
    """Run `work`, and say what it took; without a mount there are no upcalls and no daemon."""
    if mounted is None:
        began = time.perf_counter()
        work()
        return Sample(time.perf_counter() - began, 0.0, {})
    before = mounted.upcalls()
    # Between the two questions to the daemon, which cost it some CPU time themselves.
    cpu = cpu_seconds(mounted.pid)
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    time.sleep(_SETTLE_SECONDS)
    cpu = cpu_seconds(mounted.pid) - cpu
    after = mounted.upcalls()
    after.subtract(before)
    return Sample(seconds, cpu, {name: count for name, count in after.items() if count})


@contextmanager
def mounted_tree(store: Path, root: Digest, place: Path, engine: str, name: str | None = None) -> Iterator[Mounted]:
    """The tree, mounted at `place` (made if missing) as long as the context lasts."""
    place.mkdir(exist_ok=True)
    why, daemon = "", None
    if engine == "auto":  # of those with a daemon: it is what is looked at
        engine, why = mounting.choose_engine(engine, store)
    try:
        with _ender.held():
            report = mounting.start(mounting.Request(store, root, place, name), engine=engine)
            daemon = report.pid
        if daemon is None:
            raise RuntimeError(f"engine {report.engine} has no daemon to measure")
        yield Mounted(place, report.engine, why or report.why, daemon)
    finally:
        unmount(place)
        if daemon is not None:
            _end(daemon)


def unmount(place: Path) -> None:
    """Take a casfs mount away if there is one, whatever still uses it."""
    mounted = find_mount(str(place))
    if mounted is None or not mounted.is_casfs:
        return
    try:
        mountpoint.unmount(place)
    except CasfsError:
        with suppress(CasfsError):
            mountpoint.unmount(place, lazy=True)


def _end(daemon: int) -> None:
    """Have the daemon of what was unmounted end, though a mount namespace made meanwhile may have a copy of the mount.

    It would serve that one, and write to its store, which is about to be removed.
    """
    if not wait_ended(daemon, 0):
        with suppress(ProcessLookupError):
            os.kill(daemon, signal.SIGTERM)
        wait_ended(daemon)


def stop(process: subprocess.Popen[Any], seconds: float = 5.0) -> None:
    """Wait for a process of ours to end, and end it if it doesn't."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def drop_caches() -> bool:
    """Empty the kernel's caches of pages, names and inodes, all of them; False where this process may not."""
    os.sync()  # only what is on disk can be dropped
    try:
        with open("/proc/sys/vm/drop_caches", "w") as control_file:
            control_file.write("3\n")
    except OSError:
        return False
    return True


def wait_ended(pid: int, seconds: float = 30.0) -> bool:
    """Whether a process ends within so long. One that nobody has waited for yet has ended."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], seconds)[0])
    finally:
        os.close(process)


def usable_engines(scratch: Path, wanted: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Which of the engines this machine can do for a store in that directory, and why not the others."""
    probe = scratch / "probe-store"

    def make() -> None:
        Store.open(probe).close()

    in_child(make)
    engines, reasons = [], []
    for engine in wanted:
        try:
            mounting.choose_engine(engine, probe)
            engines.append(engine)
        except CasfsError as error:
            reasons.append(f"{engine} was left out: {error}")
    return engines, reasons
