"""A process that opens sandboxes, runs a command in each, captures and closes: for `tools.bench.sandboxes`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from casfs.mountinfo import list_mounts
from casfs.sandbox import Sandboxes, enter_namespace
from store.digest import Digest
from store.repository import Store
from tools.bench.small_image import TRUE
from tools.bench.workers import Refused, serve

PARTS = ("open", "run", "capture", "close")


class _Sandboxes:
    """Answers each kind of request."""

    def __init__(self, store: Store, root: Digest, engine: str) -> None:
        self._sandboxes = Sandboxes(store, engine=engine)
        self._root = root

    def close(self) -> None:
        self._sandboxes.close()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """By the name of what is asked: many, bare or held."""
        if "many" in request:
            return self._run_many(request["many"], request["threads"])
        if "bare" in request:
            return self._run_bare(request["bare"])
        self._sandboxes.wait_closed()
        return _held()

    def _run_many(self, count: int, threads: int) -> dict[str, Any]:
        """So many sandboxes one after the other, or by that many threads: seconds by part for each."""
        if threads == 1:
            return {"parts": [self._run_one(number) for number in range(count)]}
        with ThreadPoolExecutor(threads) as pool:
            return {"parts": list(pool.map(self._run_one, range(count)))}

    def _run_one(self, _: int) -> list[float]:
        times = [time.perf_counter()]
        with self._sandboxes.open(self._root) as sandbox:
            times.append(time.perf_counter())
            finished = sandbox.run(TRUE)
            times.append(time.perf_counter())
            sandbox.capture()
            times.append(time.perf_counter())
        times.append(time.perf_counter())
        if finished.code:
            raise Refused(f"the command in the sandbox ended with {finished.code}")
        return [after - before for before, after in pairwise(times)]

    def _run_bare(self, count: int) -> dict[str, Any]:
        """The very command line that a sandbox starts bubblewrap with, started by nothing but a fork: seconds each."""
        started: list[tuple[list[str], dict[str, str]]] = []

        def note(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "subprocess.Popen":
                started.append((list(arguments[1]), arguments[3]))

        with self._sandboxes.open(self._root) as sandbox:
            sys.addaudithook(note)
            sandbox.run(TRUE)
            words, environment = started[0]
            at = words.index("--json-status-fd")  # whose other end was the sandbox's
            del words[at : at + 2]
            seconds = []
            for _ in range(count):
                began = time.perf_counter()
                subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, cwd="/", check=True)
                seconds.append(time.perf_counter() - began)
        return {"seconds": seconds}


def _held() -> dict[str, float]:
    """What this process has, and what the kernel keeps in all: sizes in MB."""
    # Anonymous only: pages of the index, which is mapped, come in as they are touched.
    own = _read_fields("/proc/self/status", "RssAnon")
    kernel = _read_fields("/proc/meminfo", "Slab", "Cached")
    return {
        "memory of the process, anonymous": own["RssAnon"],
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mounts": len(list_mounts()),
        "slab of the whole machine": kernel["Slab"],
        "page cache of the whole machine": kernel["Cached"],
    }


def _read_fields(path: str, *names: str) -> dict[str, float]:
    """Fields of a file of /proc that the kernel gives in KiB, in MB."""
    fields = dict(line.split(":", 1) for line in Path(path).read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 / 1e6 for name in names}


def _begin(stack: ExitStack) -> Callable[[dict[str, Any]], dict[str, Any]]:
    options = json.loads(sys.argv[1])
    enter_namespace()
    store = stack.enter_context(Store.open(Path(options["store"])))
    sandboxes = _Sandboxes(store, Digest.parse(options["root"]), options["engine"])
    stack.callback(sandboxes.close)
    return sandboxes.answer


if __name__ == "__main__":
    serve(_begin)
