"""Errors as statuses: the one table, for whole calls and for each blob of a batch, whatever the transport."""

from __future__ import annotations

import logging

from google.protobuf.message import DecodeError

from store import errors as store
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated.error_details_pb2 import PreconditionFailure
from tools.reapi.generated.status_pb2 import Status
from tools.server import errors
from tools.server.fault_log import FaultLog

log = logging.getLogger("casfs.serve")
faults = FaultLog(log)
"""Where errors go that are nobody's mistake but ours, or the disk's."""

_TABLE: tuple[tuple[type[Exception], codes.Code], ...] = (
    (errors.InvalidArgument, codes.INVALID_ARGUMENT),
    (errors.NotThere, codes.NOT_FOUND),
    (errors.OutOfRange, codes.OUT_OF_RANGE),
    (errors.Unauthenticated, codes.UNAUTHENTICATED),
    (errors.PermissionDenied, codes.PERMISSION_DENIED),
    (errors.Exhausted, codes.RESOURCE_EXHAUSTED),
    (errors.FailedPrecondition, codes.FAILED_PRECONDITION),
    # Clients try again, and ask how much is here before.
    (errors.Overtaken, codes.ABORTED),
    (errors.TooLarge, codes.INVALID_ARGUMENT),
    (errors.Unsized, codes.INVALID_ARGUMENT),
    (errors.BadEncoding, codes.INVALID_ARGUMENT),
    (errors.Misdirected, codes.INVALID_ARGUMENT),
    (errors.NotAllowed, codes.UNIMPLEMENTED),
    (errors.TooSlow, codes.DEADLINE_EXCEEDED),
    (errors.Unavailable, codes.UNAVAILABLE),
    (errors.Unimplemented, codes.UNIMPLEMENTED),
    (store.BadInput, codes.INVALID_ARGUMENT),
    (store.DigestMismatch, codes.INVALID_ARGUMENT),
    (store.NotFound, codes.NOT_FOUND),
    # It is in quarantine: for the client it is not there, and may be uploaded again.
    (store.CorruptBlob, codes.NOT_FOUND),
    (store.NoSpace, codes.RESOURCE_EXHAUSTED),
    (store.StoreUnusable, codes.UNAVAILABLE),
    (DecodeError, codes.INVALID_ARGUMENT),
    (Exception, codes.INTERNAL),
)
"""The first that fits counts."""


def find_code(error: Exception) -> codes.Code:
    """The code of an error."""
    return next(code for kind, code in _TABLE if isinstance(error, kind))


def as_status(error: Exception | None) -> Status:
    """An error, or None for what went well, as a message. What is unexpected is logged, and not told."""
    if error is None:
        return Status()
    code = find_code(error)
    if code == codes.INTERNAL:
        faults.note(error, "unexpected %s", type(error).__name__)
        return Status(code=code, message="an internal error, see the server's log")
    status = Status(code=code, message=str(error))
    if isinstance(error, errors.FailedPrecondition) and error.missing:
        failure = PreconditionFailure()
        for digest in error.missing:
            failure.violations.add(type="MISSING", subject=f"blobs/{digest.hex}/{digest.size}")
        status.details.add().Pack(failure)
    return status
