"""What the requests of all services have in common: an instance, a digest function, digests."""

from __future__ import annotations

from collections.abc import Iterable

from store.digest import Digest, DigestFunction
from store.presence import Name, as_digest
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.resource_names import check_instance
from tools.server.errors import InvalidArgument

_FUNCTIONS = {int(function): function for function in DigestFunction}


class Instances:
    """Which instances are served. The CAS is one for all of them; each has action results of its own."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        """Without names every instance is served, and begins with its first result."""
        self._names = frozenset(map(check_instance, names))

    def check(self, name: str) -> str:
        """The name itself. Raises InvalidArgument for one that isn't served, BadName for one that can't be."""
        if self._names and name not in self._names:
            known = ", ".join(repr(known) for known in sorted(self._names))
            raise InvalidArgument(f"there is no instance {name[:80]!r} here, only {known}")
        return check_instance(name)


def get_function(value: int, hashes: Iterable[str]) -> DigestFunction:
    """The function a request means: what it says, or else what the length of a hash allows. Raises InvalidArgument."""
    if value:
        function = _FUNCTIONS.get(value)
        if function is None:
            known = ", ".join(function.name for function in DigestFunction)
            raise InvalidArgument(f"digest function {value} isn't served here: there are {known}")
        return function
    # Only functions older than REAPI 2.3 may be left out; of ours that is this one.
    first = next(iter(hashes), "")
    if first and len(first) != 64:
        raise InvalidArgument(f"a hash of {len(first)} digits: without digest_function it is a SHA-256, of 64")
    return DigestFunction.SHA256


def read_digest(message: reapi.Digest, function: DigestFunction) -> Digest:
    """A digest off the wire. Raises BadDigest."""
    return as_digest((function, message.hash, message.size_bytes))


def write_digest(digest: Digest) -> reapi.Digest:
    """A digest for the wire."""
    return reapi.Digest(hash=digest.hex, size_bytes=digest.size)


def read_names(messages: Iterable[reapi.Digest], function: DigestFunction) -> list[Name]:
    """Digests as `store.presence` takes them: not parsed yet, as most never have to be."""
    return [(function, message.hash, message.size_bytes) for message in messages]
