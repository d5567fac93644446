"""What one client can take of a gRPC server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GrpcLimits:
    """Bytes of a message and of its headers, streams of a connection, seconds of silence.

    `uploads`: those that come piece by piece and are taken at a time, of all clients.
    """

    message_bytes: int = 16 << 20
    header_bytes: int = 16 << 10
    streams: int = 1000
    idle_seconds: float = 60.0
    uploads: int = 64
