"""What clients of the Remote Execution API rely on, over a real channel to a real server."""

from __future__ import annotations

import random
import zlib
from functools import partial

import grpc
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from store.digest import Digest, DigestFunction
from tests.tools.server.conftest import BLAKE3, SHA256, Client, Server, code_of, connected, pieces, refused
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.methods import Method
from tools.reapi.resource_names import Compression, ResourceName
from tools.server.capabilities import MAX_BATCH_BYTES
from tools.server.requests import write_digest

ZSTD = Compression.ZSTD
FUNCTIONS = pytest.mark.parametrize("function", [SHA256, BLAKE3])
MIB = 1 << 20


def some_bytes(size: int, seed: int = 0) -> bytes:
    """Different for each seed, so that tests of one server don't meet each other's blobs."""
    return random.Random(f"{size} {seed}").randbytes(size)


def name_of(digest: Digest, compression: Compression = Compression.IDENTITY) -> ResourceName:
    return ResourceName("", digest, compression)


# Capabilities


def test_capabilities_say_what_old_and_new_clients_read(client: Client) -> None:
    found = client.call(methods.GET_CAPABILITIES, reapi.GetCapabilitiesRequest())
    cache, execution = found.cache_capabilities, found.execution_capabilities
    assert list(cache.digest_functions) == [reapi.DigestFunction.SHA256, reapi.DigestFunction.BLAKE3]
    assert execution.digest_function == reapi.DigestFunction.SHA256
    assert reapi.DigestFunction.BLAKE3 in execution.digest_functions
    assert cache.max_batch_total_size_bytes == 4 * MIB - 1024
    assert reapi.Compressor.ZSTD in cache.supported_compressors
    assert reapi.Compressor.ZSTD in cache.supported_batch_update_compressors
    assert cache.action_cache_update_capabilities.update_enabled
    assert (found.low_api_version.major, found.low_api_version.minor) == (2, 0)
    assert (found.high_api_version.major, found.high_api_version.minor) >= (2, 3)
    assert cache.cache_priority_capabilities.priorities[0].min_priority < 0
    assert not execution.exec_enabled


# Blobs of all sizes


@FUNCTIONS
@pytest.mark.parametrize("size", [0, 1, 64 << 10, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1])
@pytest.mark.parametrize("compression", list(Compression))
def test_a_blob_comes_back_as_it_went(
    client: Client, function: DigestFunction, size: int, compression: Compression
) -> None:
    data = some_bytes(size, compression)
    digest = function.of(data)
    sent = zstandard.compress(data) if compression is ZSTD else data
    committed = client.write(digest, sent, compression=compression)
    assert committed == (len(sent) if size else -1 if compression is ZSTD else 0)
    assert client.read(name_of(digest)) == data
    received = client.read(name_of(digest, ZSTD))
    assert zstandard.ZstdDecompressor().decompressobj().decompress(received) == data
    assert client.missing([digest], function) == []


