"""HTTP's guards, limits and accidents: tokens, TLS, clients that vanish or dawdle, a full store, several processes."""

from __future__ import annotations

import base64
import os
import random
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import (
    HTTP,
    SHA256,
    HttpClient,
    Server,
    connected,
    make_certificates,
    running,
    wait_for,
)
from tests.tools.server.raw_http import connected_raw
from tests.tools.server.test_server_life import files_in_tmp
from tools.exits import Exit

ABSENT = "00" * 32


@contextmanager
def raw(server: Server, text: bytes) -> Iterator[socket.socket]:
    """A connection on which that was sent."""
    with connected_raw(server) as connection:
        connection.sendall(text)
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """Until the other side ends it."""
    parts = []
    try:
        while data := connection.recv(1 << 20):
            parts.append(data)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def put_head(hash_: str, size: int) -> bytes:
    return f"PUT /cas/{hash_} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n".encode()


# Guards


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--http-listen", "nonsense"], "is no place to listen at"),
        (["--http-listen", ":0"], "--insecure"),
        (["--http-listen", "0.0.0.0:0"], "--insecure"),
        (["--max-body", "0"], "--max-body"),
    ],
)
def test_what_can_not_be_served_is_refused_at_the_start(casfs: Casfs, arguments: list[str], said: str) -> None:
    assert said in casfs.fails(Exit.USAGE, "serve", "--listen", "127.0.0.1:0", *arguments)


def test_tokens_have_rights_as_bearer_and_as_password(casfs: Casfs) -> None:
    (casfs.directory / "tokens").write_text("read reading-token\nwrite writing-token\n")

    def basic(token: str) -> str:
        return "Basic " + base64.b64encode(f"anybody:{token}".encode()).decode()

    path = f"/cas/{SHA256.of(b'by the writer').hex}"
    with running(casfs, *HTTP, "--tokens", "tokens") as server:
        for authorization in ("Bearer writing-token", basic("writing-token")):
            with HttpClient(server, authorization=authorization) as web:
                assert web("PUT", path, b"by the writer").status == 200
                assert web("PUT", f"/ac/{ABSENT}", b"x").status == 200
        for authorization in ("Bearer reading-token", basic("reading-token")):
            with HttpClient(server, authorization=authorization) as web:
                assert [web("GET", where).status for where in (path, "/", "/metrics", "/healthz")] == [200] * 4
                assert web("PUT", path, b"by the writer").status == 403
                assert web("DELETE", f"/ac/{ABSENT}").status == 403
        for authorization in ("", "Bearer guessed", basic("guessed"), "Basic no-base64!", "Digest x", "Basic"):
            with HttpClient(server, authorization=authorization) as web:
                for where in (path, f"/ac/{ABSENT}", "/", "/metrics", f"/blob/sha256/{ABSENT}/1"):
                    answer = web("GET", where)
                    assert answer.status == 401
                    assert "Bearer" in str(answer.headers.get_all("WWW-Authenticate"))
                assert web("PUT", path, b"by the writer").status == 401
                # Whoever watches over servers needs no token.
                assert web("GET", "/healthz").status == 200


def test_a_read_only_server_writes_for_nobody(casfs: Casfs) -> None:
    with running(casfs, *HTTP, "--read-only") as server, HttpClient(server) as web:
        assert web("PUT", f"/cas/{SHA256.of(b'x').hex}", b"x").status == 403
        assert web("PUT", f"/ac/{ABSENT}", b"x").status == 403
        assert web("DELETE", f"/ac/{ABSENT}").status == 403


def test_instances_that_are_not_served_are_400(casfs: Casfs) -> None:
    with running(casfs, *HTTP, "--instance", "main") as server, HttpClient(server) as web:
        assert web("PUT", f"/main/ac/{ABSENT}", b"x").status == 200
        assert web("GET", f"/ac/{ABSENT}").status == 400
        assert web("GET", f"/other/cas/{ABSENT}").status == 400


