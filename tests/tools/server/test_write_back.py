"""What clients bring to a server goes to its upstream, too; and what happens when that doesn't take it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from store.digest import Digest, DigestFunction
from store.repository import SourceOptions, Store
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import BLAKE3, HTTP, SHA256, HttpClient, connected, running, wait_for
from tests.tools.server.odd import Odd, serving
from tests.tools.server.test_upstream import ACTION, new, pair, result_of
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server import write_back
from tools.server.requests import write_digest
from tools.server.services import ServiceOptions, Services
from tools.server.write_back import Result, WriteBack, WriteBackLimits
from tools.upstream.options import UpstreamOptions
from tools.upstream.sources import Upstream


@pytest.mark.parametrize("function", DigestFunction)
def test_blobs_and_results_reach_the_upstream(casfs: Casfs, function: DigestFunction) -> None:
    large = os.urandom(3 << 20)
    action = function.of(b"an action")
    with pair(casfs, "--write-back") as (far, near, _):
        digests = near.add(b"one", b"two", function=function)
        near.write(function.of(large), large)
        near.put_result(action, result_of(digests[0]))
        wait_for(lambda: not far.missing([*digests, function.of(large)], function))
        assert far.read(function.of(large)) == large
        wait_for(lambda: _has_result(far, action))
        assert far.result(action).output_files[0].digest.hash == digests[0].hex


def _has_result(client: object, action: Digest) -> bool:
    try:
        client.result(action)  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001 - NOT_FOUND, until it is there
        return False
    return True


def test_what_waits_is_sent_before_the_server_ends(casfs: Casfs) -> None:
    with running(new(casfs, "above")) as upstream, connected(upstream) as far:
        with running(new(casfs, "here"), "--upstream", f"grpc://{upstream.address}", "--write-back") as server:
            with connected(server) as near:
                digests = near.add(*(b"%d" % number for number in range(500)))
            assert server.stop() == 0
        assert far.missing(digests) == []


def test_a_dead_upstream_costs_clients_nothing_and_a_line_in_the_log(casfs: Casfs) -> None:
    with pair(casfs, "--write-back") as (_, near, upstream):
        upstream.stop(signal.SIGKILL)
        digests = near.add(b"one", b"two")
        assert near.missing(digests) == []
    log = (new(casfs, "here").store / "casfs.log").read_text()
    assert " not written back" in log
    assert "2 in all" in log


@contextmanager
def writing(path: Path, url: str, limits: WriteBackLimits) -> Iterator[tuple[Store, Upstream, WriteBack]]:
    """A store in this process, and what writes back from it."""
    upstream = Upstream(UpstreamOptions(url), 2.0)
    with Store.open(path, sources=SourceOptions()) as store, Services(store, ServiceOptions()) as services:
        results = services.actions
        back = WriteBack(store.blobs, results, upstream, limits)  # type: ignore[arg-type]
        try:
            yield store, upstream, back
        finally:
            back.close()
            upstream.close()


def put(store: Store, *contents: bytes) -> list[Digest]:
    with store.ingest() as ingest:
        return [ingest.add_bytes(content, BLAKE3) for content in contents]


def test_many_small_blobs_go_in_few_calls_and_none_that_is_there(tmp_path: Path) -> None:
    with Store.open(tmp_path / "above") as above, serving(above) as url:
        with writing(tmp_path / "here", url, WriteBackLimits()) as (store, upstream, back):
            digests = put(store, *(b"%d" % number * 50 for number in range(1000)))
            put(above, *(b"%d" % number * 50 for number in range(500)))
            back.add(digests)
            wait_for(lambda: back.statistics()["sent_blobs"] == 500)
            calls = upstream.statistics()
            assert calls["FindMissingBlobs"] == 1 and calls["BatchUpdateBlobs"] == 1 and "Write" not in calls
            back.add(digests)
            wait_for(lambda: upstream.statistics()["FindMissingBlobs"] == 2)
            assert upstream.statistics()["BatchUpdateBlobs"] == 1


def test_the_queue_is_bounded_and_what_is_dropped_is_counted(tmp_path: Path) -> None:
    limits = WriteBackLimits(waiting=10, retry_seconds=0.5, end_seconds=0.1)
    with writing(tmp_path / "here", "grpc://127.0.0.1:9", limits) as (store, _, back):
        digests = put(store, *(b"%d" % number for number in range(100)))
        back.add(digests)
        assert 80 <= back.statistics()["dropped"] <= 90
        wait_for(lambda: back.statistics()["dropped"] == 100)
        assert back.statistics()["sent_blobs"] == 0


def test_an_upstream_that_comes_back_gets_what_waited(casfs: Casfs, tmp_path: Path) -> None:
    above = new(casfs, "above")
    with running(above) as first:
        pass
    with writing(tmp_path / "here", f"grpc://{first.address}", WriteBackLimits()) as (store, _, back):
        digests = put(store, b"waited")
        back.add(digests)
        wait_for(lambda: not back.statistics()["waiting"])
        with running(above, "--listen", first.address) as second, connected(second) as far:
            wait_for(lambda: not far.missing(digests, BLAKE3))
        assert back.statistics()["dropped"] == 0


def test_a_result_brings_along_what_its_trees_need_and_comes_not_without(tmp_path: Path) -> None:
    with Store.open(tmp_path / "above") as above, serving(above, Odd(zstd=False)) as url:
        with writing(tmp_path / "here", url, WriteBackLimits(retry_seconds=1.5)) as (store, _, back):
            with store.ingest() as ingest:
                file = ingest.add_bytes(b"in a tree", SHA256)
                directory = reapi.Directory(files=[reapi.FileNode(name="f", digest=write_digest(file))])
                tree = ingest.add_bytes(reapi.Tree(root=directory).SerializeToString(), SHA256)
            output = reapi.OutputDirectory(path="d", tree_digest=write_digest(tree))
            store.actions.write(ACTION.key, reapi.ActionResult(output_directories=[output]).SerializeToString())
            back.add([Result(ACTION, "")])
            wait_for(lambda: back.statistics()["sent_results"] == 1)
            assert above.blobs.has(file) and above.blobs.has(tree)
            other = SHA256.of(b"another")
            store.actions.write(other.key, result_of(SHA256.of(b"gone")).SerializeToString())
            back.add([Result(other, "")])
            wait_for(lambda: back.statistics()["dropped"] == 2)
            assert above.actions.read(other.key) is None


def test_an_upstream_that_only_reads_is_told_of_in_the_log(casfs: Casfs) -> None:
    with pair(casfs, "--write-back", above=("--read-only",)) as (_, near, _):
        digests = near.add(b"one")
        log = new(casfs, "here").store / "casfs.log"
        wait_for(lambda: "PERMISSION_DENIED" in log.read_text())
        assert near.missing(digests) == []


def test_a_result_that_comes_before_its_blobs_follows_them(casfs: Casfs) -> None:
    action, output = SHA256.of(b"an action"), b"its output"
    with running(new(casfs, "above")) as upstream, connected(upstream) as far:
        options = ("--upstream", f"grpc://{upstream.address}", "--write-back", *HTTP, "--http-validate-ac")
        with running(new(casfs, "here"), *options) as server, HttpClient(server) as web:
            assert web("PUT", f"/ac/{action.hex}", result_of(SHA256.of(output)).SerializeToString()).status == 200
            # The round that finds it lacking takes this along.
            web.put_blob(b"another")
            wait_for(lambda: not far.missing([SHA256.of(b"another")]))
            assert not _has_result(far, action)
            web.put_blob(output)
            wait_for(lambda: _has_result(far, action))
            assert not far.missing([SHA256.of(output)])
    assert "not written back" not in (new(casfs, "here").store / "casfs.log").read_text()


def test_a_result_that_waited_and_is_refused_is_dropped_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(tmp_path / "above") as above, serving(above, Odd(zstd=False)) as url:
        with writing(tmp_path / "here", url, WriteBackLimits()) as (store, _, back):
            output = SHA256.of(b"late")
            store.actions.write(ACTION.key, result_of(output).SerializeToString())
            back.add([Result(ACTION, "")])
            wait_for(lambda: back._late)
            # It comes, and the upstream takes no blob any more.
            monkeypatch.setattr(write_back, "send_blobs", lambda client, blobs, digests: (0, set(digests)))
            with store.ingest() as ingest:
                ingest.add_bytes(b"late", SHA256)
            wait_for(lambda: back.statistics()["dropped"])
            wait_for(lambda: not back._late)
            assert back.statistics()["dropped"] == 2, "the result and its blob"
