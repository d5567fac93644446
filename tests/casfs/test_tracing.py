"""Traced mounts: each engine with upcalls sees what each process touches first; others cost what they did."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from casfs import control, mounting, mountpoint, syscalls
from casfs.changes import Change
from casfs.contents import Contents, PlainGateway
from casfs.errors import MissingCapability
from casfs.session import Session
from casfs.session_making import make_session
from casfs.trace_format import Kind, Trace, decode_trace
from casfs.tree import ProjectedTree
from store.digest import Digest
from store.entries import DirectoryEntry
from store.errors import AlreadyExists, BadInput
from store.repository import Store
from store.trees import get_directory
from tests.casfs.conftest import SERVED_ENGINES, Mounted, Mounts, errno_from

FILES = {"d/e/deep": b"deep", "d/other": b"other", "top": b"top", "never": b"never"}


def read_trace(path: Path) -> Trace:
    with open(path, "rb") as file:
        return decode_trace(file)


def events(path: Path, process: int) -> list[tuple[str, str]]:
    """What a process did, in order."""
    return [
        (event.kind.value, os.fsdecode(event.path)) for event in read_trace(path).events if event.process == process
    ]


def run(*command: str | Path) -> int:
    """The process that ran a command."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        process.wait(30)
    return process.pid


def traced(mounts: Mounts, engine: str, root: Digest | None = None) -> tuple[Mounted, Path]:
    root = root or mounts.add_files(FILES)
    mounts.require(engine)
    place, trace = mounts.place(), mounts.base / f"trace-{engine}"
    request = mounting.Request(mounts.root, root, place, trace=trace)
    return Mounted(place, mounting.start(request, engine=engine)), trace


@pytest.fixture(params=SERVED_ENGINES)
def served_engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_each_process_is_seen_with_all_that_it_touches(mounts: Mounts, served_engine: str) -> None:
    """Though the kernel had everything from the process before."""
    mounted, trace = traced(mounts, served_engine)
    assert mounted.report.engine == served_engine
    above = [("look", "d"), ("look", "d/e")]
    for directories in (above, [], []):
        wanted = [*directories, ("look", "d/e/deep"), ("open", "d/e/deep")]
        assert events(trace, run("cat", mounted.path / "d/e/deep")) == wanted
    assert events(trace, run("stat", mounted.path / "top")) == [("look", "top")]
    for _ in range(2):
        listing = events(trace, run("ls", mounted.path))
        assert ("list", "") in listing and ("open", "top") not in listing
    mounted.unmount()
    found = read_trace(trace)
    assert found.ended and not found.cut
    assert {event.command for event in found.events} == {"cat", "stat", "ls"}


def test_missing_names_are_written_once(mounts: Mounts, served_engine: str) -> None:
    mounted, trace = traced(mounts, served_engine)
    for _ in range(3):
        run("cat", mounted.path / "d/absent", mounted.path / "nowhere/below")
    missed = [event for event in read_trace(trace).events if event.kind is Kind.MISS]
    assert [event.path for event in missed] == [b"d/absent", b"nowhere"]


