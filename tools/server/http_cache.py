"""The HTTP cache as a service: blobs and results by name, in and out, with no transport.

**Blobs.** A path doesn't say by which function a hash is. Reading, both are
looked for; writing, both are reckoned, as nothing tells which it is before the
end. No bytes have a given hash by both.

**Results** are *opaque* unless `validate` is set: ccache and others keep under
``ac/`` what is no ActionResult. So they lie under instances of their own, which
no gRPC client can name ("blobs" is no part of an instance's name), and can't
be taken for results. With `validate` they are what `tools.server.actions`
has: a PUT needs an ActionResult, a GET is a hit if all blobs that it names are
here.

What comes in goes through *intakes*, one around the other: a bound, perhaps
zstd, then the store. One thread at a time uses an intake; all others are shared.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from store.action_cache import ActionCache, action_key
from store.digest import Digest, DigestFunction
from store.errors import DigestMismatch, MissingBlob
from store.presence import Presence, WouldWait, as_name
from store.quota import Reservation, Space
from store.uploads import Upload, Uploads
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.actions import ActionResults
from tools.server.compression import Expander
from tools.server.desk import Desk
from tools.server.downloads import Downloads, PlainReader
from tools.server.errors import NotAllowed, NotThere, TooLarge
from tools.server.http_names import CacheName, Kind
from tools.server.read_through import Actions
from tools.server.requests import Instances, write_digest

SMALL = 64 << 10
"""What is at most so large is read here; the rest is sent from its file."""
RESULT_BYTES_MOST = 16 << 20
"""Of a result that is validated: it is parsed in memory. As `--max-message` has it for gRPC."""


@dataclass(slots=True)
class Content:
    """What is found: bytes, or a descriptor to read them from, which `close` closes."""

    size: int
    etag: str
    """Empty for what may be replaced."""
    data: bytes = b""
    descriptor: int = -1

    def close(self) -> None:
        """Let go of the file; harmless when repeated."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Intake(Protocol):
    """Takes bytes; ends with `finish` or `discard`."""

    def write(self, data: bytes, /) -> None: ...

    def finish(self) -> None:
        """That was all; returns when it is kept."""
        ...

    def discard(self) -> None:
        """Forget it; harmless when repeated, but not after `finish`."""
        ...