def test_tls_and_mutual_tls(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("openssl")
    make_certificates(casfs.directory)
    data = random.Random(1).randbytes(3 << 20)
    tls = ("--tls-certificate", "server.crt", "--tls-key", "server.key")
    context = ssl.create_default_context(cafile=str(casfs.directory / "ca.crt"))
    with running(casfs, *HTTP, *tls) as server, HttpClient(server, tls=context) as web:
        assert web("GET", web.put_blob(data)).body == data
    with running(casfs, *HTTP, *tls, "--tls-client-ca", "ca.crt") as server:
        with HttpClient(server, tls=context) as web, pytest.raises(OSError):
            web("GET", "/healthz")
        context.load_cert_chain(casfs.directory / "client.crt", casfs.directory / "client.key")
        with HttpClient(server, tls=context) as web:
            assert web("GET", f"/cas/{SHA256.of(data).hex}").body == data


# Limits


def test_heads_that_are_too_large_are_refused(casfs: Casfs) -> None:
    with running(casfs, *HTTP) as server:
        for head in (
            b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 1000 + b"\r\n",
        ):
            with raw(server, head) as connection:
                assert read_all(connection).startswith(b"HTTP/1.0 400 ")
        with HttpClient(server) as web:
            assert web("GET", "/healthz").status == 200
        server.stop()
        assert server.err == ""


def test_a_body_that_breaks_the_rules_is_refused(casfs: Casfs) -> None:
    head = f"PUT /cas/{ABSENT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with running(casfs, *HTTP) as server:
        for body in (b"no size\r\n", b"5\r\nfar too many\r\n", b"-1\r\n\r\n", b"5\r\n12"):
            with raw(server, head + body) as connection:
                connection.shutdown(socket.SHUT_WR)
                assert read_all(connection)[:12] in (b"HTTP/1.1 400", b"HTTP/1.0 400", b"")
        wait_for(lambda: not files_in_tmp(casfs))
        server.stop()
        assert server.err == ""


def test_a_put_says_how_long_it_is(casfs: Casfs) -> None:
    with running(casfs, *HTTP) as server:
        with raw(
            server, f"PUT /cas/{ABSENT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        ) as connection:
            assert read_all(connection).startswith(b"HTTP/1.1 411 ")


def test_so_many_large_uploads_are_taken_at_a_time_and_the_next_waits_for_its_turn(casfs: Casfs) -> None:
    data = b"0123456789" * 10_000
    head = put_head(SHA256.of(data).hex, len(data))
    third_data = data[::-1]
    third_head = put_head(SHA256.of(third_data).hex, len(data))
    with (
        running(casfs, *HTTP, "--max-uploads", "2") as server,
        raw(server, head + data[:5]) as first,
        raw(server, head.replace(b"/cas/", b"/ac/") + data[:5]) as second,
    ):
        wait_for(lambda: len(files_in_tmp(casfs)) == 2)
        with raw(server, third_head + third_data) as third, HttpClient(server) as web:
            # Small ones need no turn. This one came behind the one that waits.
            web.put_blob(b"x")
            assert web("HEAD", f"/cas/{SHA256.of(third_data).hex}").status == 404
            third.settimeout(0.2)
            with pytest.raises(TimeoutError):
                third.recv(1000)
            third.settimeout(30)
            first.sendall(data[5:])
            assert first.recv(1000).startswith(b"HTTP/1.1 200 ")
            assert third.recv(1000).startswith(b"HTTP/1.1 200 ")
            assert web("GET", f"/cas/{SHA256.of(third_data).hex}").body == third_data
            second.sendall(data[5:])
            assert second.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_sends_nothing_for_long_is_given_up(casfs: Casfs) -> None:
    with running(casfs, *HTTP, "--idle-timeout", "1s") as server:
        with raw(server, put_head(ABSENT, 100) + b"never the rest") as connection:
            assert read_all(connection).startswith(b"HTTP/1.1 408 ")
        # Half a head, no head.
        for text in (b"GET / HT", b""):
            with raw(server, text) as connection:
                begun = time.monotonic()
                read_all(connection)
                assert time.monotonic() - begun < 10
        # Half a head after an answer.
        with raw(server, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
            connection.sendall(b"GET / HT")
            assert read_all(connection) == b""
        wait_for(lambda: not files_in_tmp(casfs))


def test_a_connection_is_kept_for_its_next_request(casfs: Casfs) -> None:
    with running(casfs, *HTTP, "--idle-timeout", "1s") as server, HttpClient(server) as web:
        assert web("GET", "/healthz").status == 200
        with raw(server, b"") as later:
            # Given up after the idle time, which began when the other one was idle already.
            assert read_all(later) == b""
        assert web("GET", "/healthz").status == 200


def test_a_connection_is_kept_whose_request_was_refused_before_all_of_it_came(casfs: Casfs) -> None:
    with running(casfs, *HTTP, "--idle-timeout", "1s", "--read-only") as server:
        with raw(server, put_head(ABSENT, 5)) as connection, raw(server, b"") as later:
            assert connection.recv(1000).startswith(b"HTTP/1.1 403 ")
            # The rest of it comes, and a line end too many, which is no head.
            connection.sendall(b"12345")
            connection.sendall(b"\r\n")
            assert read_all(later) == b""
            with raw(server, b"") as still_later:
                assert read_all(still_later) == b""
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_is_no_longer_there_is_found_out_by_the_kernel(casfs: Casfs) -> None:
    with running(casfs, *HTTP, "--idle-timeout", "9s") as server, HttpClient(server) as web:
        assert web("GET", "/healthz").status == 200
        port = web.connection.sock.getsockname()[1]
        # Another kind until the answer is acknowledged.
        wait_for(lambda: read_timer(server, port)[0] == KEEPALIVE)
        assert read_timer(server, port)[1] <= 9 * os.sysconf("SC_CLK_TCK")


KEEPALIVE = 2
"""The kind of timer by which the kernel asks whether the other side is there."""


def read_timer(server: Server, port: int) -> tuple[int, int]:
    """Of the server's end of the connection that comes from a port: the kind of its timer, and when it will be due."""
    own = int(server.http_address.rpartition(":")[2])
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if [int(address.rpartition(":")[2], 16) for address in fields[1:3]] == [own, port]:
            kind, _, ticks = fields[5].partition(":")
            return int(kind, 16), int(ticks, 16)
    pytest.fail("there is no such connection")


def test_a_client_that_takes_nothing_is_given_up(casfs: Casfs) -> None:
    with running(casfs, *HTTP, "--idle-timeout", "1s") as server, HttpClient(server) as web:
        path = web.put_blob(bytes(64 << 20))
        before = len(os.listdir(f"/proc/{server.process.pid}/fd"))
        with raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()):
            wait_for(lambda: len(os.listdir(f"/proc/{server.process.pid}/fd")) > before)
            wait_for(lambda: len(os.listdir(f"/proc/{server.process.pid}/fd")) <= before)
        with HttpClient(server) as again:
            assert again("HEAD", path).status == 200


def test_a_client_that_vanishes_leaves_nothing(casfs: Casfs) -> None:
    data = random.Random(5).randbytes(1 << 20)
    digest = SHA256.of(data)
    with running(casfs, *HTTP, "--max-uploads", "1") as server:
        for path in ("/cas/", "/ac/"):
            head = put_head(digest.hex, len(data)).replace(b"/cas/", path.encode())
            with raw(server, head + data[:600_000]):
                wait_for(lambda: files_in_tmp(casfs))
            wait_for(lambda: not files_in_tmp(casfs))
        with HttpClient(server) as web:
            assert web("GET", f"/cas/{digest.hex}").status == 404
            assert web("GET", f"/ac/{digest.hex}").status == 404
            web.put_blob(data)
            assert web.metrics()["casfs_open_uploads"] == 0
        with raw(server, f"GET /cas/{digest.hex} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()) as connection:
            connection.recv(1000)
        assert server.stop() == 0
        assert server.err == ""


def test_a_full_store_is_507_and_makes_room_from_what_is_old(casfs: Casfs) -> None:
    with running(casfs, *HTTP, "--max-size", "1MiB", "--grace", "0s") as server, HttpClient(server) as web:
        for path in (f"/cas/{SHA256.of(bytes(2 << 20)).hex}", f"/ac/{ABSENT}"):
            assert web("PUT", path, bytes(2 << 20)).status == 507
        with HttpClient(server) as web:
            for number in range(16):
                web.put_blob(random.Random(number).randbytes(150_000))
                # Use is remembered in whole seconds; only what is older than this one goes.
                if number % 5 == 4:
                    time.sleep(1.1)
            numbers = web.metrics()
        assert numbers["casfs_evicted_files_total"] >= 5
        assert 0 < numbers["casfs_store_bytes"] <= numbers["casfs_store_limit_bytes"] == 1 << 20


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.binary(max_size=80),
    headers=st.lists(
        st.tuples(
            st.sampled_from(
                [
                    b"Range",
                    b"Accept-Encoding",
                    b"If-None-Match",
                    b"Content-Encoding",
                    b"Content-Length",
                    b"Transfer-Encoding",
                    b"Authorization",
                    b"Expect",
                ]
            ),
            st.binary(max_size=40),
        ),
        max_size=4,
    ),
    method=st.sampled_from([b"GET", b"HEAD", b"PUT", b"DELETE", b"x"]),
    prefix=st.sampled_from(
        [b"/", b"/cas/" + b"e3" * 32, b"/cas/", b"/ac/", b"/tree/sha256/", b"/blob/blake3/" + b"ab" * 32]
    ),
)
def test_whatever_comes_is_answered_or_ended(
    shared_http: Server, path: bytes, headers: list[tuple[bytes, bytes]], method: bytes, prefix: bytes
) -> None:
    lines = [method + b" " + prefix + path + b" HTTP/1.1", b"Host: localhost", b"Connection: close"]
    lines += [name + b": " + value for name, value in headers]
    with raw(shared_http, b"\r\n".join(lines) + b"\r\n\r\n") as connection:
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    assert answer[:10] != b"HTTP/1.1 5"
    with HttpClient(shared_http) as web:
        assert web("GET", "/healthz").status == 200


# Processes


def test_several_processes_count_together(casfs: Casfs) -> None:
    with running(casfs, *HTTP, "--processes", "2") as server:
        with HttpClient(server) as web:
            path = web.put_blob(b"shared")
        for _ in range(10):
            # A connection each, which the kernel gives to one of them.
            with HttpClient(server) as web:
                assert web("GET", path).body == b"shared"
            with connected(server) as client:
                client.read(SHA256.of(b"shared"))

        def counted() -> tuple[float, float, float]:
            with HttpClient(server) as web:
                numbers = web.metrics()
            return (
                numbers.get('casfs_lookups_total{half="blob",outcome="hit"}', 0),
                numbers.get('casfs_requests_total{method="Read",status="OK",transport="grpc"}', 0),
                numbers["casfs_store_bytes"],
            )

        # Whichever answers: what it knows of the other is up to a second old.
        for _ in range(4):
            wait_for(lambda: counted() == (20, 10, len(b"shared")))
        assert server.stop() == 0
        assert server.err == ""
    assert list((casfs.store / "tmp").iterdir()) == []


def test_what_killed_processes_counted_in_is_cleared_away(casfs: Casfs) -> None:
    with running(casfs, *HTTP, "--processes", "2") as server:
        assert any(path.suffix == ".db" for path in files_in_tmp(casfs))
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait(30)
    casfs.ok("stats")
    assert list((casfs.store / "tmp").iterdir()) == []


def test_an_upload_that_is_on_is_finished_before_the_end(casfs: Casfs) -> None:
    data = random.Random(1).randbytes(100_000)
    with running(casfs, *HTTP) as server:
        with raw(server, put_head(SHA256.of(data).hex, len(data)) + data[:50_000]) as connection:
            wait_for(lambda: files_in_tmp(casfs))
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            connection.sendall(data[50_000:])
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert server.process.wait(20) == 0  # by the first signal; a second one would end it as it is
    assert Path(casfs.store / "blobs/cas" / SHA256.of(data).hex[:2] / SHA256.of(data).hex).exists()


def test_numbers_of_both_transports(casfs: Casfs) -> None:
    with running(casfs, *HTTP) as server, HttpClient(server) as web, connected(server) as client:
        path = web.put_blob(b"counted")
        web("GET", path)
        web("GET", f"/ac/{ABSENT}")
        client.read(SHA256.of(b"counted"))
        client.write(SHA256.of(b"more"), b"more")
        numbers = web.metrics()
    assert numbers['casfs_requests_total{method="PUT cas",status="200",transport="http"}'] == 1
    assert numbers['casfs_requests_total{method="GET ac",status="404",transport="http"}'] == 1
    assert numbers['casfs_requests_total{method="Write",status="OK",transport="grpc"}'] == 1
    assert numbers['casfs_lookups_total{half="blob",outcome="hit"}'] == 2
    assert numbers['casfs_lookups_total{half="result",outcome="miss"}'] == 1
    assert numbers['casfs_request_seconds_count{method="Read",transport="grpc"}'] == 1
    assert numbers['casfs_transferred_bytes_total{direction="in",transport="http"}'] == 7
    assert numbers['casfs_transferred_bytes_total{direction="out",transport="grpc"}'] > 7
