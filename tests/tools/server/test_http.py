"""The HTTP cache over a real socket, by a real `casfs serve`: every status code, ranges, zstd, opaque and validated."""

from __future__ import annotations

import random
import re
import signal
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import zstandard

from store.digest import DigestFunction
from store.layout import blob_path
from store.repository import Store
from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import (
    BLAKE3,
    HTTP,
    SHA256,
    Client,
    HttpClient,
    Server,
    connected,
    refused,
    running,
    wait_for,
)
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.requests import write_digest

LARGE = random.Random(0).randbytes(3 << 20) + bytes(1 << 20)
ABSENT = "00" * 32


def in_chunks(data: bytes, size: int = 100_000) -> Iterable[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


# Blobs


@pytest.mark.parametrize("function", [SHA256, BLAKE3])
@pytest.mark.parametrize("data", [b"", b"small", bytes(64 << 10), bytes(65537), LARGE])
def test_a_blob_comes_back_whatever_its_function_and_size(
    web: HttpClient, function: DigestFunction, data: bytes
) -> None:
    path = web.put_blob(data, function)
    got = web("GET", path)
    assert (got.status, got.body) == (200, data)
    head = web("HEAD", f"/some/instance{path}")
    assert (head.status, head.headers["Content-Length"], head.body) == (200, str(len(data)), b"")


def test_a_blob_in_chunks(web: HttpClient) -> None:
    data = random.Random(1).randbytes(700_000)
    path = f"/cas/{BLAKE3.of(data).hex}"
    assert web("PUT", path, in_chunks(data)).status == 200
    assert web("GET", path).body == data


def test_both_transports_have_the_same_blobs(shared_http: Server, web: HttpClient) -> None:
    path = web.put_blob(b"over HTTP", BLAKE3)
    with connected(shared_http) as client:
        assert client.missing([BLAKE3.of(b"over HTTP")], BLAKE3) == []
        client.add(b"over gRPC")
    assert web("GET", f"/cas/{SHA256.of(b'over gRPC').hex}").body == b"over gRPC"
    assert path


def test_what_bazel_put_into_the_directory_is_found(casfs: Casfs) -> None:
    digest = BLAKE3.of(b"by its disk cache")
    Store.open(casfs.store).close()
    file = casfs.store / "blobs" / blob_path(digest)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"by its disk cache")
    wrong = SHA256.of(b"what it should be")
    file = casfs.store / "blobs" / blob_path(wrong)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"what it should BE")
    with running(casfs, *HTTP) as server, HttpClient(server) as web:
        assert web("GET", f"/cas/{digest.hex}").body == b"by its disk cache"
        assert web("GET", f"/cas/{wrong.hex}").status == 404


def test_what_is_cold_is_found(casfs: Casfs) -> None:
    data = b"not used for long " * 1000
    with Store.open(casfs.store) as store, store.ingest() as ingest:
        digest = ingest.add_bytes(data, BLAKE3)
    with Store.open(casfs.store) as store:
        store.demoter.demote(0)
        assert not store.blobs.has_file(digest)
    with running(casfs, *HTTP) as server, HttpClient(server) as web:
        assert web("HEAD", f"/cas/{digest.hex}").headers["Content-Length"] == str(len(data))
        assert web("GET", f"/cas/{digest.hex}").body == data


def test_what_is_not_there_is_404(web: HttpClient) -> None:
    for path in (f"/cas/{ABSENT}", f"/ac/{ABSENT}", f"/x/cas/{ABSENT}", "/nowhere", "/tree/sha256/12"):
        assert web("GET", path).status == 404
        assert web("HEAD", path).status == 404


@pytest.mark.parametrize(
    "path", ["/cas/short", f"/cas/{'AB' * 32}", f"/ac/{ABSENT}0", f"/a//b/cas/{ABSENT}", f"/blobs/ac/{ABSENT}"]
)
def test_bad_names_are_400(web: HttpClient, path: str) -> None:
    assert web("GET", path).status == 400
    assert web("PUT", path, b"x").status == 400


def test_other_bytes_than_their_name_says_are_400_and_nothing_is_kept(web: HttpClient) -> None:
    path = f"/cas/{SHA256.of(b'right').hex}"
    for body in (b"wrong", b"", b"rightly"):
        assert web("PUT", path, body).status == 400
    assert web("GET", path).status == 404


def test_methods_that_do_not_exist_are_405(web: HttpClient) -> None:
    path = web.put_blob(b"stays")
    for method in ("POST", "DELETE", "PATCH", "OPTIONS"):
        answer = web(method, path)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD, PUT")
    assert web("POST", f"/ac/{ABSENT}").headers["Allow"] == "GET, HEAD, PUT, DELETE"
    assert web("PUT", "/metrics", b"").status == 405
    assert web("GET", path).body == b"stays"


