"""The ByteStream service: blobs of any size, read and written as streams.

A transport opens a `Reader` and sends what it reads; or it makes a `WriteCall`,
feeds it each message that comes until one is answered, and closes it, however
the call ended.
"""

from __future__ import annotations

from store.presence import Presence, WouldWait, as_name
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.resource_names import Compression, ResourceName, parse_read, parse_write
from tools.server.desk import Desk, Transfer
from tools.server.downloads import CompressedReader, Downloads, PlainReader, Reader
from tools.server.errors import InvalidArgument, OutOfRange
from tools.server.requests import Instances

_QUICK_BYTES = 64 << 10


class ByteStream:
    """Answers for one store."""

    def __init__(self, instances: Instances, presence: Presence, downloads: Downloads, desk: Desk) -> None:
        self._instances = instances
        self._presence = presence
        self._downloads = downloads
        self._desk = desk

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

    def begin_write(self, client: str) -> WriteCall:
        """A Write call of a client."""
        return WriteCall(self, client)

    def query_write_status(self, request: bytestream.QueryWriteStatusRequest) -> bytestream.QueryWriteStatusResponse:
        """Where the client may go on: all of it where the blob is here, nothing where it isn't known."""
        name = self.parse(request.resource_name)
        if self.is_here(name):
            return bytestream.QueryWriteStatusResponse(committed_size=name.digest.size, complete=True)
        return bytestream.QueryWriteStatusResponse(committed_size=self._desk.received(name))

    # For WriteCall.

    def parse(self, resource_name: str) -> ResourceName:
        """What a client writes, of an instance that is served. Raises InvalidArgument, BadName, BadDigest."""
        name = parse_write(resource_name)
        self._instances.check(name.instance)
        return name

    def is_here(self, name: ResourceName) -> bool:
        """Whether there is nothing left to write."""
        return not self._presence.find_absent((as_name(name.digest),))

    def open_transfer(self, client: str, name: ResourceName, offset: int) -> Transfer:
        """The upload, begun anew or where it broke off. Raises InvalidArgument, Exhausted, NoSpace."""
        parked = self._desk.resume(name)
        if parked is not None:
            if offset == parked.received:
                return parked
            if offset:
                self._desk.park(parked)
            else:
                self._desk.drop(parked)
        if offset:
            there = parked.received if parked is not None else 0
            raise InvalidArgument(f"a first write_offset of {offset}, where {there} bytes are here")
        return self._desk.begin(client, name)

    def complete(self, transfer: Transfer) -> None:
        """All was sent. Returns when the blob is durable."""
        self._desk.finish(transfer)
        self._presence.note([as_name(transfer.name.digest)])

    def drop(self, transfer: Transfer) -> None:
        """It went wrong."""
        self._desk.drop(transfer)

    def park(self, transfer: Transfer) -> None:
        """It broke off."""
        self._desk.park(transfer)


class WriteCall:
    """One Write call: messages in, at last an answer out. One thread at a time."""

    def __init__(self, service: ByteStream, client: str) -> None:
        self._service = service
        self._client = client
        self._resource_name = ""
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
                compressed = name.compression is not Compression.IDENTITY
                return bytestream.WriteResponse(committed_size=-1 if compressed else name.digest.size)
            self._transfer = self._service.open_transfer(self._client, name, request.write_offset)
        try:
            return self._take(self._transfer, request)
        except BaseException:
            transfer, self._transfer = self._transfer, None
            if transfer is not None:
                self._service.drop(transfer)
            raise

    def _take(self, transfer: Transfer, request: bytestream.WriteRequest) -> bytestream.WriteResponse | None:
        if request.resource_name not in ("", self._resource_name):
            raise InvalidArgument(f"{request.resource_name!r} in a stream that began with {self._resource_name!r}")
        if request.write_offset != transfer.received:
            raise InvalidArgument(f"a write_offset of {request.write_offset}, where {transfer.received} bytes came")
        transfer.write(request.data)
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
