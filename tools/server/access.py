"""Who may do what: bearer tokens with rights to read or to write, and servers that write for nobody."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Protocol

from store.errors import BadInput
from tools.reapi import methods
from tools.reapi.methods import Method
from tools.server.errors import PermissionDenied, Unauthenticated


class Right(Enum):
    """What a method needs. Who may write may read."""

    READ = "read"
    WRITE = "write"


_WRITING = frozenset(
    (
        methods.UPDATE_ACTION_RESULT,
        methods.BATCH_UPDATE_BLOBS,
        methods.SPLICE_BLOB,
        methods.WRITE,
        methods.EXECUTE,
        methods.CANCEL_OPERATION,
    )
)


def right_for(method: Method) -> Right:
    """What a method needs."""
    return Right.WRITE if method in _WRITING else Right.READ


class Access(Protocol):
    """Asked before each call."""

    def check(self, authorization: str | None, right: Right) -> None:
        """`authorization` as in the header of that name. Raises Unauthenticated or PermissionDenied."""
        ...


class Anybody:
    """Everybody may do everything."""

    def check(self, authorization: str | None, right: Right) -> None:
        """Always."""


class ReadOnly:
    """Nobody may write; who may read is another's matter."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def check(self, authorization: str | None, right: Right) -> None:
        """Refuse what writes."""
        self._access.check(authorization, right)
        if right is Right.WRITE:
            raise PermissionDenied("this server is read-only")


class Tokens:
    """Who brings a known token has its right."""

    def __init__(self, rights: Mapping[str, Right]) -> None:
        # Looked up by hash: how long that takes says nothing of how near a guess was.
        self._rights = {_hash(token): right for token, right in rights.items()}

    def check(self, authorization: str | None, right: Right) -> None:
        """Find the token's right."""
        token = _find_token(authorization or "")
        found = None if token is None else self._rights.get(_hash(token))
        if found is None:
            raise Unauthenticated("this server wants a token that it knows: as a bearer, or as a password")
        if right is Right.WRITE and found is not Right.WRITE:
            raise PermissionDenied("this token is for reading")


def _find_token(authorization: str) -> str | None:
    """The token of a header ``Bearer TOKEN``, or ``Basic``: there it is the password, of whatever user."""
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
        except ValueError:
            return None
    return None


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


_LINE = re.compile(r"(read|write)\s+(\S{8,})")


def load_tokens(path: Path) -> Tokens:
    """Read a file of tokens: lines ``read TOKEN`` or ``write TOKEN``, empty ones, and comments behind ``#``."""
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise BadInput(f"can't read the tokens in {path}: {why}") from error
    rights: dict[str, Right] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise BadInput(f"{path}, line {number}: write 'read TOKEN' or 'write TOKEN', of at least 8 characters")
        rights[match[2]] = Right(match[1])
    if not rights:
        raise BadInput(f"{path} has no token: nobody could use this server")
    return Tokens(rights)
