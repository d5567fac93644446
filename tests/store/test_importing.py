"""Trees from directories, Directory messages and checklists."""

from __future__ import annotations

import os
import random
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from store.digest import Digest, DigestFunction
from store.directory import encode_directory
from store.entries import DirectoryEntry, Entry, FileEntry, ReferenceEntry, Stamp, SymlinkEntry
from store.errors import BadInput, BadManifest, BadName, BadTree, DigestMismatch, MissingBlob
from store.importing import ScanOptions
from store.repository import Store
from store.scan import exclude_globs
from store.trees import Directory, find_directory, walk
from tests.conftest import Requirements

BLAKE3, SHA256 = DigestFunction.BLAKE3, DigestFunction.SHA256


def _paths(store: Store, tree: Directory) -> dict[bytes, Entry]:
    with store.index.view() as view:
        return dict(walk(view, tree))


def _scan(store: Store, top: Path, **options: object) -> dict[bytes, Entry]:
    tree = store.importer.from_directories([(b"", top)], ScanOptions(**options))  # type: ignore[arg-type]
    return _paths(store, tree)


@pytest.mark.parametrize("function", DigestFunction)
def test_a_tree_has_exactly_what_the_directory_has(store: Store, sample_tree: Path, function: DigestFunction) -> None:
    found = _scan(store, sample_tree, function=function, keep_mtime=True)
    expected: dict[bytes, Entry | None] = {}
    top = os.fsencode(sample_tree)
    for directory, directories, files in os.walk(top):
        for name in [*directories, *files]:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            where = os.path.relpath(path, top)
            if stat.S_ISLNK(status.st_mode):
                expected[where] = SymlinkEntry(name, os.readlink(path), status.st_mtime_ns)
            elif stat.S_ISREG(status.st_mode):
                digest = function.of(Path(os.fsdecode(path)).read_bytes())
                expected[where] = FileEntry(name, digest, bool(status.st_mode & 0o100), status.st_mtime_ns)
            else:
                expected[where] = None
    assert {path: None if isinstance(e, DirectoryEntry) else e for path, e in found.items()} == expected
    digests = [entry.digest for entry in found.values() if isinstance(entry, FileEntry)]
    assert all(store.blobs.is_verified(digest) for digest in digests)


def test_adding_a_tree_again_finds_the_same_and_publishes_nothing(store: Store, sample_tree: Path) -> None:
    first = store.importer.from_directories([(b"", sample_tree)], ScanOptions())
    before = sorted(entry.stat().st_ino for _, _, entry in store.blobs.files())
    assert store.importer.from_directories([(b"", sample_tree)], ScanOptions()).digest == first.digest
    assert sorted(entry.stat().st_ino for _, _, entry in store.blobs.files()) == before


@pytest.mark.parametrize(
    ("globs", "gone"),
    [
        (["*.txt"], {b"README.txt", *(b"many/%03d.txt" % number for number in range(200))}),
        (["twin.*"], {b"include/twin.h", b"src/twin.c"}),
        (["src/*"], {b"src/twin.c", b"src/big.bin"}),
        (["hollow"], {b"hollow"}),
        (
            ["links/", "nothing"],
            {b"links", *(b"links/" + n for n in (b"to-file", b"to-directory", b"absolute", b"dangling"))},
        ),
        (["caf?"], {b"caf\xe9"}),
    ],
)
def test_what_is_excluded_is_left_out(store: Store, sample_tree: Path, globs: list[str], gone: set[bytes]) -> None:
    everything = _scan(store, sample_tree)
    left = _scan(store, sample_tree, excluded=exclude_globs(globs))
    assert everything.keys() - left.keys() == gone


