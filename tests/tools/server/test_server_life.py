"""A server's life: starting, being refused, guards, limits, draining, being killed; two of them on one store."""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from store.digest import Digest
from store.layout import blob_path
from store.repository import Store
from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import (
    SHA256,
    Client,
    Server,
    code_of,
    connected,
    make_certificates,
    pieces,
    refused,
    running,
    wait_for,
)
from tools.exits import Exit
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.resource_names import ResourceName
from tools.server.requests import write_digest


def open_upload(client: Client, digest: Digest, data: bytes, upload: str) -> tuple[Any, threading.Event]:
    """Begin an upload that stays open after these bytes; cancel the call, or set the event to let it end."""
    go_on = threading.Event()
    name = str(ResourceName("", digest, upload=upload))

    def messages() -> Iterator[bytestream.WriteRequest]:
        yield bytestream.WriteRequest(resource_name=name, data=data)
        go_on.wait(30)

    stub = client.channel.stream_unary(
        methods.WRITE.path,
        request_serializer=bytestream.WriteRequest.SerializeToString,
        response_deserializer=bytestream.WriteResponse.FromString,
    )
    call = stub.future(messages())
    return call, go_on


def files_in_tmp(casfs: Casfs) -> list[Path]:
    return [path for path in (casfs.store / "tmp").rglob("*") if path.is_file()]


# Starting and ending


def test_sigterm_ends_it_with_exit_code_0_and_leaves_nothing(casfs: Casfs) -> None:
    server = Server(casfs)
    with connected(server) as client:
        client.add(b"kept")
    assert (server.stop(), server.err) == (0, "")
    assert list((casfs.store / "tmp").iterdir()) == []
    assert casfs.ok("stats", "--json").json["blobs"] == 1


def test_sigint_ends_it_too(casfs: Casfs) -> None:
    assert Server(casfs).stop(signal.SIGINT) == 0


def test_a_call_that_is_on_is_finished_before_the_end(casfs: Casfs) -> None:
    data = random.Random(1).randbytes(400_000)
    digest = SHA256.of(data)
    with running(casfs) as server, connected(server) as client:
        name = str(ResourceName("", digest, upload="slow"))
        started, go_on = threading.Event(), threading.Event()

        def messages() -> Iterator[bytestream.WriteRequest]:
            first, *rest = pieces(name, data, 50_000)
            yield first
            started.set()
            go_on.wait(20)
            yield from rest

        results = []
        thread = threading.Thread(target=lambda: results.append(client.call(methods.WRITE, messages())))
        thread.start()
        started.wait(30)
        wait_for(lambda: files_in_tmp(casfs))
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        go_on.set()
        thread.join(20)
        assert results[0].committed_size == len(data)
        server.process.wait(20)  # by the first signal; a second one would end it as it is
        assert server.stop() == 0
    with Store.open(casfs.store) as store:
        assert store.blobs.has(digest)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--listen", "nonsense"], "is no place to listen at"),
        (["--listen", "127.0.0.1:99999"], "is no place to listen at"),
        (["--listen", "0.0.0.0:0"], "--insecure"),
        (["--listen", ":0"], "--insecure"),
        (["--processes", "0"], "--processes"),
        (["--max-size", "0"], "--max-size"),
        (["--max-size", "large"], "is not a size"),
        (["--tls-key", "key.pem"], "--tls-certificate"),
        (["--tls-key", "no-such.pem", "--tls-certificate", "no-such.pem"], "No such file"),
        (["--tokens", "no-such-file"], "No such file"),
        (["--instance", "a//b"], "can't be an instance"),
    ],
)
def test_what_can_not_be_served_is_refused_at_the_start(casfs: Casfs, arguments: list[str], said: str) -> None:
    assert said in casfs.fails(Exit.USAGE, "serve", *arguments)