@FUNCTIONS
def test_the_empty_blob_is_always_there(client: Client, function: DigestFunction) -> None:
    empty = function.of(b"")
    assert client.missing([empty], function) == []
    assert client.read(name_of(empty)) == b""
    answer = client.call(
        methods.BATCH_READ_BLOBS,
        reapi.BatchReadBlobsRequest(digests=[write_digest(empty)], digest_function=int(function)),  # type: ignore[arg-type]
    )
    assert (answer.responses[0].data, answer.responses[0].status.code) == (b"", 0)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_blob_of_5_gib_passes_through_without_being_held(shared: Server) -> None:
    piece, count = bytes(range(256)) * 4096, 5 * 1024
    hasher = SHA256.new()
    for _ in range(count):
        hasher.update(piece)
    digest = Digest(SHA256, hasher.digest(), count * len(piece))
    name = str(ResourceName("", digest, upload="large"))
    with connected(shared) as client:
        messages = (
            bytestream.WriteRequest(
                resource_name=name, write_offset=n * len(piece), data=piece, finish_write=n == count - 1
            )
            for n in range(count)
        )
        assert client.call(methods.WRITE, messages, timeout=600).committed_size == digest.size
        received = crc = 0
        for response in client.call(
            methods.READ, bytestream.ReadRequest(resource_name=str(name_of(digest))), timeout=600
        ):
            received += len(response.data)
            crc = zlib.crc32(response.data, crc)
        expected = 0
        for _ in range(count):
            expected = zlib.crc32(piece, expected)
        assert (received, crc) == (digest.size, expected)
    with open(f"/proc/{shared.process.pid}/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    assert peak < 400 << 10, "KiB of memory"


# Reading


@pytest.mark.parametrize(
    ("size", "messages"),
    [
        (1, [1]),
        (64 << 10, [64 << 10]),
        (65 << 10, [65 << 10]),
        (256 << 10, [256 << 10]),
        (257 << 10, [256 << 10, 1 << 10]),
    ],
)
def test_what_is_read_comes_in_pieces_and_the_last_is_a_small_one(
    client: Client, size: int, messages: list[int]
) -> None:
    data = random.Random(size).randbytes(size)
    client.write(SHA256.of(data), data)
    request = bytestream.ReadRequest(resource_name=str(name_of(SHA256.of(data))))
    received = [response.data for response in client.call(methods.READ, request)]
    assert b"".join(received) == data
    assert [len(piece) for piece in received] == messages


def test_a_read_begins_and_ends_where_it_is_told(client: Client) -> None:
    [digest] = client.add(b"0123456789")
    assert client.read(digest, offset=3) == b"3456789"
    assert client.read(digest, offset=3, limit=4) == b"3456"
    assert client.read(digest, limit=100) == b"0123456789"
    assert client.read(digest, offset=10) == b""
    compressed = client.read(name_of(digest, ZSTD), offset=3)
    assert zstandard.ZstdDecompressor().decompressobj().decompress(compressed) == b"3456789"


def test_a_read_is_refused_for_the_right_reason(client: Client) -> None:
    [digest] = client.add(b"0123456789")
    assert refused(lambda: client.read(SHA256.of(b"never written"))) == "NOT_FOUND"
    assert refused(lambda: client.read(digest._replace(size=11))) == "NOT_FOUND"
    assert refused(lambda: client.read(digest, offset=11)) == "OUT_OF_RANGE"
    assert refused(lambda: client.read(digest, offset=-1)) == "OUT_OF_RANGE"
    assert refused(lambda: client.read(digest, limit=-1)) == "INVALID_ARGUMENT"
    assert refused(lambda: client.read(name_of(digest, ZSTD), limit=1)) == "INVALID_ARGUMENT"


GOOD = "ab" * 32


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "blobs",
        f"blobs/{GOOD}",
        f"blobs/{GOOD}/",
        f"blobs/{GOOD}/-1",
        f"blobs/{GOOD}/1x",
        f"blobs/{GOOD}/99999999999999999999",
        f"blobs/{GOOD}/1/more",
        f"blobs/{GOOD.upper()}/1",
        f"blobs/{GOOD[:-1]}/1",
        f"blobs/../../../etc/passwd/{GOOD}/1",
        f"blobs/sha1/{GOOD}/1",
        f"compressed-blobs/{GOOD}/1",
        f"compressed-blobs/deflate/{GOOD}/1",
        f"a//blobs/{GOOD}/1",
        f"operations/blobs/{GOOD}/1",
        f"\0/blobs/{GOOD}/1",
        "x" * 5000,
    ],
)
def test_a_malformed_resource_name_is_the_clients_error(client: Client, name: str) -> None:
    assert refused(lambda: client.read(name)) == "INVALID_ARGUMENT"
    write = [bytestream.WriteRequest(resource_name=f"uploads/u/{name}", data=b"x", finish_write=True)]
    if not name.endswith("/more"):
        assert refused(lambda: client.call(methods.WRITE, iter(write))) == "INVALID_ARGUMENT"
    assert refused(lambda: client.query(ResourceName("", SHA256.of(b""), upload=""))) == "INVALID_ARGUMENT"


def test_what_follows_the_size_of_an_upload_means_nothing(client: Client) -> None:
    data = b"with metadata behind its name"
    name = f"some/instance/uploads/u/blobs/{SHA256.of(data).hex}/{len(data)}/and/more"
    assert client.call(methods.WRITE, pieces(name, data, 8)).committed_size == len(data)
    assert client.read(SHA256.of(data)) == data


# Writing


def test_a_blob_that_is_there_ends_its_upload_early(client: Client) -> None:
    data = some_bytes(3 * MIB, 1)
    [digest] = client.add(data)
    assert client.write(digest, data, piece=1000, upload="again") == len(data)
    # Not even its bytes are looked at.
    assert client.write(digest, b"x", upload="lies") == len(data)
    assert client.write(digest, b"x", compression=ZSTD, upload="lies") == -1
    assert client.query(ResourceName("", digest, upload="whatever")) == (len(data), True)


