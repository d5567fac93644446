"""A real `casfs serve` process, and a client of a few lines that speaks to it over a real channel."""

from __future__ import annotations

import http.client
import os
import re
import selectors
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import grpc
import pytest

from store.digest import Digest, DigestFunction
from store.repository import Store
from tests.tools.conftest import Casfs
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.methods import Method
from tools.reapi.resource_names import Compression, ResourceName
from tools.server.requests import write_digest
from tools.server.services import ServiceOptions, Services
from tools.server.storing_process import NAME
from tools.upstream.channel import open_channel, start

SHA256, BLAKE3 = DigestFunction.SHA256, DigestFunction.BLAKE3


class Server:
    """A server process; `address` is where it listens, `http_address` where for HTTP, if it was told to.

    `configured`: by its configuration, which has both.
    """

    def __init__(self, casfs: Casfs, *options: str | Path, configured: bool = False) -> None:
        self.casfs = casfs
        self.process = casfs.start("serve", *(() if configured else ("--listen", "127.0.0.1:0")), *options)
        self.address = self._read_address("grpc")
        self.http_address = self._read_address("http") if configured or "--http-listen" in options else ""

    def _read_address(self, scheme: str) -> str:
        line = self._read_line()
        match = re.fullmatch(rf"serving .* at {scheme}s?://(\S+)\n", line)
        if match is None:
            _, err = self.process.communicate(timeout=30)
            pytest.fail(f"the server said {line!r} and {err!r}")
        return match[1]

    def _read_line(self) -> str:
        # Not buffered: a second line would be read with the first, and be waited for in vain.
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(30):
                self.process.kill()
        line = b""
        while not line.endswith(b"\n") and (byte := os.read(self.process.stdout.fileno(), 1)):
            line += byte
        return line.decode()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit code. What it wrote to standard error is in `err`."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, err = self.process.communicate(timeout=30)
        self.err = err.decode()
        return self.process.returncode


class Client:
    """Calls methods; errors are grpc.RpcError, `refused` says with which code."""

    def __init__(self, address: str, *, credentials: Any = None, token: str = "", options: Any = ()) -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1), *options]
        self.channel = open_channel(address, credentials, options)
        self.metadata = [("authorization", f"Bearer {token}")] if token else []

    def call(self, method: Method, request: Any, timeout: float = 30) -> Any:
        """One request, one response, or an iterator of responses; a request given as bytes is sent as it is."""
        return start(self.channel, method, request, timeout, self.metadata)

    def write(
        self,
        digest: Digest,
        data: bytes,
        *,
        piece: int = 1 << 20,
        compression: Compression = Compression.IDENTITY,
        upload: str = "one",
        instance: str = "",
        offset: int = 0,
        finish: bool = True,
    ) -> int:
        """Upload through ByteStream; returns the committed size."""
        name = str(ResourceName(instance, digest, compression, upload))
        return int(self.call(methods.WRITE, pieces(name, data, piece, offset, finish)).committed_size)

    def read(self, name: ResourceName | Digest | str, offset: int = 0, limit: int = 0) -> bytes:
        """Download through ByteStream."""
        name = str(ResourceName("", name)) if isinstance(name, Digest) else str(name)
        request = bytestream.ReadRequest(resource_name=name, read_offset=offset, read_limit=limit)
        return b"".join(response.data for response in self.call(methods.READ, request))

    def missing(self, digests: Iterable[Digest], function: DigestFunction = SHA256) -> list[str]:
        """The hashes of those that are missing."""
        request = reapi.FindMissingBlobsRequest(
            blob_digests=map(write_digest, digests), digest_function=reapi.DigestFunction.Value.Name(function)
        )
        return [digest.hash for digest in self.call(methods.FIND_MISSING_BLOBS, request).missing_blob_digests]

    def add(self, *blobs: bytes, function: DigestFunction = SHA256) -> list[Digest]:
        """Upload in a batch; all must go well."""
        digests = [function.of(data) for data in blobs]
        request = reapi.BatchUpdateBlobsRequest(
            requests=[
                reapi.BatchUpdateBlobsRequest.Request(digest=write_digest(digest), data=data)
                for digest, data in zip(digests, blobs, strict=True)
            ],
            digest_function=reapi.DigestFunction.Value.Name(function),
        )
        responses = self.call(methods.BATCH_UPDATE_BLOBS, request, timeout=60).responses
        assert [response.status.code for response in responses] == [0] * len(blobs)
        return digests

    def query(self, name: ResourceName) -> tuple[int, bool]:
        """QueryWriteStatus: committed size, complete."""
        request = bytestream.QueryWriteStatusRequest(resource_name=str(name))
        answer = self.call(methods.QUERY_WRITE_STATUS, request)
        return answer.committed_size, answer.complete

    def result(self, action: Digest, **options: Any) -> reapi.ActionResult:
        """GetActionResult."""
        request = reapi.GetActionResultRequest(
            action_digest=write_digest(action),
            digest_function=reapi.DigestFunction.Value.Name(action.function),
            **options,
        )
        answer: reapi.ActionResult = self.call(methods.GET_ACTION_RESULT, request)
        return answer

    def put_result(self, action: Digest, result: reapi.ActionResult, instance: str = "") -> None:
        """UpdateActionResult."""
        request = reapi.UpdateActionResultRequest(
            instance_name=instance,
            action_digest=write_digest(action),
            action_result=result,
            digest_function=reapi.DigestFunction.Value.Name(action.function),
        )
        self.call(methods.UPDATE_ACTION_RESULT, request)

    def close(self) -> None:
        """Close the connection."""
        self.channel.close()