def test_ranges(web: HttpClient) -> None:
    path = web.put_blob(LARGE)
    for text, first, end in (
        ("0-9", 0, 10),
        ("1000000-2999999", 1_000_000, 3_000_000),
        ("-5", len(LARGE) - 5, len(LARGE)),
    ):
        part = web("GET", path, Range=f"bytes={text}")
        assert (part.status, part.body) == (206, LARGE[first:end])
        assert part.headers["Content-Range"] == f"bytes {first}-{end - 1}/{len(LARGE)}"
    small = web.put_blob(b"0123456789")
    assert web("GET", small, Range="bytes=3-5").body == b"345"
    assert web("HEAD", small, Range="bytes=3-5").headers["Content-Length"] == "3"
    past = web("GET", small, Range="bytes=10-")
    assert (past.status, past.headers["Content-Range"]) == (416, "bytes */10")
    assert web("GET", small, Range="bytes=1-2,4-5").body == b"0123456789"
    etag = web("GET", small).headers["ETag"]
    assert web("GET", small, Range="bytes=3-5", If_Range=etag).status == 206
    assert web("GET", small, Range="bytes=3-5", If_Range='"another"').status == 200


def test_who_has_it_is_told_so(web: HttpClient) -> None:
    path = web.put_blob(b"known already")
    etag = web("GET", path).headers["ETag"]
    answer = web("GET", path, If_None_Match=etag)
    assert (answer.status, answer.body) == (304, b"")
    assert web("GET", path, If_None_Match='"other"').status == 200


# zstd


def test_zstd_both_ways(web: HttpClient) -> None:
    packed = zstandard.compress(LARGE)
    path = f"/cas/{SHA256.of(LARGE[:-1]).hex}"
    assert web("PUT", path, zstandard.compress(LARGE[:-1]), Content_Encoding="zstd").status == 200
    assert web("GET", path).body == LARGE[:-1]
    path = web.put_blob(LARGE)
    got = web("GET", path, Accept_Encoding="gzip, zstd")
    assert got.headers["Content-Encoding"] == "zstd"
    assert zstandard.ZstdDecompressor().decompressobj().decompress(got.body) == LARGE
    assert len(got.body) < len(packed) * 1.1
    assert got.headers["ETag"] != web("GET", path).headers["ETag"]
    assert "Content-Encoding" not in web("GET", path, Accept_Encoding="zstd", Range="bytes=0-9").headers
    assert web("HEAD", path, Accept_Encoding="zstd").headers["Content-Encoding"] == "zstd"
    small = web.put_blob(b"abc" * 1000)
    got = web("GET", small, Accept_Encoding="zstd")
    assert zstandard.ZstdDecompressor().decompressobj().decompress(got.body) == b"abc" * 1000


def test_zstd_that_is_none_or_cut_off_is_400(web: HttpClient) -> None:
    data = random.Random(2).randbytes(300_000)
    path = f"/cas/{SHA256.of(data).hex}"
    packed = zstandard.compress(data)
    for body in (packed[:-100], packed[:10], b"no zstd at all", b"", packed + b"more"):
        assert web("PUT", path, body, Content_Encoding="zstd").status == 400
    assert web("GET", path).status == 404
    assert web("PUT", path, data, Content_Encoding="gzip").status == 415


def test_zstd_that_expands_beyond_the_bound_is_413(casfs: Casfs) -> None:
    bomb = zstandard.compress(bytes(100 << 20))
    assert len(bomb) < 20_000
    with running(casfs, *HTTP, "--max-body", "1MiB") as server, HttpClient(server) as web:
        assert web("PUT", f"/cas/{ABSENT}", bomb, Content_Encoding="zstd").status == 413
    with running(casfs, *HTTP, "--max-body", "1MiB") as server, HttpClient(server) as web:
        assert web("PUT", f"/cas/{ABSENT}", bytes(2 << 20)).status == 413
    with running(casfs, *HTTP, "--max-body", "1MiB") as server, HttpClient(server) as web:
        answer = web("PUT", f"/ac/{ABSENT}", in_chunks(bytes(2 << 20)))
        assert answer.status == 413


def test_the_bound_is_for_small_blobs_too(casfs: Casfs) -> None:
    with running(casfs, *HTTP, "--max-body", "100") as server, HttpClient(server) as web:
        assert web("PUT", f"/cas/{SHA256.of(bytes(101)).hex}", bytes(101)).status == 413
        assert web("PUT", f"/cas/{SHA256.of(bytes(100)).hex}", bytes(100)).status == 200


