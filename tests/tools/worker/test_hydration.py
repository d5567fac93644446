"""Input roots that are only partly here: what is missing comes from an upstream, and its time isn't the command's."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from casfs import bubblewrap
from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import Server, running, wait_for
from tests.tools.worker.conftest import Remote, executing, live_processes, remote_of, response_of
from tools.reapi.generated import code_pb2 as codes
from tools.worker.work import Stop

FILES = {f"d{number % 3}/{number}": b"content %d\n" % number for number in range(30)}


class Pair(NamedTuple):
    """Clients of an upstream, which has the blobs, and of the server before it, which runs actions."""

    far: Remote
    near: Remote
    upstream: Server
    log: Path

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@contextmanager
def pair(casfs: Casfs, *options: str) -> Iterator[Pair]:
    places = [Casfs(casfs.directory / name) for name in ("above", "here")]
    for place in places:
        place.directory.mkdir()
    (places[1].directory / "config.toml").write_text("[sources]\ntimeout = '3s'\n")
    log = places[1].directory / "log"
    with running(places[0]) as upstream, remote_of(upstream) as far:
        above = ("--upstream", f"grpc://{upstream.address}", "--config", str(places[1].directory / "config.toml"))
        with executing(places[1], *above, "--action-log", log, *options) as server, remote_of(server) as near:
            yield Pair(far, near, upstream, log)


def test_inputs_come_when_they_are_opened_or_before(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    requires.fuse()
    with pair(casfs) as (far, near, _, log):
        action = far.put(["sh", "-c", "cat d0/3 d1/4; cat d0/3 > o"], FILES, output_paths=["o"])
        response = near.execute(action)
        assert near.blob(response.result.stdout_digest) == b"content 3\ncontent 4\n"
        [line] = [json.loads(line) for line in log.read_text().splitlines()]
        assert (line["fetched_blobs"], line["input_files"]) == (2, 30)
        assert line["upcalls"] > 0 and 0 < line["held_up_seconds"] < line["run_seconds"]
        again = near.execute(far.put(["sh", "-c", "cat d0/3 d1/4"], FILES))
        assert again.result.exit_code == 0


def test_everything_may_come_before_the_command_starts(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    with pair(casfs, "--prefetch", "all") as both:
        response = both.near.execute(both.far.put(["cat", "d0/3"], FILES))
        assert both.near.blob(response.result.stdout_digest) == b"content 3\n"
        [line] = both.lines()
        assert (line["prefetched_blobs"], line["fetched_blobs"], line["upcalls"]) == (30, 0, 0)
        both.near.execute(both.far.put(["cat", "d0/4"], FILES))
        assert "prefetched_blobs" not in both.lines()[1]


@pytest.mark.timeout(120)
def test_an_input_that_cannot_be_fetched_is_no_result(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    requires.fuse()
    with pair(casfs) as both:
        tolerant = both.far.put(["sh", "-c", "sleep 2; cat d0/3 || true; cat d1/4; true"], FILES)
        # All that it needs to begin is here, but for the contents.
        assert both.near.execute(both.far.put(["cat", "d1/4"], FILES)).result.exit_code == 0
        states = both.near.begin(tolerant)
        next(states)
        time.sleep(1)
        both.upstream.process.send_signal(signal.SIGKILL)
        response = response_of(list(states)[-1])
        assert response.status.code == codes.UNAVAILABLE, response
        assert "couldn't be fetched" in response.status.message and not response.HasField("result")


@pytest.mark.timeout(120)
def test_an_upstream_that_stalls_is_no_result_within_a_bound(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    requires.fuse()
    with pair(casfs) as both:
        assert both.near.execute(both.far.put(["cat", "d1/4"], FILES)).result.exit_code == 0
        # It begins before the upstream stalls, and would take what it can't read for an empty file.
        word = f"stall{os.urandom(6).hex()}"
        action = both.far.put(["sh", "-c", f": {word}; sleep 1; cat d0/3 > o; true"], FILES, output_paths=["o"])
        states = both.near.begin(action)
        wait_for(lambda: live_processes(word))
        both.upstream.process.send_signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            response = response_of(list(states)[-1])
            # A second of sleep, three of patience (`pair`), and what a busy machine takes.
            assert time.monotonic() - began < 15
        finally:
            both.upstream.process.send_signal(signal.SIGCONT)
        assert response.status.code == codes.UNAVAILABLE, response
        assert "couldn't be fetched" in response.status.message and not response.HasField("result")
        assert not live_processes(word)
        # It isn't asked for a moment yet.
        wait_for(lambda: (again := both.near.execute(action)).status.code == codes.OK and not again.cached_result)
        assert both.near.outputs(both.near.execute(action)) == {"o": b"content 3\n"}


class _Watcher:
    """Says how long a command was held up."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._stop = Stop()
        self.first = 0

    def begin(self, process: int) -> None:
        self.first = process

    @property
    def stop(self) -> int:
        return self._stop.fileno()

    def held_up(self) -> float:
        return self._seconds

    def end(self) -> None:
        self._stop.set()


def words() -> tuple[str, ...]:
    return bubblewrap.command_line(network=False, host_root=True)


def test_what_a_command_was_held_up_does_not_count_against_its_timeout(requires: Requirements) -> None:
    requires.programs("bwrap")
    patient, strict = _Watcher(30), _Watcher(0)
    ended = bubblewrap.run(words(), ["sleep", "0.6"], {}, timeout=0.2, watcher=patient)
    assert (ended.code, ended.timed_out) == (0, False) and patient.first
    ended = bubblewrap.run(words(), ["sleep", "60"], {}, timeout=0.2, watcher=strict)
    assert (ended.code, ended.timed_out) == (124, True)


def test_a_watcher_can_end_a_command(requires: Requirements) -> None:
    requires.programs("bwrap")
    watcher = _Watcher(0)
    timer = threading.Timer(0.3, watcher.end)
    timer.start()
    began = time.monotonic()
    ended = bubblewrap.run(words(), ["sleep", "60"], {}, watcher=watcher)
    assert ended.stopped and not ended.timed_out and time.monotonic() - began < 30
    timer.join()


def test_what_cannot_begin_is_told_from_what_fails(requires: Requirements) -> None:
    requires.programs("bwrap")
    reading, writing = os.pipe()
    with open(reading, "rb") as said:
        try:
            assert not bubblewrap.run(words(), ["no-such-program"], {}, stderr=writing).begun
        finally:
            os.close(writing)
        assert said.read().startswith(b"bwrap: execvp no-such-program: ")
    assert bubblewrap.run(words(), ["sh", "-c", "exit 1"], {}).begun
