"""The ByteStream service: blobs of any size, read and written as streams.

A transport opens a `Reader` and sends what it reads; or it makes a `WriteCall`,
feeds it each message that comes until one is answered, and closes it, however
the call ended.
"""

from __future__ import annotations

import re

from store.digest import DigestFunction
from store.errors import DigestMismatch
from store.presence import Presence, WouldWait, as_name
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.resource_names import Compression, ResourceName, parse_read, parse_write
from tools.server.compression import expand
from tools.server.desk import Desk, Transfer
from tools.server.downloads import CompressedReader, Downloads, PlainReader, Reader
from tools.server.errors import InvalidArgument, OutOfRange, Overtaken
from tools.server.requests import Instances

_QUICK_BYTES = 64 << 10
_SMALL_READ = re.compile(rb"\n[\x48-\x7f](?:([\w./-]+)/)??blobs/(blake3/)?([0-9a-f]{64})/([1-9]\d{0,3})")
"""A ReadRequest of nothing but the name, of under 128 bytes, of a blob of under 10,000."""
_FIELD_HEAD = 2
_SLACK = 1 << 10
"""Bytes by which a small blob's zstd may be longer than what it makes."""


class ByteStream:
    """Answers for one store."""

    def __init__(self, instances: Instances, presence: Presence, downloads: Downloads, desk: Desk) -> None:
        self._instances = instances
        self._presence = presence
        self._downloads = downloads
        self._desk = desk

    def read_small(self, message: bytes) -> bytes | None:
        """The blob that a ReadRequest asks for, where that is all of a small one which is here, as it mostly is.

        None: ask `open_read`, which knows the rest. Raises WouldWait, InvalidArgument, BadName.
        """
        match = _SMALL_READ.fullmatch(message)
        if match is None or message[1] != len(message) - _FIELD_HEAD:
            return None
        instance, blake3, hash_, size = match.groups()
        self._instances.check(instance.decode() if instance else "")
        function = DigestFunction.BLAKE3 if blake3 else DigestFunction.SHA256
        return self._downloads.read_here((function, hash_.decode(), int(size)))

    def open_read(self, request: bytestream.ReadRequest, *, may_wait: bool = True) -> Reader:
        """What the client wants to read. Raises MissingBlob, OutOfRange, InvalidArgument, BadName."""
        name = parse_read(request.resource_name)
        self._instances.check(name.instance)
        offset, limit, size = request.read_offset, request.read_limit, name.digest.size
        if limit < 0:
            raise InvalidArgument(f"a read_limit of {limit}: it is a number of bytes, or 0 for all")
        compressed = name.compression is not Compression.IDENTITY
        if compressed and limit:
            raise InvalidArgument("a read_limit of what is compressed: it is read to its end")
        if not may_wait and (compressed or not size):
            raise WouldWait
        # A blob that isn't here is that, whatever the offset.
        open_ = self._downloads.open if may_wait else self._downloads.open_quick
        reader = PlainReader(open_(name.digest), offset, min(size, offset + limit) if limit else size)
        if not 0 <= offset <= size:
            reader.close()
            raise OutOfRange(f"offset {offset} of a blob of {size} bytes")
        return CompressedReader(reader, size - offset) if compressed else reader

    def begin_write(self) -> WriteCall:
        """A Write call."""
        return WriteCall(self)

    def status(self, name: ResourceName, *, is_here: bool) -> bytestream.QueryWriteStatusResponse:
        """Where the client may go on: all of it where the blob is here, nothing where it isn't known."""
        if is_here:
            return bytestream.QueryWriteStatusResponse(committed_size=name.digest.size, complete=True)
        return bytestream.QueryWriteStatusResponse(committed_size=self._desk.received(name))

    def is_remembered(self, name: ResourceName) -> bool:
        """Whether the blob was lately found here, or brought; the empty one always is. Never waits."""
        return name.digest.is_empty_blob or self._presence.remembers(as_name(name.digest))

    def forget(self, name: ResourceName) -> None:
        """What is parked of the upload isn't needed any more."""
        self._desk.forget(name)

    def note(self, name: ResourceName) -> None:
        """The blob has become durable."""
        self._presence.note([as_name(name.digest)])

    def whole_answer(self, name: ResourceName) -> bytestream.WriteResponse:
        """What is answered where the blob is here."""
        compressed = name.compression is not Compression.IDENTITY
        return bytestream.WriteResponse(committed_size=-1 if compressed else name.digest.size)

    # For WriteCall.

    def parse(self, resource_name: str) -> ResourceName:
        """What a client writes, of an instance that is served. Raises InvalidArgument, BadName, BadDigest."""
        name = parse_write(resource_name)
        self._instances.check(name.instance)
        return name

    def is_here(self, name: ResourceName, *, may_wait: bool = True) -> bool:
        """Whether there is nothing left to write. Raises WouldWait without `may_wait`."""
        return not self._presence.find_absent((as_name(name.digest),), may_wait=may_wait)

    def open_transfer(self, name: ResourceName, offset: int) -> Transfer:
        """The upload, begun anew or where it broke off. Raises Overtaken, NoSpace.

        More of it may be here than `offset`: a call that broke off still takes the message that it has, and its client
        may have asked how much is here before that.
        """
        parked = self._desk.resume(name)
        if parked is not None:
            if 0 < offset <= parked.received:
                return parked
            if offset:
                self._desk.park(parked)
            else:
                parked.upload.discard()
        if offset:
            there = parked.received if parked is not None else 0
            raise Overtaken(f"a first write_offset of {offset}, where {there} bytes are here")
        return self._desk.begin(name)

    def complete(self, transfer: Transfer) -> None:
        """All was sent. Returns when the blob is durable."""
        transfer.upload.finish()
        self._presence.note([as_name(transfer.name.digest)])

    def park(self, transfer: Transfer) -> None:
        """It broke off."""
        self._desk.park(transfer)