# Results


def test_opaque_results_are_kept_as_they_are(web: HttpClient) -> None:
    path, large = f"/ac/{'c1' * 32}", b"\xff no message " * 10_000
    assert web("GET", path).status == 404
    for value in (b"anything", large, b""):
        assert web("PUT", path, value).status == 200
        assert web("GET", path).body == value
        assert web("HEAD", path).headers["Content-Length"] == str(len(value))
    assert web("PUT", path, zstandard.compress(large), Content_Encoding="zstd").status == 200
    assert web("GET", path).body == large
    assert web("DELETE", path).status == 204
    assert web("DELETE", path).status == 404
    assert web("GET", path).status == 404


def test_instances_have_results_of_their_own(web: HttpClient) -> None:
    path = f"/ac/{'c2' * 32}"
    web("PUT", f"/a{path}", b"of a")
    web("PUT", f"/b{path}", b"of b")
    assert web("GET", f"/a{path}").body == b"of a"
    assert web("GET", f"/b{path}").body == b"of b"
    assert web("GET", path).status == 404


def test_what_is_opaque_is_never_taken_for_a_result(shared_http: Server, web: HttpClient) -> None:
    action = SHA256.of(b"an action")
    result = reapi.ActionResult(exit_code=1)
    assert web("PUT", f"/ac/{action.hex}", result.SerializeToString()).status == 200
    with connected(shared_http) as client:
        assert refused(lambda: client.result(action)) == "NOT_FOUND"
        for name in ("blobs/opaque", "blobs/opaque/", "opaque"):
            assert refused(partial(client.result, action, instance_name=name)) in ("NOT_FOUND", "INVALID_ARGUMENT")
        client.put_result(action, reapi.ActionResult(exit_code=2))
    assert reapi.ActionResult.FromString(web("GET", f"/ac/{action.hex}").body).exit_code == 1


def add_result(client: Client, function: DigestFunction) -> tuple[reapi.ActionResult, bytes]:
    """A result with an output that is here."""
    data = f"an output by {function.label}".encode()
    [digest] = client.add(data, function=function)
    return reapi.ActionResult(output_files=[reapi.OutputFile(path="o", digest=write_digest(digest))]), data


def test_validated_results_are_whole_ones_and_the_same_as_over_grpc(casfs: Casfs) -> None:
    with (
        running(casfs, *HTTP, "--http-validate-ac") as server,
        HttpClient(server) as web,
        connected(server) as client,
    ):
        for function in (SHA256, BLAKE3):
            action = function.of(b"an action")
            result, _ = add_result(client, function)
            assert web("PUT", f"/ac/{action.hex}", result.SerializeToString()).status == 200
            assert client.result(action) == result
            assert reapi.ActionResult.FromString(web("GET", f"/ac/{action.hex}").body) == result
            other = function.of(b"another")
            client.put_result(other, result, "main")
            assert web("GET", f"/main/ac/{other.hex}").status == 200
            assert web("GET", f"/ac/{other.hex}").status == 404
        malformed = reapi.ActionResult(output_files=[reapi.OutputFile(path="o", digest=reapi.Digest(hash="no hash"))])
        for body in (malformed.SerializeToString(), b"\xff no message"):
            assert web("PUT", f"/ac/{ABSENT}", body).status == 400
        assert web("GET", f"/ac/{ABSENT}").status == 404
        assert web("PUT", f"/ac/{ABSENT}", bytes(17 << 20)).status == 413


@pytest.mark.parametrize("function", [SHA256, BLAKE3])
def test_a_validated_result_may_come_before_its_outputs(casfs: Casfs, function: DigestFunction) -> None:
    first, second = b"the output of this action alone", b"one that Bazel uploads for another action"
    action = function.of(b"an action")
    outputs = [reapi.OutputFile(path="o", digest=write_digest(function.of(data))) for data in (first, second)]
    body = reapi.ActionResult(output_files=outputs).SerializeToString()
    with running(casfs, *HTTP, "--http-validate-ac") as server, HttpClient(server) as web:
        web.put_blob(first, function)
        assert web("PUT", f"/ac/{action.hex}", body).status == 200
        assert web("GET", f"/ac/{action.hex}").status == 404
        web.put_blob(second, function)
        assert web("GET", f"/ac/{action.hex}").body == body


