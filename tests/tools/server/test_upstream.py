"""A server as another one's upstream: reading through, budgets, what is odd or wrong about it, its death and return."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from store.digest import Digest, DigestFunction
from store.errors import BadInput, MissingBlob
from store.layout import blob_path
from store.prefetch import prefetch
from store.repository import SourceOptions, Store
from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import (
    BLAKE3,
    SHA256,
    Client,
    Server,
    connected,
    make_certificates,
    refused,
    running,
    wait_for,
)
from tests.tools.server.odd import Odd, serving
from tools.exits import Exit
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.requests import write_digest
from tools.upstream.joining import with_upstream
from tools.upstream.options import UpstreamOptions, dump_upstream, load_upstream
from tools.upstream.sources import Upstream, parts

ACTION = SHA256.of(b"an action")


def new(casfs: Casfs, name: str) -> Casfs:
    """The command with another store."""
    (casfs.directory / name).mkdir(exist_ok=True)
    return Casfs(casfs.directory / name)


@contextmanager
def pair(casfs: Casfs, *options: str, above: tuple[str, ...] = ()) -> Iterator[tuple[Client, Client, Server]]:
    """Clients of an upstream and of a server before it, and the upstream."""
    with running(new(casfs, "above"), *above) as upstream, connected(upstream) as far:
        with running(new(casfs, "here"), "--upstream", f"grpc://{upstream.address}", *options) as server:
            with connected(server) as near:
                yield far, near, upstream


@contextmanager
def fetching(path: Path, url: str, timeout: float = 5.0) -> Iterator[tuple[Store, Upstream]]:
    """A store with an upstream, in this process."""
    upstream = Upstream(UpstreamOptions(url), timeout)
    with Store.open(path, sources=SourceOptions((), timeout, partial(parts, upstream))) as store:
        yield store, upstream


def result_of(output: Digest) -> reapi.ActionResult:
    return reapi.ActionResult(output_files=[reapi.OutputFile(path="out", digest=write_digest(output))])


# Reading through


@pytest.mark.parametrize("function", DigestFunction)
def test_blobs_are_read_through_and_count_as_present(casfs: Casfs, function: DigestFunction) -> None:
    large = os.urandom(3 << 20)
    with pair(casfs) as (far, near, upstream):
        digests = far.add(b"small", b"other", function=function)
        far.write(function.of(large), large)
        assert near.missing([*digests, function.of(large), function.of(b"nowhere")], function) == [
            function.of(b"nowhere").hex
        ]
        assert near.read(digests[0]) == b"small"
        assert near.read(function.of(large)) == large
        assert refused(lambda: near.read(function.of(b"nowhere"))) == "NOT_FOUND"
        upstream.stop()
        assert near.read(function.of(large)) == large, "it was kept"
        assert near.missing([digests[1]], function) == [digests[1].hex], "only there, and nobody answers"


def test_a_result_is_a_hit_if_all_its_blobs_can_be_had(casfs: Casfs) -> None:
    with pair(casfs, above=("--read-only",)) as (far, near, upstream):
        above = new(casfs, "above")
        output = SHA256.of(b"an output")
        assert refused(lambda: near.result(ACTION)) == "NOT_FOUND"
        assert refused(lambda: far.put_result(ACTION, result_of(output))) == "PERMISSION_DENIED"
        with running(above) as writable, connected(writable) as writer:
            writer.add(b"an output")
            writer.put_result(ACTION, result_of(output))
        assert near.result(ACTION).output_files[0].digest.hash == output.hex
        assert near.read(output) == b"an output"
        upstream.stop()
        assert near.result(ACTION).output_files[0].path == "out", "result and output are here now"


def test_a_result_whose_blobs_are_gone_there_is_no_hit(casfs: Casfs) -> None:
    with Store.open(casfs.directory / "lying") as store, serving(store, Odd(careless=True)) as url:
        with running(new(casfs, "here"), "--upstream", url) as server, connected(server) as near:
            with connected_to(url) as far:
                far.put_result(ACTION, result_of(SHA256.of(b"nowhere")))
                assert far.result(ACTION).output_files[0].path == "out"
            assert refused(lambda: near.result(ACTION)) == "NOT_FOUND"


@contextmanager
def connected_to(url: str) -> Iterator[Client]:
    client = Client(url.removeprefix("grpc://"))
    try:
        yield client
    finally:
        client.close()


# Budgets


def test_two_thousand_small_blobs_cost_few_calls(tmp_path: Path) -> None:
    with Store.open(tmp_path / "above") as above, above.ingest() as ingest:
        digests = [ingest.add_bytes(b"%d" % number * 100, BLAKE3) for number in range(2000)]
        ingest.flush()
        # What a batch has is what came to wait during the calls before it: so they take their time here.
        with serving(above, Odd(delay=0.2)) as url, fetching(tmp_path / "here", url) as (store, upstream):
            done = prefetch(store, digests)
            assert (done.fetched_blobs, done.failed) == (2000, {})
            assert upstream.statistics()["BatchReadBlobs"] <= 40
            assert upstream.statistics()["GetCapabilities"] == 1
            assert "Read" not in upstream.statistics()


def test_who_opens_a_blob_while_it_comes_waits_for_the_same_call(tmp_path: Path) -> None:
    with Store.open(tmp_path / "above") as above, above.ingest() as ingest:
        digest = ingest.add_bytes(b"wanted", BLAKE3)
        ingest.flush()
        with serving(above, Odd(delay=0.3)) as url, fetching(tmp_path / "here", url) as (store, upstream):
            futures = []
            threads = [threading.Thread(target=lambda: futures.append(store.hydrator.fetch(digest))) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for future in futures:
                future.result(10)
            assert len(futures) == 8 and upstream.statistics()["BatchReadBlobs"] == 1


def test_a_large_blob_is_streamed_with_flat_memory(casfs: Casfs, tmp_path: Path) -> None:
    size = 200 << 20
    source = tmp_path / "large"
    with open(source, "wb") as file:
        file.writelines(os.urandom(1 << 16) * 16 for _ in range(size >> 20))
    with Store.open(new(casfs, "above").store) as above, above.ingest() as ingest:
        digest = ingest.add_file(os.fsencode(source), BLAKE3)
    source.unlink()
    with running(new(casfs, "above")) as server:
        url = f"grpc://{server.address}"
        with fetching(tmp_path / "here", url, 30) as (store, upstream):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            store.hydrator.fetch(digest).result(60)
            assert store.blobs.has(digest)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"
            assert upstream.statistics()["Read"] == 1


# What is odd about an upstream


@pytest.mark.parametrize("odd", [Odd(zstd=False), Odd(functions=(SHA256,)), Odd(batch_bytes=1000), Odd(silent=True)])
def test_an_upstream_is_taken_as_it_says_it_is(tmp_path: Path, odd: Odd) -> None:
    with Store.open(tmp_path / "above") as above, above.ingest() as ingest:
        contents = [b"x" * size for size in (1, 900, 2000, 3 << 20)]
        known = [ingest.add_bytes(content, SHA256) for content in contents]
        other = ingest.add_bytes(b"by another function", BLAKE3)
        ingest.flush()
        with serving(above, odd) as url, fetching(tmp_path / "here", url) as (store, upstream):
            assert prefetch(store, known).fetched_blobs == 4
            if odd.functions == (SHA256,) or odd.silent:
                calls = upstream.statistics()
                with pytest.raises(MissingBlob):
                    store.hydrator.fetch(other).result(10)
                assert upstream.statistics() == calls, "it isn't asked for what it can't have"
            else:
                store.hydrator.fetch(other).result(10)


@pytest.mark.parametrize("zstd", [True, False])
@pytest.mark.parametrize("content", [b"small", b"large" * (1 << 19)])
def test_wrong_bytes_are_never_served(tmp_path: Path, content: bytes, zstd: bool) -> None:
    with Store.open(tmp_path / "above") as above, above.ingest() as ingest:
        digest = ingest.add_bytes(content, BLAKE3)
        ingest.flush()
        with serving(above, Odd(lying=True, zstd=zstd)) as url, fetching(tmp_path / "here", url) as (store, _):
            with pytest.raises(MissingBlob, match="damaged"):
                store.hydrator.fetch(digest).result(10)
            assert not store.blobs.has_file(digest)


def test_a_slow_upstream_holds_up_nothing_that_is_here(casfs: Casfs, tmp_path: Path) -> None:
    with Store.open(tmp_path / "above") as above, serving(above, Odd(delay=3.0)) as url:
        with running(new(casfs, "here"), "--upstream", url) as server, connected(server) as near:
            [digest] = near.add(b"here")
            slow = threading.Thread(target=lambda: refused(lambda: near.read(SHA256.of(b"nowhere"))))
            slow.start()
            began = time.monotonic()
            assert near.read(digest) == b"here"
            assert time.monotonic() - began < 2.0
            slow.join()


# Its death


def test_a_dead_upstream_is_passed_over_and_found_again(casfs: Casfs, tmp_path: Path) -> None:
    above = new(casfs, "above")
    with running(above) as first, connected(first) as far:
        [digest, other] = far.add(b"wanted", b"wanted later")
        url, port = f"grpc://{first.address}", first.address
        with fetching(tmp_path / "here", url, 3) as (store, upstream):
            store.hydrator.fetch(digest).result(10)
            first.stop(signal.SIGKILL)
            with pytest.raises(MissingBlob, match="grpc://"):
                store.hydrator.fetch(other).result(10)
            for _ in range(20):
                with pytest.raises(MissingBlob, match="passed over"):
                    store.hydrator.fetch(other).result(0.5)
            assert upstream.statistics()["passed_over"] >= 20
            with running(above, "--listen", port):
                wait_for(lambda: store.hydrator.fetch(other).exception(10) is None)


def test_a_short_absence_is_bridged_by_trying_again(casfs: Casfs, tmp_path: Path) -> None:
    above = new(casfs, "above")
    with running(above) as first, connected(first) as far:
        [digest] = far.add(b"wanted")
        with fetching(tmp_path / "here", f"grpc://{first.address}", 30) as (store, _):
            first.stop(signal.SIGKILL)
            future = store.hydrator.fetch(digest)
            with running(above, "--listen", first.address):
                future.result(30)
            assert store.blobs.has(digest)


def test_a_server_lives_on_without_its_upstream(casfs: Casfs) -> None:
    with pair(casfs) as (_, near, upstream):
        upstream.stop(signal.SIGKILL)
        [digest] = near.add(b"still works")
        assert near.read(digest) == b"still works"
        near.put_result(ACTION, result_of(digest))
        assert near.result(ACTION).output_files[0].path == "out"
        assert refused(lambda: near.result(SHA256.of(b"another action"))) == "NOT_FOUND"
        began = time.monotonic()
        for number in range(20):
            assert refused(partial(near.result, SHA256.of(b"%d" % number))) == "NOT_FOUND"
        assert time.monotonic() - began < 5


# Who may ask


def test_tokens_and_tls(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("openssl")
    make_certificates(casfs.directory)
    (casfs.directory / "tokens").write_text("write the-upstream-token\n")
    (casfs.directory / "token").write_text("the-upstream-token\n")
    files = {name: str(casfs.directory / name) for name in ("ca.crt", "server.crt", "server.key", "token", "tokens")}
    files |= {name: str(casfs.directory / name) for name in ("client.crt", "client.key")}
    above = new(casfs, "above")
    above.ok("add", "--stdin", stdin="behind locks")
    tls = ("--tls-certificate", files["server.crt"], "--tls-key", files["server.key"])
    with running(above, *tls, "--tls-client-ca", files["ca.crt"], "--tokens", files["tokens"]) as server:
        options = UpstreamOptions(
            f"grpcs://{server.address}", files["token"], files["ca.crt"], files["client.crt"], files["client.key"]
        )
        options.check()
        assert load_upstream(dump_upstream(options)) == options
        wanted = BLAKE3.of(b"behind locks")
        with Store.open(casfs.directory / "one", sources=with_upstream(SourceOptions((), 5), options)) as store:
            store.hydrator.fetch(wanted).result(10)
        without = UpstreamOptions(options.url, None, files["ca.crt"], files["client.crt"], files["client.key"])
        with Store.open(casfs.directory / "two", sources=with_upstream(SourceOptions((), 5), without)) as store:
            with pytest.raises(MissingBlob, match="UNAUTHENTICATED"):
                store.hydrator.fetch(wanted).result(10)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://host", "grpc://HOST"),
        ("grpc://host:99999", "grpc://HOST"),
        ("grpc://host/a/blobs", "instance"),
    ],
)
def test_what_is_no_upstream_is_said_at_once(casfs: Casfs, url: str, why: str) -> None:
    for verb in (["prefetch", "m"], ["mount", "m", "."], ["run", "m", "true"], ["serve"]):
        assert why in casfs.fails(Exit.USAGE, *verb, "--upstream", url)


def test_a_token_goes_to_no_other_machine_in_plain_text(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-token")
    with pytest.raises(BadInput, match="plain text"):
        UpstreamOptions("grpc://cache.example", str(tmp_path / "token")).check()


def test_write_back_needs_somebody_to_write_to(casfs: Casfs) -> None:
    assert "--upstream" in casfs.fails(Exit.USAGE, "serve", "--write-back")


def test_what_was_fetched_lies_where_it_belongs(casfs: Casfs) -> None:
    with pair(casfs) as (far, near, _):
        [digest] = far.add(b"fetched")
        near.read(digest)
        assert (new(casfs, "here").store / "blobs" / blob_path(digest)).read_bytes() == b"fetched"
