"""Which upstream, as plain data: it crosses forks and, as JSON, command lines. No I/O but for reading credentials."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from store.errors import BadInput, BadName
from tools.server.address import Address

_URL = re.compile(r"(grpcs?)://(\[[0-9a-fA-F:.]+\]|[^:/\[\]\s@]+)(?::([0-9]{1,5}))?(?:/(.*))?")
_PORTS = {"grpc": 8980, "grpcs": 443}


@dataclass(frozen=True, slots=True)
class UpstreamOptions:
    """Where it is and how it is spoken to. The files are a bearer token, and PEM files for TLS."""

    url: str
    token: str | None = None
    tls_ca: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None

    def check(self) -> None:
        """Raises BadInput for what can't be."""
        address, _ = self.address, self.instance
        if not self.secure and (self.tls_ca or self.tls_certificate or self.tls_key):
            raise BadInput(f"upstream {self.url}: TLS files are for grpcs://")
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise BadInput(f"upstream {self.url}: a client certificate needs its key, and a key its certificate")
        if self.token and not self.secure and not address.is_loopback:
            raise BadInput(f"upstream {self.url}: a token would be sent in plain text; use grpcs://")
        self.read_token()
        self.read_tls()
        if find_spec("grpc") is None or find_spec("google.protobuf") is None:
            raise BadInput("an upstream needs packages that aren't installed here: pip install 'casfs[serve]'")

    @property
    def _parts(self) -> tuple[str, str, str, str]:
        match = _URL.fullmatch(self.url)
        if match is None or not 0 < int(match[3] or 1) < 65536:
            raise BadInput(f"upstream {self.url!r}: write grpc://HOST[:PORT][/INSTANCE], or grpcs:// for TLS")
        return match[1], match[2], match[3] or "", match[4] or ""

    @property
    def secure(self) -> bool:
        """Whether it is spoken to over TLS."""
        return self._parts[0] == "grpcs"

    @property
    def address(self) -> Address:
        """Host and port. Raises BadInput."""
        scheme, host, port, _ = self._parts
        return Address(host.strip("[]"), int(port or _PORTS[scheme]))

    @property
    def instance(self) -> str:
        """The instance's name, perhaps empty. Raises BadInput."""
        from tools.reapi.resource_names import check_instance

        try:
            return check_instance(self._parts[3].removesuffix("/"))
        except BadName as error:
            raise BadInput(f"upstream {self.url}: {error}") from error

    def read_token(self) -> str:
        """The token, empty where there is none. Raises BadInput."""
        if self.token is None:
            return ""
        token = self._read(self.token).decode("ascii", "replace").strip()
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise BadInput(f"{self.token} has to have one token in it, and nothing else")
        return token

    def read_tls(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """The authority, the key and the certificate, None for what isn't set. Raises BadInput."""
        authority, key, certificate = (
            None if file is None else self._read(file) for file in (self.tls_ca, self.tls_key, self.tls_certificate)
        )
        return authority, key, certificate

    @staticmethod
    def _read(file: str) -> bytes:
        try:
            return Path(file).read_bytes()
        except OSError as error:
            raise BadInput(f"can't read {file}: {error.strerror}") from error


def dump_upstream(upstream: UpstreamOptions | None) -> str:
    """As a text, empty for none."""
    if upstream is None:
        return ""
    return json.dumps({name: getattr(upstream, name) for name in UpstreamOptions.__slots__}, sort_keys=True)


def load_upstream(text: str) -> UpstreamOptions | None:
    """The inverse of `dump_upstream`."""
    return UpstreamOptions(**json.loads(text)) if text else None