def test_a_result_whose_output_is_gone_is_a_miss(casfs: Casfs) -> None:
    action = SHA256.of(b"an action")
    with running(casfs, *HTTP, "--http-validate-ac") as server, HttpClient(server) as web, connected(server) as client:
        result, data = add_result(client, SHA256)
        assert web("PUT", f"/ac/{action.hex}", result.SerializeToString()).status == 200
    (casfs.store / "blobs" / blob_path(SHA256.of(data))).unlink()
    with running(casfs, *HTTP, "--http-validate-ac") as server, HttpClient(server) as web:
        assert web("GET", f"/ac/{action.hex}").status == 404
        assert web("DELETE", f"/ac/{action.hex}").status == 204


# What is sent by the kernel


@contextmanager
def traced(server: Server, calls: str) -> Iterator[Path]:
    """A file of the server's system calls of these names; whole when the context has ended."""
    trace = server.casfs.directory / "trace"
    command = ["strace", "-f", "-qq", "-e", f"trace={calls}", "-o", str(trace), "-p", str(server.process.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
        threads = Path(f"/proc/{server.process.pid}/task")
        wait_for(lambda: all("TracerPid:\t0" not in path.read_text() for path in threads.glob("*/status")))
        yield trace
        tracer.send_signal(signal.SIGINT)
        tracer.wait(30)


def test_large_blobs_are_sent_by_sendfile(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("strace")
    with running(casfs, *HTTP) as server, HttpClient(server) as web:
        path = web.put_blob(LARGE)
        with traced(server, "sendfile") as trace:
            assert web("GET", path).body == LARGE
        sent = map(int, re.findall(r"= (\d+)$", trace.read_text(), re.MULTILINE))
        assert sum(sent) == len(LARGE)


def test_a_head_is_acknowledged_at_once_if_its_body_comes_later(casfs: Casfs, requires: Requirements) -> None:
    """As ccache sends it: its kernel keeps the body back until then."""
    requires.programs("strace")
    with running(casfs, *HTTP) as server, HttpClient(server) as web:
        with traced(server, "setsockopt") as trace:

            def body() -> Iterator[bytes]:
                wait_for(lambda: "TCP_QUICKACK" in trace.read_text())
                yield b"later"

            assert web("PUT", f"/ac/{ABSENT}", body()).status == 200


@pytest.mark.parametrize("function", [SHA256, BLAKE3])
def test_a_blob_of_an_upstream_is_found_by_its_hash_once_its_size_was_seen(
    casfs: Casfs, tmp_path: Path, function: DigestFunction
) -> None:
    front = Casfs(tmp_path / "front")
    front.directory.mkdir()
    action, content = function.of(b"an action"), LARGE[: 3 << 20]
    with (
        running(casfs) as upstream,
        connected(upstream) as far,
        running(front, *HTTP, "--upstream", f"grpc://{upstream.address}") as server,
        connected(server) as near,
        HttpClient(server) as web,
    ):
        large, unseen = far.add(content, b"never asked for", function=function)
        result, data = add_result(far, function)
        result.output_files.append(reapi.OutputFile(path="large", digest=write_digest(large)))
        far.put_result(action, result)
        assert web("GET", f"/cas/{large.hex}").status == 404
        assert near.result(action) == result  # over gRPC, where it names sizes
        for expected in (data, content):
            path = f"/cas/{function.of(expected).hex}"
            assert web("HEAD", path).headers["Content-Length"] == str(len(expected))
            assert web("GET", path).body == expected
        assert web("GET", f"/cas/{unseen.hex}").status == 404
        # Seen, and gone since.
        [vanishing] = far.add(b"vanishing", function=function)
        assert near.missing([vanishing], function) == []
        (casfs.store / "blobs" / blob_path(vanishing)).unlink()
        assert web("GET", f"/cas/{vanishing.hex}").status == 404


def test_results_of_an_upstream_come_with_their_blobs(casfs: Casfs, tmp_path: Path) -> None:
    front = Casfs(tmp_path / "front")
    front.directory.mkdir()
    action = SHA256.of(b"an action")
    with (
        running(casfs) as upstream,
        connected(upstream) as client,
        running(front, *HTTP, "--http-validate-ac", "--upstream", f"grpc://{upstream.address}") as server,
        HttpClient(server) as web,
    ):
        result, data = add_result(client, SHA256)
        client.put_result(action, result)
        assert web("GET", f"/cas/{SHA256.of(data).hex}").status == 404
        assert reapi.ActionResult.FromString(web("GET", f"/ac/{action.hex}").body) == result
        # Nobody could ask the upstream for it by its hash alone.
        assert web("GET", f"/cas/{SHA256.of(data).hex}").body == data
