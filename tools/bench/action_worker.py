"""One side of the action benchmark, in a process and a mount namespace of its own: see `tools.bench.workers`.

A forked child does the reading, in the same namespace: in this process, it
would share the interpreter's lock with the session that answers it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from casfs.sandbox import enter_namespace
from casfs.syscalls import MNT_DETACH, mount, umount
from store.repository import Store
from tools.bench.action_methods import LINKS, BuildboxFuse, Casfs, Forest, Method
from tools.bench.action_tree import ActionTree, inputs_read
from tools.bench.workers import serve

HOST = "host"
BUILDBOX = "buildbox-fuse"


class Reader:
    """A child process that opens, reads and closes every file the action reads."""

    def __init__(self, paths: list[bytes]) -> None:
        # Before a store is open and a thread runs: neither may cross a fork.
        self._ours, theirs = multiprocessing.Pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._ours.close()
                _read_on_demand(theirs, paths)
            finally:
                os._exit(0)
        theirs.close()

    def read(self, top: Path, *, check: bool) -> tuple[float, int, str]:
        """Seconds, bytes, and with `check` a hash of them all. Raises OSError."""
        self._ours.send((os.fspath(top), check))
        answer = self._ours.recv()
        if isinstance(answer, OSError):
            raise answer
        seconds, size, found = answer
        return seconds, size, found

    def close(self) -> None:
        self._ours.close()
        os.waitpid(self._pid, 0)


def _read_on_demand(pipe: Connection, paths: list[bytes]) -> None:
    while True:
        try:
            top, check = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(_read_all(top, paths, check))
        except OSError as error:
            pipe.send(error)


def _read_all(top: str, paths: list[bytes], check: bool) -> tuple[float, int, str]:
    size, found = 0, hashlib.sha256()
    began = time.perf_counter()
    directory = os.open(top, os.O_PATH | os.O_DIRECTORY)
    for path in paths:
        file = os.open(path, os.O_RDONLY, dir_fd=directory)
        data = os.read(file, 1 << 20)
        os.close(file)
        size += len(data)
        if check:
            found.update(data)
    os.close(directory)
    return time.perf_counter() - began, size, found.hexdigest() if check else ""


class _Side:
    """Answers each request with one action: {"number", "salt", "check"} → seconds by part."""

    def __init__(self, tree: ActionTree, method: Method, reader: Reader) -> None:
        self._tree = tree
        self._method = method
        self._reader = reader

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        variant = self._tree.variant(request["number"], salt=request["salt"])
        method = self._method
        method.prepare(variant)
        # Settled: no side pays for what the one before left to be written.
        os.sync()
        began = time.perf_counter()
        try:
            top = method.set_up(variant)
            set_up = time.perf_counter() - began
            read, size, found = self._reader.read(top, check=request["check"])
            asked = {"upcalls": method.upcalls(), "warm_bytes": method.warm_bytes()}
            began = time.perf_counter()
        finally:
            method.tear_down()
        tear_down = time.perf_counter() - began
        return {"set_up": set_up, "read": read, "tear_down": tear_down, "size": size, "found": found, **asked}


def _measure_yardsticks(place: Path, counts: list[int]) -> dict[str, float]:
    """Seconds for what no engine can do without, by bare calls: so many entries in tmpfs, and an overlay over them."""
    return {bare_root(count): _lay_out_bare(place / str(count), count) for count in counts}


def bare_root(entries: int) -> str:
    """The name of a yardstick."""
    return f"{entries} bare entries and an overlay"


def _lay_out_bare(place: Path, count: int) -> float:
    for name in ("layer", "upper", "work", "merged"):
        (place / name).mkdir(parents=True)
    layer, merged = str(place / "layer"), str(place / "merged")
    os.sync()
    began = time.perf_counter()
    mount("yardstick", layer, "tmpfs", 0, "mode=0755")
    try:
        for number in range(count):
            file = os.open(f"{layer}/file{number}", os.O_CREAT | os.O_WRONLY, 0o444)
            os.ftruncate(file, 4096)
            os.setxattr(file, "user.overlay.metacopy", b"")
            os.setxattr(file, "user.overlay.redirect", b"/cas/ab/" + b"0" * 64)
            os.utime(file, ns=(0, 0))
            os.close(file)
        options = f"userxattr,lowerdir={layer},upperdir={place}/upper,workdir={place}/work"
        mount("yardstick", merged, "overlay", 0, options)
        taken = time.perf_counter() - began
        umount(merged, 0)
    finally:
        umount(layer, MNT_DETACH)
    return taken


def _begin(stack: ExitStack) -> Callable[[dict[str, Any]], dict[str, Any]]:
    options = json.loads(sys.argv[1])
    headers = [Path(header) for header in options["headers"]]
    side, place = options["side"], Path(options["place"])
    enter_namespace()
    paths = inputs_read(headers)
    reader = Reader(paths)
    stack.callback(reader.close)
    store = stack.enter_context(Store.open(Path(options["store"])))
    tree = ActionTree(store, headers, options["padding"])
    method: Method
    if side == HOST:
        method = Forest(store, tree, place, "hard links", set(paths))
    elif side in LINKS:
        method = Forest(store, tree, place, side)
    elif side == BUILDBOX:
        method = BuildboxFuse(store, place, Path(options["buildbox"]))
    else:
        method = Casfs(store, side)
        stack.callback(method.close)
    answering = _Side(tree, method, reader)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if "yardsticks" in request:
            return _measure_yardsticks(
                place.with_name(f"{place.name}-yardstick-{request['number']}"), request["yardsticks"]
            )
        return answering.answer(request)

    return answer


if __name__ == "__main__":
    serve(_begin)