def test_a_port_that_is_taken_is_refused(casfs: Casfs) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        said = casfs.fails(Exit.USAGE, "serve", "--listen", f"127.0.0.1:{other.getsockname()[1]}")
    assert "in use" in said


def test_settings_come_from_the_configuration_and_the_command_line_goes_before(casfs: Casfs) -> None:
    config = casfs.directory / "serve.toml"
    config.write_text('[serve]\nread-only = true\ninstances = ["main"]\nmax-size = "1GiB"\n')
    with running(casfs, "--config", config, "--instance", "other") as server, connected(server) as client:
        answer = client.call(methods.GET_CAPABILITIES, reapi.GetCapabilitiesRequest(instance_name="other"))
        assert not answer.cache_capabilities.action_cache_update_capabilities.update_enabled
        assert answer.cache_capabilities.max_cas_blob_size_bytes == 1 << 30
        main = reapi.GetCapabilitiesRequest(instance_name="main")
        assert refused(lambda: client.call(methods.GET_CAPABILITIES, main)) == "INVALID_ARGUMENT"


def test_several_processes_share_the_port_and_the_store(casfs: Casfs) -> None:
    with running(casfs, "--processes", "2") as server:
        digests = []
        for number in range(12):
            # A connection each, which the kernel gives to one of them.
            with connected(server) as client:
                digests += client.add(b"blob %d" % number)
                assert client.missing(digests) == []
                assert client.read(digests[0]) == b"blob 0"
        assert server.stop() == 0
        assert server.err == ""


def test_when_one_of_its_processes_dies_it_ends_and_says_so_by_its_code(casfs: Casfs) -> None:
    with running(casfs, "--processes", "2") as server:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        assert server.process.wait(20) == 1


