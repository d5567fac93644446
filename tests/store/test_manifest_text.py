"""Manifests as text: what is written is read back, and what is wrong is refused with its line and reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.digest import Digest, DigestFunction
from store.entries import Entry, FileEntry, ReferenceEntry, Stamp, SymlinkEntry, path_order
from store.errors import BadManifest
from store.importing import ScanOptions
from store.index import Table
from store.manifest_text import format_manifest, parse_header, parse_manifest, quote, unquote
from store.repository import Store
from store.trees import export_items

BLAKE3 = DigestFunction.BLAKE3
ONE = BLAKE3.of(b"one")
RAW = st.binary(min_size=1, max_size=60).filter(lambda raw: b"\0" not in raw)
COMPONENTS = RAW.map(lambda raw: raw.replace(b"/", b"|")).filter(lambda name: name not in (b".", b".."))
PATHS = st.lists(COMPONENTS, min_size=1, max_size=4).map(b"/".join)
TIMES = st.none() | st.integers(-(1 << 63), (1 << 63) - 1)
STAMPS = st.builds(Stamp, *[st.integers(0, (1 << 63) - 1)] * 3, *[st.integers(-(1 << 63), (1 << 63) - 1)] * 2)
CONTENTS = st.binary(max_size=3).map(BLAKE3.of)


def _entry(path: bytes) -> st.SearchStrategy[tuple[bytes, Entry | None]]:
    name = path.rpartition(b"/")[2]
    return st.tuples(
        st.just(path),
        st.one_of(
            st.none(),
            st.builds(FileEntry, st.just(name), CONTENTS, st.booleans(), TIMES),
            st.builds(SymlinkEntry, st.just(name), RAW, TIMES),
            st.builds(ReferenceEntry, st.just(name), RAW.map(lambda raw: b"/" + raw), STAMPS, st.booleans()),
        ),
    )


def _without_clashes(paths: set[bytes]) -> list[bytes]:
    """Those paths that are no directory of another, in order."""
    parents = {b"/".join(path.split(b"/")[:depth]) for path in paths for depth in range(1, path.count(b"/") + 1)}
    return sorted(paths - parents, key=path_order)


ITEMS = (
    st.sets(PATHS, max_size=12).map(_without_clashes).flatmap(lambda paths: st.tuples(*map(_entry, paths))).map(list)
)


@given(st.binary(max_size=100))
def test_quoting_keeps_every_byte_and_every_field_apart(raw: bytes) -> None:
    text = quote(raw)
    assert unquote(text) == raw
    assert text.splitlines() in ([], [text])
    assert "\t" not in text
    text.encode("utf-8")


@given(ITEMS)
def test_lines_come_back_as_the_items_they_were(items: list[tuple[bytes, Entry | None]]) -> None:
    first, *lines = "".join(format_manifest(items, BLAKE3)).splitlines(keepends=True)
    assert parse_header(first, "text") is BLAKE3
    assert [item[:2] for item in parse_manifest(lines, BLAKE3, "text")] == items


def test_a_tree_exported_and_imported_is_the_same_tree(tmp_path: Path, store: Store, sample_tree: Path) -> None:
    (sample_tree / "new\nline\ttab %41 \x85").write_text("awkward")
    for options in (ScanOptions(), ScanOptions(DigestFunction.SHA256, keep_mtime=True), ScanOptions(reference=True)):
        tree = store.importer.from_directories([(b"", sample_tree)], options)
        with store.index.view() as view:
            text = "".join(format_manifest(export_items(view, tree), options.function))
        with Store.open(tmp_path / "other") as other:
            assert other.importer.from_text(text.splitlines(keepends=True), "text").digest == tree.digest
        (tmp_path / "other.txt").write_text(text, encoding="utf-8")
        assert "new%0Aline%09tab %2541 %C2%85" in text
        assert "caf%E9" in text


def _line(kind: str = "f", digest: str = f"{ONE.hex}/3", mtime: str = "-", path: str = "a") -> str:
    return f"{kind}\t{digest}\t{mtime}\t{path}\n"


HEADER = "casfs manifest 1 blake3\n"
EMPTY_HASH = BLAKE3.of(b"").hex


@pytest.mark.parametrize(
    ("lines", "line", "why"),
    [
        ([], 1, "a manifest begins with"),
        (["hello\n"], 1, "a manifest begins with"),
        (["casfs manifest 2 blake3\n"], 1, "version 2"),
        (["casfs manifest 1 md5\n"], 1, "unknown digest function"),
        ([HEADER, _line(path="../up")], 2, r"the name '..' can't be"),
        ([HEADER, "# fine\n", "\n", _line(path="a/../b")], 4, r"the name '..' can't be"),
        ([HEADER, _line(path="a/./b")], 2, r"the name '.' can't be"),
        ([HEADER, _line(path="/etc/passwd")], 2, "is absolute"),
        ([HEADER, _line(path="a%00b")], 2, "NUL"),
        ([HEADER, _line(path="a\0b")], 2, "has to be written %XX"),
        ([HEADER, _line(path="a\r")], 2, "has to be written %XX"),
        ([HEADER, _line(path="100%")], 2, "has to be written %XX"),
        ([HEADER, _line(path="")], 2, "an empty name"),
        ([HEADER, _line(path="a//b")], 2, "an empty name"),
        ([HEADER, _line(path="a/")], 2, "an empty name"),
        ([HEADER, _line(path="n" * 256)], 2, "256 bytes, 255 is the most"),
        ([HEADER, _line(), _line(path="b"), _line()], 4, "'a' is there twice; see line 2"),
        ([HEADER, "d\ta\n", "d\ta\n"], 3, "'a' is there twice; see line 2"),
        ([HEADER, _line(), "d\ta\n"], 3, "'a' is there twice; see line 2"),
        ([HEADER, _line(), _line(path="b"), _line(path="a/x")], 4, "'a' is a file and a directory at once; see line 2"),
        ([HEADER, _line(path="a/x/y"), _line(path="a.b"), _line()], 4, "'a' is a file and a directory.*see line 2"),
        ([HEADER, _line(digest="abc/3")], 2, "is not a hash"),
        ([HEADER, _line(digest=ONE.hex)], 2, "has no size"),
        ([HEADER, _line(digest=f"{ONE.hex.upper()}/3")], 2, "is not a hash"),
        ([HEADER, _line(digest=f"sha256:{ONE.hex}/3")], 2, "not of the manifest's function"),
        ([HEADER, _line(digest=f"{ONE.hex}/{1 << 63}")], 2, "over 63 bits"),
        ([HEADER, _line(digest=f"{ONE.hex}/0")], 2, "contradicts itself"),
        ([HEADER, _line(digest=f"{EMPTY_HASH}/1")], 2, "contradicts itself"),
        ([HEADER, _line(), _line(path="b", digest=f"{ONE.hex}/4")], 3, "wrong size.*has 3 bytes"),
        ([HEADER, _line(mtime="soon")], 2, "is not a number"),
        ([HEADER, _line(mtime="1_000")], 2, "is not a number"),
        ([HEADER, _line(mtime=str(1 << 63))], 2, "64 bits"),
        ([HEADER, _line(kind="q")], 2, "not a manifest line"),
        ([HEADER, "f a b c\n"], 2, "not a manifest line"),
        ([HEADER, _line(kind="l", digest="")], 2, "a symlink's target"),
        ([HEADER, _line(kind="l", digest="x" * 4096)], 2, "a symlink's target"),
        ([HEADER, _line(kind="r", digest="1:2:3", mtime="/x")], 2, "a stamp is"),
        ([HEADER, _line(kind="r", digest="1:2:-3:4:5", mtime="/x")], 2, "no file has"),
        ([HEADER, _line(kind="r", digest="1:2:3:4:5", mtime="x")], 2, "an absolute host path"),
    ],
)
def test_a_bad_line_is_refused_with_its_number_and_reason_and_changes_nothing(
    store: Store, lines: list[str], line: int, why: str
) -> None:
    before = store.index.statistics()
    with pytest.raises(BadManifest, match=f"(?s)^{re.escape('list.txt')}:{line}: .*{why}"):
        store.importer.from_text(lines, "list.txt")
    assert store.index.statistics() == before


def test_a_size_that_the_stored_blob_contradicts_is_refused(store: Store) -> None:
    with store.ingest() as ingest:
        ingest.add_bytes(b"one", BLAKE3)
    with pytest.raises(BadManifest, match=r"list:2: .*wrong size.*has 3 bytes"):
        store.importer.from_text([HEADER, _line(digest=f"{ONE.hex}/5")], "list")
    with store.index.view() as view:
        assert not view.count(Table.DIRECTORIES)


def test_lines_may_come_in_any_order_and_without_their_directories(store: Store) -> None:
    lines = [_line(path="z/y/x"), _line(path="a-b"), _line(path="a/b"), "d\te/m/pty\n", "d\ta\n"]
    tree = store.importer.from_text([HEADER, *lines], "list")
    assert tree.nodes == 1 + 3 + 2 + 1 + 3
    assert store.importer.from_text([HEADER, *reversed(lines)], "list").digest == tree.digest


def test_a_digest_may_say_its_function(store: Store) -> None:
    said = store.importer.from_text([HEADER, _line(digest=str(ONE))], "list")
    assert said.digest == store.importer.from_text([HEADER, _line()], "list").digest
    assert Digest.parse(str(said.digest)) == said.digest