class HttpCache:
    """Answers for one store."""

    def __init__(
        self,
        instances: Instances,
        presence: Presence,
        downloads: Downloads,
        uploads: Uploads,
        desk: Desk,
        service: Actions,
        results: ActionResults,
        actions: ActionCache,
        space: Space,
        *,
        validate: bool,
        most: int,
        reads_through: bool = False,
        find_seen: Callable[[bytes], Digest | None] = lambda hash_: None,
    ) -> None:
        """`most`: bytes that one upload may have, expanded. `reads_through`: results may come from an upstream.

        `find_seen` knows blobs there by their hash, as far as they were seen.
        """
        self._instances = instances
        self._presence = presence
        self._downloads = downloads
        self._uploads = uploads
        self._desk = desk
        self._service = service
        self._results = results
        self._actions = actions
        self._space = space
        self._reads_through = reads_through
        self._find_seen = find_seen
        self.validates = validate
        self._most = most

    def get(self, name: CacheName, *, may_wait: bool = True) -> Content:
        """What has that name. Raises NotThere, MissingBlob, BadName."""
        self._instances.check(name.instance)
        if name.kind is Kind.CAS:
            return self._get_blob(name.hash, may_wait)
        if self.validates:
            data = self._get_result(name, may_wait)
            return Content(len(data), "", data)
        return self._get_opaque(_opaque_key(name))

    def _get_blob(self, hash_: bytes, may_wait: bool) -> Content:
        digest = self._presence.find_hashed(hash_)
        if digest is None:
            digest = self._find_seen(hash_)
            if digest is None:
                raise MissingBlob(f"no blob {hash_.hex()}, by any function")
            if not may_wait:
                raise WouldWait
        open_ = self._downloads.open if may_wait else self._downloads.open_quick
        return _content(open_(digest), digest.size, digest.hex, may_wait)

    def _get_result(self, name: CacheName, may_wait: bool) -> bytes:
        if self._reads_through and not may_wait:
            raise WouldWait
        for action in _actions(name):
            request = reapi.GetActionResultRequest(
                instance_name=name.instance,
                action_digest=write_digest(action),
                digest_function=reapi.DigestFunction.Value.Name(action.function),
            )
            with suppress(NotThere):
                message = self._service.get(request, may_wait=may_wait)
                if self._reads_through and (found := self._results.find(action, name.instance)):
                    # A path doesn't say a blob's size, so none can be asked for by it: they come now, or never.
                    self._downloads.bring(found[1])
                return message
        raise NotThere(f"no result of action {name.hash.hex()}, or not all of its outputs")

    def _put_result(self, name: CacheName, message: bytes) -> None:
        """Store a result by the function by which all that it names can be had; by both where something isn't here yet.

        Bazel uploads a blob once: where two actions have an output in common, the result of one comes while what the
        other uploads is still on its way. It becomes a hit when all has come. Raises BadDigest.
        """
        result = reapi.ActionResult.FromString(message)
        actions = _actions(name)
        whole = [action for action in actions if self._results.names_what_can_be_had(action, name.instance, message)]
        for number, action in enumerate(whole[:1] or actions):
            # Only one of two goes to an upstream: that by the function that nearly all have.
            service = self._results if number else self._service
            service.update(
                reapi.UpdateActionResultRequest(
                    instance_name=name.instance,
                    action_digest=write_digest(action),
                    action_result=result,
                    digest_function=reapi.DigestFunction.Value.Name(action.function),
                )
            )

    def _get_opaque(self, key: bytes) -> Content:
        descriptor = self._actions.open(key)
        if descriptor is None:
            raise NotThere(f"nothing has the name {key[1:].hex()}")
        self._actions.touch(key, time.time())
        return _content(descriptor, os.fstat(descriptor).st_size, "", may_wait=True)

    def is_remembered(self, digest: Digest) -> bool:
        """Whether the blob was lately found here, or brought. Never waits."""
        return self._presence.remembers(as_name(digest))

    def read_whole(self, name: CacheName, data: bytes) -> Digest:
        """What a blob is, all of whose bytes came under a name. Raises DigestMismatch, TooLarge, BadName."""
        self._check(name, len(data))
        found = []
        for function in DigestFunction:
            digest = function.of(data)
            if digest.hash == name.hash:
                return digest
            found.append(digest)
        raise DigestMismatch(
            f"the bytes offered as {name.hash.hex()} are {' and '.join(map(str, found))}; nothing was stored"
        )

    def note(self, digest: Digest) -> None:
        """The blob has become durable."""
        self._presence.note([as_name(digest)])

    def begin_put(self, name: CacheName, size: int | None, *, compressed: bool) -> Intake:
        """Begin to take what shall have that name; `size`: of the body, if that is known.

        Raises TooLarge, NoSpace, BadName.
        """
        self._check(name, size)
        plain = 0 if compressed or size is None else size
        if name.kind is Kind.CAS:
            intake, most = self._begin_blob(name.hash, plain), self._most
        elif self.validates:
            intake, most = _Result(partial(self._put_result, name)), min(self._most, RESULT_BYTES_MOST)
        else:
            intake, most = self._begin_opaque(name, plain), self._most
        bounded = _Bounded(intake, most)
        return _Expanding(bounded) if compressed else bounded

    def _check(self, name: CacheName, size: int | None) -> None:
        self._instances.check(name.instance)
        if size is not None and size > self._most:
            raise TooLarge(f"{size} bytes: {self._most} are the most (--max-body)")

    def _begin_blob(self, hash_: bytes, size: int) -> Intake:
        there = self._presence.find_hashed(hash_)
        if there is not None and not self._presence.find_absent((as_name(there),)):
            return _Nothing()
        upload = self._desk.admit(lambda: self._uploads.begin_hashed(hash_, size))
        return _Blob(upload, self._presence)

    def _begin_opaque(self, name: CacheName, size: int) -> Intake:
        reservation = self._desk.admit(lambda: self._space.reserve(size))
        try:
            return _Opaque(self._actions, _opaque_key(name), reservation)
        except BaseException:
            reservation.release()
            raise

    def remove(self, name: CacheName) -> None:
        """Remove a result. Raises NotThere, and NotAllowed for a blob: others may need it."""
        self._instances.check(name.instance)
        if name.kind is Kind.CAS:
            raise NotAllowed("blobs aren't removed by clients", ("GET", "HEAD", "PUT"))
        if self.validates:
            # By either function: all of them are tried.
            removed = any([self._results.remove(action, name.instance) for action in _actions(name)])  # noqa: C419
        else:
            removed = self._actions.remove(_opaque_key(name))
        if not removed:
            raise NotThere(f"nothing has the name {name.hash.hex()}")