def test_health_and_reflection_answer(casfs: Casfs) -> None:
    with running(casfs) as server, connected(server) as client:
        health: Any = health_pb2_grpc.HealthStub(client.channel)
        service = methods.FIND_MISSING_BLOBS.service
        for name in ("", service):
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(client.channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(iter(reflection.ServerReflectionInfo(iter([asked]))))
        names = {found.name for found in answer.list_services_response.service}
        assert {service, "google.bytestream.ByteStream", "grpc.health.v1.Health"} <= names


# Guards


def all_writes(client: Client) -> list[str]:
    """What each way to write is answered with."""
    digest = SHA256.of(b"x")
    batch = reapi.BatchUpdateBlobsRequest()
    batch.requests.add(digest=write_digest(digest), data=b"x")
    return [
        refused(lambda: client.write(digest, b"x")),
        refused(lambda: client.call(methods.BATCH_UPDATE_BLOBS, batch)),
        refused(lambda: client.put_result(digest, reapi.ActionResult())),
    ]


def test_a_read_only_server_writes_for_nobody(casfs: Casfs) -> None:
    with running(casfs) as server, connected(server) as client:
        [digest] = client.add(b"there before")
    with running(casfs, "--read-only") as server, connected(server) as client:
        assert client.read(digest) == b"there before"
        assert all_writes(client) == ["PERMISSION_DENIED"] * 3
        assert client.missing([SHA256.of(b"x")]) == [SHA256.of(b"x").hex]


def test_tokens_have_rights(casfs: Casfs) -> None:
    tokens = casfs.directory / "tokens"
    tokens.write_text("# a comment\n\nread reading-token\nwrite writing-token\n")
    with running(casfs, "--tokens", tokens) as server:
        with connected(server, token="writing-token") as writer:
            [digest] = writer.add(b"by the writer")
            assert writer.read(digest) == b"by the writer"
        with connected(server, token="reading-token") as reader:
            assert reader.read(digest) == b"by the writer"
            assert all_writes(reader) == ["PERMISSION_DENIED"] * 3
        for token in ("", "guessed-token"):
            with connected(server, token=token) as stranger:
                assert refused(partial(stranger.read, digest)) == "UNAUTHENTICATED"
                assert all_writes(stranger) == ["UNAUTHENTICATED"] * 3
                # Whoever watches over servers needs no token.
                health: Any = health_pb2_grpc.HealthStub(stranger.channel)
                assert health.Check(health_pb2.HealthCheckRequest()).status == 1


@pytest.mark.parametrize("text", ["", "read short\n", "admin some-long-token\n", "read two tokens-here\n"])
def test_a_file_of_tokens_that_makes_no_sense_is_refused(casfs: Casfs, text: str) -> None:
    (casfs.directory / "tokens").write_text(text)
    assert "tokens" in casfs.fails(Exit.USAGE, "serve", "--tokens", "tokens")


def test_tls_and_mutual_tls(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("openssl")
    make_certificates(casfs.directory)
    files = {path.name: path.read_bytes() for path in casfs.directory.glob("*.*")}
    anonymous = grpc.ssl_channel_credentials(files["ca.crt"])
    known = grpc.ssl_channel_credentials(files["ca.crt"], files["client.key"], files["client.crt"])
    tls = ("--tls-certificate", "server.crt", "--tls-key", "server.key")
    with running(casfs, *tls) as server:
        with connected(server, credentials=anonymous) as client:
            client.add(b"over TLS")
        with connected(server) as plain:
            assert refused(lambda: plain.missing([])) == "UNAVAILABLE"
    with running(casfs, *tls, "--tls-client-ca", "ca.crt") as server:
        with connected(server, credentials=known) as client:
            assert client.missing([SHA256.of(b"over TLS")]) == []
        with connected(server, credentials=anonymous) as client:
            assert refused(lambda: client.missing([])) == "UNAVAILABLE"


# Limits


def test_a_message_that_is_too_large_is_refused(casfs: Casfs) -> None:
    with running(casfs, "--max-message", "100KiB") as server, connected(server) as client:
        data = bytes(200 << 10)
        assert refused(lambda: client.write(SHA256.of(data), data)) == "RESOURCE_EXHAUSTED"
        assert client.write(SHA256.of(data), data, piece=50 << 10) == len(data)


def test_so_many_large_uploads_are_taken_at_a_time_and_the_next_waits_for_its_turn(casfs: Casfs) -> None:
    with running(casfs, "--max-uploads", "3", "--idle-timeout", "10s") as server, connected(server) as client:
        blobs = [b"upload %d" % number + bytes(400_000) for number in range(4)]
        digests = list(map(SHA256.of, blobs))
        calls = [open_upload(client, digest, b"up", f"u{n}") for n, digest in enumerate(digests[:3])]
        wait_for(lambda: len(files_in_tmp(casfs)) == 3)
        waiting, finish = open_upload(client, digests[3], blobs[3], "u3")
        # Small ones need no turn. This one came behind the one that waits.
        assert client.write(SHA256.of(b"small"), b"small") == 5
        assert len(files_in_tmp(casfs)) == 3
        assert not waiting.done()
        finish.set()
        for call, go_on in calls:
            go_on.set()
            assert call.result(10).committed_size == 2
        # Its client didn't say that this was all.
        assert waiting.result(10).committed_size == len(blobs[3])
        # All four are parked now, and none of them has a turn.
        assert len(files_in_tmp(casfs)) == 4
        for number, (digest, data) in enumerate(zip(digests, blobs, strict=True)):
            received = 2 if number < 3 else len(data)
            assert client.write(digest, data[received:], upload=f"u{number}", offset=received) == len(data)
            assert client.read(digest) == data


def test_a_client_that_sends_nothing_for_long_is_given_up(casfs: Casfs) -> None:
    with running(casfs, "--idle-timeout", "1s") as server, connected(server) as client:
        call, go_on = open_upload(client, SHA256.of(b"never finished"), b"never", "slow")
        with pytest.raises(grpc.RpcError) as caught:
            call.result(20)
        go_on.set()
        assert code_of(caught.value) == "DEADLINE_EXCEEDED"


def test_a_client_that_takes_nothing_for_long_is_given_up(casfs: Casfs) -> None:
    data = random.Random(5).randbytes(30 << 20)
    with running(casfs, "--idle-timeout", "1s") as server, connected(server) as client:
        client.write(SHA256.of(data), data)
        request = bytestream.ReadRequest(resource_name=str(ResourceName("", SHA256.of(data))))
        responses = client.call(methods.READ, request)
        next(responses)
        time.sleep(2)
        with pytest.raises(grpc.RpcError) as caught:
            list(responses)
        assert code_of(caught.value) == "DEADLINE_EXCEEDED"


def test_a_client_that_vanishes_in_mid_upload_can_come_back(casfs: Casfs) -> None:
    data = b"0123456789" * 40_000
    digest = SHA256.of(data)
    with running(casfs) as server:
        with connected(server) as client:
            call, go_on = open_upload(client, digest, data[:4000], "vanishing")
            wait_for(lambda: any(path.stat().st_size == 4000 for path in files_in_tmp(casfs)))
            call.cancel()
            go_on.set()
        with connected(server) as client:
            name = ResourceName("", digest, upload="vanishing")
            wait_for(lambda: client.query(name) == (4000, False))
            assert client.missing([digest]) == [digest.hex]
            assert client.write(digest, data[4000:], upload="vanishing", offset=4000) == len(data)
            assert client.read(digest) == data
        assert server.stop() == 0
    assert files_in_tmp(casfs) == []


def test_a_full_store_refuses_and_makes_room_from_what_is_old(casfs: Casfs) -> None:
    with running(casfs, "--max-size", "1MiB", "--grace", "0s") as server, connected(server) as client:
        assert refused(lambda: client.write(SHA256.of(bytes(2 << 20)), bytes(2 << 20))) == "RESOURCE_EXHAUSTED"
        written = []
        for number in range(16):
            data = random.Random(number).randbytes(150_000)
            digest = SHA256.of(data)
            if client.write(digest, data) == len(data):
                written.append(digest)
            # Use is remembered in whole seconds; only what is older than this one goes.
            if number % 5 == 4:
                time.sleep(1.1)
        assert client.read(written[-1]) == random.Random(15).randbytes(150_000)
        assert len(client.missing(written)) >= 9
        assert casfs.ok("stats", "--json").json["bytes"] <= 1 << 20


# Accidents


def test_a_download_of_what_is_collected_gets_to_its_end(casfs: Casfs) -> None:
    data = random.Random(3).randbytes(30 << 20)
    digest = SHA256.of(data)
    with running(casfs) as server, connected(server) as client:
        client.write(digest, data)
        responses = client.call(
            methods.READ, bytestream.ReadRequest(resource_name=str(ResourceName("", digest))), timeout=60
        )
        received = next(responses).data
        time.sleep(1.1)
        casfs("gc", "--high", "0", "--grace", "0")
        assert not (casfs.store / "blobs" / blob_path(digest)).exists()
        for response in responses:
            received += response.data
        assert received == data
        assert client.missing([digest]) == [digest.hex]
        assert refused(lambda: client.read(digest)) == "NOT_FOUND"


def test_what_others_remove_is_not_found_and_can_be_written_again(casfs: Casfs) -> None:
    with running(casfs) as server, connected(server) as client:
        [digest] = client.add(b"behind our back")
        path = casfs.store / "blobs" / blob_path(digest)
        path.unlink()
        assert refused(lambda: client.read(digest)) == "NOT_FOUND"
        assert client.missing([digest]) == [digest.hex]
        client.add(b"behind our back")
        assert client.read(digest) == b"behind our back"


def test_what_bazel_puts_into_the_directory_is_served_once_it_was_verified(casfs: Casfs) -> None:
    good, bad = b"written by Bazel", b"damaged on its way"
    with running(casfs) as server, connected(server) as client:
        for data, content in ((good, good), (bad, b"other bytes at all")):
            path = casfs.store / "blobs" / blob_path(SHA256.of(data))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        assert client.missing([SHA256.of(good), SHA256.of(bad)]) == [SHA256.of(bad).hex]
        assert client.read(SHA256.of(good)) == good
        assert refused(lambda: client.read(SHA256.of(bad))) == "NOT_FOUND"


def test_cold_blobs_are_there_and_come_back_when_they_are_read(casfs: Casfs) -> None:
    with running(casfs) as server, connected(server) as client:
        [digest] = client.add(b"cold " * 1000)
        time.sleep(1.1)
        casfs.ok("gc", "--cold", "0")
        assert not (casfs.store / "blobs" / blob_path(digest)).exists()
        assert client.missing([digest]) == []
        assert client.read(digest) == b"cold " * 1000


def test_two_servers_on_one_store_see_each_others_blobs(casfs: Casfs) -> None:
    with running(casfs) as one, running(casfs) as two, connected(one) as first, connected(two) as second:
        [digest] = first.add(b"by the first")
        assert second.missing([digest]) == []
        assert second.read(digest) == b"by the first"
        first.put_result(digest, reapi.ActionResult(exit_code=3))
        assert second.result(digest).exit_code == 3
        # Both write the same, at once.
        data = random.Random(5).randbytes(3 << 20)
        threads = [
            threading.Thread(target=lambda client=client, n=n: client.write(SHA256.of(data), data, upload=f"u{n}"))
            for n, client in enumerate((first, second, first, second))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert first.read(SHA256.of(data)) == data


@pytest.mark.parametrize("after", [1, 60, 300])
def test_kill_9_under_load_loses_no_acknowledged_blob(casfs: Casfs, after: int) -> None:
    """Killed when so many blobs have been acknowledged, with more on their way."""
    acknowledged: list[bytes] = []
    server = Server(casfs)

    def load(seed: int) -> None:
        rng = random.Random(seed)
        with connected(server) as client:
            try:
                while True:
                    data = rng.randbytes(rng.choice((10, 3000, 200_000)))
                    if rng.random() < 0.5:
                        client.add(data)
                    else:
                        client.write(SHA256.of(data), data, piece=50_000, upload=f"{seed}-{len(acknowledged)}")
                    acknowledged.append(data)
            except grpc.RpcError:
                return

    threads = [threading.Thread(target=load, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(acknowledged) >= after)
    server.stop(signal.SIGKILL)
    for thread in threads:
        thread.join()
    with running(casfs) as server, connected(server) as client:
        assert client.missing(map(SHA256.of, acknowledged)) == []
        for data in acknowledged:
            assert client.read(SHA256.of(data)) == data
    assert files_in_tmp(casfs) == []
    assert casfs("verify").code == 0


@pytest.fixture
def small_disk(tmp_path: Path, requires: Requirements) -> Iterator[Path]:
    """A file system of 12 MiB."""
    requires.admin()
    requires.programs("mount", "umount")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_told_and_what_was_acknowledged_stays(casfs: Casfs, small_disk: Path) -> None:
    casfs.store = small_disk / "store"
    casfs.environment["CASFS_STORE"] = str(casfs.store)
    data = random.Random(1).randbytes(20 << 20)
    with running(casfs) as server, connected(server) as client:
        [digest] = client.add(b"before the disk was full")
        assert refused(lambda: client.write(SHA256.of(data), data)) == "RESOURCE_EXHAUSTED"
        assert files_in_tmp(casfs) == []
        assert client.read(digest) == b"before the disk was full"
        client.add(b"after there was room again")
        assert server.stop() == 0
        assert server.err == ""


def test_a_server_takes_more_connections_than_files_are_usually_open(casfs: Casfs) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 1024), before[1]))
    try:
        with running(casfs) as server:
            assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (min(before[1], 1 << 16), before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
