"""Sources and hydration: who is asked, in which order, and what happens when one lies, fails or hangs."""

from __future__ import annotations

import errno
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from store.digest import Digest, DigestFunction
from store.directory_source import DirectorySource
from store.errors import MissingBlob
from store.hydration import Hydrator
from store.importing import ScanOptions
from store.layout import blob_path
from store.prefetch import find_absent, prefetch
from store.repository import SourceOptions, Store
from store.sources import Source, Supply

BLAKE3, SHA256 = DigestFunction.BLAKE3, DigestFunction.SHA256
SECONDS = 30
CONTENT = b"what a source has\n" * 1000
DIGEST = BLAKE3.of(CONTENT)


class FakeSource:
    """A source whose answers a test chooses, and that remembers what it was asked and told."""

    def __init__(self, label: str, contents: dict[Digest, bytes] | None = None) -> None:
        self.label = label
        self.contents = contents or {}
        self.error: Exception | None = None
        self.free = threading.Event()
        self.free.set()
        self.asked: list[Digest] = []
        self.heard: list[tuple[str, Digest]] = []

    def open(self, digest: Digest) -> Supply | None:
        self.asked.append(digest)
        assert self.free.wait(SECONDS)
        if self.error is not None:
            raise self.error
        content = self.contents.get(digest)
        return None if content is None else Supply(io.BytesIO(content), False)

    def accepted(self, digests: Sequence[Digest]) -> None:
        self.heard += [("accepted", digest) for digest in digests]

    def rejected(self, digest: Digest) -> None:
        self.heard.append(("rejected", digest))


Make = Callable[..., Hydrator]


@pytest.fixture
def make(store: Store) -> Iterator[Make]:
    """A hydrator with these sources: ``make(source, …, timeout=…)``."""
    made: list[Hydrator] = []

    def make_one(*sources: Source, timeout: float = SECONDS) -> Hydrator:
        made.append(Hydrator(store.blobs, store.ingest, sources, timeout=timeout))
        return made[-1]

    yield make_one
    for hydrator in made:
        hydrator.close()


def read(store: Store, digest: Digest) -> bytes:
    with open(store.blobs.open(digest), "rb") as file:
        return file.read()


def why(hydrator: Hydrator, digest: Digest = DIGEST) -> str:
    """What a fetch that must fail says."""
    with pytest.raises(MissingBlob) as caught:
        hydrator.fetch(digest).result(SECONDS)
    return str(caught.value)


def many(number: int) -> dict[Digest, bytes]:
    return {BLAKE3.of(content): content for content in (b"%d" % n * 1000 for n in range(number))}


def test_sources_are_asked_in_order_until_one_has_it(store: Store, make: Make) -> None:
    sources = [FakeSource("first"), FakeSource("second", {DIGEST: CONTENT}), FakeSource("third", {DIGEST: CONTENT})]
    hydrator = make(*sources)
    hydrator.fetch(DIGEST).result(SECONDS)
    assert read(store, DIGEST) == CONTENT
    assert [source.asked for source in sources] == [[DIGEST], [DIGEST], []]
    assert sources[1].heard == [("accepted", DIGEST)]
    statistics = hydrator.statistics()
    assert (statistics["fetched_blobs"], statistics["fetched_bytes"]) == (1, len(CONTENT))
    hydrator.fetch(DIGEST).result(SECONDS)
    assert len(sources[0].asked) == 1, "what is here isn't fetched"


