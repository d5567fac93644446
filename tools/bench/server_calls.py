"""The calls that clients of a remote cache make: what each is given, how the server is filled for it, what it moves."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from google.protobuf.message import Message

from store.action_cache import action_key
from store.digest import Digest, DigestFunction
from store.repository import Store
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.methods import Method
from tools.reapi.resource_names import ResourceName
from tools.server.downloads import PIECE
from tools.server.requests import write_digest

_SHA256 = DigestFunction.SHA256
_SMALL = 1024
_BATCH = 100
_MANY = 1000
_READ_SIZES = {"64 KiB": 64 << 10, "4 MiB": 4 << 20}
_WRITE_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Call:
    """One line of the table. `data`, for a number of calls, as `Generator.run` takes it.

    `mark` is what bazel-remote 2.x did with 32 in flight, where that was measured once, in calls a second.
    `bare`: the answer of a server that does nothing, and how often it is sent.
    """

    what: str
    method: Method
    data: Callable[[int], Sequence[Message] | str]
    calls: int
    mark: float
    bare: tuple[bytes, int]
    size: int = 0
    """Bytes of content that it moves."""


class Filled(NamedTuple):
    """What lies in the store for the calls."""

    small: list[Digest]
    large: dict[str, Digest]
    action: Digest
    result: bytes


def fill(store: Store, generator: random.Random) -> Filled:
    """Bring in what will be asked for."""
    with store.ingest() as ingest:
        small = [ingest.add_bytes(generator.randbytes(_SMALL), _SHA256) for _ in range(_MANY)]
        large = {name: ingest.add_bytes(generator.randbytes(size), _SHA256) for name, size in _READ_SIZES.items()}
    result = reapi.ActionResult(
        output_files=[
            reapi.OutputFile(path=f"bazel-out/k8-fastbuild/bin/some/package/output-{number}.o", digest=write_digest(d))
            for number, d in enumerate(small[:3])
        ],
        stdout_digest=write_digest(small[3]),
        stderr_digest=write_digest(small[4]),
    ).SerializeToString()
    action = _SHA256.of(b"an action")
    store.actions.write(action_key(action), result)
    return Filled(small, large, action, result)


def list_calls(filled: Filled, scale: int, generator: random.Random) -> list[Call]:
    """The calls, each made a number of times that grows with `scale`."""
    batch = [write_digest(digest) for digest in filled.small[:_BATCH]]
    return [
        Call(
            "GetActionResult",
            methods.GET_ACTION_RESULT,
            _same(reapi.GetActionResultRequest(action_digest=write_digest(filled.action))),
            100 * scale,
            25_000,
            (filled.result, 1),
        ),
        *(
            Call(
                f"FindMissingBlobs({count:,})",
                methods.FIND_MISSING_BLOBS,
                _same(reapi.FindMissingBlobsRequest(blob_digests=map(write_digest, filled.small[:count]))),
                calls,
                mark,
                (b"", 1),
            )
            for count, calls, mark in ((1, 100 * scale, 41_000), (_MANY, 20 * scale, 940))
        ),
        Call(
            "BatchReadBlobs, 100 of 1 KB",
            methods.BATCH_READ_BLOBS,
            _same(reapi.BatchReadBlobsRequest(digests=batch)),
            10 * scale,
            1250,
            (_batch_answer(batch, generator).SerializeToString(), 1),
            _BATCH * _SMALL,
        ),
        Call(
            "BatchUpdateBlobs, 100 new of 1 KB",
            methods.BATCH_UPDATE_BLOBS,
            lambda calls: [_new_batch(generator) for _ in range(calls)],
            4 * scale,
            108,
            (
                reapi.BatchUpdateBlobsResponse(
                    responses=[reapi.BatchUpdateBlobsResponse.Response(digest=digest) for digest in batch]
                ).SerializeToString(),
                1,
            ),
            _BATCH * _SMALL,
        ),
        *(
            _read_call(name, filled.large[name], calls, mark)
            for name, calls, mark in (("64 KiB", 40 * scale, 6600), ("4 MiB", 4 * scale, 207))
        ),
        *(
            _write_call(name, _READ_SIZES[name], calls, mark)
            for name, calls, mark in (("64 KiB", 10 * scale, 2400), ("4 MiB", 2 * scale, 64))
        ),
    ]


def _same(request: Message) -> Callable[[int], Sequence[Message]]:
    return lambda calls: [request]


def _new_batch(generator: random.Random) -> reapi.BatchUpdateBlobsRequest:
    blobs = [generator.randbytes(_SMALL) for _ in range(_BATCH)]
    return reapi.BatchUpdateBlobsRequest(
        requests=[
            reapi.BatchUpdateBlobsRequest.Request(digest=write_digest(_SHA256.of(blob)), data=blob) for blob in blobs
        ]
    )


def _batch_answer(batch: list[reapi.Digest], generator: random.Random) -> reapi.BatchReadBlobsResponse:
    return reapi.BatchReadBlobsResponse(
        responses=[
            reapi.BatchReadBlobsResponse.Response(digest=digest, data=generator.randbytes(_SMALL)) for digest in batch
        ]
    )


def _read_call(name: str, digest: Digest, calls: int, mark: float) -> Call:
    request = bytestream.ReadRequest(resource_name=str(ResourceName("", digest)))
    piece = min(digest.size, PIECE)
    answer = bytestream.ReadResponse(data=bytes(piece)).SerializeToString()
    return Call(f"Read {name}", methods.READ, _same(request), calls, mark, (answer, digest.size // piece), digest.size)


def _write_call(name: str, size: int, calls: int, mark: float) -> Call:
    """New bytes for each call, which the generator makes: a random name, over and over."""
    answer = bytestream.WriteResponse(committed_size=size).SerializeToString()
    template = _write_template(size)
    return Call(f"Write {name}", methods.WRITE, lambda calls: template, calls, mark, (answer, 1), size)


def _write_template(size: int) -> str:
    piece = min(size, _WRITE_PIECE)
    pieces = size // piece
    unit = '(printf "%s%s" $id $id | trunc 64)'
    head = f"{{{{$id := newUUID}}}}{{{{$piece := repeat {piece // 64} {unit}}}}}{{{{$blob := repeat {pieces} $piece}}}}"
    name = f'"resource_name":"uploads/{{{{$id}}}}/blobs/{{{{sha256sum $blob}}}}/{size}",'
    messages = [
        f'{{{name if number == 0 else ""}"write_offset":{number * piece},'
        f'"finish_write":{"true" if number == pieces - 1 else "false"},"data":"{{{{b64enc $piece}}}}"}}'
        for number in range(pieces)
    ]
    return f"{head}[{','.join(messages)}]"
