"""Messages a session sends unasked, as the running kernel takes them: what was cached is asked for again."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from casfs import wire
from casfs.contents import Contents, PlainGateway
from casfs.tree import ROOT, ProjectedTree
from store.importing import ScanOptions
from store.repository import Store
from store.trees import find_directory
from tests.casfs.conftest import InProcess

PRUNE_SINCE, EPOCH_SINCE = (6, 18), (6, 16)


@pytest.fixture
def served(tmp_path: Path, store: Store, serve: Callable[..., InProcess]) -> InProcess:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"content")
    root = store.importer.from_directories([(b"", source)], ScanOptions()).digest
    with store.index.view() as view:
        directory = find_directory(view, root)
    assert directory is not None
    tree = ProjectedTree(store.index, directory)
    return serve(tree, Contents(store.blobs, PlainGateway(store.blobs)), passthrough=False)


def spent(served: InProcess, call: Callable[[], object]) -> Counter[str]:
    """The upcalls a call costs."""
    before = Counter[str](served.session.statistics()["upcalls"])
    call()
    return Counter[str](served.session.statistics()["upcalls"]) - before


def require_kernel(wanted: tuple[int, int]) -> None:
    release = os.uname().release
    major, minor = release.split(".")[:2]
    if (int(major), int(minor.split("-")[0])) < wanted:
        pytest.skip(f"needs Linux {wanted[0]}.{wanted[1]}, this is {release}")


def stat_file(served: InProcess) -> Callable[[], object]:
    path = served.path / "file"
    os.stat(path)
    assert not spent(served, lambda: os.stat(path)), "a warm stat should cost nothing"
    return lambda: os.stat(path)


def test_an_invalidated_entry_is_looked_up_again(served: InProcess) -> None:
    again = stat_file(served)
    assert served.session.notify(wire.notify_inval_entry(ROOT, b"file"))
    assert spent(served, again)["LOOKUP"] == 1


def test_an_invalidated_missing_name_is_looked_up_again(served: InProcess) -> None:
    missing = served.path / "missing"
    assert not missing.exists()
    assert not spent(served, missing.exists)
    assert served.session.notify(wire.notify_inval_entry(ROOT, b"missing"))
    assert spent(served, missing.exists)["LOOKUP"] == 1


def test_an_invalidated_inode_has_its_attributes_asked_for_again(served: InProcess) -> None:
    again = stat_file(served)
    assert served.session.notify(wire.notify_inval_inode(os.stat(served.path / "file").st_ino))
    assert spent(served, again) == {"GETATTR": 1}


def test_a_deleted_entry_is_looked_up_again(served: InProcess) -> None:
    again = stat_file(served)
    number = os.stat(served.path / "file").st_ino
    assert served.session.notify(wire.notify_delete(ROOT, number, b"file"))
    assert spent(served, again)["LOOKUP"] == 1


def test_a_new_epoch_has_everything_looked_up_again(served: InProcess) -> None:
    require_kernel(EPOCH_SINCE)
    again = stat_file(served)
    assert served.session.notify(wire.notify_inc_epoch())
    assert spent(served, again)["LOOKUP"] == 1


def test_a_pruned_inode_is_forgotten(served: InProcess) -> None:
    require_kernel(PRUNE_SINCE)
    again = stat_file(served)
    number = os.stat(served.path / "file").st_ino
    assert served.session.notify(wire.notify_prune([number]))
    assert spent(served, again)["LOOKUP"] == 1


def test_what_is_not_cached_is_said_to_be_unknown(served: InProcess) -> None:
    assert not served.session.notify(wire.notify_inval_inode(4711))
