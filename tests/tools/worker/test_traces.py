"""A worker that traces its actions: a file each, complete when the next one has run, of what it used and missed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from casfs.errors import MissingCapability
from casfs.trace_format import Kind, decode_trace
from store.digest import DigestFunction
from tests.conftest import Requirements
from tests.tools.conftest import Casfs, wait_until
from tests.tools.worker.conftest import executing, remote_of
from tools.worker.traces import Traces

FILES = {"used": b"used", "d/unused": b"unused", "d/stated": b"stated"}


def test_each_action_has_a_trace_by_its_digest(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    requires.fuse()
    traces = casfs.directory / "traces"
    log = casfs.directory / "log"
    options = ("--trace", traces, "--jobs", "2", "--action-log", log)
    with executing(casfs, *options) as server, remote_of(server) as remote:
        actions = [
            remote.put(["sh", "-c", f"cat used; stat d/stated; cat absent{number} >o; true"], FILES, output_paths=["o"])
            for number in range(2)
        ]
        for action in (*actions, actions[0]):
            assert not remote.execute(action, skip_cache_lookup=True).result.exit_code
        names = sorted([*(f"{action.hash.hex()}.trace" for action in actions), f"{actions[0].hash.hex()}.2.trace"])
        assert sorted(path.name for path in traces.iterdir()) == names
        # Sandboxes are taken away in the background.
        wait_until(lambda: all(path.read_bytes().endswith(b'["end"]\n') for path in traces.iterdir()))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["input_files"], line["input_files_opened"]) for line in lines] == [(3, 1)] * 3
    for number, action in enumerate(actions):
        with open(traces / f"{action.hash.hex()}.trace", "rb") as file:
            trace = decode_trace(file)
        done = {(event.kind, event.path, event.command) for event in trace.events}
        assert (Kind.OPEN, b"used", "cat") in done
        assert (Kind.LOOK, b"d/stated", "stat") in done
        assert [event.path for event in trace.events if event.kind is Kind.MISS] == [b"o", b"absent%d" % number]
        assert not [event for event in trace.events if event.path == b"d/unused"]
        assert trace.header.outputs == [b"o"]


def test_engine_kernel_and_bad_places_are_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(MissingCapability, match="can't be traced"):
        Traces(tmp_path / "t", "kernel")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Exception, match="can't make the directory"):
        Traces(tmp_path / "file" / "t", "auto")
    traces = Traces(tmp_path / "t", "auto")
    digest = DigestFunction.SHA256.of(b"action")
    assert [traces.begin(digest).name[64:] for _ in range(3)] == [".trace", ".2.trace", ".3.trace"]
