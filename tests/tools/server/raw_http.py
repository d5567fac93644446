"""Requests over HTTP as bytes on a connection, and what a server has under way."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tests.tools.server.conftest import Server, wait_for

HASH = "5e" * 32


def put(body: bytes, *fields: str, path: str = f"/cas/{HASH}", length: int | None = None) -> bytes:
    lines = [f"PUT {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join([*lines, *fields, "", ""]).encode() + body


@contextmanager
def connected_raw(server: Server) -> Iterator[socket.socket]:
    host, _, port = server.http_address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        yield connection


def ask(connection: socket.socket, data: bytes) -> tuple[int, set[str], bytes]:
    """Send it, and read one answer: status, names of its fields, body."""
    connection.sendall(data)
    return answer(connection)


def answer(connection: socket.socket) -> tuple[int, set[str], bytes]:
    text = b""
    while b"\r\n\r\n" not in text:
        piece = connection.recv(1)
        assert piece, text
        text += piece
    lines = text.decode().split("\r\n")
    fields = {line.partition(":")[0] for line in lines[1:-2]}
    length = re.search(r"Content-Length: (\d+)", text.decode())
    assert length is not None
    body = b""
    while len(body) < int(length[1]):
        body += connection.recv(int(length[1]) - len(body))
    return int(lines[0].split(" ")[1]), fields, body


def report(server: Server) -> str:
    """What it says is under way."""
    log = server.casfs.store / "casfs.log"
    before = log.read_text()
    server.process.send_signal(signal.SIGUSR1)
    wait_for(lambda: "SIGUSR1: " in log.read_text()[len(before) :])
    return log.read_text()[len(before) :]


def listens(address: str) -> bool:
    """Whether a server takes connections there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=20).close()
    except ConnectionRefusedError:
        return False
    return True
