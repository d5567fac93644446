"""The ActionCache service: results of actions, and only whole ones.

A result is a hit if every blob it names is here: outputs, the trees of output
directories and all in them, what was printed. All are touched then, and the
result before them. What was found whole is believed for a few seconds, as long
as casfs removes nothing (`Presence.generation`): a build asks for the same
results from many clients.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from store.action_cache import ActionCache, action_key
from store.digest import Digest, DigestFunction
from store.errors import BadInput, MissingBlob
from store.presence import Finder, Name, WouldWait
from store.quota import Space
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.downloads import Downloads
from tools.server.errors import InvalidArgument, NotThere
from tools.server.requests import Instances, get_function, read_digest

_BELIEVE_SECONDS = 5.0
_BELIEVE_MOST = 20_000
_BELIEVE_BYTES_MOST = 16 << 20
_QUICK_BYTES = 256 << 10
"""Of a result that is taken apart in the loop: it names thousands of blobs, and takes some tens of ms."""
_INLINE_MOST = 1 << 20
"""Bytes that are inlined into one result: it has to fit into a message."""
_TREE_MOST = 256 << 20
"""Of one Tree message: it is read into memory."""


@dataclass(frozen=True, slots=True)
class _Whole:
    """A result that was found whole: the message as it is stored, until when and in which generation that holds."""

    message: bytes
    until: float
    generation: int


class ActionResults:
    """Answers for one store."""

    def __init__(
        self, instances: Instances, actions: ActionCache, finder: Finder, downloads: Downloads, space: Space
    ) -> None:
        self._instances = instances
        self._actions = actions
        self._finder = finder
        self._downloads = downloads
        self._space = space
        self._whole: dict[bytes, _Whole] = {}
        self._whole_bytes = 0
        """Of the messages in it, and of those that were taken out since it was empty."""

    def get(self, request: reapi.GetActionResultRequest, *, may_wait: bool = True) -> bytes:
        """The ActionResult, serialized as it was stored. Raises NotThere."""
        key = self._key(request.instance_name, request.action_digest, request.digest_function)
        message = self._find_believed(key)
        if message is None and (message := self._actions.read(key)) is not None:
            message = self._believe_whole(key, message, may_wait)
        if message is None:
            raise NotThere(f"no result of action {request.action_digest.hash}, or not all of its outputs")
        if request.inline_stdout or request.inline_stderr or request.inline_output_files:
            return self._inline(message, request, key, may_wait)
        return message

    def adopt(self, request: reapi.GetActionResultRequest, result: reapi.ActionResult) -> bool:
        """Store a result that came from elsewhere, if all that it names can be had; whether it can. Raises NoSpace."""
        key = self._key(request.instance_name, request.action_digest, request.digest_function)
        message = result.SerializeToString()
        if self._find_names(key, message, may_wait=True) is None:
            return False
        self._write(key, message)
        return self._believe_whole(key, message, may_wait=True) is not None

    def find(self, action: Digest, instance: str) -> tuple[reapi.ActionResult, list[Name]] | None:
        """A result that is stored here and all blobs that it needs; None where there is none, or it can't be read."""
        key = action_key(action, instance)
        message = self._actions.read(key)
        names = None if message is None else self._all_names(key, message, may_wait=True)
        return None if message is None or names is None else (reapi.ActionResult.FromString(message), names)

    def update(self, request: reapi.UpdateActionResultRequest) -> bytes:
        """Store a result, and return it. Raises InvalidArgument, BadDigest, NoSpace."""
        if not request.HasField("action_result"):
            raise InvalidArgument("there is no action_result in the request")
        key = self._key(request.instance_name, request.action_digest, request.digest_function)
        for _ in _named_by(request.action_result, DigestFunction(key[0])):
            pass  # every digest can be one
        message = request.action_result.SerializeToString()
        self._write(key, message)
        return message

    def names_what_can_be_had(self, action: Digest, instance: str, message: bytes) -> bool:
        """Whether such a result of that action would be a hit."""
        return self._find_names(action_key(action, instance), message, may_wait=True) is not None

    def remove(self, action: Digest, instance: str) -> bool:
        """Remove a result; False where there was none."""
        key = action_key(action, instance)
        self._whole.pop(key, None)
        return self._actions.remove(key)

    def _write(self, key: bytes, message: bytes) -> None:
        with self._space.reserve(len(message)):
            self._actions.write(key, message)
        self._whole.pop(key, None)

    def _key(self, instance: str, action: reapi.Digest, function: int) -> bytes:
        self._instances.check(instance)
        return action_key(read_digest(action, get_function(function, [action.hash])), instance)

    def _find_believed(self, key: bytes) -> bytes | None:
        found = self._whole.get(key)
        if found is None or found.until < time.monotonic() or found.generation != self._finder.generation():
            return None
        return found.message

    def _believe_whole(self, key: bytes, message: bytes, may_wait: bool) -> bytes | None:
        """The result itself, if all that it names can be had; it and its blobs count as used now."""
        began, generation = time.time(), self._finder.generation()
        if self._find_names(key, message, may_wait) is None:
            return None
        # With the time before its blobs', so that a collection takes the result first.
        self._actions.touch(key, began)
        if len(self._whole) >= _BELIEVE_MOST or self._whole_bytes >= _BELIEVE_BYTES_MOST:
            self._whole.clear()
            self._whole_bytes = 0
        self._whole_bytes += len(message)
        self._whole[key] = _Whole(message, time.monotonic() + _BELIEVE_SECONDS, generation)
        return message

    def _find_names(self, key: bytes, message: bytes, may_wait: bool) -> list[Name] | None:
        """The blobs that a result needs, if all of them can be had."""
        names = self._all_names(key, message, may_wait)
        return None if names is None or self._finder.find_absent(names, may_wait=may_wait) else names

    def _all_names(self, key: bytes, message: bytes, may_wait: bool) -> list[Name] | None:
        if len(message) > _QUICK_BYTES and not may_wait:
            raise WouldWait
        try:
            result = reapi.ActionResult.FromString(message)
            return list(self._all_named_by(result, DigestFunction(key[0]), may_wait))
        except (DecodeError, BadInput, MissingBlob):
            # Not from a client of ours, or a Tree is gone.
            return None

    def _all_named_by(self, result: reapi.ActionResult, function: DigestFunction, may_wait: bool) -> Iterator[Name]:
        """Every blob that a result needs, those in its trees included."""
        yield from _named_by(result, function)
        if result.output_directories and not may_wait:
            raise WouldWait
        for directory in result.output_directories:
            if directory.HasField("tree_digest"):
                yield from self._in_tree(read_digest(directory.tree_digest, function))
            if directory.HasField("root_directory_digest"):
                yield from self._below(read_digest(directory.root_directory_digest, function))

    def _in_tree(self, digest: Digest) -> Iterator[Name]:
        """The files of a Tree. Its directories needn't be blobs of their own."""
        if digest.size > _TREE_MOST:
            raise BadInput(f"{digest} is too large for a Tree message")
        tree = reapi.Tree.FromString(self._downloads.read(digest))
        for directory in (tree.root, *tree.children):
            yield from _files_of(directory, digest.function)

    def _below(self, root: Digest) -> Iterator[Name]:
        """The files and directories of a tree of Directory messages."""
        pending, seen = [root], {root}
        while pending:
            digest = pending.pop()
            if digest.size > _TREE_MOST:
                raise BadInput(f"{digest} is too large for a Directory message")
            directory = reapi.Directory.FromString(self._downloads.read(digest))
            yield from _files_of(directory, digest.function)
            for node in directory.directories:
                child = read_digest(node.digest, digest.function)
                if child not in seen:
                    seen.add(child)
                    pending.append(child)

    def _inline(self, message: bytes, request: reapi.GetActionResultRequest, key: bytes, may_wait: bool) -> bytes:
        """The result with what the client would fetch next; what is large or just gone is left to it."""
        if len(message) > _QUICK_BYTES and not may_wait:
            raise WouldWait
        result = reapi.ActionResult.FromString(message)
        function = DigestFunction(key[0])
        wanted = set(request.inline_output_files)
        left = _INLINE_MOST

        def contents(digest: reapi.Digest) -> bytes:
            nonlocal left
            if not 0 < digest.size_bytes <= left:
                return b""
            if not may_wait:
                raise WouldWait
            left -= digest.size_bytes
            try:
                return self._downloads.read(read_digest(digest, function))
            except MissingBlob:
                return b""

        if request.inline_stdout and not result.stdout_raw:
            result.stdout_raw = contents(result.stdout_digest)
        if request.inline_stderr and not result.stderr_raw:
            result.stderr_raw = contents(result.stderr_digest)
        for file in result.output_files:
            if file.path in wanted and not file.contents:
                file.contents = contents(file.digest)
        return result.SerializeToString()


def _named_by(result: reapi.ActionResult, function: DigestFunction) -> Iterator[Name]:
    """The blobs that a result names itself. Raises BadDigest."""
    digests: list[reapi.Digest] = [file.digest for file in result.output_files]
    for directory in result.output_directories:
        if directory.HasField("tree_digest"):
            digests.append(directory.tree_digest)
        if directory.HasField("root_directory_digest"):
            digests.append(directory.root_directory_digest)
    if result.HasField("stdout_digest"):
        digests.append(result.stdout_digest)
    if result.HasField("stderr_digest"):
        digests.append(result.stderr_digest)
    return _names(digests, function)


def _files_of(directory: reapi.Directory, function: DigestFunction) -> Iterator[Name]:
    return _names((file.digest for file in directory.files), function)


def _names(digests: Iterable[reapi.Digest], function: DigestFunction) -> Iterator[Name]:
    for digest in digests:
        read_digest(digest, function)
        yield function, digest.hash, digest.size_bytes
