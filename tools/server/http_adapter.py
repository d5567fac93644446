"""The cache over HTTP: aiohttp's parser and connections, and nothing that a service needs to know.

Runs in the same event loop as gRPC, with the same rule: what can be answered at
once is answered there, what waits for a disk goes to a thread. Large bodies go
from the file to the socket by sendfile(2), without passing through Python;
under TLS, and compressed, in pieces.

aiohttp's FileResponse isn't used: it opens files by name, looks for ``.gz``
neighbours, and takes the file's time for what tells versions apart, while a
blob's time is when it was last used.
"""

from __future__ import annotations

import asyncio
import io
import socket
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import closing, suppress
from functools import partial
from http import HTTPStatus
from typing import Any

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from store.digest import Digest, DigestFunction
from store.presence import WouldWait
from tools.server.access import Access, Right
from tools.server.downloads import CompressedReader, PlainReader, Reader, is_cached, no_head, warm
from tools.server.errors import (
    BadEncoding,
    InvalidArgument,
    Misdirected,
    NotAllowed,
    OutOfRange,
    TooSlow,
    Unauthenticated,
    Unsized,
)
from tools.server.gate import Client, Gate, settle_future
from tools.server.http_cache import SMALL, Content, HttpCache, Intake
from tools.server.http_names import CacheName, Kind, accepts_zstd, is_host, matches, parse_cache_path, parse_range
from tools.server.http_short import WholePut
from tools.server.http_status import find_http_status
from tools.server.metrics import Half, Metrics
from tools.server.pages import Page, Pages
from tools.server.recent import Recent
from tools.server.sending import Sending
from tools.server.status import as_status, faults
from tools.server.waiting import FETCH_THREADS, Waiting
from tools.server.waits import Reason, waiting_for

_SEND = 1 << 20
"""Bytes between two looks at the clock: who takes fewer in the idle time is too slow."""
_TAKE = 256 << 10
"""Bytes of a body that are gathered before a thread writes them."""
_HELD_BYTES = 128 << 10
"""Of a body that nobody takes yet: twice what is read at a time."""
_WORTH_COMPRESSING = 512
_IMMUTABLE = "public, max-age=31536000, immutable"
_SAFE = {"X-Content-Type-Options": "nosniff"}
_RIGHTS = {"GET": Right.READ, "HEAD": Right.READ, "PUT": Right.WRITE, "DELETE": Right.WRITE}
_HALVES = {Kind.CAS: Half.BLOB, Kind.AC: Half.RESULT}


