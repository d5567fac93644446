"""Images of trees: made once, kept like blobs, and made anew when they are gone or damaged."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from casfs import erofs, images, kernel_engine, overlay
from casfs.planning import Subtree
from store.digest import Digest
from store.errors import MissingTree
from store.layout import blob_path
from store.repository import Store
from tests.casfs.conftest import Mounts
from tests.conftest import Requirements

CONTENT = b"the bytes of a blob\n" * 300
FILES = {"directory/file": CONTENT, "other": b"other"}


@pytest.fixture(autouse=True)
def _always_an_image(requires: Requirements, monkeypatch: pytest.MonkeyPatch) -> None:
    requires.admin()
    monkeypatch.setattr(kernel_engine, "TMPFS_NODES", 0)


def _image(mounts: Mounts, root: Digest) -> Path:
    with Store.open(mounts.root) as store, store.index.view() as view:
        subtree = Subtree(b"", root, 0, 0)
        found = images.find_image(view, subtree, overlay.find_family())
    assert found is not None
    return mounts.layout.blobs / blob_path(found.digest)


def test_an_image_is_made_once(mounts: Mounts) -> None:
    root = mounts.add_files(FILES)
    mounts.mount(root, "kernel")
    image = _image(mounts, root)
    made = image.stat()
    mounts.mount(root, "kernel")
    assert _image(mounts, root) == image
    assert os.path.samestat(image.stat(), made)


def test_an_image_is_made_once_when_several_ask_at_a_time(mounts: Mounts, monkeypatch: pytest.MonkeyPatch) -> None:
    root = mounts.add_files(FILES)
    made: list[int] = []
    real = erofs.write_image

    def slowly(*arguments: Any) -> Iterator[bytes]:
        made.append(1)
        time.sleep(0.2)
        return real(*arguments)

    monkeypatch.setattr(images, "write_image", slowly)
    with Store.open(mounts.root) as store, ThreadPoolExecutor(4) as pool:
        places = [mounts.place() for _ in range(4)]
        for done in [pool.submit(kernel_engine.mount_tree, store, root, place) for place in places]:
            done.result()
    assert len(made) == 1
    assert {(place / "other").read_bytes() for place in places} == {b"other"}


@pytest.mark.parametrize("damage", ["collected", "cut short"])
def test_an_image_that_is_gone_or_damaged_is_made_anew(mounts: Mounts, damage: str) -> None:
    root = mounts.add_files(FILES)
    mounts.mount(root, "kernel").unmount()
    image = _image(mounts, root)
    right = image.read_bytes()
    image.unlink()
    if damage == "cut short":
        image.write_bytes(right[:-4096])
    mounted = mounts.mount(root, "kernel")
    assert (mounted.path / "directory" / "file").read_bytes() == CONTENT
    assert _image(mounts, root).read_bytes() == right


def test_a_mount_outlives_its_image(mounts: Mounts) -> None:
    root = mounts.add_files(FILES)
    mounted = mounts.mount(root, "kernel")
    _image(mounts, root).unlink()
    assert (mounted.path / "directory" / "file").read_bytes() == CONTENT


def test_a_blob_removed_since_the_image_was_made_is_noticed(mounts: Mounts) -> None:
    root = mounts.add_files(FILES)
    mounts.mount(root, "kernel").unmount()
    mounts.age()
    with Store.open(mounts.root) as store:
        assert store.collector.collect(0, 0).removed_blobs
    with pytest.raises(MissingTree):
        mounts.mount(root, "kernel")
