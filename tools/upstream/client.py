"""What an upstream is asked, as a client of the Remote Execution API: blobs, trees, action results.

Every question goes through a `Patience`: it is retried, or not asked at all
while the upstream is passed over. Threads may share a `Client`. Make it after a
fork.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import Message

from store.digest import Digest, DigestFunction
from store.errors import BadDigest, CorruptBlob, StoreError
from store.sources import Stream
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.methods import Method
from tools.reapi.resource_names import Compression, ResourceName
from tools.server.compression import compress, compress_stream, expand
from tools.server.errors import InvalidArgument
from tools.server.requests import read_digest, write_digest
from tools.upstream.channel import Channel
from tools.upstream.downloads import Download
from tools.upstream.errors import NotThere, Refused, UpstreamError
from tools.upstream.options import UpstreamOptions
from tools.upstream.patience import Patience

T = TypeVar("T")

_BATCH_BYTES_MOST = (4 << 20) - 1024
_ITEM_BYTES = 256
"""What a blob in a batch takes beside its bytes, at most."""
_SMALL_BYTES = 1 << 20
"""Larger blobs would fill a batch by themselves."""
_FIND_MOST = 4_000
"""Digests in one FindMissingBlobs: less than half a megabyte."""
_PIECE = 1 << 20
_RESULT_SECONDS = 10.0
"""For an action's result, which a client waits for before it can do anything."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a server says it can do; as it is here if it doesn't say."""

    functions: frozenset[DigestFunction] = frozenset((DigestFunction.SHA256,))
    batch_bytes: int = _BATCH_BYTES_MOST
    zstd: bool = False
    zstd_updates: bool = False
    """zstd is taken in BatchUpdateBlobs, too."""
    results_update: bool = True


class Client:
    """A client of one upstream, which connects when it is first asked something."""

    def __init__(self, options: UpstreamOptions, timeout: float) -> None:
        """`timeout`: seconds that whoever asks has, or without progress in what is large. Raises BadInput."""
        self.label = options.url
        self.patience = Patience(timeout)
        self.channel = Channel(options)
        self.instance = options.instance
        self._silence = self.patience.call_seconds
        self._lock = threading.Lock()
        self._abilities: Abilities | None = None

    # What it can do.

    def abilities(self) -> Abilities:
        """Asked once, as soon as it answers; everybody waits for that. Raises UpstreamError."""
        with self._lock:
            if self._abilities is None:
                request = reapi.GetCapabilitiesRequest(instance_name=self.instance)
                try:
                    self._abilities = _read_abilities(self._call(methods.GET_CAPABILITIES, request))
                except Refused as error:
                    if error.code != "UNIMPLEMENTED":
                        raise
                    self._abilities = Abilities()
            return self._abilities

    def knows(self, function: DigestFunction) -> bool:
        """Whether blobs of that function can be there. Raises UpstreamError."""
        return function in self.abilities().functions

    def is_small(self, digest: Digest) -> bool:
        """Whether it goes with others in one message. Raises UpstreamError."""
        return digest.size <= min(self.abilities().batch_bytes - _ITEM_BYTES, _SMALL_BYTES)

    # Blobs.

    def find_missing(self, digests: Sequence[Digest]) -> list[Digest]:
        """Those that are not there, of one digest function; the others live longer. Raises UpstreamError."""
        if not digests or not self.knows(digests[0].function):
            return list(digests)
        missing: set[tuple[str, int]] = set()
        for at in range(0, len(digests), _FIND_MOST):
            request = reapi.FindMissingBlobsRequest(
                instance_name=self.instance,
                blob_digests=map(write_digest, digests[at : at + _FIND_MOST]),
                digest_function=_number(digests[0].function),
            )
            answer = self._call(methods.FIND_MISSING_BLOBS, request)
            missing.update((found.hash, found.size_bytes) for found in answer.missing_blob_digests)
        return [digest for digest in digests if (digest.hex, digest.size) in missing]

    def read_batch(self, digests: Sequence[Digest]) -> Mapping[Digest, bytes | StoreError]:
        """Small blobs, or why one didn't come; what isn't there is left out. In as few calls as they fit into."""
        found: dict[Digest, bytes | StoreError] = {}
        for batch in self._batches(digests):
            function = batch[0].function
            request = reapi.BatchReadBlobsRequest(
                instance_name=self.instance,
                digests=map(write_digest, batch),
                digest_function=_number(function),
                acceptable_compressors=[reapi.Compressor.ZSTD] if self.abilities().zstd else [],
            )
            for item in self._call(methods.BATCH_READ_BLOBS, request).responses:
                try:
                    digest = read_digest(item.digest, function)
                except BadDigest:
                    continue
                if item.status.code != 5:  # NOT_FOUND
                    found[digest] = _content(item, digest)
        return found

    def open_stream(self, digest: Digest) -> Stream:
        """A blob of any size. Raises NotThere, UpstreamError."""
        compression = Compression.ZSTD if self.abilities().zstd else Compression.IDENTITY
        name = str(ResourceName(self.instance, digest, compression))

        def begin(offset: int) -> Iterator[bytes]:
            request = bytestream.ReadRequest(resource_name=name, read_offset=offset)
            with closing(self.channel.read(methods.READ, request, self._silence)) as responses:
                yield from (response.data for response in responses)

        return Download(digest, begin, self.patience, compressed=compression is Compression.ZSTD)

    def write_batch(self, blobs: Sequence[tuple[Digest, bytes]]) -> list[Digest]:
        """Add small blobs; those that were refused. Raises UpstreamError."""
        contents = dict(blobs)
        refused: list[Digest] = []
        for batch in self._batches(list(contents)):
            compressor = reapi.Compressor.ZSTD if self.abilities().zstd_updates else reapi.Compressor.IDENTITY
            request = reapi.BatchUpdateBlobsRequest(
                instance_name=self.instance, digest_function=_number(batch[0].function)
            )
            for digest in batch:
                data = contents[digest]
                request.requests.add(
                    digest=write_digest(digest),
                    data=compress(data) if compressor else data,
                    compressor=compressor,
                )
            taken = {
                item.digest.hash
                for item in self._call(methods.BATCH_UPDATE_BLOBS, request).responses
                if not item.status.code
            }
            refused += [digest for digest in batch if digest.hex not in taken]
        return refused

    def write_stream(self, digest: Digest, open_: Callable[[], Iterable[bytes]]) -> None:
        """Add a blob of any size; `open_` gives its bytes, again for each attempt. Raises UpstreamError."""
        compression = Compression.ZSTD if self.abilities().zstd else Compression.IDENTITY

        def attempt(seconds: float) -> None:
            name = str(ResourceName(self.instance, digest, compression, str(uuid.uuid4())))
            pieces = open_() if compression is Compression.IDENTITY else compress_stream(open_(), digest.size)
            self.channel.write(methods.WRITE, write_requests(name, pieces), self._silence)

        self.patience.run(attempt)

    def _batches(self, digests: Iterable[Digest]) -> Iterator[list[Digest]]:
        """Those of functions that it knows, of one function each, as many as one message takes."""
        most = min(self.abilities().batch_bytes, _BATCH_BYTES_MOST)
        for function in self.abilities().functions:
            batch: list[Digest] = []
            size = 0
            for digest in digests:
                if digest.function is not function:
                    continue
                if batch and size + digest.size + _ITEM_BYTES > most:
                    yield batch
                    batch, size = [], 0
                batch.append(digest)
                size += digest.size + _ITEM_BYTES
            if batch:
                yield batch

    # Trees and results.

    def read_tree(self, root: Digest) -> Iterator[bytes]:
        """The Directory messages of a tree, as far as the server sends them. Raises UpstreamError."""
        token = ""
        while True:
            request = reapi.GetTreeRequest(
                instance_name=self.instance,
                root_digest=write_digest(root),
                digest_function=_number(root.function),
                page_token=token,
            )
            token = ""
            for page in self.channel.read(methods.GET_TREE, request, self._silence):
                token = page.next_page_token
                yield from (directory.SerializeToString(deterministic=True) for directory in page.directories)
            # A stream may end early and say where to go on.
            if not token or token == request.page_token:
                return

    def find_result(self, action: Digest, instance: str) -> reapi.ActionResult | None:
        """The result of an action in an instance below ours, or None. Raises UpstreamError."""
        if not self.knows(action.function):
            return None
        request = reapi.GetActionResultRequest(
            instance_name=self._below(instance),
            action_digest=write_digest(action),
            digest_function=_number(action.function),
        )
        try:
            result: reapi.ActionResult = self._call(methods.GET_ACTION_RESULT, request, _RESULT_SECONDS)
        except NotThere:
            return None
        return result

    def write_result(self, action: Digest, instance: str, result: reapi.ActionResult) -> None:
        """Store a result. Raises UpstreamError."""
        request = reapi.UpdateActionResultRequest(
            instance_name=self._below(instance),
            action_digest=write_digest(action),
            action_result=result,
            digest_function=_number(action.function),
        )
        self._call(methods.UPDATE_ACTION_RESULT, request)

    def _below(self, instance: str) -> str:
        return "/".join(filter(None, (self.instance, instance)))

    def _call(self, method: Method, request: Message, seconds: float = 0.0) -> Any:
        return self.patience.run(lambda left: self.channel.call(method, request, left), seconds)

    def statistics(self) -> dict[str, int]:
        """Calls by method, and how often it was passed over."""
        return {**self.channel.calls, "passed_over": self.patience.passed_over}

    def close(self) -> None:
        """Break off what is under way."""
        self.channel.close()


def write_requests(name: str, pieces: Iterable[bytes], offset: int = 0) -> Iterator[bytestream.WriteRequest]:
    """The messages of a Write, which the last one finishes."""
    last = b""
    for piece in pieces:
        for at in range(0, len(piece), _PIECE):
            if last:
                yield bytestream.WriteRequest(resource_name=name, write_offset=offset, data=last)
                name, offset = "", offset + len(last)
            last = piece[at : at + _PIECE]
    yield bytestream.WriteRequest(resource_name=name, write_offset=offset, data=last, finish_write=True)


def _number(function: DigestFunction) -> reapi.DigestFunction.Value:
    return reapi.DigestFunction.Value.Name(function)  # type: ignore[return-value]


def _content(item: reapi.BatchReadBlobsResponse.Response, digest: Digest) -> bytes | StoreError:
    """What came as a blob."""
    if item.status.code:
        return UpstreamError(f"BatchReadBlobs: {item.status.message[:300]}")
    if item.compressor == reapi.Compressor.IDENTITY:
        return item.data
    try:
        return expand(item.data, digest.size)
    except InvalidArgument as error:
        return CorruptBlob(f"what came as {digest} can't be expanded: {error}")
    except StoreError as error:
        return error


def _read_abilities(message: reapi.ServerCapabilities) -> Abilities:
    cache = message.cache_capabilities
    known = frozenset(map(int, cache.digest_functions))
    functions = frozenset(function for function in DigestFunction if function in known)
    return Abilities(
        functions=functions if known else Abilities().functions,
        batch_bytes=cache.max_batch_total_size_bytes or _BATCH_BYTES_MOST,
        zstd=reapi.Compressor.ZSTD in cache.supported_compressors,
        zstd_updates=reapi.Compressor.ZSTD in cache.supported_batch_update_compressors,
        results_update=cache.action_cache_update_capabilities.update_enabled,
    )