def _actions(name: CacheName) -> list[Digest]:
    """The actions that a path may mean."""
    return [Digest(function, name.hash, 0) for function in DigestFunction]


def _opaque_key(name: CacheName) -> bytes:
    # "blobs" is reserved, so no instance that is served can be called so.
    instance = f"blobs/opaque/{name.instance}"
    return action_key(Digest(DigestFunction.SHA256, name.hash, 0), instance)


def _content(descriptor: int, size: int, etag: str, may_wait: bool) -> Content:
    """Takes the descriptor over."""
    if size > SMALL:
        return Content(size, etag, descriptor=descriptor)
    with closing(PlainReader(descriptor, 0, size)) as reader:
        # In more than one piece where the page cache has only its beginning.
        return Content(size, etag, b"".join(iter(partial(reader.read, may_wait=may_wait), b"")))


class _Nothing:
    """For what is here already: whatever comes is as good."""

    def write(self, data: bytes, /) -> None:
        pass

    def finish(self) -> None:
        pass

    def discard(self) -> None:
        pass


class _Blob:
    """An upload whose blob counts as found when it is durable."""

    def __init__(self, upload: Upload, presence: Presence) -> None:
        self.write = upload.write
        self.discard = upload.discard
        self._upload = upload
        self._presence = presence

    def finish(self) -> None:
        self._presence.note([as_name(self._upload.finish())])


class _Opaque:
    """Something under ``ac/``, streamed to disk, with space reserved as it grows."""

    def __init__(self, actions: ActionCache, key: bytes, reservation: Reservation) -> None:
        self._writer = actions.begin(key)
        self._reservation = reservation

    def write(self, data: bytes) -> None:
        self._reservation.cover(self._writer.size + len(data))
        self._writer.write(data)

    def finish(self) -> None:
        try:
            self._writer.finish()
        finally:
            self.discard()

    def discard(self) -> None:
        self._writer.discard()
        self._reservation.release()


class _Result:
    """An ActionResult, in memory until it is whole."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        self._put = put
        self._data = bytearray()

    def write(self, data: bytes, /) -> None:
        self._data += data

    def finish(self) -> None:
        self._put(bytes(self._data))

    def discard(self) -> None:
        self._data.clear()


class _Bounded:
    """Lets so many bytes through."""

    def __init__(self, intake: Intake, most: int) -> None:
        self._intake = intake
        self._left = self._most = most
        self.finish = intake.finish
        self.discard = intake.discard

    def write(self, data: bytes, /) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise TooLarge(f"there are over {self._most} bytes, which are the most")
        self._intake.write(data)


class _Expanding:
    """Expands zstd."""

    def __init__(self, intake: Intake) -> None:
        self.write = Expander(intake).write
        self.finish = intake.finish
        self.discard = intake.discard