@pytest.mark.parametrize("kind", ["socket", "FIFO", "character device", "block device"])
def test_special_files_are_refused_by_name(
    store: Store, sample_tree: Path, kind: str, requires: Requirements, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sample_tree / "src" / "odd"
    if kind == "socket":
        monkeypatch.chdir(path.parent)  # a socket's path has to be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("odd")
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        requires.admin()
        os.mknod(path, (stat.S_IFCHR if kind == "character device" else stat.S_IFBLK) | 0o600, os.makedev(1, 3))
    with pytest.raises(BadInput, match=rf"src/odd' is a {kind}.*--exclude"):
        _scan(store, sample_tree)
    assert b"src/odd" not in _scan(store, sample_tree, excluded=exclude_globs(["odd"]))


def test_references_stay_where_they_are_with_their_stamp(store: Store, sample_tree: Path) -> None:
    found = _scan(store, sample_tree, reference=True)
    run = found[b"run.sh"]
    path = sample_tree / "run.sh"
    assert run == ReferenceEntry(b"run.sh", os.fsencode(path.resolve()), Stamp.of(path.stat()), True)
    assert not any(isinstance(entry, FileEntry) for entry in found.values())


def test_directories_are_grafted_side_by_side_from_several_places(store: Store, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    grafts = [(b"usr/two", tmp_path / "two"), (b"usr/one", tmp_path / "one"), (b"opt", tmp_path / "one")]
    found = _paths(store, store.importer.from_directories(grafts, ScanOptions()))
    assert found.keys() == {b"opt", b"opt/file", b"usr", b"usr/one", b"usr/one/file", b"usr/two", b"usr/two/file"}


@pytest.mark.parametrize(
    ("places", "why"),
    [
        ((b"a", b"a"), "twice"),
        ((b"a", b"a/b"), "at once"),
        ((b"", b"a"), "beside others"),
        ((b"../a", b"b"), r"'\.\.'"),
    ],
)
def test_grafts_that_clash_are_refused(store: Store, sample_tree: Path, places: tuple[bytes, ...], why: str) -> None:
    with pytest.raises((BadManifest, BadName), match=why):
        store.importer.from_directories([(place, sample_tree) for place in places], ScanOptions())


@pytest.mark.parametrize("reference", [False, True], ids=["copied", "by reference"])
def test_a_directory_that_holds_the_store_is_refused(store: Store, tmp_path: Path, reference: bool) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"the store itself lies there: .*--exclude"):
        store.importer.from_directories([(b"", tmp_path)], ScanOptions(reference=reference))
    left_out = ScanOptions(excluded=exclude_globs(["/store"]), reference=reference)
    assert store.importer.from_directories([(b"", tmp_path)], left_out).files == 1


def test_a_directory_that_is_none_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a directory"):
        _scan(store, tmp_path / "missing")


def _messages(store: Store) -> tuple[Digest, Digest]:
    """A root whose Directory messages are blobs that casfs hasn't interned, and the inner directory."""
    with store.ingest() as ingest:
        file = ingest.add_bytes(b"int x;\n", SHA256)
        inner = ingest.add_bytes(encode_directory([FileEntry(b"x.c", file, False)]), SHA256)
        empty = DirectoryEntry(b"empty", SHA256.of(b""))
        twice: list[Entry] = [
            DirectoryEntry(b"a", inner),
            DirectoryEntry(b"b", inner),
            empty,
            SymlinkEntry(b"l", b"a/x.c"),
        ]
        return ingest.add_bytes(encode_directory(twice), SHA256), inner


def test_a_root_of_directory_messages_becomes_a_tree(store: Store) -> None:
    root, _ = _messages(store)
    tree = store.importer.from_messages(root)
    assert (tree.digest, tree.nodes, tree.files) == (root, 7, 2)
    assert _paths(store, tree).keys() == {b"a", b"a/x.c", b"b", b"b/x.c", b"empty", b"l"}


def test_a_missing_directory_message_is_named_and_nothing_is_interned(store: Store) -> None:
    absent = SHA256.of(b"not here")
    with store.ingest() as ingest:
        root = ingest.add_bytes(encode_directory([DirectoryEntry(b"a", absent)]), SHA256)
    with pytest.raises(MissingBlob, match=absent.hex):
        store.importer.from_messages(root)
    with store.index.view() as view:
        assert find_directory(view, root) is None


def test_a_blob_that_is_no_directory_message_is_refused(store: Store) -> None:
    with store.ingest() as ingest:
        root = ingest.add_bytes(b"hello", SHA256)
    with pytest.raises(BadTree, match="not a valid Directory message"):
        store.importer.from_messages(root)


def test_a_tree_beyond_all_bounds_is_refused(store: Store) -> None:
    with store.ingest() as ingest:
        digest = ingest.add_bytes(b"", BLAKE3)
        for _ in range(80):
            digest = ingest.add_bytes(
                encode_directory([DirectoryEntry(b"a", digest), DirectoryEntry(b"b", digest)]), BLAKE3
            )
    with pytest.raises(BadTree, match="too large"):
        store.importer.from_messages(digest)


CHECKSUMS = pytest.mark.parametrize(
    ("command", "function"),
    [
        (["sha256sum"], SHA256),
        (["sha256sum", "--tag"], SHA256),
        (["sha256sum", "--binary"], SHA256),
        (["b3sum"], BLAKE3),
    ],
)


@CHECKSUMS
@pytest.mark.parametrize("base", [True, False])
def test_checklists_of_the_real_programs_become_trees(
    store: Store, tmp_path: Path, command: list[str], function: DigestFunction, base: bool, requires: Requirements
) -> None:
    requires.programs(command[0])
    top = tmp_path / "top"
    names = ["plain", "a b", "*star", "new\nline", "back\\slash", "sub/dir/ leading", "100%"]
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(f"content of {name}")
    (top / "plain").chmod(0o755)
    (top / "link").symlink_to("plain")
    output = subprocess.run(
        [*command, *names, "./link"], cwd=top, check=True, capture_output=True, timeout=20
    ).stdout.splitlines(keepends=True)
    if not base:
        store.importer.from_directories([(b"", top)], ScanOptions(function))
    tree = store.importer.from_checklist(output, function, "list", top if base else None)
    files = {path: entry for path, entry in _paths(store, tree).items() if isinstance(entry, FileEntry)}
    assert files.keys() == {name.encode() for name in [*names, "link"]}
    for path, entry in files.items():
        assert entry.digest == function.of((top / os.fsdecode(path)).read_bytes())
        assert entry.executable == (path in (b"plain", b"link"))


HASH = "ab" * 32


@pytest.mark.parametrize(
    ("lines", "line", "why"),
    [
        (["hello\n"], 1, "not a line of sha256sum or b3sum"),
        ([f"{HASH[1:]}  a\n"], 1, "not a line"),
        ([f"{HASH}  a\n", "\n", f"{HASH}  ../a\n"], 3, r"'\.\.'"),
        ([f"{HASH}  /etc/passwd\n"], 1, "is absolute"),
        ([f"{HASH}  a\n", f"{HASH}  ./a\n"], 2, "there twice; see line 1"),
        ([f"{HASH}  a/b\n", f"{HASH}  a\n"], 2, "a file and a directory at once; see line 1"),
        ([f"{HASH}  {'n' * 256}\n"], 1, "256 bytes"),
        ([f"\\{HASH}  a\\nb/../c\n"], 1, r"'\.\.'"),
    ],
)
def test_a_bad_line_of_a_checklist_is_refused_with_its_number(
    store: Store, lines: list[str], line: int, why: str
) -> None:
    with pytest.raises(BadManifest, match=f"^list:{line}: .*{why}"):
        store.importer.from_checklist([text.encode() for text in lines], SHA256, "list")


def test_a_listed_file_that_changed_is_refused_by_line(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("changed")
    with pytest.raises(DigestMismatch, match=r"^list:1: .*nothing was stored"):
        store.importer.from_checklist([f"{HASH}  a\n".encode()], SHA256, "list", tmp_path)
    with pytest.raises(BadInput, match=r"^list:1: can't read .*missing"):
        store.importer.from_checklist([f"{HASH}  missing\n".encode()], SHA256, "list", tmp_path)
    assert list(store.blobs.files()) == []


def test_a_listed_blob_that_is_not_here_says_what_to_do(store: Store) -> None:
    with pytest.raises(MissingBlob, match=r"^list:1: .*--base"):
        store.importer.from_checklist([f"{HASH}  a\n".encode()], SHA256, "list")


def test_a_large_tree_is_published_in_rounds_and_complete(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.importing._ROUND_CHUNKS", 1)
    monkeypatch.setattr("store.importing._CHUNK_FILES", 7)
    chance = random.Random(1)
    for number in range(60):
        path = tmp_path / "top" / f"d{number % 5}" / f"{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(chance.randbytes(50))
    done: list[tuple[int, int]] = []
    tree = store.importer.from_directories(
        [(b"", tmp_path / "top")], ScanOptions(), lambda files, size: done.append((files, size))
    )
    assert (sum(files for files, _ in done), sum(size for _, size in done)) == (60, 3000)
    assert (tree.files, tree.bytes) == (60, 3000)
    assert store.manifests.count_missing(tree.digest) == 0
