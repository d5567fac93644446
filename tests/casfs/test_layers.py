"""Layers kept warm: mounts stacked from them show the tree, and what is kept follows the store and its budget.

Each test is made as root and in a user namespace: in a process of its own, as
a process can enter one only once, and never comes back.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from store.digest import Digest
from store.importing import ScanOptions
from store.repository import Store
from tests.conftest import Requirements, make_sample_tree

REPOSITORY = Path(__file__).resolve().parents[2]

_COMMON = """
import json, os, sys
from pathlib import Path
from casfs import layers, overlay, planning
from casfs.layers import Layers
from casfs.overlay import Family, stack
from casfs.sandbox import Sandboxes, enter_namespace
from store.digest import Digest
from store.entries import DirectoryEntry, FileEntry
from store.repository import Store
from store.treebuilder import TreeBuilder
from store.trees import get_directory, list_entries

place, privileged, roots = Path(sys.argv[1]), sys.argv[2] == "root", [Digest.parse(text) for text in sys.argv[3:]]
enter_namespace(privileged=privileged)

def snapshot(top):
    found = {}
    for directory, names, files in os.walk(top):
        for name in files + names:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            content = None
            if os.path.islink(path):
                content = os.readlink(path)
            elif name in files:
                content = Path(path).read_bytes().hex()
            executable = bool(status.st_mode & 0o100) if name in files else None
            found[os.path.relpath(path, top)] = [content, executable]
    return found

def show(sandboxes, root):
    with sandboxes.open(root) as sandbox:
        return snapshot(sandbox.scratch.merged)
"""


@pytest.fixture(params=["root", "user namespace"])
def run(request: pytest.FixtureRequest, tmp_path: Path, requires: Requirements) -> Callable[..., Any]:
    """Run a script with `_COMMON` before it; returns what it prints, as JSON."""
    requires.admin()

    def start(script: str, *roots: Digest) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", _COMMON + script, tmp_path / "store", request.param, *map(str, roots)],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return start


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], list[Digest]]:
    """A store, four versions of a tree with large subtrees, of which each changes a little, and their roots in it."""
    base = tmp_path_factory.mktemp("versions")
    sample_tree = make_sample_tree(base / "sample")
    tops = []
    for number in range(4):
        top = base / f"tree{number}"
        shutil.copytree(sample_tree, top / "vendor" / "sample", symlinks=True)
        for directory in ("include/a", "include/b", "vendor/c"):
            (top / directory).mkdir(parents=True)
            for index in range(150):
                (top / directory / f"h{index}.h").write_text(f"#define {directory[-1].upper()} {index}\n")
        (top / "include" / "b" / "h7.h").write_text(f"version {number}\n")
        (top / "main.c").write_text(f"int version = {number};\n")
        tops.append(top)
    with Store.open(base / "store") as store:
        roots = [store.importer.from_directories([(b"", top)], ScanOptions()).digest for top in tops]
    return base / "store", tops, roots


@pytest.fixture
def versions(made_once: tuple[Path, list[Path], list[Digest]], tmp_path: Path) -> tuple[list[Path], list[Digest]]:
    """The versions, to look at, and their roots in a store of the test's own; before `store`, which opens it."""
    made, tops, roots = made_once
    shutil.copytree(made, tmp_path / "store", symlinks=True)
    return tops, roots


def snapshot(top: Path) -> dict[str, list[Any]]:
    """As `_COMMON` makes one, of the tree on the host."""
    space: dict[str, Any] = {"__name__": "snapshot"}
    exec(_COMMON[_COMMON.index("def snapshot") : _COMMON.index("def show")], {"os": os, "Path": Path}, space)
    found: dict[str, list[Any]] = space["snapshot"](top)
    return found


