"""A server that is told to read its tokens and certificates again, with connections going on."""

from __future__ import annotations

import signal
import ssl
from pathlib import Path

import grpc
import pytest

from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import (
    HTTP,
    HttpClient,
    Server,
    connected,
    make_certificates,
    refused,
    running,
    wait_for,
)

ABSENT = f"/cas/{'00' * 32}"


def reload(server: Server) -> None:
    """Have its one process read their files again."""
    log = server.casfs.store / "casfs.log"
    before = log.read_text().count("tokens and certificates")
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: log.read_text().count("tokens and certificates") > before)


def status(web: HttpClient, token: str) -> int:
    return web("GET", ABSENT, Authorization=f"Bearer {token}").status


def test_tokens_come_and_go_also_for_connections_that_are_open(casfs: Casfs) -> None:
    tokens = casfs.directory / "tokens"
    tokens.write_text("write first-token\n")
    with running(casfs, *HTTP, "--tokens", tokens) as server, HttpClient(server) as web:
        with connected(server, token="first-token") as first, connected(server, token="second-token") as second:
            first.add(b"by the first")
            assert refused(lambda: second.missing([])) == "UNAUTHENTICATED"
            assert (status(web, "first-token"), status(web, "second-token")) == (404, 401)
            tokens.write_text("read second-token\n")
            assert status(web, "first-token") == 404, "not before it is told to"
            reload(server)
            assert second.missing([]) == []
            assert refused(lambda: second.add(b"by the second")) == "PERMISSION_DENIED"
            assert refused(lambda: first.missing([])) == "UNAUTHENTICATED"
            assert (status(web, "first-token"), status(web, "second-token")) == (401, 404)
        assert server.stop() == 0


def test_tokens_that_make_no_sense_change_nothing(casfs: Casfs) -> None:
    tokens = casfs.directory / "tokens"
    tokens.write_text("write first-token\n")
    with running(casfs, *HTTP, "--tokens", tokens) as server, HttpClient(server) as web:
        tokens.write_text("everybody\n")
        reload(server)
        assert status(web, "first-token") == 404
        tokens.unlink()
        reload(server)
        assert (status(web, "first-token"), status(web, "everybody")) == (404, 401)
    assert "tokens and certificates stay as they were" in (casfs.store / "casfs.log").read_text()


def test_each_of_several_processes_reads_its_files_again(casfs: Casfs) -> None:
    tokens = casfs.directory / "tokens"
    tokens.write_text("write first-token\n")
    with running(casfs, *HTTP, "--tokens", tokens, "--processes", "2") as server:
        tokens.write_text("write second-token\n")
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: (casfs.store / "casfs.log").read_text().count("read tokens and certificates again") == 2)
        for _ in range(20):  # connections, which the kernel spreads over both
            with HttpClient(server) as web:
                assert status(web, "second-token") == 404
        assert server.stop() == 0


@pytest.mark.parametrize("mutual", [False, True])
def test_certificates_are_replaced_for_new_connections(casfs: Casfs, requires: Requirements, mutual: bool) -> None:
    requires.programs("openssl")
    old, new, live = (casfs.directory / name for name in ("old", "new", "live"))
    for directory in (old, new):
        directory.mkdir()
        make_certificates(directory)
    live.mkdir()

    def install(source: Path) -> None:
        for name in ("server.crt", "server.key", "ca.crt"):
            (live / name).write_bytes((source / name).read_bytes())

    def context_of(source: Path) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=source / "ca.crt")
        if mutual:
            context.load_cert_chain(source / "client.crt", source / "client.key")
        return context

    def credentials_of(source: Path) -> grpc.ChannelCredentials:
        authority, key, certificate = ((source / name).read_bytes() for name in ("ca.crt", "client.key", "client.crt"))
        return grpc.ssl_channel_credentials(authority, *((key, certificate) if mutual else ()))

    install(old)
    options: list[str | Path] = ["--tls-certificate", live / "server.crt", "--tls-key", live / "server.key"]
    options += ["--tls-client-ca", live / "ca.crt"] if mutual else []
    with running(casfs, *HTTP, *options) as server, HttpClient(server, tls=context_of(old)) as before:
        assert before("GET", "/healthz").status == 200
        with connected(server, credentials=credentials_of(old)) as client:
            assert client.missing([]) == []
            install(new)
            reload(server)
            assert client.missing([]) == [], "what is connected stays so"
        assert before("GET", "/healthz").status == 200
        with (
            HttpClient(server, tls=context_of(new)) as after,
            connected(server, credentials=credentials_of(new)) as client,
        ):
            assert after("GET", "/healthz").status == 200
            assert client.missing([]) == []
        with pytest.raises(ssl.SSLError), HttpClient(server, tls=context_of(old)) as web:
            web("GET", "/healthz")
        with connected(server, credentials=credentials_of(old)) as client:
            assert refused(lambda: client.missing([])) == "UNAVAILABLE"
        # A key that doesn't belong to the certificate: all stays.
        (live / "server.key").write_bytes((old / "server.key").read_bytes())
        reload(server)
        with HttpClient(server, tls=context_of(new)) as after:
            assert after("GET", "/healthz").status == 200
        if mutual:
            # Of a client with a certificate of the old authority, though it trusts the new server.
            context = ssl.create_default_context(cafile=new / "ca.crt")
            context.load_cert_chain(old / "client.crt", old / "client.key")
            with pytest.raises((ssl.SSLError, ConnectionError)), HttpClient(server, tls=context) as web:
                web("GET", "/healthz")
