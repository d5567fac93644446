"""The books of backing ids: one a content, closed only when nobody uses it, and not too many kept."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casfs import backing, control
from casfs.backing import BackingRegistry
from casfs.contents import Contents, ReadOnlyGateway
from casfs.syscalls import BackingId
from casfs.tree import ProjectedTree
from store.importing import ScanOptions
from store.repository import Store
from tests.casfs.conftest import InProcess, Mounts, wait_until


class FakeKernelIds:
    """Gives ids out and takes them back; refuses what the kernel would."""

    def __init__(self) -> None:
        self.living: set[int] = set()
        self.last = 0
        self.refusal = 0

    def register(self, device: int, descriptor: int) -> BackingId:
        if self.refusal:
            raise OSError(self.refusal, os.strerror(self.refusal))
        self.last += 1
        self.living.add(self.last)
        return BackingId(self.last)

    def close(self, device: int, backing_id: BackingId) -> None:
        if backing_id not in self.living:
            raise OSError(errno.ENOENT, "no such id")
        self.living.remove(backing_id)


@pytest.fixture
def ids(monkeypatch: pytest.MonkeyPatch) -> FakeKernelIds:
    fake = FakeKernelIds()
    monkeypatch.setattr(backing, "register_backing", fake.register)
    monkeypatch.setattr(backing, "close_backing", fake.close)
    return fake


def must(backing_id: BackingId | None) -> BackingId:
    assert backing_id is not None
    return backing_id


def test_a_content_has_one_id_however_often_it_is_opened(ids: FakeKernelIds) -> None:
    registry = BackingRegistry(0)
    assert registry.find(b"a") is None
    first = must(registry.register(b"a", 5))
    assert registry.register(b"a", 6) == registry.find(b"a") == first
    assert registry.register(b"b", 7) != first
    assert registry.statistics() == {"open": 2, "idle": 0, "registered": 2}


def test_an_id_is_kept_for_the_next_open_when_the_last_is_over(ids: FakeKernelIds) -> None:
    registry = BackingRegistry(0)
    first = must(registry.register(b"a", 5))
    must(registry.find(b"a"))
    registry.release(first)
    assert registry.statistics()["open"] == 1
    registry.release(first)
    assert registry.statistics() == {"open": 0, "idle": 1, "registered": 1}
    assert registry.find(b"a") == first
    assert ids.living == {first}


def test_of_ids_that_nobody_uses_the_one_unused_longest_is_closed(ids: FakeKernelIds) -> None:
    registry = BackingRegistry(0, idle=2)
    used = [must(registry.register(b"%d" % number, 5)) for number in range(4)]
    for number in (1, 0, 2):
        registry.release(used[number])
    assert ids.living == {used[0], used[2], used[3]}
    assert registry.find(b"1") is None
    assert must(registry.register(b"1", 5)) not in used, "registered anew"


@pytest.mark.parametrize("number", [errno.ELOOP, errno.EOPNOTSUPP])
def test_what_the_kernel_cannot_pass_through_is_never_tried_again(ids: FakeKernelIds, number: int) -> None:
    """An inode must not be open in both modes, so the answer holds for good."""
    registry = BackingRegistry(0)
    ids.refusal = number
    assert registry.register(b"a", 5) is None
    ids.refusal = 0
    assert registry.register(b"a", 5) is None
    assert registry.register(b"b", 5) is not None


def test_other_refusals_are_errors_and_leave_no_trace(ids: FakeKernelIds) -> None:
    registry = BackingRegistry(0)
    ids.refusal = errno.ENOMEM
    with pytest.raises(OSError, match="allocate"):
        registry.register(b"a", 5)
    ids.refusal = 0
    assert registry.register(b"a", 5) is not None


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 4)), max_size=60), limit=st.integers(0, 3))
def test_an_id_in_use_is_never_closed(steps: list[tuple[bool, int]], limit: int) -> None:
    fake = FakeKernelIds()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backing, "register_backing", fake.register)
        patch.setattr(backing, "close_backing", fake.close)
        registry = BackingRegistry(0, idle=limit)
        opens: list[BackingId] = []
        for is_open, number in steps:
            if is_open:
                key = b"%d" % number
                opens.append(must(registry.find(key) or registry.register(key, 5)))
            elif opens:
                registry.release(opens.pop(number % len(opens)))
            assert set(opens) <= fake.living
            assert len(fake.living - set(opens)) <= limit
            assert registry.statistics()["open"] == len(set(opens))


# In real mounts


def test_equal_files_share_an_id_and_opening_again_registers_nothing(mounts: Mounts) -> None:
    mounted = mounts.mount(mounts.add_files({f"copy{number}": b"same" * 5000 for number in range(5)}), "passthrough")
    for _ in range(3):
        for number in range(5):
            assert (mounted.path / f"copy{number}").read_bytes() == b"same" * 5000
    with (mounted.path / "copy0").open("rb"), (mounted.path / "copy1").open("rb"):
        assert control.statistics(mounted.path)["backing_ids"]["open"] == 1
    wait_until(lambda: control.statistics(mounted.path)["backing_ids"]["open"] == 0, "the releases")
    assert control.statistics(mounted.path)["backing_ids"] == {"open": 0, "idle": 1, "registered": 1}


def test_with_no_idle_ids_every_file_is_still_read_right(
    store: Store, tmp_path: Path, serve: Callable[..., InProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids are closed all the time, also while others open the same content."""
    monkeypatch.setattr(BackingRegistry.__init__, "__defaults__", (0,))
    (tmp_path / "tree").mkdir()
    for number in range(20):
        (tmp_path / "tree" / str(number)).write_bytes(b"%d" % (number % 5) * 5000)
    root = store.importer.from_directories([(b"", tmp_path / "tree")], ScanOptions())
    contents = Contents(store.blobs, ReadOnlyGateway(store.layout))
    running = serve(ProjectedTree(store.index, root), contents, passthrough=True)
    for _ in range(10):
        for number in range(20):
            assert (running.path / str(number)).read_bytes() == b"%d" % (number % 5) * 5000
    wait_until(lambda: running.session.statistics()["backing_ids"]["open"] == 0, "the releases")
    assert running.session.statistics()["backing_ids"]["registered"] > 5
    contents.close()
