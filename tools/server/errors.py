"""What a service refuses a request with, beside the store's own errors.

    ServeError
    ├── InvalidArgument       the request is wrong in itself
    ├── NotThere              what was asked for isn't here: an action's result
    ├── OutOfRange            an offset past the end
    ├── Unauthenticated       no token, or one that nobody knows
    ├── PermissionDenied      this client may not, or this server doesn't
    ├── Exhausted             a limit of this server is reached
    ├── FailedPrecondition    something else has to come first; `missing` says which blobs
    ├── Overtaken             what it goes on with is no longer here; it may be begun anew
    ├── TooLarge              more bytes than this server takes at a time
    ├── Unsized               a body whose length isn't said where it has to be
    ├── BadEncoding           bytes that are encoded in a way this server doesn't know
    ├── Misdirected           a request for a host of another name
    ├── NotAllowed            a method that what it is meant for doesn't have; `allowed` says which it has
    ├── TooSlow               the client made no progress for too long
    ├── Unavailable           this server is ending; another may answer
    └── Unimplemented         this server doesn't do that

`tools.server.status` has the one table from these, and from the store's, to codes.
"""

from __future__ import annotations

from collections.abc import Sequence

from store.digest import Digest


class ServeError(Exception):
    """A request that is refused, with a message for whoever sent it."""


class InvalidArgument(ServeError):
    """The request is wrong in itself."""


class NotThere(ServeError):
    """What was asked for isn't here."""


class OutOfRange(ServeError):
    """An offset lies past the end."""

    def __init__(self, message: str, size: int | None = None) -> None:
        """`size`: where the end is, if that shall be told."""
        super().__init__(message)
        self.size = size


class Unauthenticated(ServeError):
    """Nobody knows who is asking."""


class PermissionDenied(ServeError):
    """This client may not do that, or this server does it for nobody."""


class Exhausted(ServeError):
    """A limit of this server is reached; later it may work."""


class FailedPrecondition(ServeError):
    """Something else has to come first."""

    def __init__(self, message: str, missing: Sequence[Digest] = ()) -> None:
        """`missing`: blobs to upload before it is tried again."""
        super().__init__(message)
        self.missing = tuple(missing)


class Overtaken(ServeError):
    """What the request goes on with is no longer here, or still held by another; it may be begun anew."""


class TooLarge(ServeError):
    """There are more bytes than this server takes at a time."""


class Unsized(ServeError):
    """The length of a body has to be said."""


class BadEncoding(ServeError):
    """The bytes are encoded in a way this server doesn't know."""


class Misdirected(ServeError):
    """The request is for a host of another name."""


class NotAllowed(ServeError):
    """What is asked for can't be done with this."""

    def __init__(self, message: str, allowed: Sequence[str] = ()) -> None:
        """`allowed`: what can be done with it."""
        super().__init__(message)
        self.allowed = tuple(allowed)


class TooSlow(ServeError):
    """The client made no progress for too long."""


class Unavailable(ServeError):
    """This server can't answer just now."""


class Unimplemented(ServeError):
    """This server doesn't do that."""