class Answer(NamedTuple):
    """What a server answered over HTTP."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


class HttpClient:
    """One connection over HTTP."""

    def __init__(self, server: Server, *, authorization: str = "", tls: ssl.SSLContext | None = None) -> None:
        host, _, port = server.http_address.rpartition(":")
        self.connection = (
            http.client.HTTPConnection(host, int(port), timeout=30)
            if tls is None
            else http.client.HTTPSConnection(host, int(port), timeout=30, context=tls)
        )
        self.headers = {"Authorization": authorization} if authorization else {}

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One request; an underscore in a header's name stands for a dash."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, path, body, {**self.headers, **named})
        response = self.connection.getresponse()
        return Answer(response.status, response.headers, response.read())

    def put_blob(self, data: bytes, function: DigestFunction = SHA256) -> str:
        """Add a blob, which must go well; returns its path."""
        path = f"/cas/{function.of(data).hex}"
        assert self("PUT", path, data).status == 200
        return path

    def metrics(self) -> dict[str, float]:
        """The numbers, by name and labels as they are written."""
        lines = self("GET", "/metrics").body.decode().splitlines()
        return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if x[0] != "#")}

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()


def pieces(
    name: str, data: bytes, piece: int, offset: int = 0, finish: bool = True
) -> Iterator[bytestream.WriteRequest]:
    """The messages of a Write."""
    at = 0
    while True:
        end = at + piece >= len(data)
        yield bytestream.WriteRequest(
            resource_name=name if at == 0 else "",
            write_offset=offset + at,
            data=data[at : at + piece],
            finish_write=end and finish,
        )
        at += piece
        if end:
            return


def refused(call: Callable[[], Any]) -> str:
    """The name of the code that a call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return code_of(caught.value)


def code_of(error: grpc.RpcError) -> str:
    """The name of the code of what a call raised: its error is a Call, too."""
    return cast("grpc.Call", error).code().name


@contextmanager
def connected(server: Server, **options: Any) -> Iterator[Client]:
    """A client of a server."""
    client = Client(server.address, **options)
    try:
        yield client
    finally:
        client.close()


def children(pid: int) -> list[int]:
    """The processes that one has begun."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet has ended, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def find_storing(parent: int) -> int:
    """The process that stores for that one."""
    [found] = [child for child in children(parent) if Path(f"/proc/{child}/comm").read_text() == f"{NAME}\n"]
    return found


@contextmanager
def running(casfs: Casfs, *options: str | Path) -> Iterator[Server]:
    """A server that is stopped at the end, whatever happens."""
    server = Server(casfs, *options)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests of a module that don't mind each other's blobs."""
    with running(Casfs(tmp_path_factory.mktemp("shared"))) as server:
        yield server


@pytest.fixture
def client(shared: Server) -> Iterator[Client]:
    """A client of the shared server."""
    with connected(shared) as connection:
        yield connection


HTTP = ("--http-listen", "127.0.0.1:0")


@pytest.fixture(scope="module")
def shared_http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same, listening for HTTP, too."""
    with running(Casfs(tmp_path_factory.mktemp("shared")), *HTTP) as server:
        yield server


@pytest.fixture
def web(shared_http: Server) -> Iterator[HttpClient]:
    """A connection to it."""
    with HttpClient(shared_http) as connection:
        yield connection


@pytest.fixture
def services(store: Store) -> Iterator[Services]:
    """The services of a new store, with no transport at all."""
    with Services(store, ServiceOptions()) as made:
        yield made


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Return once the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def run_openssl(*arguments: str) -> None:
    """Run openssl, whose chatter nobody needs."""
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def make_certificates(directory: Path) -> None:
    """An authority, and a server's and a client's certificate by it: ca, server and client, each .key and .crt."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    run_openssl(
        "req", "-x509", *key, "-keyout", f"{directory}/ca.key", "-out", f"{directory}/ca.crt", "-subj", "/CN=ca"
    )
    for name in ("server", "client"):
        request = f"{directory}/{name}.csr"
        run_openssl("req", *key, "-keyout", f"{directory}/{name}.key", "-out", request, "-subj", f"/CN={name}")
        (directory / "names").write_text("subjectAltName=IP:127.0.0.1\n")
        run_openssl(
            *("x509", "-req", "-in", request, "-CA", f"{directory}/ca.crt", "-CAkey", f"{directory}/ca.key"),
            *("-CAcreateserial", "-out", f"{directory}/{name}.crt", "-extfile", f"{directory}/names"),
        )