def test_a_blob_is_fetched_once_however_many_want_it(store: Store, make: Make) -> None:
    source = FakeSource("slow", {DIGEST: CONTENT})
    source.free.clear()
    hydrator = make(source)
    futures = []
    threads = [threading.Thread(target=lambda: futures.append(hydrator.fetch(DIGEST))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    source.free.set()
    for future in futures:
        future.result(SECONDS)
    assert len(futures) == 20 and source.asked == [DIGEST]
    assert read(store, DIGEST) == CONTENT


def test_wrong_bytes_are_refused_and_the_next_source_is_asked(store: Store, make: Make) -> None:
    wrong = [
        FakeSource(str(number), {DIGEST: content}) for number, content in enumerate((b"x" * 18000, b"", CONTENT * 2))
    ]
    right = FakeSource("right", {DIGEST: CONTENT})
    make(*wrong, right).fetch(DIGEST).result(SECONDS)
    assert read(store, DIGEST) == CONTENT
    assert [source.heard for source in wrong] == [[("rejected", DIGEST)]] * 3
    assert right.heard == [("accepted", DIGEST)]


def test_a_failure_names_the_digest_and_each_source_and_is_tried_again(store: Store, make: Make) -> None:
    first, second, third = FakeSource("/net/first"), FakeSource("/net/second"), FakeSource("/net/third")
    first.error = OSError(errno.EIO, "Input/output error")
    second.error = RuntimeError("a bug")
    third.contents[DIGEST] = b"wrong"
    hydrator = make(first, second, third)
    text = why(hydrator)
    assert str(DIGEST) in text
    assert "/net/first: [Errno 5] Input/output error; /net/second: a bug; /net/third: its copy is damaged" in text
    assert hydrator.statistics()["failed_fetches"] == 1
    first.error, first.contents[DIGEST] = None, CONTENT
    hydrator.fetch(DIGEST).result(SECONDS)
    assert read(store, DIGEST) == CONTENT


def test_a_source_that_hangs_is_given_up_and_holds_nobody_else(store: Store, make: Make) -> None:
    contents = many(30)
    hanging, good = FakeSource("hanging"), FakeSource("good", {**contents, DIGEST: CONTENT})
    hanging.free.clear()
    first = make(good, hanging, timeout=1.5)
    absent = [first.fetch(Digest(BLAKE3, bytes((number,)) * 32, 5)) for number in range(10)]
    for digest in contents:
        first.fetch(digest).result(SECONDS)
    assert not any(future.done() for future in absent), "those that another source has didn't wait"
    for future in absent:
        with pytest.raises(MissingBlob, match=r"no answer in 1\.5 s"):
            future.result(SECONDS)
    assert len(hanging.asked) == 4, "it holds its own threads, and no more"
    assert "hanging: doesn't answer" in why(first, Digest(BLAKE3, bytes(32), 5))
    hanging.free.set()
    deadline = time.monotonic() + SECONDS
    while "doesn't answer" in (said := why(first, Digest(BLAKE3, bytes(32), 5))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "(" not in said, "it answers again: it hasn't that blob"


def test_a_source_that_stops_in_the_middle_is_given_up(store: Store, make: Make) -> None:
    release = threading.Event()

    class Stalling(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell():
                assert release.wait(SECONDS)
            return super().read(1000)

    class StallingSource(FakeSource):
        def open(self, digest: Digest) -> Supply | None:
            return Supply(Stalling(CONTENT), False)

    hydrator = make(StallingSource("stalling"), FakeSource("next", {DIGEST: CONTENT}), timeout=1.0)
    hydrator.fetch(DIGEST).result(SECONDS)
    assert read(store, DIGEST) == CONTENT
    release.set()
    hydrator.close()
    assert list(store.layout.tmp.iterdir()) == []


def test_a_slow_source_that_goes_on_is_not_given_up(store: Store, make: Make) -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            time.sleep(0.15)
            return super().read(1000)

    class SlowSource(FakeSource):
        def open(self, digest: Digest) -> Supply | None:
            return Supply(Slow(CONTENT), False)

    make(SlowSource("slow"), timeout=1.5).fetch(DIGEST).result(SECONDS)
    assert read(store, DIGEST) == CONTENT


def test_closing_ends_what_is_on_its_way(store: Store, make: Make) -> None:
    source = FakeSource("hanging")
    source.free.clear()
    hydrator = make(source)
    future = hydrator.fetch(DIGEST)
    hydrator.close()
    with pytest.raises(MissingBlob, match="closed"):
        future.result(0)
    assert "closed" in why(hydrator)
    source.free.set()
    assert list(store.layout.tmp.iterdir()) == []


def test_nothing_of_a_session_stays_when_nothing_is_on_its_way(store: Store, make: Make) -> None:
    make(FakeSource("good", {DIGEST: CONTENT})).fetch(DIGEST).result(SECONDS)
    assert list(store.layout.tmp.iterdir()) == [], "a living session would keep collections from collecting"


# Directories


@pytest.mark.parametrize("function", [BLAKE3, SHA256])
def test_another_store_and_its_cold_tier_are_sources(tmp_path: Path, function: DigestFunction) -> None:
    with Store.open(tmp_path / "other") as other, other.ingest() as ingest:
        cold = ingest.add_bytes(b"cold " * 1000, function, executable=True)
        ingest.flush()
        ingest.close()
        other.demoter.demote(0)
    with Store.open(tmp_path / "other") as other, other.ingest() as ingest:
        hot = ingest.add_bytes(b"hot " * 1000, function)
    before = sorted(path for path in (tmp_path / "other").rglob("*"))
    with Store.open(tmp_path / "mine", sources=SourceOptions((tmp_path / "other",))) as store:
        for digest, content in ((hot, b"hot " * 1000), (cold, b"cold " * 1000)):
            store.hydrator.fetch(digest).result(SECONDS)
            assert read(store, digest) == content
        assert (store.layout.blobs / blob_path(cold)).stat().st_mode & 0o111
    assert sorted(path for path in (tmp_path / "other").rglob("*")) == before, "it is only read"


def test_a_bazel_disk_cache_is_a_source(store: Store, make: Make, tmp_path: Path) -> None:
    digest = SHA256.of(CONTENT)
    path = tmp_path / "bazel" / "cas" / digest.hex[:2] / digest.hex
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    make(DirectorySource(tmp_path / "bazel")).fetch(digest).result(SECONDS)
    assert read(store, digest) == CONTENT


@pytest.mark.parametrize("kind", ["damaged", "size", "link", "directory", "absent"])
def test_what_a_directory_has_in_place_of_a_blob_is_never_taken(
    store: Store, make: Make, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "cache" / blob_path(DIGEST)
    path.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").write_bytes(CONTENT)
    match kind:
        case "damaged":
            path.write_bytes(b"x" * len(CONTENT))
        case "size":
            path.write_bytes(CONTENT + b"x")
        case "link":
            path.symlink_to(tmp_path / "elsewhere")
        case "directory":
            path.mkdir()
    assert str(DIGEST) in why(make(DirectorySource(tmp_path / "cache")))
    assert not (store.layout.blobs / blob_path(DIGEST)).exists()


def test_a_directory_that_is_gone_is_named(make: Make, tmp_path: Path) -> None:
    assert f"{tmp_path / 'gone'}: it is not there" in why(make(DirectorySource(tmp_path / "gone")))


def test_many_blobs_are_prefetched_and_those_that_fail_are_named(tmp_path: Path) -> None:
    contents = many(2500)
    with Store.open(tmp_path / "other") as other, other.ingest() as ingest:
        for content in contents.values():
            ingest.add_bytes(content, BLAKE3)
    seen: list[int] = []
    with Store.open(tmp_path / "mine", sources=SourceOptions((tmp_path / "other",))) as store:
        result = prefetch(store, [*contents, DIGEST], lambda blobs, size: seen.append(blobs))
        assert (result.fetched_blobs, list(result.failed)) == (len(contents), [DIGEST])
        assert str(DIGEST) in result.failed[DIGEST]
        assert sum(seen) == len(contents) + 1
        assert store.blobs.missing(contents) == []
        assert store.verifier.verify().is_clean


def test_a_tree_is_made_from_directory_messages_of_a_source(tmp_path: Path, sample_tree: Path) -> None:
    with Store.open(tmp_path / "other") as other:
        tree = other.importer.from_directories([(b"", sample_tree)], ScanOptions())
    with Store.open(tmp_path / "mine", sources=SourceOptions((tmp_path / "other",))) as store:
        mine = store.importer.from_messages(tree.digest)
        assert mine[1:] == tree[1:]
        missing = find_absent(store, mine)
        assert missing and not prefetch(store, missing).failed
        assert store.manifests.count_missing(tree.digest) == 0


class FakeBatchSource(FakeSource):
    """A source that is asked for many; it remembers how many at a time."""

    most_together = 50
    most_bytes = 1000

    def __init__(self, label: str, contents: dict[Digest, bytes]) -> None:
        super().__init__(label, contents)
        self.rounds: list[list[Digest]] = []

    def open_all(self, digests: Sequence[Digest]) -> Sequence[Supply | Exception | None]:
        self.rounds.append(list(digests))
        assert self.free.wait(SECONDS)
        if self.error is not None:
            raise self.error
        return [
            OSError("this one can't be read") if self.contents.get(digest) == b"" else self._supply(digest)
            for digest in digests
        ]

    def _supply(self, digest: Digest) -> Supply | None:
        content = self.contents.get(digest)
        return None if content is None else Supply(io.BytesIO(content), False)


def test_a_source_for_many_is_asked_for_all_that_waits(make: Make) -> None:
    contents = {BLAKE3.of(b"%d" % number): b"%d" % number for number in range(200)}
    source = FakeBatchSource("batch", contents)
    source.free.clear()
    hydrator = make(source)
    futures = [hydrator.fetch(digest) for digest in contents]
    deadline = time.monotonic() + SECONDS
    while len(source.rounds) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1)  # until those who look here first have found nothing, and all the rest waits for the source
    source.free.set()
    for future in futures:
        future.result(SECONDS)
    assert sum(map(len, source.rounds)) == 200
    assert max(map(len, source.rounds)) <= source.most_together
    assert len(source.rounds) <= 4 + 200 // source.most_together


def test_a_round_has_bounded_bytes_and_each_blob_an_answer_of_its_own(make: Make) -> None:
    contents = {BLAKE3.of(b"%d" % number * 300): b"%d" % number * 300 for number in range(10, 50)}
    broken, gone = BLAKE3.of(b"broken"), BLAKE3.of(b"gone")
    source = FakeBatchSource("batch", contents | {broken: b""})
    hydrator = make(source)
    futures = {digest: hydrator.fetch(digest) for digest in [*contents, broken, gone]}
    for digest in contents:
        futures[digest].result(SECONDS)
    for digest, why in ((broken, "can't be read"), (gone, "nor in any")):
        with pytest.raises(MissingBlob, match=why):
            futures[digest].result(SECONDS)
    assert all(sum(digest.size for digest in asked) < 1000 + 600 for asked in source.rounds)