def test_every_version_is_shown_as_it_is_and_known_subtrees_are_not_laid_out_again(
    run: Callable[..., Any], versions: tuple[list[Path], list[Digest]]
) -> None:
    tops, roots = versions
    results = run(
        """
results = []
with Store.open(place) as store, Sandboxes(store, engine="kernel") as sandboxes:
    for root in [*roots, *roots]:
        with sandboxes.open(root) as sandbox:
            kept = sandboxes.projector.get_layouts().statistics()
            results.append([snapshot(sandbox.scratch.merged), sandbox.projection.laid_out, kept["layers"]])
print(json.dumps(results))
""",
        *roots,
    )
    for (shown, _, _), top in zip(results, tops * 2, strict=True):
        assert shown == snapshot(top)
    laid_out = [count for _, count, _ in results]
    assert laid_out[0] > 600
    # The second time vendor/ and include/a are known; include/b, which changes each time, never is.
    assert laid_out[1] < 200 and laid_out[2] < 200 and laid_out[3] < 200
    # And in the end the roots themselves come again.
    assert laid_out[4:] == [0, 0, 0, 0]


def test_both_carriers_and_both_families_show_the_same(
    run: Callable[..., Any], versions: tuple[list[Path], list[Digest]], request: pytest.FixtureRequest
) -> None:
    tops, roots = versions
    results = run(
        """
results = []
with Store.open(place) as store:
    for family in Family:
        if family is Family.TRUSTED and not privileged:
            continue
        layers.find_family = lambda: family
        for nodes in (0, 10**9):
            layers.IMAGE_NODES = nodes
            with Sandboxes(store, engine="kernel") as sandboxes:
                for root in roots:
                    shown = show(sandboxes, root)
                kept = sandboxes.projector.get_layouts().statistics()
                results.append([shown, kept["images"], kept["layers"]])
print(json.dumps(results))
""",
        *roots,
    )
    as_root = "root" in request.node.callspec.id
    assert [(images > 0, layers > 0) for _, images, layers in results] == (
        [(True, True), (False, True)] * 2 if as_root else [(False, True)] * 2
    )
    assert all(shown == snapshot(tops[-1]) for shown, _, _ in results)


def test_what_is_kept_stays_within_the_budget_and_what_is_in_use_stays(
    run: Callable[..., Any], versions: tuple[list[Path], list[Digest]]
) -> None:
    _, roots = versions
    result = run(
        """
with Store.open(place) as store:
    few = Layers(store, budget=300_000)
    held = []
    for root in [*roots, *roots]:
        held.append(few.lay_out(root))
    over = few.statistics()
    for layout in held:
        layout.close()
    few.lay_out(roots[0]).close()
    few.lay_out(roots[1]).close()
    after = few.statistics()
    few.close()
    descriptors = len(os.listdir("/proc/self/fd"))
    none = Layers(store, budget=0)
    for root in [*roots, *roots]:
        none.lay_out(root).close()
    empty = none.statistics()
    none.close()
    print(json.dumps([over, after, empty, len(os.listdir("/proc/self/fd")) - descriptors]))
""",
        *roots,
    )
    over, after, empty, leaked = result
    assert over["bytes"] > over["budget"], "what is in use isn't dropped"
    assert after["bytes"] <= 800_000 and after["layers"] < over["layers"]
    assert empty["built"] > 0
    assert leaked == 0


def test_after_a_removal_a_kept_layer_is_looked_over_and_what_is_missing_is_an_error_or_fetched(
    run: Callable[..., Any], versions: tuple[list[Path], list[Digest]]
) -> None:
    _, roots = versions
    result = run(
        """
def read(sandboxes, name):
    with sandboxes.open(roots[0]) as sandbox:
        try:
            text = (sandbox.scratch.merged / name).read_text()
        except OSError as error:
            text = error.errno
        return [text, sandbox.projection.laid_out]

with Store.open(place) as store, Sandboxes(store, engine="kernel") as sandboxes:
    for _ in range(3):
        before = read(sandboxes, "include/a/h3.h")
    digest = store.blobs
    import store.layout as layout
    from store.digest import DigestFunction
    lost = DigestFunction.BLAKE3.of(b"#define A 3\\n")
    path = place / "blobs" / layout.blob_path(lost)
    aside = place / "tmp" / "aside"
    os.rename(path, aside)
    try:
        store.blobs.open(lost)
    except Exception:
        pass  # so the row is gone, as after a collection
    missing = read(sandboxes, "include/a/h3.h")
    other = read(sandboxes, "include/a/h4.h")
    os.rename(aside, path)
    again = read(sandboxes, "include/a/h3.h")
    print(json.dumps([before, missing, other, again]))
""",
        *roots,
    )
    assert result == [["#define A 3\n", 0], [5, 0], ["#define A 4\n", 0], ["#define A 3\n", 0]]


