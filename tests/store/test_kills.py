"""SIGKILL at random moments of an ingest: nothing published is lost or wrong, and nothing is left lying about.

Each kill is of a fresh child that opens the store, adds blobs and names trees
in a loop, and says on a pipe what it was told is published. A moment is a
fraction of a second after the fork, so the opening is hit as well.
"""

from __future__ import annotations

import io
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

from store.digest import Digest, DigestFunction
from store.importing import ScanOptions
from store.layout import blob_path, cas_directories
from store.repository import Store

_LATEST_SECONDS = 0.12
_MORE = 1.3
"""So much later the next one is killed where one had published nothing: on a busy machine none gets to it else."""
_FUNCTIONS = (DigestFunction.BLAKE3, DigestFunction.SHA256)


def _work(root: Path, report: int, seed: int) -> NoReturn:
    """Add and name until killed."""
    chance = random.Random(seed)
    source = root.parent / "source"
    with Store.open(root) as store:
        while True:
            function = chance.choice(_FUNCTIONS)
            with store.ingest() as ingest:
                # Few blobs are made durable by fsync, many by syncfs.
                added = [
                    ingest.add_bytes(
                        chance.randbytes(chance.randrange(2000)), function, executable=chance.random() < 0.2
                    )
                    for _ in range(chance.choice((1, 3, 20)))
                ]
                added.append(ingest.add_stream(io.BytesIO(chance.randbytes(5000)), function))
                (source / f"{chance.randrange(8)}").write_bytes(chance.randbytes(300_000))
                added += [ingest.add_file(path, function) for path in sorted(source.iterdir())]
            os.write(report, "".join(f"blob {digest}\n" for digest in added).encode())
            directory = store.importer.from_directories([(b"", source)], ScanOptions(function))
            manifest = store.manifests.put(f"tree-{chance.randrange(4)}", directory.digest, "", replace=True)
            os.write(report, f"tree {manifest.name} {manifest.root}\n".encode())


def _kill_one(root: Path, seed: int, seconds: float) -> list[str]:
    """What a child that was killed after so many seconds had been told is published."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            os.close(reading)
            _work(root, writing, seed)
        os._exit(1)
    os.close(writing)
    try:
        time.sleep(seconds)
    finally:
        os.kill(child, signal.SIGKILL)
        with open(reading, encoding="ascii") as report:
            # A pipe takes up to 4096 bytes at once; the last line may be cut.
            lines = report.read().split("\n")[:-1]
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child ended by itself: what it was doing failed"
    return lines


def _blob_files(root: Path) -> Iterator[tuple[DigestFunction, Path]]:
    for function, prefix in cas_directories().items():
        for path in (root / "blobs" / prefix).glob("??/*"):
            yield function, path


def _kill_many(tmp_path: Path, seed: int, kills: int) -> None:
    chance = random.Random(seed)
    root = tmp_path / "store"
    (tmp_path / "source").mkdir()
    promised: set[Digest] = set()
    checked: set[Path] = set()
    latest = _LATEST_SECONDS
    for number in range(kills):
        lines = _kill_one(root, seed * 10_000 + number, chance.random() * latest)
        if not lines and latest < 4:
            latest *= _MORE
        promised |= {Digest.parse(line.split()[1]) for line in lines if line.startswith("blob ")}
        named = {line.split()[1]: Digest.parse(line.split()[2]) for line in lines if line.startswith("tree ")}
        with Store.open(root) as store:
            assert os.listdir(root / "tmp") == [], "litter in tmp"
            assert os.listdir(root / "leases") == []
            for function, path in _blob_files(root):
                if path not in checked:
                    assert function.of(path.read_bytes()).hex == path.name, "a wrong byte under a published name"
                    checked.add(path)
            files = {path for _, path in _blob_files(root)}
            lost = {digest for digest in promised if root / "blobs" / blob_path(digest) not in files}
            assert not lost, "published blobs are lost"
            assert all(store.blobs.is_verified(digest) for digest in promised)
            for manifest in store.manifests.list():
                assert store.manifests.count_missing(manifest.root) == 0
                assert (root / "manifests" / f"{manifest.name}.json").exists()
            known = {manifest.name for manifest in store.manifests.list()}
            assert named.keys() <= known, "named trees are lost"
    assert promised, "no child lived long enough to publish anything"
    with Store.open(root) as store:
        assert store.verifier.verify().is_clean


@pytest.mark.parametrize("seed", range(8))
def test_twenty_five_kills_lose_nothing_and_leave_nothing(tmp_path: Path, seed: int) -> None:
    _kill_many(tmp_path, seed, 25)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 120))
def test_fifty_more_kills_lose_nothing_and_leave_nothing(tmp_path: Path, seed: int) -> None:
    _kill_many(tmp_path, seed, 50)


def test_a_rebuild_that_was_killed_is_finished_by_the_next_verification(tmp_path: Path, sample_tree: Path) -> None:
    root = tmp_path / "store"
    with Store.open(root) as store:
        tree = store.importer.from_directories([(b"", sample_tree)], ScanOptions())
        store.manifests.put("sample", tree.digest, "", replace=False)
    for milliseconds in range(0, 40, 4):
        child = os.fork()
        if child == 0:
            with suppress(BaseException), Store.open(root) as store:
                store.verifier.verify(rebuild=True)
            os._exit(0)
        time.sleep(milliseconds / 1000)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with Store.open(root) as store:
            assert store.verifier.verify().is_clean
            assert store.manifests.get("sample").root == tree.digest
            assert store.manifests.count_missing(tree.digest) == 0
