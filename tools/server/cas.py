"""The ContentAddressableStorage service: which blobs are here, small ones by the batch, whole trees.

Methods with `may_wait` can be tried first where nothing may wait, and raise
WouldWait then; the others write or read disks and are for a thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from google.protobuf.message import DecodeError

from store.digest import Digest, DigestFunction
from store.errors import MissingBlob, StoreError, StoreUnusable
from store.presence import Finder, Name, Presence, WouldWait, as_name
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.wire import read_find_missing, write_batch_read
from tools.server.capabilities import MAX_BATCH_BYTES
from tools.server.compression import compress, expand
from tools.server.downloads import PIECE, Downloads
from tools.server.errors import InvalidArgument, NotThere, ServeError, Unimplemented
from tools.server.requests import Instances, get_function, read_digest, read_names
from tools.server.status import as_status

_QUICK_BYTES = 1 << 20
_PAGE_DIRECTORIES = 1000
_PAGE_BYTES = 2 << 20
_DIRECTORY_BYTES_MOST = 64 << 20
"""Of one Directory message: it is read into memory."""


class Question(NamedTuple):
    """Blobs to be looked for. `spellings`: of each, as the request has it, or none."""

    names: list[Name]
    spellings: list[bytes]


@dataclass(slots=True)
class Batch:
    """What a BatchUpdateBlobsRequest brings: `blobs` by their places there, and why others are `refused`.

    `left`: those of them that aren't stored yet.
    """

    spellings: list[reapi.Digest]
    blobs: dict[int, tuple[Digest, bytes]] = field(default_factory=dict)
    refused: dict[int, Exception] = field(default_factory=dict)
    left: int = 0

    @property
    def digests(self) -> list[Digest]:
        """Of its blobs."""
        return [digest for digest, _ in self.blobs.values()]

    def settle(self, number: int, refused: Exception | None) -> bool:
        """That one is stored, or refused; whether it was the last."""
        if refused is not None:
            self.refused[number] = refused
        self.left -= 1
        return not self.left

    def answer(self) -> bytes:
        """A BatchUpdateBlobsResponse, with a status for each. What isn't refused is durable.

        Raises StoreUnusable if that is why nothing of it could be stored: clients
        try a call again that failed so, and few of them a blob of a batch.
        """
        refusals = list(self.refused.values())
        if (
            refusals
            and len(refusals) == len(self.spellings)
            and all(isinstance(one, StoreUnusable) for one in refusals)
        ):
            raise refusals[0]
        response = reapi.BatchUpdateBlobsResponse()
        for number, digest in enumerate(self.spellings):
            answer = response.responses.add(digest=digest)
            refused = self.refused.get(number)
            if refused is None:
                answer.status.SetInParent()
            else:
                answer.status.CopyFrom(as_status(refused))
        return response.SerializeToString()


class ContentAddressableStorage:
    """Answers for one store."""

    def __init__(self, instances: Instances, presence: Presence, finder: Finder, downloads: Downloads) -> None:
        """`finder` knows what can be had, `presence` what is here."""
        self._instances = instances
        self._presence = presence
        self._finder = finder
        self._downloads = downloads

    def read_question(self, raw: bytes) -> Question:
        """What a serialized FindMissingBlobsRequest asks, as far as it is new. Never waits.

        What was lately found here isn't even parsed: an action's inputs are
        asked for with each action that has them, and few of them are new.
        """
        asked = read_find_missing(raw)
        spellings: list[bytes] = []
        if asked is None:
            request = reapi.FindMissingBlobsRequest.FromString(raw)
            self._instances.check(request.instance_name)
            function = get_function(request.digest_function, (digest.hash for digest in request.blob_digests))
        else:
            self._instances.check(asked.instance)
            function = get_function(asked.function, ())
            spellings = self._presence.unknown(function, asked.digests)
            request = reapi.FindMissingBlobsRequest.FromString(b"".join(spellings))
        return Question(read_names(request.blob_digests, function), spellings)

    def find_missing(self, question: Question, *, may_wait: bool = True) -> bytes:
        """Those that are not here, each once, as a serialized message; the others count as used now."""
        names, spellings = question
        absent = self._finder.find_absent(names, may_wait=may_wait) if names else []
        if spellings:
            self._presence.learn(names, spellings)
        if not absent:
            return b""
        return reapi.FindMissingBlobsResponse(
            missing_blob_digests=[reapi.Digest(hash=hash_, size_bytes=size) for _, hash_, size in dict.fromkeys(absent)]
        ).SerializeToString()

    def read_batch(self, request: reapi.BatchUpdateBlobsRequest) -> Batch:
        """The blobs of a batch that are to be stored. Raises what is wrong with all of it.

        What was lately stored here, or found, isn't stored again: a batch comes
        anew when its client gave up waiting for it, and most of it is here by then.
        """
        self._instances.check(request.instance_name)
        function = get_function(request.digest_function, (item.digest.hash for item in request.requests))
        _check_total(sum(max(len(item.data), item.digest.size_bytes) for item in request.requests))
        batch = Batch([item.digest for item in request.requests])
        for number, item in enumerate(request.requests):
            try:
                digest = read_digest(item.digest, function)
                if not self._presence.remembers(as_name(digest)):
                    batch.blobs[number] = digest, _plain(item, digest)
            except (ServeError, StoreError) as error:
                batch.refused[number] = error
        batch.left = len(batch.blobs)
        return batch

    def note(self, digest: Digest) -> None:
        """The blob has become durable."""
        self._presence.note([as_name(digest)])

    def batch_read(self, request: reapi.BatchReadBlobsRequest, *, may_wait: bool = True) -> bytes:
        """Blobs, and a status for each: a BatchReadBlobsResponse, serialized."""
        self._instances.check(request.instance_name)
        function = get_function(request.digest_function, (digest.hash for digest in request.digests))
        names = read_names(request.digests, function)
        total = sum(size for _, _, size in names)
        _check_total(total)
        compressed = reapi.Compressor.ZSTD in request.acceptable_compressors
        if may_wait:
            return self._read_batch(request, function, compressed).SerializeToString()
        if compressed or total > _QUICK_BYTES or any(size > PIECE for _, _, size in names):
            raise WouldWait
        if self._finder.find_absent(names, may_wait=False):
            raise WouldWait
        contents = self._downloads.read_all_present(names)
        return write_batch_read((hash_, size, data) for (_, hash_, size), data in zip(names, contents, strict=True))

    def _read_batch(
        self, request: reapi.BatchReadBlobsRequest, function: DigestFunction, compressed: bool
    ) -> reapi.BatchReadBlobsResponse:
        self._downloads.bring(read_names(request.digests, function))
        response = reapi.BatchReadBlobsResponse()
        for message in request.digests:
            item = response.responses.add(digest=message)
            try:
                data = self._downloads.read(read_digest(message, function))
            except (ServeError, StoreError) as error:
                item.status.CopyFrom(as_status(error))
                continue
            if compressed and data:
                item.compressor = reapi.Compressor.ZSTD
                data = compress(data)
            item.data = data
        return response

    def get_tree(self, request: reapi.GetTreeRequest) -> Iterator[reapi.GetTreeResponse]:
        """The directories of a tree, each once, a page at a time; those that are missing are left out.

        Raises NotThere if the root is missing. A page's token is how many
        directories came before it: the order is always the same.
        """
        self._instances.check(request.instance_name)
        function = get_function(request.digest_function, [request.root_digest.hash])
        root = read_digest(request.root_digest, function)
        if not (request.page_token == "" or (request.page_token.isascii() and request.page_token.isdigit())):
            raise InvalidArgument(f"{request.page_token[:40]!r} is no page token of this server")
        skip = int(request.page_token or 0)
        most = request.page_size if 0 < request.page_size < _PAGE_DIRECTORIES else _PAGE_DIRECTORIES
        return self._pages(self._walk(root, self._read_directory(root)), skip, most)

    def _pages(self, directories: Iterator[reapi.Directory], skip: int, most: int) -> Iterator[reapi.GetTreeResponse]:
        page, size, sent = reapi.GetTreeResponse(), 0, 0
        for directory in directories:
            if sent < skip:
                sent += 1
                continue
            if len(page.directories) >= most or size >= _PAGE_BYTES:
                page.next_page_token = str(sent)
                yield page
                page, size = reapi.GetTreeResponse(), 0
            page.directories.append(directory)
            size += directory.ByteSize()
            sent += 1
        yield page

    def _walk(self, root: Digest, first: reapi.Directory) -> Iterator[reapi.Directory]:
        """Breadth first, parents before their children."""
        yield first
        seen, level = {root}, [first]
        while level:
            below: list[reapi.Directory] = []
            for directory in level:
                for node in directory.directories:
                    digest = read_digest(node.digest, root.function)
                    if digest in seen:
                        continue
                    seen.add(digest)
                    try:
                        child = self._read_directory(digest)
                    except (NotThere, MissingBlob):
                        continue
                    below.append(child)
                    yield child
            level = below

    def _read_directory(self, digest: Digest) -> reapi.Directory:
        if digest.size > _DIRECTORY_BYTES_MOST:
            raise InvalidArgument(f"{digest} is too large for a Directory message")
        try:
            return reapi.Directory.FromString(self._downloads.read(digest))
        except DecodeError as error:
            raise InvalidArgument(f"{digest} is no Directory message") from error

    def split(self, request: reapi.SplitBlobRequest) -> reapi.SplitBlobResponse:
        """Not offered."""
        raise Unimplemented("this server doesn't split blobs")

    def splice(self, request: reapi.SpliceBlobRequest) -> reapi.SpliceBlobResponse:
        """Not offered."""
        raise Unimplemented("this server doesn't splice blobs")


def _check_total(total: int) -> None:
    if total > MAX_BATCH_BYTES:
        raise InvalidArgument(
            f"{total} bytes of blobs in a batch: {MAX_BATCH_BYTES} are the most; larger ones go through ByteStream"
        )


def _plain(item: reapi.BatchUpdateBlobsRequest.Request, digest: Digest) -> bytes:
    if item.compressor == reapi.Compressor.IDENTITY:
        return item.data
    if item.compressor == reapi.Compressor.ZSTD:
        return expand(item.data, digest.size)
    raise InvalidArgument(f"compressor {item.compressor} isn't offered here: there are IDENTITY and ZSTD")
