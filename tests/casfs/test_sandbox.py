"""Sandboxes as a worker uses them: many at once in one process, each alone with its scratch; and what a kill leaves."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from casfs.projection import ENGINES
from casfs.scratch import ScratchSpace, clear_leftovers, remove_tree
from store.digest import Digest, DigestFunction
from store.importing import ScanOptions
from store.repository import Store
from tests.conftest import Requirements

REPOSITORY = Path(__file__).resolve().parents[2]

_WORKER = """
import json, os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from casfs.mountinfo import list_mounts
from casfs.sandbox import Sandboxes, enter_namespace
from store.digest import Digest
from store.repository import Store

enter_namespace()
place, root, engine, number = Path(sys.argv[1]), Digest.parse(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def work(index):
    with sandboxes.open(root, outputs=[b"out/made"]) as sandbox:
        script = f"cat README.txt > out/made; echo {index} >> out/made; test ! -e mine; touch mine"
        finished = sandbox.run(["sh", "-euc", script], host_root=True)
        captured = sandbox.capture()
        return finished.code, str(captured.outputs[0].digest), len(store.leases.living()) > 0

def held():
    mounts = [mount.path for mount in list_mounts() if mount.path.startswith(os.fsencode(place))]
    return len(os.listdir("/proc/self/fd")), len(mounts)

with Store.open(place) as store:
    with Sandboxes(store, engine=engine) as sandboxes:
        work(-1)  # opens what the store keeps open
    before = held()
    with Sandboxes(store, engine=engine) as sandboxes, ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(number)))
    after = held()
    print(json.dumps([results, before, after, len(store.leases.living()), os.listdir(place / "scratch")]))
"""


@pytest.fixture
def root(store: Store, sample_tree: Path) -> Digest:
    """The sample tree, in the store."""
    return store.importer.from_directories([(b"", sample_tree)], ScanOptions()).digest


@pytest.fixture
def worker(tmp_path: Path, root: Digest, requires: Requirements) -> Callable[..., Any]:
    """Run so many sandboxes, four at a time, in a process of their own."""
    requires.admin()
    requires.fuse()
    requires.programs("bwrap")

    def run(engine: str, number: int) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", _WORKER, tmp_path / "store", str(root), engine, str(number)],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("engine", ENGINES)
def test_many_at_once_do_not_see_each_other_and_leave_nothing(worker: Callable[..., Any], engine: str) -> None:
    results, before, after, leases, scratch = worker(engine, 24)
    assert [code for code, _, _ in results] == [0] * 24
    assert len({digest for _, digest, _ in results}) == 24
    assert all(held for _, _, held in results)
    assert [digest for _, digest, _ in results] == [
        str(DigestFunction.BLAKE3.of(b"A sample.\n%d\n" % index)) for index in range(24)
    ]
    assert before[1] == 0
    assert (after, leases, scratch) == (before, 0, [])


_VIEW = """
import errno, json, os, sys
from pathlib import Path
from casfs import bubblewrap
from casfs.host_view import HostViews
from casfs.mountinfo import list_mounts
from casfs.sandbox import enter_namespace

enter_namespace()
views = HostViews(Path(sys.argv[1]))
first, view, same = views.find(False), Path(views.find(False)), views.find(False)

def refusal(path):
    try:
        open(path, "w").close()
    except OSError as error:
        return errno.errorcode[error.errno]

def mounts():
    return sum(mount.path.startswith(os.fsencode(view)) for mount in list_mounts())

shown = {name: os.readlink(view / name) if (view / name).is_symlink() else "" for name in os.listdir(view)}
written = [refusal(view / "new"), refusal(view / "etc/new"), refusal(view / "tmp/new")]
words = [*bubblewrap.command_line(False, True, str(view)), "--bind", str(view / "tmp"), "/build", "--chdir", "/build"]
said = os.open(Path(sys.argv[1]) / "said", os.O_RDWR | os.O_CREAT)
script = "ls /; ls /dev; test -d /proc/self; touch /tmp/x; ! touch /new /etc/new 2>/dev/null; cat /etc/passwd"
ended = bubblewrap.run(words, ["/bin/sh", "-euc", script], {}, stdout=said)
before = mounts()
views.close()
print(json.dumps([first, str(view) == same, shown, written, ended.code, before, mounts(), view.exists()]))
"""


def test_the_view_of_the_host_is_what_sandboxes_bind_and_read_only(tmp_path: Path, requires: Requirements) -> None:
    requires.admin()
    requires.programs("bwrap")
    command = [sys.executable, "-c", _VIEW, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    first, same, shown, written, code, before, after, left = json.loads(done.stdout)
    assert (first, same) == ("", True)
    directories = {path.name for path in Path("/").iterdir() if path.is_dir() and not path.is_symlink()}
    assert {name for name, link in shown.items() if not link} == (directories - {"sys", "run"}) | {"build"}
    links = {path.name: os.readlink(path) for path in Path("/").iterdir() if path.is_symlink() and path.is_dir()}
    assert links.items() <= shown.items()
    assert written == ["EROFS"] * 3
    assert code == 0
    lines = (tmp_path / "said").read_text().splitlines()
    assert "build" in lines and "null" in lines and "run" not in lines and "sys" not in lines
    assert lines[-1] == Path("/etc/passwd").read_text().splitlines()[-1]
    assert before > 3 and (after, left) == (0, False)


def test_scratch_of_the_dead_is_cleared_and_that_of_the_living_stays(tmp_path: Path) -> None:
    living, dead = ScratchSpace(tmp_path / "scratch"), ScratchSpace(tmp_path / "scratch")
    living.new()
    upper = dead.new().upper
    (upper / "d").mkdir()
    (upper / "d" / "file").write_bytes(b"1")
    (upper / "d").chmod(0)
    fcntl.flock(dead._lock, fcntl.LOCK_UN)
    assert clear_leftovers(tmp_path / "scratch") == 1
    assert os.listdir(tmp_path / "scratch") == [living.directory.name]
    for space in (living, dead):
        space.close()
        space.close()
    assert os.listdir(tmp_path / "scratch") == []


def test_removing_a_tree_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir(mode=0o755)
    (tmp_path / "kept" / "file").write_bytes(b"1")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "kept")
    remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
    assert (tmp_path / "kept" / "file").exists()
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o755
