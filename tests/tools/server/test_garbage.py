"""Calls leave no cycles of references: the collector, which stops the loop, has nothing to look for."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest

from store.repository import Store
from tests.tools.server.conftest import SHA256, Client, refused, wait_for
from tests.tools.server.odd import serving
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.resource_names import ResourceName
from tools.server.grpc_counting import GrpcCounting
from tools.server.http2_call import GrpcCall
from tools.server.metrics import Metrics, Sizes
from tools.server.recent import Recent
from tools.server.requests import write_digest

CALLS = 20
ABSENT = reapi.Digest(hash="0" * 64, size_bytes=1)


@contextmanager
def saved_garbage() -> Iterator[list[object]]:
    """What only a search would free, once that was made. None is made meanwhile."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    found: list[object] = []
    try:
        yield found
        gc.collect()
        found += gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def count_calls() -> int:
    """Those that the server has not yet let go, of all in this process."""
    return sum(isinstance(one, GrpcCall) for one in gc.get_objects())


def query(client: Client, number: int) -> None:
    client.query(ResourceName("", SHA256.of(b"%d" % number), upload=f"{number}"))


def write_small(client: Client, number: int) -> None:
    data = b"small %d" % number
    client.write(SHA256.of(data), data)


def write_large(client: Client, number: int) -> None:
    data = b"large %d" % number * 50_000
    client.write(SHA256.of(data), data)


def write_wrong(client: Client, number: int) -> None:
    assert refused(lambda: client.write(SHA256.of(b"right"), b"wrong")) == "INVALID_ARGUMENT"


def give_up_writing(client: Client, number: int) -> None:
    """Some of it comes, and then its deadline is over."""
    end = threading.Event()

    def messages() -> Iterator[bytestream.WriteRequest]:
        name = ResourceName("", SHA256.of(b"never whole"), upload=f"{number}")
        yield bytestream.WriteRequest(resource_name=str(name), data=b"never")
        end.wait(30)

    try:
        assert refused(lambda: client.call(methods.WRITE, messages(), timeout=0.2)) == "DEADLINE_EXCEEDED"
    finally:
        end.set()


def update(client: Client, number: int) -> None:
    item = reapi.BatchUpdateBlobsRequest.Request(digest=write_digest(SHA256.of(b"%d" % number)), data=b"%d" % number)
    client.call(methods.BATCH_UPDATE_BLOBS, reapi.BatchUpdateBlobsRequest(requests=[item]))


def read(client: Client, number: int) -> None:
    client.read(SHA256.of(b"present"))


def read_large(client: Client, number: int) -> None:
    client.read(SHA256.of(bytes(300_000)))


def read_absent(client: Client, number: int) -> None:
    assert refused(lambda: client.read(SHA256.of(b"absent"))) == "NOT_FOUND"


def find(client: Client, number: int) -> None:
    client.missing([SHA256.of(b"present"), SHA256.of(b"%d" % number)])


def read_batch(client: Client, number: int) -> None:
    wanted = [write_digest(SHA256.of(b"present")), ABSENT]
    client.call(methods.BATCH_READ_BLOBS, reapi.BatchReadBlobsRequest(digests=wanted))


def miss(client: Client, number: int) -> None:
    get = reapi.GetActionResultRequest(action_digest=ABSENT)
    assert refused(lambda: client.call(methods.GET_ACTION_RESULT, get)) == "NOT_FOUND"


def put_result(client: Client, number: int) -> None:
    action = SHA256.of(b"%d" % number)
    client.put_result(action, reapi.ActionResult(exit_code=1))
    client.result(action)


@pytest.mark.parametrize(
    "call",
    [
        query,
        write_small,
        write_large,
        write_wrong,
        give_up_writing,
        update,
        read,
        read_large,
        read_absent,
        find,
        read_batch,
        miss,
        put_result,
    ],
    ids=lambda call: str(call.__name__),
)
def test_a_call_leaves_no_garbage(store: Store, call: Callable[[Client, int], None]) -> None:
    metrics = Metrics(lambda: Sizes(0, 0))
    counting = GrpcCounting(metrics, Recent(metrics.lookups))
    with serving(store, wrap=counting.wrap) as url, closing(Client(url.removeprefix("grpc://"))) as client:
        client.add(b"present", bytes(300_000))
        call(client, 0)
        with saved_garbage() as garbage, ThreadPoolExecutor(1) as pool:
            # Other tests may have left some that something of theirs still refers to.
            before = count_calls()
            for number in range(1, CALLS + 1):
                pool.submit(call, client, number).result(60)
            wait_for(lambda: count_calls() <= before)
    ours = Counter(
        type(one).__qualname__ for one in garbage if type(one).__module__.startswith(("tools.server", "tools.http2"))
    )
    # What a call leaves, each does; what threads leave at their end, or a client, is another's.
    assert not [name for name, number in ours.items() if number >= CALLS], ours