def test_two_that_want_one_layer_have_it_built_once(
    run: Callable[..., Any], versions: tuple[list[Path], list[Digest]]
) -> None:
    _, roots = versions
    built, shown = run(
        """
from concurrent.futures import ThreadPoolExecutor
with Store.open(place) as store, Sandboxes(store, engine="kernel") as sandboxes:
    show(sandboxes, roots[0])
    with ThreadPoolExecutor(4) as pool:
        shown = list(pool.map(lambda _: show(sandboxes, roots[0]), range(8)))
    print(json.dumps([sandboxes.projector.get_layouts().statistics()["built"], shown]))
""",
        *roots,
    )
    assert built == 1
    assert all(one == shown[0] for one in shown)


def test_a_tree_with_very_long_paths_and_many_levels_is_shown(
    run: Callable[..., Any], store: Store, tmp_path: Path
) -> None:
    from store.digest import DigestFunction
    from store.entries import FileEntry
    from store.treebuilder import TreeBuilder

    with store.ingest() as ingest:
        builder = TreeBuilder(store.index, ingest, DigestFunction.BLAKE3)
        content = ingest.add_bytes(b"deep", DigestFunction.BLAKE3)
        long = b"/".join([b"d" * 200] * 26 + [b"file"])
        deep = b"/".join([b"x"] * 200 + [b"file"])
        items = [(long, FileEntry(b"file", content, False)), (deep, FileEntry(b"file", content, False))]
        root = builder.finish(builder.add_paths(items)).digest
    assert len(long) > 5000
    found = run(
        """
with Store.open(place) as store, Sandboxes(store, engine="kernel") as sandboxes:
    with sandboxes.open(roots[0]) as sandbox:
        texts = []
        for name, depth in (("d" * 200, 26), ("x", 200)):
            directory = os.open(sandbox.scratch.merged, os.O_PATH)
            for _ in range(depth):
                directory = os.open(name, os.O_PATH, dir_fd=directory)
            texts.append(os.read(os.open("file", os.O_RDONLY, dir_fd=directory), 100).decode())
print(json.dumps(texts))
""",
        root,
    )
    assert found == ["deep", "deep"]


_MOVING = """
import random
from store.digest import DigestFunction
from store.entries import SymlinkEntry, path_order

def add(store, files):
    with store.ingest() as ingest:
        builder = TreeBuilder(store.index, ingest, DigestFunction.BLAKE3)
        items = []
        for path, content in sorted(files.items(), key=lambda item: path_order(item[0])):
            name = path.rpartition(b"/")[2]
            if isinstance(content, str):
                items.append((path, SymlinkEntry(name, os.fsencode(content))))
            else:
                items.append((path, FileEntry(name, ingest.add_bytes(content, DigestFunction.BLAKE3), False)))
        return builder.finish(builder.add_paths(items)).digest

def expected(files):
    found = {}
    for path, content in files.items():
        while path:
            is_link = isinstance(content, str)
            known = [content if is_link else content.hex(), None if is_link else False] if content is not None else None
            found[os.fsdecode(path)] = known or [None, None]
            path, content = path.rpartition(b"/")[0], None
    return found

def kinds(found):
    # What os.walk says of links, which may be names of directories or of files, isn't what this is about.
    return {path: content for path, (content, _) in found.items()}

files = {b"d%02d/e%d/f%03d" % (n % 25, n % 3, n): b"file %d" % (n % 500) for n in range(2300)}
files |= {b"d%02d/link" % n: "e1" for n in range(10)}
files |= {b"tiny%02d/%s" % (n, name): b"tiny" for n in range(30) for name in (b"a", b"b/c")}
choose = random.Random(7)

def change(files):
    files = dict(files)
    for path in choose.sample(sorted(files), 6):
        files[path] = b"changed %d" % choose.randrange(10**6)
    for path in choose.sample(sorted(files), 4):
        del files[path]
    path = choose.choice(sorted(path for path in files if path.count(b"/") == 2))
    files[path + b"/now/a/directory"] = files.pop(path)
    doomed = choose.choice(sorted({path.split(b"/")[0] for path in files if path.startswith(b"tiny") and b"/" in path}))
    for path in [path for path in files if path.startswith(doomed + b"/")]:
        del files[path]
    if choose.random() < 0.5:
        files[doomed] = b"was a directory"
    files[b"new/at/top%d" % choose.randrange(100)] = b"new"
    return files
"""