class SmallWrite:
    """A Write call of a blob that is gathered in memory. `finished`: all its messages came."""

    def __init__(self, name: ResourceName, first: bytestream.WriteRequest) -> None:
        self.name = name
        self.size = len(first.data)
        """Bytes that came."""
        self._resource_name = first.resource_name
        self._parts = [first.data]
        self.finished = first.finish_write

    @classmethod
    def begin(cls, name: ResourceName, first: bytestream.WriteRequest) -> SmallWrite | None:
        """None for one that goes on with what is here."""
        return None if first.write_offset else cls(name, first)

    def add(self, request: bytestream.WriteRequest) -> None:
        """Take the next message. Raises InvalidArgument."""
        _check_following(request, self._resource_name, self.size)
        if request.data:
            self._parts.append(request.data)
        self.size += len(request.data)
        self.finished = request.finish_write
        if not self.finished and self.size > self.name.digest.size + _SLACK:
            raise InvalidArgument(f"over {self.name.digest.size} bytes came, which {self.name.digest} has")

    def plain(self) -> bytes:
        """The blob's bytes. Raises DigestMismatch, InvalidArgument where they can't be that."""
        size = self.name.digest.size
        if self.name.compression is Compression.ZSTD:
            return expand(b"".join(self._parts), size)
        if self.size != size:
            raise DigestMismatch(f"{self.size} bytes came as {self.name.digest}; nothing was stored")
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)

    def answer(self) -> bytestream.WriteResponse:
        """What is answered when the blob is durable."""
        return bytestream.WriteResponse(committed_size=self.size)

    def so_far(self) -> bytestream.WriteRequest:
        """All that came, as one message."""
        return bytestream.WriteRequest(resource_name=self._resource_name, data=b"".join(self._parts))


def _check_following(request: bytestream.WriteRequest, first_name: str, received: int) -> None:
    if request.resource_name not in ("", first_name):
        raise InvalidArgument(f"{request.resource_name!r} in a stream that began with {first_name!r}")
    if request.write_offset != received:
        raise InvalidArgument(f"a write_offset of {request.write_offset}, where {received} bytes came")


class WriteCall:
    """One Write call: messages in, at last an answer out. One thread at a time."""

    def __init__(self, service: ByteStream) -> None:
        self._service = service
        self._resource_name = ""
        self._offset = 0
        """Where the next message begins."""
        self._transfer: Transfer | None = None
        self._answered = False

    def feed(self, request: bytestream.WriteRequest, *, may_wait: bool = True) -> bytestream.WriteResponse | None:
        """Take a message; the answer, once there is one: the rest of the stream doesn't matter then.

        Without `may_wait` raises WouldWait, having done nothing, where more than a few bytes are to be written.
        Raises what a client is to be told; the call is over then.
        """
        if not may_wait and (self._transfer is None or request.finish_write or len(request.data) > _QUICK_BYTES):
            raise WouldWait
        if self._transfer is None:
            name = self._service.parse(request.resource_name)
            self._resource_name = request.resource_name
            if self._service.is_here(name):
                self._answered = True
                return self._service.whole_answer(name)
            self._transfer = self._service.open_transfer(name, request.write_offset)
            self._offset = request.write_offset
        try:
            return self._take(self._transfer, request)
        except BaseException:
            transfer, self._transfer = self._transfer, None
            if transfer is not None:
                transfer.upload.discard()
            raise

    def _take(self, transfer: Transfer, request: bytestream.WriteRequest) -> bytestream.WriteResponse | None:
        _check_following(request, self._resource_name, self._offset)
        transfer.write(request.data[transfer.received - self._offset :])
        self._offset += len(request.data)
        if not request.finish_write:
            return None
        self._transfer = None
        self._service.complete(transfer)
        self._answered = True
        return bytestream.WriteResponse(committed_size=transfer.received)

    def end(self) -> bytestream.WriteResponse:
        """The client sends no more, and hasn't finished: says how much is here. Raises InvalidArgument for nothing."""
        if self._transfer is None:
            raise InvalidArgument("a stream without a message")
        return bytestream.WriteResponse(committed_size=self._transfer.received)

    def close(self) -> None:
        """The call is over: what isn't finished waits for its client."""
        if self._transfer is not None:
            transfer, self._transfer = self._transfer, None
            self._service.park(transfer)