@pytest.mark.parametrize("compression", list(Compression))
def test_wrong_bytes_are_refused_and_nothing_is_stored(
    client: Client, shared: Server, compression: Compression
) -> None:
    def sent(data: bytes) -> bytes:
        return zstandard.compress(data) if compression is ZSTD else data

    data = some_bytes(100_000, 2)
    digest = SHA256.of(data)
    for bad in (data[:-1], data + b"x", data[:-1] + b"x", b""):
        assert refused(partial(client.write, digest, sent(bad), compression=compression)) == "INVALID_ARGUMENT"
    longer, shorter = digest._replace(size=100_001), digest._replace(size=99_999)
    for lie in (longer, shorter):
        assert refused(partial(client.write, lie, sent(data), compression=compression)) == "INVALID_ARGUMENT"
    assert client.missing([digest, longer, shorter]) == [digest.hex] * 3
    assert not [path for path in (shared.casfs.store / "tmp").rglob("*") if path.is_file()]


def test_a_broken_zstd_stream_is_refused(client: Client) -> None:
    data = some_bytes(300_000, 3)
    digest, whole = SHA256.of(data), zstandard.compress(data)
    for bad in (whole[: len(whole) // 2], b"not zstd at all" * 100, whole + b"garbage behind it"):
        assert refused(partial(client.write, digest, bad, compression=ZSTD)) == "INVALID_ARGUMENT"
    assert client.missing([digest]) == [digest.hex]


def test_a_zstd_bomb_is_stopped_at_the_size_it_claims(client: Client, shared: Server) -> None:
    bomb = zstandard.compress(bytes(1 << 30))
    digest = SHA256.of(b"small")
    assert refused(lambda: client.write(digest, bomb, compression=ZSTD)) == "INVALID_ARGUMENT"
    request = reapi.BatchUpdateBlobsRequest()
    request.requests.add(digest=write_digest(digest), data=bomb, compressor=reapi.Compressor.ZSTD)
    assert client.call(methods.BATCH_UPDATE_BLOBS, request).responses[0].status.code == 3
    with open(f"/proc/{shared.process.pid}/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    assert peak < 400 << 10, "KiB of memory"


def test_an_upload_goes_on_where_it_broke_off(client: Client) -> None:
    data = some_bytes(2 * MIB, 4)
    digest = SHA256.of(data)
    name = ResourceName("", digest, upload="resumed")
    assert client.query(name) == (0, False)
    assert client.write(digest, data[:MIB], upload="resumed", finish=False) == MIB
    assert client.query(name) == (MIB, False)
    beyond = MIB + 1
    assert refused(lambda: client.write(digest, data[beyond:], upload="resumed", offset=beyond)) == "ABORTED"
    assert client.write(digest, data[MIB:], upload="resumed", offset=MIB) == len(data)
    assert client.query(name) == (len(data), True)
    assert client.read(digest) == data


def test_a_compressed_upload_goes_on_where_it_broke_off(client: Client) -> None:
    data = some_bytes(500_000, 5)
    digest, sent = SHA256.of(data), zstandard.compress(data)
    client.write(digest, sent[:1000], compression=ZSTD, upload="z", finish=False)
    assert client.query(ResourceName("", digest, ZSTD, "z")) == (1000, False)
    assert client.write(digest, sent[1000:], compression=ZSTD, upload="z", offset=1000) == len(sent)
    assert client.read(digest) == data


def test_an_upload_can_begin_anew(client: Client) -> None:
    data = some_bytes(50_000, 6)
    digest = SHA256.of(data)
    client.write(digest, b"wrong from its beginning", upload="anew", finish=False)
    assert client.write(digest, data, upload="anew") == len(data)


def test_a_stream_that_contradicts_itself_is_refused(client: Client) -> None:
    data = some_bytes(1000, 7)
    name = str(ResourceName("", SHA256.of(data), upload="odd"))

    def write(*messages: bytestream.WriteRequest) -> str:
        return refused(lambda: client.call(methods.WRITE, iter(messages)))

    first = bytestream.WriteRequest(resource_name=name, data=data[:500])
    assert write(first, bytestream.WriteRequest(write_offset=499, data=data[500:])) == "INVALID_ARGUMENT"
    assert write(first, bytestream.WriteRequest(resource_name="other", write_offset=500)) == "INVALID_ARGUMENT"
    assert write(bytestream.WriteRequest(resource_name=name, write_offset=7)) == "ABORTED"
    assert write() == "INVALID_ARGUMENT"


# Batches


def test_a_batch_of_10_000_blobs(client: Client) -> None:
    blobs = [b"one of many %d" % number for number in range(10_000)]
    digests = [SHA256.of(blob) for blob in blobs]
    assert client.missing(digests) == [digest.hex for digest in digests]
    assert client.add(*blobs) == digests
    assert client.missing(digests) == []
    request = reapi.BatchReadBlobsRequest(digests=map(write_digest, digests))
    answer = client.call(methods.BATCH_READ_BLOBS, request, timeout=60)
    assert [response.data for response in answer.responses] == blobs


def test_a_batch_has_a_status_for_each_blob(client: Client) -> None:
    good, known = b"a good one in a batch", b"one that is known already"
    client.add(known)
    request = reapi.BatchUpdateBlobsRequest()
    request.requests.add(digest=write_digest(SHA256.of(good)), data=good)
    request.requests.add(digest=write_digest(SHA256.of(b"other")), data=b"bytes")
    request.requests.add(digest=write_digest(SHA256.of(known)), data=known)
    request.requests.add(digest=reapi.Digest(hash="nonsense", size_bytes=5), data=b"bytes")
    request.requests.add(
        digest=write_digest(SHA256.of(b"packed")), data=zstandard.compress(b"packed"), compressor=reapi.Compressor.ZSTD
    )
    request.requests.add(digest=write_digest(SHA256.of(b"x")), data=b"x", compressor=reapi.Compressor.BROTLI)
    request.digest_function = reapi.DigestFunction.SHA256
    answer = client.call(methods.BATCH_UPDATE_BLOBS, request)
    assert [response.status.code for response in answer.responses] == [0, 3, 0, 3, 0, 3]
    assert [response.digest for response in answer.responses] == [item.digest for item in request.requests]

    wanted = [SHA256.of(good), SHA256.of(b"never written"), SHA256.of(b"packed")]
    read = reapi.BatchReadBlobsRequest(digests=map(write_digest, wanted))
    answer = client.call(methods.BATCH_READ_BLOBS, read)
    assert [(response.data, response.status.code) for response in answer.responses] == [
        (good, 0),
        (b"", 5),
        (b"packed", 0),
    ]
    read.acceptable_compressors.append(reapi.Compressor.ZSTD)
    answer = client.call(methods.BATCH_READ_BLOBS, read)
    assert answer.responses[0].compressor == reapi.Compressor.ZSTD
    assert zstandard.ZstdDecompressor().decompressobj().decompress(answer.responses[0].data) == good


def test_a_batch_may_be_as_large_as_was_said_and_no_larger(client: Client) -> None:
    most = some_bytes(MAX_BATCH_BYTES, 8)
    [digest] = client.add(most)
    read = reapi.BatchReadBlobsRequest(digests=[write_digest(digest)])
    assert client.call(methods.BATCH_READ_BLOBS, read).responses[0].data == most
    read.digests.add(hash=SHA256.of(b"x").hex, size_bytes=1)
    assert refused(lambda: client.call(methods.BATCH_READ_BLOBS, read)) == "INVALID_ARGUMENT"
    request = reapi.BatchUpdateBlobsRequest()
    request.requests.add(digest=write_digest(SHA256.of(most + b"x")), data=most + b"x")
    assert refused(lambda: client.call(methods.BATCH_UPDATE_BLOBS, request)) == "INVALID_ARGUMENT"


def test_missing_blobs_are_named_once_and_wrong_digests_refused(client: Client) -> None:
    absent = SHA256.of(b"nobody ever wrote this")
    assert client.missing([absent, absent]) == [absent.hex]
    [here] = client.add(b"somebody wrote this")
    assert client.missing([here, absent, here]) == [absent.hex]
    assert client.missing([here._replace(size=3)]) == [here.hex]

    def find(hash_: str, size: int = 1, function: int = 0) -> str:
        request = reapi.FindMissingBlobsRequest(
            blob_digests=[reapi.Digest(hash=hash_, size_bytes=size)],
            digest_function=function,  # type: ignore[arg-type]
        )
        return refused(lambda: client.call(methods.FIND_MISSING_BLOBS, request))

    for hash_ in ("", "../../etc", "AB" * 32, "ab" * 20, "zz" * 32):
        assert find(hash_) == "INVALID_ARGUMENT"
    assert find("ab" * 32, -1) == "INVALID_ARGUMENT"
    assert find("ab" * 20, 1, reapi.DigestFunction.SHA1) == "INVALID_ARGUMENT"
    assert find("ab" * 32, 1, 77) == "INVALID_ARGUMENT"


# Trees


def make_tree(client: Client, count: int) -> tuple[Digest, list[bytes]]:
    """A root over so many different directories; the messages, in the order in which they are to come."""
    children = []
    for number in range(count):
        child = reapi.Directory()
        child.symlinks.add(name=f"link{number}", target="x" * 50)
        children.append(child.SerializeToString())
    digests = client.add(*children)
    root = reapi.Directory()
    for number, digest in enumerate(digests):
        root.directories.add(name=f"d{number:05}", digest=write_digest(digest))
        root.directories.add(name=f"e{number:05}", digest=write_digest(digest))
    root_bytes = root.SerializeToString()
    client.add(root_bytes)
    return SHA256.of(root_bytes), [root_bytes, *children]


def test_a_tree_comes_in_pages_each_directory_once(client: Client) -> None:
    root, expected = make_tree(client, 25)
    request = reapi.GetTreeRequest(root_digest=write_digest(root), page_size=10)
    pages = list(client.call(methods.GET_TREE, request))
    assert [len(page.directories) for page in pages] == [10, 10, 6]
    assert [directory.SerializeToString() for page in pages for directory in page.directories] == expected
    assert [bool(page.next_page_token) for page in pages] == [True, True, False]
    request.page_token = pages[0].next_page_token
    rest = list(client.call(methods.GET_TREE, request))
    assert [directory.SerializeToString() for page in rest for directory in page.directories] == expected[10:]


def test_a_tree_without_its_root_is_not_found_and_without_others_is_what_is_there(client: Client) -> None:
    root = reapi.Directory()
    root.directories.add(name="gone", digest=write_digest(SHA256.of(b"a directory nobody wrote")))
    [digest] = client.add(root.SerializeToString())

    def get(digest: Digest, token: str = "") -> list[reapi.GetTreeResponse]:
        request = reapi.GetTreeRequest(root_digest=write_digest(digest), page_token=token)
        return list(client.call(methods.GET_TREE, request))

    assert [len(page.directories) for page in get(digest)] == [1]
    assert refused(lambda: get(SHA256.of(b"no such root"))) == "NOT_FOUND"
    assert refused(lambda: get(digest, "nonsense")) == "INVALID_ARGUMENT"
    [junk] = client.add(b"\xff\xff no Directory")
    assert refused(lambda: get(junk)) == "INVALID_ARGUMENT"


def test_splitting_and_splicing_are_not_offered(client: Client) -> None:
    assert refused(lambda: client.call(methods.SPLIT_BLOB, reapi.SplitBlobRequest())) == "UNIMPLEMENTED"
    assert refused(lambda: client.call(methods.SPLICE_BLOB, reapi.SpliceBlobRequest())) == "UNIMPLEMENTED"
    assert refused(lambda: list(client.call(methods.EXECUTE, reapi.ExecuteRequest()))) == "UNIMPLEMENTED"


# Action results


def result_of(*outputs: Digest, **fields: bytes) -> reapi.ActionResult:
    return reapi.ActionResult(
        output_files=[
            reapi.OutputFile(path=f"out{number}", digest=write_digest(digest)) for number, digest in enumerate(outputs)
        ],
        **fields,  # type: ignore[arg-type]
    )


@FUNCTIONS
def test_a_result_is_a_hit_once_all_it_names_is_there(client: Client, function: DigestFunction) -> None:
    action = function.of(b"an action")
    file, inside, printed = b"output file", b"file in a directory", b"printed"
    tree = reapi.Tree()
    tree.children.add().files.add(name="f", digest=write_digest(function.of(inside)))
    result = result_of(function.of(file), stdout_raw=b"raw")
    result.output_directories.add(path="dir", tree_digest=write_digest(function.of(tree.SerializeToString())))
    result.stderr_digest.CopyFrom(write_digest(function.of(printed)))
    assert refused(lambda: client.result(action)) == "NOT_FOUND"
    client.put_result(action, result)
    for blob in (file, tree.SerializeToString(), inside, printed):
        assert refused(lambda: client.result(action)) == "NOT_FOUND"
        client.add(blob, function=function)
    assert client.result(action) == result


def test_a_result_is_replaced_by_a_later_one(client: Client) -> None:
    action = SHA256.of(b"an action run twice")
    client.put_result(action, result_of(stdout_raw=b"first"))
    assert client.result(action).stdout_raw == b"first"
    client.put_result(action, result_of(stdout_raw=b"second"))
    assert client.result(action).stdout_raw == b"second"


def test_instances_have_results_of_their_own_and_share_blobs(client: Client) -> None:
    action = SHA256.of(b"an action in two instances")
    client.put_result(action, result_of(stdout_raw=b"none"))
    client.put_result(action, result_of(stdout_raw=b"a/b"), "a/b")
    assert client.result(action).stdout_raw == b"none"
    assert client.result(action, instance_name="a/b").stdout_raw == b"a/b"
    assert refused(lambda: client.result(action, instance_name="c")) == "NOT_FOUND"
    assert refused(lambda: client.result(action, instance_name="c/uploads")) == "INVALID_ARGUMENT"
    data = b"written in one instance"
    client.write(SHA256.of(data), data, instance="a/b")
    assert client.read(ResourceName("c", SHA256.of(data))) == data


def test_small_outputs_are_inlined_when_asked_for(client: Client) -> None:
    action = SHA256.of(b"an action that prints")
    out, err, file, other = client.add(b"to stdout", b"to stderr", b"contents", b"other contents")
    result = result_of(file, other)
    result.stdout_digest.CopyFrom(write_digest(out))
    result.stderr_digest.CopyFrom(write_digest(err))
    client.put_result(action, result)
    assert client.result(action) == result
    found = client.result(action, inline_stdout=True, inline_stderr=True, inline_output_files=["out0"])
    assert (found.stdout_raw, found.stderr_raw) == (b"to stdout", b"to stderr")
    assert [file.contents for file in found.output_files] == [b"contents", b""]


def test_a_result_that_makes_no_sense_is_refused(client: Client) -> None:
    action = SHA256.of(b"an odd action")
    bad = reapi.ActionResult(output_files=[reapi.OutputFile(path="o", digest=reapi.Digest(hash="../x"))])
    assert refused(lambda: client.put_result(action, bad)) == "INVALID_ARGUMENT"
    empty = reapi.UpdateActionResultRequest(action_digest=write_digest(action))
    assert refused(lambda: client.call(methods.UPDATE_ACTION_RESULT, empty)) == "INVALID_ARGUMENT"
    no_action = reapi.GetActionResultRequest()
    assert refused(lambda: client.call(methods.GET_ACTION_RESULT, no_action)) == "INVALID_ARGUMENT"


# Nonsense

UNARY = [
    methods.GET_CAPABILITIES,
    methods.GET_ACTION_RESULT,
    methods.UPDATE_ACTION_RESULT,
    methods.FIND_MISSING_BLOBS,
    methods.BATCH_UPDATE_BLOBS,
    methods.BATCH_READ_BLOBS,
    methods.GET_TREE,
    methods.READ,
    methods.QUERY_WRITE_STATUS,
]


@pytest.mark.parametrize("method", UNARY, ids=lambda method: method.name)
def test_what_is_no_message_is_the_clients_error(client: Client, method: Method) -> None:
    call = client.call
    expected = "INVALID_ARGUMENT"
    assert refused(lambda: list(call(method, b"\xff" * 9)) if method.streams_out else call(method, b"\xff" * 9)) == (
        expected
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(method=st.sampled_from(UNARY), data=st.binary(max_size=200))
def test_random_bytes_never_make_an_internal_error(client: Client, method: Method, data: bytes) -> None:
    try:
        answer = client.call(method, data)
        if method.streams_out:
            list(answer)
    except grpc.RpcError as error:
        code = code_of(error)
    else:
        code = "OK"
    assert code in ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(st.binary(max_size=100), max_size=4))
def test_random_bytes_in_an_upload_never_make_an_internal_error(client: Client, messages: list[bytes]) -> None:
    assert refused(lambda: client.call(methods.WRITE, iter(messages))) == "INVALID_ARGUMENT"
