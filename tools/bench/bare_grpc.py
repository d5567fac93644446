"""A gRPC server that does nothing: what the transport alone costs, with answers that lie ready in memory.

    python -m tools.bench.bare_grpc ANSWERS

ANSWERS is a file of JSON: {"/service/Method": [answer in hexadecimal, times]}. Requests aren't
even parsed; a method that streams sends the answer as often as "times" says. It says
where it listens, and ends with SIGTERM. `serve` is for servers that do a little more.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from tools.reapi import methods
from tools.reapi.methods import Method

_OPTIONS = (("grpc.max_receive_message_length", -1),)


def _answering(method: Method, answer: bytes, times: int) -> grpc.RpcMethodHandler[Any, Any]:
    async def unary(request: bytes, context: Any) -> bytes:
        return answer

    async def stream_out(request: bytes, context: Any) -> None:
        for _ in range(times):
            await context.write(answer)

    async def stream_in(requests: AsyncIterator[bytes], context: Any) -> bytes:
        async for _ in requests:
            pass
        return answer

    if method.streams_out:
        return grpc.unary_stream_rpc_method_handler(stream_out)
    if method.streams_in:
        return grpc.stream_unary_rpc_method_handler(stream_in)
    return grpc.unary_unary_rpc_method_handler(unary)


def calling(call: Callable[[bytes], bytes]) -> grpc.RpcMethodHandler[Any, Any]:
    """A method that one message answers, also where it could have been several: they look the same on the wire."""

    async def handle(request: bytes, context: Any) -> bytes:
        return call(request)

    return grpc.unary_unary_rpc_method_handler(handle)


async def serve(handlers: Mapping[Method, grpc.RpcMethodHandler[Any, Any]]) -> None:
    """Answer with these until SIGTERM."""
    server = grpc.aio.server(options=_OPTIONS)
    for method, handler in handlers.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(method.service, {method.name: handler}),))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"serving nothing at grpc://127.0.0.1:{port}", flush=True)
    await stop.wait()
    await server.stop(0)


def _read_answers(path: Path) -> dict[Method, grpc.RpcMethodHandler[Any, Any]]:
    answers = json.loads(path.read_text())
    every = {value.path: value for value in vars(methods).values() if isinstance(value, Method)}
    return {
        every[name]: _answering(every[name], bytes.fromhex(answer), times) for name, (answer, times) in answers.items()
    }


if __name__ == "__main__":
    asyncio.run(serve(_read_answers(Path(sys.argv[1]))))