def test_a_tree_that_is_nearly_the_same_as_a_kept_one_is_shown_as_it_is_and_not_laid_out(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    results = run(
        _MOVING
        + """
results = []
with Store.open(place) as store, Sandboxes(store, engine="kernel") as sandboxes:
    trees = [files, *(change(files) for _ in range(6))]
    trees += [change(trees[1]), trees[2], trees[2], files]
    for tree in trees:
        with sandboxes.open(add(store, tree)) as sandbox:
            shown = snapshot(sandbox.scratch.merged)
            counts = sandboxes.projector.get_layouts().statistics()
            results.append([kinds(shown) == kinds(expected(tree)), sandbox.projection.laid_out, counts["differences"]])
            top = sandbox.scratch.merged
            for path in list(tree)[:50]:
                # Whatever of it is where, all of it can be written over and taken away.
                if not isinstance(tree[path], str):
                    (top / os.fsdecode(path)).write_bytes(b"by the action")
            shown = kinds(snapshot(top))
            written = b"by the action".hex(), "e1"
            results[-1][0] &= all(shown[os.fsdecode(path)] in written for path in list(tree)[:50])
print(json.dumps(results))
"""
    )
    assert all(right for right, _, _ in results)
    laid_out = [count for _, count, _ in results]
    assert laid_out[0] > 2300
    assert laid_out[1:] == [0] * (len(results) - 1)
    # What is seen once goes with its mount; what comes again is kept.
    assert [kept for _, _, kept in results] == [0] * 8 + [1, 1, 1]


def test_parts_that_come_again_become_layers_though_each_tree_is_nearly_the_same_as_a_kept_one(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """As of actions that all have another version of a library than the first one had."""
    results = run(
        _MOVING
        + """
results = []
with Store.open(place) as store:
    some = Layers(store)
    some.lay_out(add(store, files)).close()
    later = {**files, **{b"d%02d/e0/changed" % n: b"later" for n in range(25)}}
    for number in range(5):
        tree = {**later, b"project/%d" % number: b"", b"project/own": b"%d" % number}
        with some.lay_out(add(store, tree)) as layout:
            results.append([layout.fresh_nodes, some.statistics()["layers"], some.statistics()["differences"]])
print(json.dumps(results))
"""
    )
    # A difference; then its parts are known again, and are layers; then what is new is laid out, and no more.
    assert results[0] == [0, 1, 0]
    assert results[1][1] > 20
    assert all(laid_out < 300 for laid_out, *_ in results), "small directories are never layers"
    assert [layers for _, layers, _ in results[2:]] == [results[1][1]] * 3


def test_a_tree_in_which_much_changed_or_that_is_no_longer_in_the_index_is_laid_out(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    results = run(
        _MOVING
        + """
results = []
with Store.open(place) as store, Sandboxes(store, engine="kernel") as sandboxes:
    other = {path: b"of another version" if n % 10 == 0 else content for n, (path, content) in enumerate(files.items())}
    for tree in (files, other, files, change(other)):
        with sandboxes.open(add(store, tree)) as sandbox:
            shown = kinds(snapshot(sandbox.scratch.merged))
            results.append([shown == kinds(expected(tree)), sandbox.projection.laid_out])
    last = change(change(other))
    root = add(store, last)
    layers.find_directory = lambda view, digest: None
    with sandboxes.open(root) as sandbox:
        shown = kinds(snapshot(sandbox.scratch.merged))
        results.append([shown == kinds(expected(last)), sandbox.projection.laid_out])
print(json.dumps(results))
"""
    )
    assert all(right for right, _ in results)
    assert [count > 500 for _, count in results] == [True, True, False, False, True]


def test_what_is_missing_of_what_two_trees_have_in_common_is_fetched_or_an_error(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    result = run(
        _MOVING
        + """
import store.layout as layout
with Store.open(place) as store, Sandboxes(store, engine="kernel") as sandboxes:
    with sandboxes.open(add(store, files)):
        pass
    changed = {**files, b"d00/e0/f000": b"changed"}
    root = add(store, changed)
    lost = DigestFunction.BLAKE3.of(b"file 7")
    path = place / "blobs" / layout.blob_path(lost)
    os.rename(path, place / "tmp" / "aside")
    try:
        store.blobs.open(lost)
    except Exception:
        pass  # so the row is gone, as after a collection
    result = []
    for there in (False, True):
        if there:
            os.rename(place / "tmp" / "aside", path)
        with sandboxes.open(root) as sandbox:
            for name in (b"d07/e1/f007", b"d00/e0/f000", b"d08/e2/f008"):
                try:
                    result.append((sandbox.scratch.merged / os.fsdecode(name)).read_text())
                except OSError as error:
                    result.append(error.errno)
    print(json.dumps(result))
"""
    )
    assert result == [5, "changed", "file 8", "file 7", "changed", "file 8"]


def test_differences_are_dropped_before_what_they_are_over(run: Callable[..., Any], tmp_path: Path) -> None:
    kept, leaked = run(
        _MOVING
        + """
with Store.open(place) as store:
    first = Layers(store)
    first.lay_out(add(store, files)).close()
    first.close()
    descriptors = len(os.listdir("/proc/self/fd"))
    some = Layers(store, budget=layers.MEMORY_PER_NODE * 2500 + 300_000)
    with some.lay_out(add(store, files)):
        pass
    kept = []
    for _ in range(5):
        root = add(store, change(files))
        for _ in range(2):
            with some.lay_out(root):
                kept.append(some.statistics()["differences"])
    kept.append(some.statistics()["layers"])
    none = Layers(store, budget=0)
    for tree in (files, change(files), files):
        root = add(store, tree)
        for _ in range(2):
            none.lay_out(root).close()
    kept.append(none.statistics()["layers"])
    some.close()
    none.close()
    print(json.dumps([kept, len(os.listdir("/proc/self/fd")) - descriptors]))
"""
    )
    # One of them fits beside what it is over.
    assert kept == [0, *[1] * 9, 2, 0]
    assert leaked == 0


_COLLECTED = """
import threading, time
from store.blobs import pack_row, unpack_row
from store.index import Table

def age(store):
    def work(change):
        for key, value in list(change.scan(Table.BLOBS)):
            change.put(Table.BLOBS, key, pack_row(unpack_row(value)._replace(used=1)))
    store.index.update(work)

failures, removed = [], [0]
with Store.open(place) as store, Sandboxes(store, engine="kernel") as sandboxes:
    ended = threading.Event()

    def collect():
        while not ended.is_set():
            age(store)
            removed[0] += store.collector.collect(0, 0, grace=0).removed_blobs

    def use(number):
        # A tree of its own, of which nobody else holds the new blob, and the large subtrees of the others.
        with store.ingest() as ingest:
            content = b"only in %d" % number
            digest = ingest.add_bytes(content, roots[0].function)
            builder = TreeBuilder(store.index, ingest, roots[0].function)
            with store.index.view() as view:
                entries = [row.entry for row in list_entries(view, get_directory(view, roots[0]).id)]
            root = builder.finish(builder.add_directory([*entries, FileEntry(b"own", digest, False)])).digest
            sandbox = sandboxes.open(root)
        with sandbox:
            top = sandbox.scratch.merged
            for _ in range(2):
                time.sleep(0.002)
                if (top / "own").read_bytes() != content or (top / "include/a/h9.h").read_text() != "#define A 9\\n":
                    failures.append(number)

    lease = store.leases.acquire("test", [roots[0]], "the large subtrees")
    collector = threading.Thread(target=collect)
    collector.start()
    for number in range(int(COUNT)):
        use(number)
    ended.set()
    collector.join()
    meanwhile = removed[0]
    # What was made in this second is spared, and on a quick machine that is most of it.
    sandboxes.wait_closed()
    time.sleep(1.1)
    age(store)
    removed[0] += store.collector.collect(0, 0, grace=0).removed_blobs
    lease.release()
print(json.dumps([failures, meanwhile, removed[0]]))
"""


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_a_collection_never_takes_what_a_sandbox_can_see(
    run: Callable[..., Any], versions: tuple[list[Path], list[Digest]], count: int
) -> None:
    failures, meanwhile, removed = run(f"COUNT = {count}\n{_COLLECTED}", *versions[1])
    assert failures == []
    assert meanwhile > 0
    assert removed >= count // 2, "and what no sandbox sees any more goes"


def test_without_a_fuse_device_what_is_missing_is_fetched_before(
    run: Callable[..., Any], versions: tuple[list[Path], list[Digest]], store: Store
) -> None:
    _, roots = versions
    assert store.demoter.demote(0).blobs > 100
    text, said = run(
        """
from casfs import fusemount
from casfs.errors import MissingCapability
from store.errors import MissingBlob
fusemount.DEVICE = "/dev/nothing"
with Store.open(place) as store, Sandboxes(store, engine="kernel") as sandboxes:
    with sandboxes.open(roots[0]) as sandbox:
        text = (sandbox.scratch.merged / "include/a/h3.h").read_text()
    for path in (place / "blobs" / "blake3" / "cas").glob("*/*"):
        if path.read_bytes() == b"#define A 3\\n":
            path.unlink()
    try:
        store.blobs.open(roots[0].function.of(b"#define A 3\\n"))
    except MissingBlob:
        pass
    try:
        sandboxes.open(roots[0])
    except MissingBlob as error:
        said = str(error)
print(json.dumps([text, said]))
""",
        *roots,
    )
    assert text == "#define A 3\n"
    assert "1 blobs in all" in said and "/dev/nothing" in said


def test_every_call_that_needs_a_missing_blob_finds_it(run: Callable[..., Any], store: Store, tmp_path: Path) -> None:
    """They look again by themselves when the lookup that fetches says ESTALE."""
    top = tmp_path / "calls"
    top.mkdir()
    for name in ("mapped", "truncated", "changed", "renamed", "linked", "written"):
        (top / name).write_text(f"the bytes of {name}\n")
    (top / "started").write_text("#!/bin/sh\necho ran\n")
    (top / "started").chmod(0o755)
    root = store.importer.from_directories([(b"", top)], ScanOptions()).digest
    assert store.demoter.demote(0).blobs == 7
    found, ran = run(
        """
import mmap, subprocess
with Store.open(place) as store, Sandboxes(store, engine="kernel") as sandboxes:
    with sandboxes.open(roots[0]) as sandbox:
        top = sandbox.scratch.merged
        ran = subprocess.run([top / "started"], capture_output=True, text=True).stdout
        with open(top / "mapped", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            found = [mapped[:].decode()]
        os.truncate(top / "truncated", 9)
        os.chmod(top / "changed", 0o600)
        os.rename(top / "renamed", top / "new name")
        os.link(top / "linked", top / "second name")
        with open(top / "written", "a") as file:
            file.write("and more")
        for name in ("truncated", "changed", "new name", "second name", "written"):
            found.append((top / name).read_text())
print(json.dumps([found, ran]))
""",
        root,
    )
    assert ran == "ran\n"
    assert found == [
        "the bytes of mapped\n",
        "the bytes",
        "the bytes of changed\n",
        "the bytes of renamed\n",
        "the bytes of linked\n",
        "the bytes of written\nand more",
    ]
