"""gRPC's headers and trailers on HTTP/2, as "PROTOCOL-HTTP2" has them: what a request wants, and how a call went."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import quote

from tools.http2.headers import check_request
from tools.http2.hpack import Header, encode
from tools.reapi.generated.status_pb2 import Status
from tools.server.calls import Endpoint
from tools.server.errors import Exhausted, Unimplemented
from tools.server.limits import GrpcLimits
from tools.server.status import as_status

_CONTENT_TYPE = b"application/grpc"
HEADERS = encode([(b":status", b"200"), (b"content-type", _CONTENT_TYPE), (b"grpc-accept-encoding", b"identity,gzip")])
"""The block that begins every answer."""
OK = encode([(b"grpc-status", b"0")])
"""The block that ends one that went well."""
_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_SOME_TIME = (b"grpc-timeout", b"")
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_ENTRY_BYTES = 32
"""What a header counts for beside its text (RFC 9113, section 6.5.2)."""
_STATUS_MOST = 4096
"""Bytes of a status's message, and of its details: clients bound headers at 8 KiB, and a frame at 16."""
_TIMEOUT_BYTES = 9
"""Of a valid one."""
_KNOWN_MOST = 256
"""Headers whose meaning is remembered; none is longer than a few times the bound of a request's."""
_CUT_QUOTE = re.compile("%.?$")
_SAFE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
"""What a status message needn't have quoted."""


class Head(NamedTuple):
    """What a request's headers say; those with a `refusal` get that block for an answer."""

    endpoint: Endpoint | None
    authorization: str | None = None
    timeout: bytes = b""
    compressed: bool = False
    """Messages may be: gzip."""
    refusal: bytes = b""


class Routes:
    """The endpoints by their paths, and what else a request is refused for."""

    def __init__(self, endpoints: Iterable[Endpoint], limits: GrpcLimits) -> None:
        self.limits = limits
        self._endpoints = {endpoint.method.path.encode(): endpoint for endpoint in endpoints}
        self._known: dict[tuple[Header, ...], tuple[Head, int]] = {}

    def interpret(self, headers: list[Header]) -> tuple[Head, int]:
        """What they say, and the bytes of the body or -1. Raises Malformed."""
        if len(headers) * _ENTRY_BYTES > self.limits.header_bytes:
            # A byte each is enough to name one that came before: neither looked at nor remembered.
            return _refuse(Exhausted(f"{len(headers)} headers: {self.limits.header_bytes // _ENTRY_BYTES} may be")), -1
        # The same ones come again and again, but for the time that is left to the call.
        timeout = b""
        for position, header in enumerate(headers):
            if header[0] == b"grpc-timeout" and len(header[1]) <= _TIMEOUT_BYTES:
                timeout = header[1]
                headers[position] = _SOME_TIME
        key = tuple(headers)
        known = self._known.get(key)
        if known is None:
            expected = check_request(headers)
            known = self._interpret(headers), expected
            if len(self._known) >= _KNOWN_MOST:
                self._known.clear()
            self._known[key] = known
        return _with_timeout(known, timeout) if timeout else known

    def vary(self, known: tuple[Head, int], header: Header) -> tuple[Head, int] | None:
        """What headers say that differ from known ones in this only, if it is the time that is left."""
        name, timeout = header
        # One without a time of its own may have had one too long to be looked at.
        if name != b"grpc-timeout" or not known[0].timeout or not 0 < len(timeout) <= _TIMEOUT_BYTES:
            return None
        return _with_timeout(known, timeout)

    def _interpret(self, headers: list[Header]) -> Head:
        size = sum(len(name) + len(value) + _ENTRY_BYTES for name, value in headers)
        if size > self.limits.header_bytes:
            return _refuse(Exhausted(f"headers of {size} bytes: at most {self.limits.header_bytes} may be"))
        found = dict(headers)
        if found[b":method"] != b"POST":
            return Head(None, refusal=encode([(b":status", b"405"), (b"allow", b"POST")]))
        kind = found.get(b"content-type", b"")
        if kind != _CONTENT_TYPE and not kind.startswith((_CONTENT_TYPE + b"+", _CONTENT_TYPE + b";")):
            return Head(None, refusal=encode([(b":status", b"415")]))
        endpoint = self._endpoints.get(found[b":path"])
        if endpoint is None:
            return _refuse(Unimplemented(f"there is no method {found[b':path'].decode('ascii', 'replace')[:200]} here"))
        encoding = found.get(b"grpc-encoding", b"identity")
        if encoding not in (b"identity", b"gzip"):
            return _refuse(
                Unimplemented(
                    f"messages in {encoding.decode('ascii', 'replace')[:40]}: identity and gzip are known here"
                )
            )
        authorization = found.get(b"authorization")
        return Head(
            endpoint,
            None if authorization is None else authorization.decode("utf-8", "surrogateescape"),
            compressed=encoding == b"gzip",
        )


def _with_timeout(known: tuple[Head, int], timeout: bytes) -> tuple[Head, int]:
    head, expected = known
    return Head(head.endpoint, head.authorization, timeout, head.compressed, head.refusal), expected


def _refuse(error: Exception) -> Head:
    return Head(None, refusal=HEADERS + trailers_of(as_status(error)))


def trailers_of(status: Status) -> bytes:
    """The block that ends a call with this status."""
    if not status.code:
        return OK
    text = _CUT_QUOTE.sub("", quote(status.message, _SAFE)[:_STATUS_MOST])
    trailers = [(b"grpc-status", b"%d" % status.code), (b"grpc-message", text.encode())]
    if status.details and status.ByteSize() <= _STATUS_MOST:
        trailers.append((b"grpc-status-details-bin", b64encode(status.SerializeToString()).rstrip(b"=")))
    return encode(trailers)


def read_timeout(text: bytes) -> float | None:
    """Seconds, or None where nobody says how long it may take."""
    match = _TIMEOUT.fullmatch(text)
    return int(match[1]) * _UNITS[match[2]] if match else None
