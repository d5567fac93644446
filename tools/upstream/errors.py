"""What asking an upstream can end with: StoreErrors, so that whoever asks sources knows them.

    UpstreamError
    ├── Unreachable         nobody answers, or not in time
    │   └── PassedOver      so it was a moment ago: it isn't asked again yet
    └── Refused             it answered, with an error
        └── NotThere        that it hasn't what was asked for

Those of grpcio are translated in `tools.upstream.channel`.
"""

from __future__ import annotations

from store.errors import StoreError


class UpstreamError(StoreError):
    """An upstream could not be made use of."""


class Unreachable(UpstreamError):
    """Nobody answers, or not in time."""


class PassedOver(Unreachable):
    """It didn't answer a moment ago, and isn't asked again yet."""


class Refused(UpstreamError):
    """It answered with an error; `code` is the name of its status."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class NotThere(Refused):
    """It hasn't what was asked for."""
