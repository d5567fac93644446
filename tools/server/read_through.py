"""A server in front of an upstream: what isn't here may be there.

**Blobs** that only the upstream has count as present (`Reachable`): a client
that is told so needn't send them, and may not have them any more. Reading one
brings it in, as the upstream is a source of the store. While the upstream
doesn't answer, only what is here is present.

**Results** that aren't here, or not whole, are asked for there (`ActionsThrough`).
One is stored, and given to the client, if every blob that it names is here or
there; the blobs come when they are read.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Protocol

from store.digest import Digest, DigestFunction
from store.errors import StoreError
from store.presence import Finder, Name, WouldWait, as_digest
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.actions import ActionResults
from tools.server.errors import NotThere
from tools.server.requests import get_function, read_digest
from tools.upstream.errors import PassedOver
from tools.upstream.sources import Upstream

log = logging.getLogger("casfs.serve")
_REMEMBER_MOST = 100_000


class Actions(Protocol):
    """The ActionCache service, whoever answers in the end."""

    def get(self, request: reapi.GetActionResultRequest, *, may_wait: bool = True) -> bytes: ...
    def update(self, request: reapi.UpdateActionResultRequest) -> bytes: ...


class Reachable:
    """Knows which blobs are here or in the upstream. Implements `store.presence.Finder`.

    Threads share it: what they share is one dictionary, used by single operations.
    """

    def __init__(self, here: Finder, upstream: Upstream) -> None:
        self._here = here
        self._upstream = upstream
        self._seen: dict[bytes, Digest] = {}
        """What was found in the upstream, by its hash alone, as HTTP asks for it."""

    def find_absent(self, names: Collection[Name], *, may_wait: bool = True) -> list[Name]:
        """Those that are in neither."""
        absent = self._here.find_absent(names, may_wait=may_wait)
        if not absent:
            return absent
        if not may_wait:
            raise WouldWait
        for function in DigestFunction:
            asked = {as_digest(name): name for name in absent if name[0] is function}
            missing = self._ask(list(asked))
            found = {name for digest, name in asked.items() if digest not in missing}
            if len(self._seen) + len(found) > _REMEMBER_MOST:
                self._seen.clear()
            self._seen.update((digest.hash, digest) for digest in asked if digest not in missing)
            absent = [name for name in absent if name not in found]
        return absent

    def _ask(self, digests: list[Digest]) -> set[Digest]:
        try:
            return set(self._upstream.client().find_missing(digests)) if digests else set()
        except StoreError as error:
            _say(self._upstream, error, "missing blobs")
            return set(digests)

    def find_seen(self, hash_: bytes) -> Digest | None:
        """A blob of that hash that was found in the upstream before: it can only be asked for by its size, too."""
        return self._seen.get(hash_)

    def generation(self) -> int:
        """As of what is here."""
        return self._here.generation()


class Certain(Reachable):
    """The same for whoever has to know: an upstream that doesn't answer is an UpstreamError."""

    def _ask(self, digests: list[Digest]) -> set[Digest]:
        return set(self._upstream.client().find_missing(digests))


def _say(upstream: Upstream, error: StoreError, what: str) -> None:
    # While it is passed over, a line for each question would say nothing new.
    if not isinstance(error, PassedOver):
        log.warning("%s failed for %s: %s", upstream.options.url, what, error)


class ActionsThrough:
    """The ActionCache service with an upstream behind it."""

    def __init__(self, here: ActionResults, upstream: Upstream) -> None:
        """`here` has to find blobs by a `Reachable`."""
        self._here = here
        self._upstream = upstream

    def get(self, request: reapi.GetActionResultRequest, *, may_wait: bool = True) -> bytes:
        """The result from here or there. Raises NotThere."""
        try:
            return self._here.get(request, may_wait=may_wait)
        except NotThere:
            if not may_wait:
                raise WouldWait from None
            result = self._find(request)
            if result is None or not self._here.adopt(request, result):
                raise
        return self._here.get(request)

    def _find(self, request: reapi.GetActionResultRequest) -> reapi.ActionResult | None:
        function = get_function(request.digest_function, [request.action_digest.hash])
        action = read_digest(request.action_digest, function)
        try:
            return self._upstream.client().find_result(action, request.instance_name)
        except StoreError as error:
            _say(self._upstream, error, f"the result of {action}")
            return None

    def update(self, request: reapi.UpdateActionResultRequest) -> bytes:
        """Here."""
        return self._here.update(request)
