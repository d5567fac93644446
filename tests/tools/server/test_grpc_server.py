"""A gRPC server as a whole: refusals, counting, health and reflection; the conformance suite has the rest."""

from __future__ import annotations

import random
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2 as health
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.tools.conftest import Casfs
from tests.tools.server.conftest import SHA256, Client, Server, connected, refused, running
from tools.reapi import methods
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.methods import Method

CHECK = Method("grpc.health.v1.Health", "Check", health.HealthCheckRequest, health.HealthCheckResponse)
WATCH = CHECK._replace(name="Watch", streams_out=True)
SERVING, NOT_SERVING = health.HealthCheckResponse.SERVING, health.HealthCheckResponse.NOT_SERVING
CAS = methods.FIND_MISSING_BLOBS.service


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that wants a token, takes small messages, and counts."""
    directory = tmp_path_factory.mktemp("server")
    tokens = directory / "tokens"
    tokens.write_text("write write-token\nread read-token\n")
    options: list[str | Path] = ["--tokens", tokens, "--max-message", "1MiB"]
    with running(Casfs(directory), *options, "--http-listen", "127.0.0.1:0") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """One that may write."""
    with connected(server, token="write-token") as client:
        yield client


def test_blobs_come_back_as_they_went_in(client: Client) -> None:
    generator = random.Random(1)
    for size in (0, 1, 64 << 10, (64 << 10) + 1, 3 << 20):
        data = generator.randbytes(size)
        client.write(SHA256.of(data), data, piece=512 << 10)
        assert client.read(SHA256.of(data)) == data
        assert client.read(SHA256.of(data), offset=size // 2) == data[size // 2 :]
    absent = SHA256.of(b"nothing of the kind")
    assert client.missing([absent]) == [absent.hex]


def test_what_is_refused_has_its_code(client: Client, server: Server) -> None:
    other = methods.GET_CAPABILITIES._replace(name="Other")
    assert refused(lambda: client.read(SHA256.of(b"nothing of the kind"))) == "NOT_FOUND"
    assert refused(lambda: client.call(methods.FIND_MISSING_BLOBS, b"\xff\xff\xff")) == "INVALID_ARGUMENT"
    assert refused(lambda: client.call(methods.BATCH_UPDATE_BLOBS, bytes(2 << 20))) == "RESOURCE_EXHAUSTED"
    assert refused(lambda: client.call(other, b"")) == "UNIMPLEMENTED"
    with connected(server, token="read-token") as reader:
        assert reader.missing([]) == []
        assert refused(lambda: reader.add(b"x")) == "PERMISSION_DENIED"
    with connected(server) as stranger:
        assert refused(lambda: stranger.missing([])) == "UNAUTHENTICATED"


def test_requests_are_counted(client: Client, server: Server) -> None:
    def counted(name: str) -> float:
        url, headers = f"http://{server.http_address}/metrics", {"Authorization": "Bearer read-token"}
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{") and '"grpc"' in line)

    before = counted("casfs_requests_total")
    client.missing([SHA256.of(b"x")])
    refused(lambda: client.read(SHA256.of(b"nothing of the kind")))
    assert counted("casfs_requests_total") == before + 2


def test_health_needs_no_token(server: Server) -> None:
    with connected(server) as stranger:
        for service in ("", CAS):
            assert stranger.call(CHECK, health.HealthCheckRequest(service=service)).status == SERVING
        assert refused(lambda: stranger.call(CHECK, health.HealthCheckRequest(service="other"))) == "NOT_FOUND"
        states = stranger.call(WATCH, health.HealthCheckRequest())
        assert next(states).status == SERVING
        states.cancel()


def test_who_watches_is_told_of_the_end(tmp_path: Path) -> None:
    with (
        running(Casfs(tmp_path), "--drain-timeout", "1s") as ending,
        connected(ending) as client,
    ):
        states = client.call(WATCH, health.HealthCheckRequest())
        assert next(states).status == SERVING
        ending.process.send_signal(signal.SIGTERM)
        assert next(states).status == NOT_SERVING
        # It ends well, and isn't waited for as long as it would watch.
        assert list(states) == []
        assert ending.process.wait(30) == 0


def test_reflection_says_what_there_is(server: Server) -> None:
    with connected(server) as stranger:
        database = ProtoReflectionDescriptorDatabase(stranger.channel)
        assert {CAS, methods.READ.service, CHECK.service} <= set(database.get_services())
        pool = DescriptorPool(database)
        found = pool.FindServiceByName(CAS).FindMethodByName("FindMissingBlobs")
        assert found.input_type.full_name == reapi.FindMissingBlobsRequest.DESCRIPTOR.full_name
        with pytest.raises(KeyError):
            pool.FindMessageTypeByName("no.such.Message")
