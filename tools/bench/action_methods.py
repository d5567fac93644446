"""The ways to give an action its input root that the benchmark compares: three forests, buildbox-fuse, casfs's engines.

Each is used by one worker: `prepare` is not measured (a build's inputs are in
the CAS before the action comes), `set_up` and `tear_down` are. Forests are made
by bare loops over paths known beforehand: what an implementation in any
language can't do without.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from casfs.mountinfo import find_mount
from casfs.sandbox import Sandbox, Sandboxes
from casfs.syscalls import umount
from store.digest import Digest
from store.entries import DirectoryEntry, FileEntry
from store.layout import blob_path
from store.repository import Store
from store.trees import find_directory, walk_directories
from tools.bench.action_tree import PROJECT, ActionTree, Placed, Variant
from tools.bench.casfs_side import warm_bytes
from tools.bench.scratch import stop
from tools.bench.workers import Refused

_START_SECONDS = 20.0

LINKS: dict[str, Callable[[str, str], object]] = {
    "hard links": os.link,
    "symbolic links": os.symlink,
    "copy": shutil.copyfile,
}
"""Forests: how a file is made of its blob."""
OUTPUT = b"project/out/main.o"


class Method(Protocol):
    """One way, for one action after the other."""

    def prepare(self, variant: Variant) -> None:
        """What is done before the action comes."""

    def set_up(self, variant: Variant) -> Path:
        """Where the action finds its input root."""

    def tear_down(self) -> None:
        """Take it away."""

    def upcalls(self) -> dict[str, int] | None:
        """How many there were for this action, where that can be asked."""

    def warm_bytes(self) -> int | None:
        """What it keeps for the next action, where that can be asked."""


class _Silent:
    """A method of which nothing can be asked."""

    def upcalls(self) -> dict[str, int] | None:
        return None

    def warm_bytes(self) -> int | None:
        return None


class Forest(_Silent):
    """A directory with a link or a copy of every blob; `only` the files at some paths, or all."""

    def __init__(self, store: Store, tree: ActionTree, place: Path, kind: str, only: set[bytes] | None = None) -> None:
        self._blobs = os.fspath(store.layout.blobs)
        self._tree = tree
        self._top = os.fspath(place)
        self._link = LINKS[kind]
        self._only = only
        self._unchanged = self._plan(tree.unchanged_files())
        self._plans = [self._unchanged]

    def _plan(self, files: list[Placed]) -> tuple[list[str], list[tuple[str, str]]]:
        """Directories in the order of their making, and (blob, path) a file."""
        files = [file for file in files if self._only is None or file.path in self._only]
        directories = dict.fromkeys(
            os.fsdecode(b"/".join(above[:depth]))
            for above in (file.path.split(b"/") for file in files)
            for depth in range(1, len(above))
        )
        linked = [(f"{self._blobs}/{blob_path(digest)}", f"{self._top}/{os.fsdecode(path)}") for path, digest in files]
        return [f"{self._top}/{directory}" for directory in directories], linked

    def prepare(self, variant: Variant) -> None:
        self._plans = [self._plan(self._tree.own_files(variant)), self._unchanged]

    def set_up(self, variant: Variant) -> Path:
        os.mkdir(self._top)
        for directories, files in self._plans:
            for directory in directories:
                os.mkdir(directory)
            for blob, path in files:
                self._link(blob, path)
        return Path(self._top)

    def tear_down(self) -> None:
        for directories, files in self._plans:
            for _, path in files:
                os.unlink(path)
            for directory in reversed(directories):
                os.rmdir(directory)
        os.rmdir(self._top)


class BuildboxFuse(_Silent):
    """buildbox-fuse on a CAS directory of its own layout, whose files are hard links to our blobs."""

    def __init__(self, store: Store, place: Path, program: Path) -> None:
        self._store = store
        self._program = program
        self._place = place
        self._cas = place.with_name(f"{place.name}-cas")
        (self._cas / "objects").mkdir(parents=True)
        (self._cas / "tmp").mkdir()
        self._place.mkdir()
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: set[int] = set()

    def prepare(self, variant: Variant) -> None:
        """Its Directory messages and files; what an earlier variant had is passed over with its directory."""
        self._add(variant.root)
        with self._store.index.view() as view:
            directory = find_directory(view, variant.root)
            if directory is None:
                raise RuntimeError("the root is not in the index")
            for _, rows in walk_directories(view, directory.id, self._seen):
                for row in rows:
                    if isinstance(row.entry, FileEntry | DirectoryEntry):
                        self._add(row.entry.digest)

    def _add(self, digest: Digest) -> None:
        target = self._cas / "objects" / digest.hex[:2] / digest.hex[2:]
        target.parent.mkdir(exist_ok=True)
        with suppress(FileExistsError):
            os.link(self._store.layout.blobs / blob_path(digest), target)

    def set_up(self, variant: Variant) -> Path:
        root = f"{variant.root.hex}/{variant.root.size}"
        command = [str(self._program), f"--local={self._cas}", f"--input-digest-value={root}", str(self._place)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + _START_SECONDS
        while find_mount(str(self._place)) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.tear_down()
                raise Refused("buildbox-fuse doesn't mount here")
            time.sleep(0.0005)
        os.stat(self._place / os.fsdecode(PROJECT))  # answered, so it serves
        return self._place

    def tear_down(self) -> None:
        if find_mount(str(self._place)) is not None:
            umount(str(self._place), 0)
        if self._process is not None:
            stop(self._process)
            self._process = None


class Casfs:
    """A sandbox of ours, with an output declared."""

    def __init__(self, store: Store, engine: str) -> None:
        self._sandboxes = Sandboxes(store, engine=engine)
        self._sandbox: Sandbox | None = None

    def close(self) -> None:
        self._sandboxes.close()

    def prepare(self, variant: Variant) -> None:
        pass

    def set_up(self, variant: Variant) -> Path:
        self._sandbox = self._sandboxes.open(variant.root, outputs=[OUTPUT])
        return self._sandbox.scratch.merged

    def tear_down(self) -> None:
        if self._sandbox is not None:
            self._sandbox.close()
            # A worker goes on meanwhile; here it counts as if it had to wait.
            self._sandboxes.wait_closed()

    def upcalls(self) -> dict[str, int] | None:
        if self._sandbox is None:
            return None
        count = self._sandbox.projection.upcalls()
        return {"all": count} if count else {}

    def warm_bytes(self) -> int | None:
        return warm_bytes(self._sandboxes)
