"""Calls of methods over grpcio: the one module of the client's side that imports it.

`open_channel` and `start` are grpcio as it is; `Channel` is what the rest uses:
it knows tokens and TLS, counts calls, and its errors are ours.

The C library sets TCP_NODELAY on every connection by itself.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import grpc

from tools.reapi.methods import Method
from tools.upstream.errors import NotThere, Refused, Unreachable
from tools.upstream.options import UpstreamOptions

_MESSAGE_MOST = 64 << 20
"""Bytes of one message that is taken: servers say 4 MiB, and some don't keep to it for trees and results."""
_LOOKS = 4

_OPTIONS = (
    ("grpc.max_receive_message_length", _MESSAGE_MOST),
    ("grpc.max_send_message_length", -1),
    # A connection of its own, which isn't shared with other channels of the process.
    ("grpc.use_local_subchannel_pool", 1),
    # While a call is silent the other end is asked whether it lives; oftener than that servers take for an attack.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A server that is started again is found soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def open_channel(target: str, credentials: Any = None, options: Sequence[tuple[str, Any]] = _OPTIONS) -> grpc.Channel:
    """A channel; without credentials in plain text."""
    if credentials is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, credentials, options=options)


def start(
    channel: grpc.Channel, method: Method, request: Any, timeout: float | None, metadata: Sequence[tuple[str, str]] = ()
) -> Any:
    """One call; `request` is a message, its bytes, or an iterator of them where the method takes many.

    Returns the response, or the call as an iterator of responses. Raises grpc.RpcError.
    """
    kind: Any = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
    }[method.streams_in, method.streams_out]
    stub = kind(
        method.path,
        request_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
        response_deserializer=method.response.FromString,
    )
    return stub(request, timeout=timeout, metadata=metadata)


class Channel:
    """A connection to one upstream, made at the first call and again when it is lost."""

    def __init__(self, options: UpstreamOptions) -> None:
        """Raises BadInput where the credentials can't be read."""
        credentials = None
        if options.secure:
            credentials = grpc.ssl_channel_credentials(*options.read_tls())
        token = options.read_token()
        self._metadata = [("authorization", f"Bearer {token}")] if token else []
        self._channel = open_channel(str(options.address), credentials)
        self.calls: Counter[str] = Counter()
        """How many were made, by the method's name."""

    def call(self, method: Method, request: Any, seconds: float) -> Any:
        """One response to one request. Raises Unreachable, Refused."""
        self.calls[method.name] += 1
        with translated(method):
            return start(self._channel, method, request, seconds, self._metadata)

    def read(self, method: Method, request: Any, silence: float) -> Generator[Any, None, None]:
        """The responses to one request, ended where none comes for `silence` seconds; close it to break it off."""
        self.calls[method.name] += 1
        with translated(method):
            call = start(self._channel, method, request, None, self._metadata)
            with _watched(silence) as (moved, watch):
                watch(call.cancel)
                try:
                    for response in call:
                        moved()
                        yield response
                        moved()
                finally:
                    call.cancel()

    def write(self, method: Method, requests: Iterable[Any], silence: float) -> Any:
        """The response to many requests, ended where none is taken for `silence` seconds. Raises what making them does.

        They are made in another thread.
        """
        self.calls[method.name] += 1
        failures: list[Exception] = []

        def feed(moved: Callable[[], None]) -> Iterator[Any]:
            try:
                for request in requests:
                    moved()
                    yield request
            except Exception as error:
                failures.append(error)
                raise

        stub: Any = self._channel.stream_unary(
            method.path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=method.response.FromString,
        )
        with translated(method), _watched(silence) as (moved, watch):
            call = stub.future(feed(moved), metadata=self._metadata)
            watch(call.cancel)
            try:
                return call.result()
            except grpc.RpcError:
                if failures:
                    raise failures[0] from None
                raise
            except grpc.FutureCancelledError:
                raise Unreachable(f"{method.name}: no progress in {silence:g} s") from None

    def begin(self, method: Method, request: Any, seconds: float, wake: Callable[[], object]) -> Pending:
        """The same as `call`, without waiting for the response; `wake` is called, by any thread, when it is there."""
        self.calls[method.name] += 1
        stub: Any = self._channel.unary_unary(
            method.path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=method.response.FromString,
        )
        with translated(method):
            future = stub.future(request, timeout=seconds, metadata=self._metadata)
        future.add_done_callback(lambda _: wake())
        return Pending(method, future)

    def close(self) -> None:
        """Break off what is under way."""
        self._channel.close()


class Pending:
    """A call that is under way, of one request and one response. Any thread may use it."""

    def __init__(self, method: Method, future: Any) -> None:
        self._method = method
        self._future = future

    @property
    def done(self) -> bool:
        """Whether `result` doesn't wait."""
        return bool(self._future.done())

    def cancel(self) -> None:
        """Break it off; harmless when it is done."""
        self._future.cancel()

    def result(self) -> Any:
        """The response. Raises Unreachable, also for what was broken off, and Refused."""
        with translated(self._method):
            try:
                return self._future.result()
            except grpc.FutureCancelledError as error:
                raise Unreachable(f"{self._method.name}: broken off") from error


@contextmanager
def translated(method: Method) -> Iterator[None]:
    """Errors of grpc as ours."""
    try:
        yield
    except grpc.RpcError as error:
        call = cast("grpc.Call", error)
        code, why = call.code(), f"{method.name}: {(call.details() or '').strip()[:300]}"
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
            raise Unreachable(why if code is not grpc.StatusCode.CANCELLED else f"{why}: no progress") from error
        if code is grpc.StatusCode.NOT_FOUND:
            raise NotThere(why, code.name) from error
        raise Refused(f"{why} ({code.name})", code.name) from error
    except ValueError as error:
        # What grpcio says of a channel that was closed.
        raise Unreachable(f"{method.name}: {error}") from error


@contextmanager
def _watched(silence: float) -> Iterator[tuple[Callable[[], None], Callable[[Callable[[], object]], None]]]:
    """What is given notes progress, and takes the call to be cancelled after so many seconds without."""
    last = time.monotonic()
    over = threading.Event()

    def moved() -> None:
        nonlocal last
        last = time.monotonic()

    def look(cancel: Callable[[], object]) -> None:
        while not over.wait(silence / _LOOKS):
            if time.monotonic() - last > silence:
                cancel()
                return

    def watch(cancel: Callable[[], object]) -> None:
        threading.Thread(target=look, args=(cancel,), name="watch", daemon=True).start()

    try:
        yield moved, watch
    finally:
        over.set()
