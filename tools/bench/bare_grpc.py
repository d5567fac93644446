"""A gRPC server that does nothing: what the transport alone costs, with answers that lie ready in memory.

    python -m tools.bench.bare_grpc ANSWERS

ANSWERS is a file of JSON: {"/service/Method": answer in hexadecimal}. Requests aren't
even parsed; a method that streams sends the answer as often as "times" says. It says
where it listens, and ends with SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from tools.reapi import methods


def _handler(method: methods.Method, answer: bytes, times: int) -> grpc.RpcMethodHandler[Any, Any]:
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


async def _serve(answers: dict[str, tuple[str, int]]) -> None:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    every = [value for value in vars(methods).values() if isinstance(value, methods.Method)]
    for method in every:
        if method.path in answers:
            answer, times = answers[method.path]
            handlers = {method.name: _handler(method, bytes.fromhex(answer), times)}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(method.service, handlers),))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"serving nothing at grpc://127.0.0.1:{port}", flush=True)
    await stop.wait()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(Path(sys.argv[1]).read_text())))