class HttpAdapter:
    """Answers requests; made and used in the loop's thread."""

    def __init__(
        self,
        cache: HttpCache,
        pages: Pages,
        access: Access,
        waiting: Waiting,
        gate: Gate,
        metrics: Metrics,
        recent: Recent,
        names: Collection[str] | None,
    ) -> None:
        """`names`: what clients may call this server; None: they may call it anything."""
        self._cache = cache
        self._pages = pages
        self._access = access
        self._waiting = waiting
        self._gate = gate
        self._fetching = Waiting(waiting.idle_seconds, FETCH_THREADS)
        self._metrics = metrics
        self._recent = recent
        self._names = names
        self.ending = ""
        """Why the server ends, if it does."""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, and count it."""
        begun = time.perf_counter()
        kind, status = "other", "cancelled"
        try:
            name = parse_cache_path(request.raw_path.partition("?")[0])
            kind = "page" if name is None else name.kind.value
            response = await (self._answer_page(request) if name is None else self._answer_cache(request, name))
            status = str(response.status)
        except ConnectionError:
            # Nobody is there to be told; aiohttp finds the same out, and says nothing of it either.
            response, status = web.Response(), "gone"
        except Exception as error:  # noqa: BLE001 - told to the client
            response = _refusal(error, request)
            status = str(response.status)
        finally:
            method = request.method if request.method in _RIGHTS else "other"
            self._metrics.note_request("http", f"{method} {kind}", status, time.perf_counter() - begun)
        response.headers[hdrs.SERVER] = "casfs"
        return response

    def close(self) -> None:
        """End the threads, when they have done what they are at."""
        self._waiting.close()
        self._fetching.close()

    # The cache.

    async def _answer_cache(self, request: web.BaseRequest, name: CacheName) -> web.StreamResponse:
        self._check(request, _RIGHTS.get(request.method, Right.READ))
        match request.method:
            case "GET" | "HEAD":
                return await self._get(request, name)
            case "PUT":
                return await self._put(request, name)
            case "DELETE":
                await self._waiting.in_thread(self._cache.remove, name)
                return web.Response(status=HTTPStatus.NO_CONTENT)
        allowed = tuple(method for method in _RIGHTS if method != "DELETE" or name.kind is Kind.AC)
        raise NotAllowed(f"{request.method[:20]} isn't answered here", allowed)

    def put_whole(self, request: WholePut, connection: int, done: Callable[[bool], object]) -> Digest | None:
        """The blob of a PUT that came whole, which is being stored; None: the request has to go the ordinary way.

        `done` is told later whether it is stored. Where it isn't, the request has to go the ordinary way, too, which
        tells the client why.
        """
        begun = time.perf_counter()
        try:
            name = parse_cache_path(request.path)
            if name is None or name.kind is not Kind.CAS:
                return None
            self._check_fields(request.fields.host, request.fields.authorization, Right.WRITE)
            digest = self._cache.read_whole(name, request.body)
        except Exception:  # noqa: BLE001 - the ordinary way finds the same, and tells the client
            return None
        if self._cache.is_remembered(digest):
            return None
        metrics = self._metrics

        def settle(refused: Exception | None) -> None:
            metrics.note_upload(-1)
            if refused is None:
                self._cache.note(digest)
                metrics.note_request("http", "PUT cas", "200", time.perf_counter() - begun)
                metrics.note_bytes("http", digest.size, 0)
            done(refused is None)

        metrics.note_upload(1)
        self._gate.add(Client(request.fields.authorization, connection), digest, request.body, settle)
        return digest

    def _check(self, request: web.BaseRequest, right: Right) -> None:
        self._check_fields(request.headers.get(hdrs.HOST), request.headers.get(hdrs.AUTHORIZATION), right)

    def _check_fields(self, host: str | None, authorization: str | None, right: Right) -> None:
        if self._names is not None and not is_host(host, self._names):
            raise Misdirected(f"this server isn't called {(host or '')[:80]!r}; if it shall be: --http-name")
        self._access.check(authorization, right)

    async def _get(self, request: web.BaseRequest, name: CacheName) -> web.StreamResponse:
        try:
            try:
                content = self._cache.get(name, may_wait=False)
            except WouldWait:
                content = await self._fetching.in_thread(self._cache.get, name, dropped=Content.close)
        except Exception as error:
            if find_http_status(error) is HTTPStatus.NOT_FOUND:
                self._metrics.note_lookup(_HALVES[name.kind], hit=False)
            raise
        self._metrics.note_lookup(_HALVES[name.kind], hit=True)
        if name.kind is Kind.AC:
            self._note(name, "hit")
        with closing(content):
            return await self._send(request, content)

    def _note(self, name: CacheName, what: str) -> None:
        action = Digest(DigestFunction.SHA256, name.hash, 0)
        self._recent.note(name.instance, action, what, opaque=not self._cache.validates)

    async def _send(self, request: web.BaseRequest, content: Content) -> web.StreamResponse:
        """Send what was found: as a whole or a part, as it is or compressed, or nothing where the client has it."""
        part = None
        if content.etag and request.headers.get(hdrs.IF_RANGE) in (None, f'"{content.etag}"'):
            part = parse_range(request.headers.get(hdrs.RANGE), content.size)
        zstd = (
            part is None
            and content.size >= _WORTH_COMPRESSING
            and accepts_zstd(request.headers.get(hdrs.ACCEPT_ENCODING))
        )
        headers = _headers(content, zstd)
        if content.etag and matches(request.headers.get(hdrs.IF_NONE_MATCH), headers[hdrs.ETAG]):
            return web.Response(status=HTTPStatus.NOT_MODIFIED, headers=headers)
        if zstd:
            return await self._send_compressed(request, content, headers)
        first, end = part or (0, content.size)
        status = HTTPStatus.OK
        if part is not None:
            status = HTTPStatus.PARTIAL_CONTENT
            headers[hdrs.CONTENT_RANGE] = f"bytes {first}-{end - 1}/{content.size}"
        if content.descriptor < 0 and request.method == "GET":
            self._metrics.note_bytes("http", 0, end - first)
            return web.Response(status=status, headers=headers, body=content.data[first:end])
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = end - first
        if request.method == "HEAD":
            return response
        self._metrics.note_bytes("http", 0, end - first)
        await self._send_body(request, response, self._send_file(request, content, first, end))
        return response

    async def _send_body(
        self, request: web.BaseRequest, response: web.StreamResponse, sending: Coroutine[Any, Any, None]
    ) -> None:
        """Send the head, then the body; where that fails the connection ends, as no other answer can follow."""
        try:
            await response.prepare(request)
            await sending
            await response.write_eof()
        except Exception as error:
            if not isinstance(error, ConnectionError | TooSlow):
                faults.note(error, "an answer broke off")
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError from error
        finally:
            sending.close()

    async def _send_file(self, request: web.BaseRequest, content: Content, first: int, end: int) -> None:
        transport = _transport_of(request)
        socket = transport.get_extra_info("socket")
        if transport.get_extra_info("sslcontext") is not None or transport.get_write_buffer_size():
            await self._send_file_by_loop(request, content, first, end)
            return
        with closing(Sending(socket.fileno(), content.descriptor)) as sending:
            while first < end:
                size = min(_SEND, end - first)
                await self._see_cached(content, first, size)
                _transport_of(request)
                if (done := sending.begin(first, first + size)) is not None:
                    await self._waiting.patiently(done)
                first += size

    async def _send_file_by_loop(self, request: web.BaseRequest, content: Content, first: int, end: int) -> None:
        """The same for TLS, which the kernel doesn't know of, and behind what is still to be written."""
        loop = asyncio.get_running_loop()
        with io.FileIO(content.descriptor, "rb", closefd=False) as file:
            while first < end:
                size = min(_SEND, end - first)
                await self._see_cached(content, first, size)
                await self._waiting.patiently(loop.sendfile(_transport_of(request), file, first, size))
                first += size

    async def _see_cached(self, content: Content, first: int, size: int) -> None:
        """Have it in the page cache: sendfile would wait for the disk, and everybody for it."""
        if not is_cached(content.descriptor, first, size):
            await self._waiting.in_thread(warm, content.descriptor, first, size)

    async def _send_compressed(
        self, request: web.BaseRequest, content: Content, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=headers)
        if request.method == "HEAD":
            return response
        await self._send_body(request, response, self._compress(response, content))
        return response

    async def _compress(self, response: web.StreamResponse, content: Content) -> None:
        descriptor, content.descriptor = content.descriptor, -1
        plain: Reader = PlainReader(descriptor, 0, content.size) if descriptor >= 0 else _Bytes(content.data)
        with closing(CompressedReader(plain, content.size)) as reader:
            while data := await self._waiting.in_thread(reader.read):
                self._metrics.note_bytes("http", 0, len(data))
                await self._waiting.patiently(response.write(data))

    async def _put(self, request: web.BaseRequest, name: CacheName) -> web.StreamResponse:
        size = _body_size(request)
        compressed = _is_compressed(request)
        client = Client(request.headers.get(hdrs.AUTHORIZATION), id(request.transport))
        self._metrics.note_upload(1)
        try:
            if name.kind is Kind.CAS and not compressed and size is not None and size <= SMALL:
                await self._put_small(request, name, client)
            else:
                async with self._gate.turn(client, min(size or _HELD_BYTES, _HELD_BYTES)):
                    await self._put_long(request, name, size, compressed)
        finally:
            self._metrics.note_upload(-1)
        if name.kind is Kind.AC:
            self._note(name, "stored")
        return web.Response(status=HTTPStatus.OK)

    async def _put_small(self, request: web.BaseRequest, name: CacheName, client: Client) -> None:
        """A blob that is gathered in memory, and stored together with others."""
        _acknowledge(request)
        await _continue(request)
        parts = [await self._read_piece(request)]
        while not request.content.at_eof():
            parts.append(await self._read_piece(request))
        data = b"".join(parts)
        self._metrics.note_bytes("http", len(data), 0)
        digest = self._cache.read_whole(name, data)
        if self._cache.is_remembered(digest):
            return
        done: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._gate.add(client, digest, data, partial(settle_future, done))
        with waiting_for(Reason.STORE, blobs=(digest,)):
            refused = await done
        if refused is not None:
            raise refused
        self._cache.note(digest)

    async def _put_long(self, request: web.BaseRequest, name: CacheName, size: int | None, compressed: bool) -> None:
        _acknowledge(request)
        intake = await self._waiting.in_thread(
            lambda: self._cache.begin_put(name, size, compressed=compressed),
            dropped=lambda late: late.discard(),
        )
        try:
            await self._take(request, intake)
            await self._fetching.in_thread(intake.finish)
        except BaseException:
            # Also when the client has vanished, which shows as an error of its body.
            intake.discard()
            raise

    async def _take(self, request: web.BaseRequest, intake: Intake) -> None:
        await _continue(request)
        gathered = bytearray()
        while data := await self._read_piece(request):
            self._metrics.note_bytes("http", len(data), 0)
            gathered += data
            if len(gathered) >= _TAKE:
                await self._waiting.in_thread(intake.write, bytes(gathered))
                gathered.clear()
        if gathered:
            await self._waiting.in_thread(intake.write, bytes(gathered))

    async def _read_piece(self, request: web.BaseRequest) -> bytes:
        """What has come of the body; nothing at its end. Raises InvalidArgument, TooSlow."""
        here = _body_here(request)
        # Waiting has its price, a timer among others; most bodies are small, and come with their heads.
        return here if here is not None else await self._waiting.patiently(_read_body(request))

    # What isn't the cache.

    async def _answer_page(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method not in ("GET", "HEAD"):
            raise NotAllowed(f"{request.method[:20]} isn't answered here", ("GET", "HEAD"))
        path, _, query = request.raw_path.partition("?")
        if path == "/healthz":
            # Who checks whether a server lives needn't be able to use it.
            if self.ending:
                return web.Response(status=HTTPStatus.SERVICE_UNAVAILABLE, text=f"{self.ending}\n")
            return web.Response(text="ok\n")
        self._check(request, Right.READ)
        if path == "/metrics":
            text, content_type = await self._waiting.in_thread(self._metrics.render)
            return web.Response(body=text, headers={hdrs.CONTENT_TYPE: content_type})
        page = await self._fetching.in_thread(self._pages.get, path, query)
        return _page_response(page)


class _Bytes:
    """A reader of what is in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def left(self) -> int:
        return len(self._data)

    def read(self, *, may_wait: bool = True, head: Callable[[int], bytes] = no_head) -> bytes:
        data, self._data = self._data, b""
        return head(len(data)) + data if data else b""

    def close(self) -> None:
        pass


async def _continue(request: web.BaseRequest) -> None:
    if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _acknowledge(request: web.BaseRequest) -> None:
    """Have the kernel tell the client at once that the head has arrived, if the body hasn't.

    ccache sends them apart and without TCP_NODELAY, so its kernel keeps the
    body back until then: 40 ms, as long as ours puts acknowledgements off.
    """
    if request.content.is_eof() or request.transport is None:
        return
    connection = request.transport.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def _transport_of(request: web.BaseRequest) -> asyncio.Transport:
    """The connection. Raises ConnectionResetError where the client is gone."""
    transport = request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client is gone")
    return transport


def _body_here(request: web.BaseRequest) -> bytes | None:
    """What `_read_body` gives, if that is here and whole; else None."""
    content = request.content
    if content.exception() is not None:
        return None
    return content.read_nowait() or (b"" if content.at_eof() else None)


async def _read_body(request: web.BaseRequest) -> bytes:
    """What has come of the body; nothing at its end. Raises InvalidArgument for one that breaks HTTP's rules."""
    try:
        return await request.content.readany()
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise InvalidArgument(f"the body can't be read: {error}") from None


def _headers(content: Content, zstd: bool) -> dict[str, str]:
    headers = {hdrs.CONTENT_TYPE: "application/octet-stream", hdrs.VARY: hdrs.ACCEPT_ENCODING, **_SAFE}
    if zstd:
        headers[hdrs.CONTENT_ENCODING] = "zstd"
    if content.etag:
        headers[hdrs.ETAG] = f'"{content.etag}-zstd"' if zstd else f'"{content.etag}"'
        headers[hdrs.CACHE_CONTROL] = _IMMUTABLE
        headers[hdrs.ACCEPT_RANGES] = "bytes"
    return headers


def _body_size(request: web.BaseRequest) -> int | None:
    """What Content-Length says, or None where the body comes in chunks. Raises Unsized."""
    if request.content_length is not None:
        return request.content_length
    if "chunked" in request.headers.get(hdrs.TRANSFER_ENCODING, "").lower():
        return None
    raise Unsized("a PUT has a Content-Length, or comes in chunks")


def _is_compressed(request: web.BaseRequest) -> bool:
    encoding = request.headers.get(hdrs.CONTENT_ENCODING, "identity").strip().lower()
    if encoding not in ("identity", "zstd", ""):
        raise BadEncoding(f"Content-Encoding {encoding[:40]!r}: there are zstd and identity")
    return encoding == "zstd"


def _refusal(error: Exception, request: web.BaseRequest) -> web.Response:
    status = find_http_status(error)
    message = as_status(error).message
    response = web.Response(status=status, text=f"{message}\n")
    if isinstance(error, Unauthenticated):
        response.headers.add(hdrs.WWW_AUTHENTICATE, 'Basic realm="casfs", charset="UTF-8"')
        response.headers.add(hdrs.WWW_AUTHENTICATE, 'Bearer realm="casfs"')
    if isinstance(error, NotAllowed):
        response.headers[hdrs.ALLOW] = ", ".join(error.allowed)
    if isinstance(error, OutOfRange) and error.size is not None:
        response.headers[hdrs.CONTENT_RANGE] = f"bytes */{error.size}"
    if isinstance(error, TooSlow):
        response.force_close()
    return response


def _page_response(page: Page) -> web.Response:
    headers = {hdrs.CACHE_CONTROL: "no-store", "Content-Security-Policy": page.policy, **_SAFE}
    return web.Response(text=page.html, content_type="text/html", headers=headers)
