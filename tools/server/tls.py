"""Certificates: read from PEM files, and again while connections come and go."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from store.errors import BadInput


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. With `client_ca`, clients need a certificate of that authority."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


class Tls(NamedTuple):
    """The files as OpenSSL has them: for HTTP/1.1, and for HTTP/2."""

    context: ssl.SSLContext
    http2: ssl.SSLContext


def read_tls(files: TlsFiles) -> Tls:
    """Certificate, key and authority. Raises BadInput."""
    try:
        context, http2 = _make_context(files), _make_context(files)
        http2.set_alpn_protocols(["h2"])
        return Tls(context, http2)
    except (OSError, ValueError) as error:
        raise BadInput(f"can't use the TLS files: {error.strerror if isinstance(error, OSError) else error}") from error


def _make_context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files.certificate, files.key)
    if files.client_ca is not None:
        context.load_verify_locations(files.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class Certificates:
    """What new connections are secured with. Connections that are there keep what they began with."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises BadInput."""
        self._files = files
        self.current = read_tls(files)

    def reload(self) -> None:
        """Read the files again. Raises BadInput, and then nothing has changed."""
        self.current = read_tls(self._files)

    def context(self, *, http2: bool = False) -> ssl.SSLContext:
        """A context to listen with, whose connections get the files that were read last.

        Its own is loaded with the same; what decides is the callback, which
        OpenSSL makes for every connection, whether or not that names a server.
        """

        def choose(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            connection.context = self.current.http2 if http2 else self.current.context

        read = read_tls(self._files)
        context = read.http2 if http2 else read.context
        context.sni_callback = choose
        return context
