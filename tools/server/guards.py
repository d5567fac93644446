"""Who is let in: rights and certificates of a server, which can be read from their files again."""

from __future__ import annotations

from pathlib import Path

from store.errors import BadInput
from tools.server.access import Access, Anybody, ReadOnly, Right, load_tokens
from tools.server.notify import READY, notify, reloading
from tools.server.status import log
from tools.server.tls import Certificates, TlsFiles


class Guards:
    """An `Access` to be asked before each call, and the certificates for new connections."""

    def __init__(self, tokens: Path | None, tls: TlsFiles | None, *, read_only: bool) -> None:
        """Raises BadInput."""
        self._tokens = tokens
        self._read_only = read_only
        self._access = self._load()
        self.certificates = None if tls is None else Certificates(tls)

    def _load(self) -> Access:
        access: Access = Anybody() if self._tokens is None else load_tokens(self._tokens)
        return ReadOnly(access) if self._read_only else access

    def check(self, authorization: str | None, right: Right) -> None:
        """As `Access` has it."""
        self._access.check(authorization, right)

    def reload(self) -> None:
        """Read the files again; what can't be used is logged, and all stays as it was."""
        notify(reloading())
        try:
            access = self._load()
            if self.certificates is not None:
                self.certificates.reload()
            self._access = access
            log.info("read tokens and certificates again")
        except BadInput as error:
            log.error("tokens and certificates stay as they were: %s", error)
        notify(READY)
