"""Errors as HTTP's status codes: by `tools.server.status`, but for what HTTP tells apart and gRPC doesn't."""

from __future__ import annotations

from http import HTTPStatus

from store import errors as store
from tools.reapi.generated import code_pb2 as codes
from tools.server import errors
from tools.server.status import find_code

_OF_ERRORS: tuple[tuple[type[Exception], HTTPStatus], ...] = (
    (store.NoSpace, HTTPStatus.INSUFFICIENT_STORAGE),
    (errors.TooLarge, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (errors.Unsized, HTTPStatus.LENGTH_REQUIRED),
    (errors.BadEncoding, HTTPStatus.UNSUPPORTED_MEDIA_TYPE),
    (errors.Misdirected, HTTPStatus.MISDIRECTED_REQUEST),
    (errors.NotAllowed, HTTPStatus.METHOD_NOT_ALLOWED),
)
_OF_CODES = {
    codes.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    codes.FAILED_PRECONDITION: HTTPStatus.CONFLICT,
    codes.ABORTED: HTTPStatus.CONFLICT,
    codes.NOT_FOUND: HTTPStatus.NOT_FOUND,
    codes.OUT_OF_RANGE: HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    codes.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    codes.PERMISSION_DENIED: HTTPStatus.FORBIDDEN,
    codes.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    codes.DEADLINE_EXCEEDED: HTTPStatus.REQUEST_TIMEOUT,
    codes.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    codes.UNIMPLEMENTED: HTTPStatus.NOT_IMPLEMENTED,
}


def find_http_status(error: Exception) -> HTTPStatus:
    """The status code of an error."""
    for kind, status in _OF_ERRORS:
        if isinstance(error, kind):
            return status
    return _OF_CODES.get(find_code(error), HTTPStatus.INTERNAL_SERVER_ERROR)
