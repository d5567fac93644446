"""Our end of HTTP/2 over a real socket, by the conformance test that others use, too."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Requirements
from tests.tools.http2.echo import Echo, Request


class Unhurried(Echo):
    """One whose answers take a moment: so streams are there at a time."""

    def __init__(self, protocol: Protocol) -> None:
        super().__init__()
        self._protocol = protocol

    def answer(self, request: Request) -> None:
        asyncio.get_running_loop().call_later(0.05, self._answer_late, request)

    def _answer_late(self, request: Request) -> None:
        if self.connection.streams.get(request.id) is request:
            super().answer(request)
            self._protocol.send()


class Protocol(asyncio.Protocol):
    """It behind a socket."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.echo = Unhurried(self)
        self.send()

    def data_received(self, data: bytes) -> None:
        self.echo.connection.receive(data)
        self.send()

    def send(self) -> None:
        self.transport.write(self.echo.output())
        if self.echo.connection.closed:
            self.transport.close()


@pytest.mark.long
def test_h2spec_finds_nothing(requires: Requirements) -> None:
    program = Path(sys.prefix) / "bin" / "h2spec"
    requires.programs(str(program))

    async def main() -> tuple[int, str]:
        server = await asyncio.get_running_loop().create_server(Protocol, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            program, "--host", "127.0.0.1", "--port", str(port), "--timeout", "10", stdout=subprocess.PIPE
        )
        output, _ = await process.communicate()
        server.close()
        return process.returncode or 0, output.decode()

    code, output = asyncio.run(main())
    assert code == 0, output
    assert ", 0 failed" in output
