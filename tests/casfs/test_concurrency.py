"""Many at once: readers, mounts, unmounts, daemons on one store, collections and additions meanwhile."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from casfs import control, mounting, mountpoint
from casfs.errors import BadMountPoint, Busy, MountError
from casfs.mountinfo import find_mount
from store.repository import Store
from tests.casfs.conftest import ENGINES, Mounted, Mounts, wait_until

CONTENTS = {f"{number % 7}/{number}": hashlib.sha256(b"%d" % number).digest() * (number * 5) for number in range(120)}


def check_files(top: Path, seed: int) -> None:
    """Read every file once, in an order of one's own."""
    names = list(CONTENTS)
    random.Random(seed).shuffle(names)
    for name in names:
        assert (top / name).read_bytes() == CONTENTS[name]
        with suppress(FileNotFoundError):
            os.stat(top / (name + "x"))
        os.listdir((top / name).parent)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(count) as pool:
        for result in [pool.submit(work, number) for number in range(count)]:
            result.result()


def drop_caches(path: Path) -> None:
    """Blobs leave the page cache, so that opens and reads go to the disk, and so to the pool."""
    for blob in path.rglob("*"):
        if blob.is_file():
            descriptor = os.open(blob, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_many_readers_of_one_mount_all_get_the_right_bytes(mounts: Mounts, engine: str, cold: bool) -> None:
    root = mounts.add_files(CONTENTS)
    if cold:
        drop_caches(mounts.layout.blobs)
    mounted = mounts.mount(root, engine)
    in_threads(8, lambda number: check_files(mounted.path, number))
    statistics = control.statistics(mounted.path)
    assert statistics["failed_opens"] == 0
    if engine == "passthrough":
        assert statistics["upcalls"]["READ"] == 0
        assert statistics["backing_ids"]["registered"] <= len(CONTENTS)


def test_readers_of_unverified_blobs_all_wait_for_one_answer(mounts: Mounts, engine: str) -> None:
    """As after a crash: every blob has to be hashed, and everybody asks at once."""
    from store.index import Table

    root = mounts.add_files(CONTENTS)
    with Store.open(mounts.root) as store:
        with store.index.view() as view:
            keys = [key for key, _ in view.scan(Table.BLOBS)]
        store.index.update(lambda change: [change.delete(Table.BLOBS, key) for key in keys])
    mounted = mounts.mount(root, engine)
    in_threads(6, lambda number: check_files(mounted.path, number))
    assert not list(mounts.layout.quarantine.iterdir())


def test_several_mounts_of_one_store_in_every_engine_at_once(mounts: Mounts) -> None:
    root = mounts.add_files(CONTENTS)
    mounted = [mounts.mount(root, engine) for engine in (*ENGINES, "passthrough", "native")]
    assert len({mount.report.pid for mount in mounted}) == len(mounted)
    in_threads(len(mounted), lambda number: check_files(mounted[number].path, number))
    for mount in mounted[1:]:
        mount.unmount()
    check_files(mounted[0].path, 0)
    assert mounts.leases() == 1


def cycle(mounts: Mounts, engine: str, rounds: int) -> None:
    """Mount, read, unmount, again and again, in several processes at once."""
    root = mounts.add_files(CONTENTS)
    mounts.require(engine)
    places = [mounts.place() for _ in range(3)]
    children = []
    for number, place in enumerate(places):
        child = os.fork()
        if not child:
            code = 1
            try:
                for _ in range(rounds):
                    mounting.start(mounting.Request(mounts.root, root, place), engine=engine)
                    check_files(place, number)
                    mountpoint.unmount(place)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert not any(find_mount(str(place)) for place in places)
    # A daemon lives on while a mount namespace that was made meanwhile has a copy of its mount.
    wait_until(lambda: mounts.leases() == 0, "the leases to end", 60)
    assert "ERROR" not in mounts.log()


def test_mounts_and_unmounts_at_once_do_not_disturb_each_other(mounts: Mounts, engine: str) -> None:
    cycle(mounts, engine, 4)


@pytest.mark.long
def test_hundreds_of_mounts_and_unmounts_leave_nothing(mounts: Mounts, engine: str) -> None:
    cycle(mounts, engine, 100)


def test_of_two_who_mount_on_one_place_one_gets_it(mounts: Mounts) -> None:
    """Or both do, one above the other, in which case both come off again; but nobody crashes."""
    root = mounts.add_files(CONTENTS)
    mounts.require("native")
    place = mounts.place()
    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            code = 1
            try:
                mounting.start(mounting.Request(mounts.root, root, place), engine="native")
                code = 0
            except (BadMountPoint, MountError):
                code = 2
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes.count(0) >= 1
    assert 1 not in codes
    check_files(place, 0)


def test_readers_survive_being_unmounted_under_them(mounts: Mounts, engine: str) -> None:
    """They get errors, or the empty directory below; never wrong bytes, never a hang."""
    mounted = mounts.mount(mounts.add_files(CONTENTS), engine)
    stop = threading.Event()
    wrong: list[str] = []

    def read_on(number: int) -> None:
        names = list(CONTENTS)
        while not stop.is_set():
            name = names[number % len(names)]
            number += 7
            with suppress(OSError):
                if (mounted.path / name).read_bytes() != CONTENTS[name]:
                    wrong.append(name)

    readers = [threading.Thread(target=read_on, args=(number,)) for number in range(4)]
    for reader in readers:
        reader.start()
    time.sleep(0.1)
    with suppress(Busy):
        mountpoint.unmount(mounted.path)
    if find_mount(str(mounted.path)):
        mountpoint.unmount(mounted.path, lazy=True)
    time.sleep(0.1)
    stop.set()
    for reader in readers:
        reader.join(30)
        assert not reader.is_alive()
    assert not wrong
    if engine != "kernel":
        wait_until(lambda: not mountpoint.is_running(mounted.pid), "the daemon to end")


def collect(mounts: Mounts) -> int:
    """Remove all that may go; returns how many blobs went."""
    with Store.open(mounts.root) as store:
        return store.collector.collect(0, 0, grace=0).removed_blobs


def test_a_collection_takes_nothing_that_is_mounted(mounts: Mounts, engine: str) -> None:
    """No manifest holds the tree, only the mount's lease does."""
    root = mounts.add_files(CONTENTS)
    mounts.add_files({"other": b"nobody wants this"})
    mounted = mounts.mount(root, engine)
    first = next(iter(CONTENTS))
    assert (mounted.path / first).read_bytes() == CONTENTS[first]
    mounts.age()
    assert collect(mounts) >= 1
    assert not mounts.blob(b"nobody wants this").exists()
    check_files(mounted.path, 1)
    daemon = mounted.report.pid
    mounted.unmount()
    wait_until(lambda: daemon is None or not mountpoint.is_running(daemon), "the daemon to end")
    mounts.age()  # what was opened counts as used until the end of the mount
    assert collect(mounts) >= len(set(CONTENTS.values())) - 1


def test_the_lease_of_a_killed_daemon_holds_nothing(mounts: Mounts) -> None:
    import signal

    mounted = mounts.mount(mounts.add_files(CONTENTS), "native")
    os.kill(mounted.pid, signal.SIGKILL)
    wait_until(lambda: not mountpoint.is_running(mounted.pid), "the daemon to die")
    mountpoint.unmount(mounted.path)
    mounts.age()
    assert collect(mounts) >= len(set(CONTENTS.values())) - 1
    assert not list(mounts.layout.leases.iterdir())


def test_additions_and_collections_while_mounted_do_not_disturb_readers(mounts: Mounts, engine: str) -> None:
    mounted = mounts.mount(mounts.add_files(CONTENTS), engine)
    child = os.fork()
    if not child:
        code = 1
        try:
            for number in range(6):
                mounts.add_files({f"{number}-{inner}": b"%d %d" % (number, inner) for inner in range(50)})
                collect(mounts)
            code = 0
        finally:
            os._exit(code)
    try:
        in_threads(3, lambda number: check_files(mounted.path, number))
    finally:
        status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0
    check_files(mounted.path, 9)


def test_the_control_socket_answers_many_at_once_and_survives_nonsense(mounts: Mounts) -> None:
    import socket

    mounted = mounts.mount(mounts.add_files(CONTENTS), "native")
    in_threads(8, lambda number: _ask_repeatedly(mounted))
    mount = find_mount(str(mounted.path))
    assert mount is not None
    directory = control.runtime_directory()
    name = f"{mount.device[0]}-{mount.device[1]}.sock"
    for line in (
        b"\n",
        b"{}\n",
        b'{"op": 5}\n',
        b"[1]\n",
        b"\xff\xfe\n",
        b'{"op": "no such"}\n',
        b"no end of line",
        b"",
    ):
        with socket.socket(socket.AF_UNIX) as client:
            place = os.open(directory, os.O_PATH)
            try:
                client.connect(f"/proc/self/fd/{place}/{name}")
            finally:
                os.close(place)
            client.sendall(line)
            client.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda client=client: client.recv(4096), b""))  # type: ignore[misc]
            assert b"error" in answer
    with pytest.raises(MountError, match="not a request"):
        control.call(mounted.path, "no such")
    _ask_repeatedly(mounted)


def _ask_repeatedly(mounted: Mounted) -> None:
    for _ in range(10):
        assert control.statistics(mounted.path)["pid"] == mounted.pid