def test_links_and_programs_are_told_from_files(mounts: Mounts, served_engine: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    true = shutil.which("true")
    assert true is not None
    shutil.copy(os.path.realpath(true), source / "program")
    (source / "link").symlink_to("program")
    mounted, trace = traced(mounts, served_engine, mounts.add(source))
    for _ in range(2):
        done = events(trace, run(mounted.path / "link"))
        assert done[:4] == [("look", "link"), ("link", "link"), ("look", "program"), ("exec", "program")], done


def test_what_a_killed_daemon_had_answered_is_in_the_trace(mounts: Mounts, served_engine: str) -> None:
    """SIGKILL in the middle of many opens: every file that was read is there, only the end is not."""
    names = [f"f{number}" for number in range(500)]
    mounted, trace = traced(mounts, served_engine, mounts.add_files(dict.fromkeys(names, b"x\n")))
    reader = subprocess.Popen(
        ["sh", "-c", 'for f in "$0"/f*; do read x < $f && echo ${f##*/}; done', mounted.path],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert reader.stdout is not None
    first = [reader.stdout.readline() for _ in range(20)]
    os.kill(mounted.pid, signal.SIGKILL)
    read = {line.strip() for line in (*first, *reader.stdout)}
    reader.wait(30)
    reader.stdout.close()
    found = read_trace(trace)
    assert not found.ended
    opened = {event.path for event in found.events if event.kind is Kind.OPEN}
    assert 20 <= len(read) < 500
    assert read <= opened


def test_a_traced_mount_can_be_steered(mounts: Mounts, served_engine: str) -> None:
    """What was missed and is there later is seen as both."""
    extra = mounts.add_files({"new": b"new"})
    mounted, trace = traced(mounts, served_engine)
    assert events(trace, run("cat", mounted.path / "put/new")) == [("miss", "put")]
    control.remap(mounted.path, [Change("add", b"put", DirectoryEntry(b"put", extra))])
    done = events(trace, run("cat", mounted.path / "put/new"))
    assert done == [("look", "put"), ("look", "put/new"), ("open", "put/new")]


def test_engine_kernel_is_refused_and_auto_takes_another(mounts: Mounts) -> None:
    root = mounts.add_files(FILES)
    mounts.require("passthrough")
    mounts.requires.admin()
    request = mounting.Request(mounts.root, root, mounts.place(), trace=mounts.base / "t")
    with pytest.raises(MissingCapability, match=r"engine kernel can't be traced.*passthrough"):
        mounting.start(request, engine="kernel")
    assert not (mounts.base / "t").exists()
    report = mounting.start(request, engine="auto")
    assert (report.engine, report.why.partition(";")[0]) == (
        "passthrough",
        "it shall be traced, which engine kernel can't be",
    )


def test_a_file_that_is_no_trace_stays_as_it_is(mounts: Mounts) -> None:
    file = mounts.base / "main.c"
    file.write_text("int main(void) { return 0; }\n")
    request = mounting.Request(mounts.root, mounts.add_files(FILES), mounts.place(), trace=file)
    with pytest.raises(AlreadyExists, match=r"main\.c exists and is no trace"):
        mounting.start(request, engine="native")
    assert file.read_text().startswith("int main")
    for bad in (mounts.base, mounts.base / "no/such"):
        with pytest.raises(BadInput, match="can't write the trace"):
            mounting.start(mounting.Request(mounts.root, request.root, request.place, trace=bad), engine="native")


def test_an_older_trace_is_replaced(mounts: Mounts) -> None:
    mounted, trace = traced(mounts, "native")
    for word in ("top", "never"):
        if word == "never":
            mounted, _ = traced(mounts, "native")
        run("cat", mounted.path / word)
        mounted.unmount()
    assert {event.path for event in read_trace(trace).events} == {b"never"}


def test_a_full_disk_ends_the_trace_and_not_the_mount(mounts: Mounts) -> None:
    mounts.requires.admin()
    disk = mounts.base / "disk"
    disk.mkdir()
    syscalls.mount("tmpfs", str(disk), "tmpfs", 0, "size=4k")
    try:
        names = [f"f{number}" for number in range(300)]
        root = mounts.add_files({name: name.encode() for name in names})
        mounts.require("native")
        place = mounts.place()
        mounting.start(mounting.Request(mounts.root, root, place, trace=disk / "t"), engine="native")
        mounted_files = [place / name for name in names]
        run("cat", *mounted_files)
        assert [path.read_bytes() for path in mounted_files] == [name.encode() for name in names]
        assert f"the trace {disk}/t ends here" in mounts.log()
        found = read_trace(disk / "t")
        assert found.events and not found.ended
        mountpoint.unmount(place)
    finally:
        syscalls.umount(str(disk), syscalls.MNT_DETACH)


def test_what_tracing_costs_is_counted(mounts: Mounts) -> None:
    """An upcall a path each time, and the open; one a directory in all, nothing for what is done with an open file."""
    mounted, _ = traced(mounts, "passthrough")
    for lookups in (3, 1, 1):
        with mounted.counting() as spent:
            with open(mounted.path / "d/e/deep", "rb", buffering=0) as file:
                assert file.read() == b"deep"
                os.fstat(file.fileno())
        assert spent == Counter(LOOKUP=lookups, OPEN=1), spent
    with mounted.counting() as spent:
        for _ in range(3):
            assert errno_from(lambda: os.stat(mounted.path / "absent")) == errno.ENOENT
    assert spent == Counter(LOOKUP=3)


def test_a_mount_without_a_trace_costs_what_it_did(mounts: Mounts) -> None:
    """Its session is of the class that knows nothing of traces; test_upcalls.py has more of its counts."""
    root = mounts.add_files(FILES)
    mounted = mounts.mount(root, "native")
    for expected in (Counter(LOOKUP=3, OPEN=1, READ=1), Counter(OPEN=1)):
        with mounted.counting() as spent:
            with open(mounted.path / "d/e/deep", "rb", buffering=0) as file:
                assert file.read() == b"deep"
        assert spent == expected
    with Store.open(mounts.root) as store, store.index.view() as view, open(os.devnull, "r+b") as device:
        tree = ProjectedTree(store.index, get_directory(view, root))
        contents = Contents(store.blobs, PlainGateway(store.blobs))
        session = make_session(device.fileno(), tree, contents, passthrough=False, tracer=None)
        assert type(session) is Session
