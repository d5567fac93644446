"""Sandboxes of host files, mounted: what is mapped is there and nothing else, writes go to the host's scratch."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casfs.errors import BadMountPoint, MountError, SandboxError
from casfs.host_layers import LEAST, SOURCE
from casfs.mountinfo import list_mounts
from casfs.planning import ENOUGH
from casfs.sandboxfs import Sandboxfs
from casfs.sandboxfs_protocol import Mapping, map_path
from tests.conftest import Requirements


@pytest.fixture
def sandboxfs(tmp_path: Path, requires: Requirements) -> Iterator[Sandboxfs]:
    requires.admin()
    place = tmp_path / "mnt"
    place.mkdir()
    umask = os.umask(0)
    try:
        with Sandboxfs(place) as opened:
            yield opened
    finally:
        os.umask(umask)
    assert not list_below(place)
    assert os.listdir(place) == []
    assert not list(tmp_path.glob("sandboxes-*"))


def list_below(place: Path) -> list[bytes]:
    top = os.fsencode(place)
    return [mount.path for mount in list_mounts() if mount.path == top or mount.path.startswith(top + b"/")]


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """Files of the host."""
    top = tmp_path / "host"
    (top / "src").mkdir(parents=True)
    (top / "src" / "a.c").write_text("int a;\n")
    (top / "src" / "undeclared.h").write_text("#define NO\n")
    (top / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (top / "run.sh").chmod(0o755)
    (top / "empty").touch()
    return top


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    path = tmp_path / "scratch"
    path.mkdir()
    return path


def read_only(path: str, host: Path | str) -> Mapping:
    return map_path(os.fsencode(path), os.fsencode(host), False)


def writable(path: str, host: Path) -> Mapping:
    return map_path(os.fsencode(path), os.fsencode(host), True)


def everything(top: Path) -> list[str]:
    return sorted(str(path.relative_to(top)) for path in top.rglob("*"))


def test_what_is_mapped_is_there_and_nothing_else(sandboxfs: Sandboxfs, host: Path) -> None:
    sandboxfs.create("0", [read_only("ws/x/a.c", host / "src" / "a.c"), read_only("run", host / "run.sh")])
    top = sandboxfs.place / "0"
    assert everything(top) == ["run", "ws", "ws/x", "ws/x/a.c"]
    assert (top / "ws/x/a.c").read_text() == "int a;\n"
    assert subprocess.run([top / "run"], capture_output=True, check=True).stdout == b"ran\n"
    shown, there = (top / "run").stat(), (host / "run.sh").stat()
    for name in ("st_mode", "st_size", "st_mtime_ns", "st_uid", "st_gid"):
        assert getattr(shown, name) == getattr(there, name)
    for path in ("ws/x/undeclared.h", "ws/x/../../../src", "src"):
        with pytest.raises(FileNotFoundError):
            (top / path).stat()
    with pytest.raises(OSError) as caught:
        (top / "new").touch()
    assert caught.value.errno == errno.EROFS


def test_an_empty_sandbox_and_one_after_the_other(sandboxfs: Sandboxfs, host: Path) -> None:
    sandboxfs.create("empty", [])
    assert os.listdir(sandboxfs.place / "empty") == []
    with pytest.raises(SandboxError, match="already"):
        sandboxfs.create("empty", [])
    for _ in range(3):
        sandboxfs.create("0", [read_only("a", host / "run.sh")])
        sandboxfs.destroy("0")
    with pytest.raises(SandboxError, match="no sandbox '0'"):
        sandboxfs.destroy("0")
    sandboxfs.destroy("empty")


def test_open_files_outlive_their_sandbox(sandboxfs: Sandboxfs, host: Path) -> None:
    sandboxfs.create("0", [read_only("a", host / "run.sh")])
    with (sandboxfs.place / "0" / "a").open() as file:
        sandboxfs.destroy("0")
        sandboxfs.create("0", [])
        assert file.read() == "#!/bin/sh\necho ran\n"


# Writable


def test_writes_land_in_scratch_with_all_that_posix_has(sandboxfs: Sandboxfs, host: Path, scratch: Path) -> None:
    sandboxfs.create("0", [writable("", scratch), read_only("ws/a.c", host / "src" / "a.c")])
    top = sandboxfs.place / "0"
    (top / "out").mkdir()
    made = top / "out" / "made"
    made.write_bytes(b"first, and longer")
    with made.open("wb") as file:  # O_TRUNC
        file.write(b"second")
    assert (scratch / "out" / "made").read_bytes() == b"second"
    with made.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        mapped[:3] = b"SEC"
        mapped.flush()
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        made.unlink()
        assert opened.read() == b"SECond"
        assert os.fstat(opened.fileno()).st_nlink == 0
    assert os.listdir(scratch / "out") == []
    made.write_bytes(b"x")
    os.rename(made, top / "out" / "renamed")
    os.link(top / "out" / "renamed", top / "linked")
    os.symlink("out/renamed", top / "symbolic")
    os.chmod(top / "linked", 0o751)
    os.utime(top / "linked", ns=(5, 7))
    status = (scratch / "out" / "renamed").stat()
    assert (status.st_mode & 0o777, status.st_mtime_ns, status.st_nlink) == (0o751, 7, 2)
    os.rename(top / "out", top / "moved")
    assert everything(scratch) == ["linked", "moved", "moved/renamed", "symbolic"]
    with (top / "linked").open("ab") as file:
        file.write(b"y")
        os.fsync(file.fileno())
    assert (scratch / "moved" / "renamed").read_bytes() == b"xy"


def test_what_writes_to_an_input_has_a_copy(sandboxfs: Sandboxfs, host: Path, scratch: Path) -> None:
    sandboxfs.create(
        "0", [writable("", scratch), read_only("a.c", host / "src" / "a.c"), read_only("r", host / "run.sh")]
    )
    top = sandboxfs.place / "0"
    with (top / "a.c").open("a") as file:
        file.write("more\n")
    # Whole, not a file of the right size full of zeros.
    (top / "r").chmod(0o700)
    assert (host / "src" / "a.c").read_text() == "int a;\n"
    assert (scratch / "a.c").read_text() == "int a;\nmore\n"
    assert (scratch / "r").read_text() == "#!/bin/sh\necho ran\n"
    assert (host / "run.sh").stat().st_mode & 0o777 == 0o755
    (top / "a.c").unlink()
    assert not (top / "a.c").exists()
    assert (host / "src" / "a.c").exists()


def test_what_scratch_has_before_is_there_and_outputs_can_be_moved_out(
    sandboxfs: Sandboxfs, host: Path, scratch: Path, tmp_path: Path
) -> None:
    (scratch / "ws" / "bazel-out").mkdir(parents=True)
    sandboxfs.create("0", [writable("", scratch), read_only("ws/a.c", host / "src" / "a.c")])
    top = sandboxfs.place / "0"
    assert everything(top) == ["ws", "ws/a.c", "ws/bazel-out"]
    (top / "ws" / "bazel-out" / "a.o").write_bytes(b"object")
    os.rename(scratch / "ws" / "bazel-out" / "a.o", tmp_path / "a.o")
    sandboxfs.destroy("0")
    assert (tmp_path / "a.o").read_bytes() == b"object"


def test_a_writable_directory_or_file_anywhere(sandboxfs: Sandboxfs, host: Path, scratch: Path) -> None:
    (scratch / "file").write_text("old")
    sandboxfs.create(
        "0",
        [
            read_only("ws/a.c", host / "src" / "a.c"),
            writable("ws/out", scratch),
            writable("log", scratch / "file"),
            read_only("ws/out/in/run", host / "run.sh"),
            read_only("devices/null", "/dev/zero"),
        ],
    )
    top = sandboxfs.place / "0"
    (top / "ws" / "out" / "new").write_text("new")
    (top / "log").write_text("changed")
    assert (scratch / "new").read_text() == "new"
    assert (scratch / "file").read_text() == "changed"
    assert (top / "ws" / "out" / "in" / "run").read_text() == "#!/bin/sh\necho ran\n"
    with pytest.raises(OSError):
        (top / "ws" / "b.c").touch()


# What mappings point at


def test_directories_are_shown_whole_and_read_only(sandboxfs: Sandboxfs, host: Path, scratch: Path) -> None:
    sandboxfs.create(
        "0",
        [
            writable("", scratch),
            read_only("all", host),
            read_only("more", host / "src"),
            read_only("more/deep/run", host / "run.sh"),
            read_only("more/a.c", host / "empty"),
        ],
    )
    top = sandboxfs.place / "0"
    assert everything(top / "all") == everything(host)
    assert everything(top / "more") == ["a.c", "deep", "deep/run", "undeclared.h"]
    assert (top / "more" / "a.c").read_text() == ""
    for path in ("all/new", "all/src/a.c", "more/new"):
        with pytest.raises(OSError) as caught:
            (top / path).write_text("x")
        assert caught.value.errno == errno.EROFS
    (host / "later").touch()
    assert (top / "all" / "later").exists()


def test_the_root_can_be_a_directory_of_the_host(sandboxfs: Sandboxfs, host: Path) -> None:
    sandboxfs.create("0", [read_only("", host)])
    sandboxfs.create("1", [read_only("", host), read_only("src/b.c", host / "run.sh")])
    assert everything(sandboxfs.place / "0") == everything(host)
    assert everything(sandboxfs.place / "1") == sorted([*everything(host), "src/b.c"])


def test_links_stay_inside_or_are_what_they_lead_to(sandboxfs: Sandboxfs, host: Path) -> None:
    (host / "lib.so").symlink_to("lib.so.1")
    (host / "lib.so.1").write_text("library")
    (host / "out").symlink_to(host / "src" / "a.c")
    (host / "dir").symlink_to("src")
    (host / "dangling").symlink_to("/nonexistent/x")
    (host / "loop").symlink_to("loop")
    mapped = ["lib.so", "out", "dir", "dangling", "loop"]
    sandboxfs.create("0", [read_only(name, host / name) for name in [*mapped, "lib.so.1"]])
    sandboxfs.create("1", [read_only("x/lib.so", host / "lib.so")])
    top = sandboxfs.place / "0"
    assert os.readlink(top / "lib.so") == "lib.so.1"
    assert (top / "lib.so").read_text() == "library"
    assert not (top / "out").is_symlink()
    assert (top / "out").read_text() == "int a;\n"
    assert everything(top / "dir") == ["a.c", "undeclared.h"]
    assert os.readlink(top / "dangling") == "/nonexistent/x"
    assert os.readlink(top / "loop") == "loop"
    assert not (sandboxfs.place / "1" / "x" / "lib.so").is_symlink()
    assert (sandboxfs.place / "1" / "x" / "lib.so").read_text() == "library"


def test_links_above_what_is_mapped_are_followed(sandboxfs: Sandboxfs, host: Path) -> None:
    (host / "execroot").symlink_to(host / "src")
    sandboxfs.create("0", [read_only("a.c", host / "execroot" / "a.c")])
    assert (sandboxfs.place / "0" / "a.c").read_text() == "int a;\n"


def test_an_empty_file_is_mapped_as_dev_null(sandboxfs: Sandboxfs, host: Path) -> None:
    sandboxfs.create("0", [read_only("pkg/__init__.py", "/dev/null"), read_only("e", host / "empty")])
    for path in ("pkg/__init__.py", "e"):
        found = sandboxfs.place / "0" / path
        assert found.is_file()
        assert found.read_bytes() == b""


def test_files_on_several_volumes(sandboxfs: Sandboxfs, host: Path, tmp_path: Path, scratch: Path) -> None:
    volumes = [tmp_path / "volume 1", tmp_path / "volume\n2"]
    mappings = [writable("", scratch)]
    try:
        for number, volume in enumerate(volumes):
            volume.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", volume], check=True)
            (volume / "src").mkdir()
            (volume / "src" / "a.c").write_text(f"on volume {number}")
            mappings.append(read_only(f"v/{number}", volume / "src" / "a.c"))
        sandboxfs.create("0", [*mappings, read_only("v/host", host / "src" / "a.c")])
        top = sandboxfs.place / "0" / "v"
        assert [(top / name).read_text() for name in ("0", "1", "host")] == ["on volume 0", "on volume 1", "int a;\n"]
    finally:
        sandboxfs.close()
        for volume in volumes:
            subprocess.run(["umount", volume], check=True)


def test_names_that_are_not_utf_8(sandboxfs: Sandboxfs, tmp_path: Path) -> None:
    name = b"\xff\xfe \n%"
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        file.write(b"odd")
    sandboxfs.create("0", [map_path(b"d" + name + b"/" + name, path, False)])
    with open(os.path.join(os.fsencode(sandboxfs.place), b"0", b"d" + name, name), "rb") as file:
        assert file.read() == b"odd"


def test_names_of_bazels_that_are_not_utf_8_are_found(sandboxfs: Sandboxfs, tmp_path: Path) -> None:
    with open(os.path.join(os.fsencode(tmp_path), b"\xff"), "wb") as file:
        file.write(b"odd")
    twice = b"\xff".decode("latin-1").encode()
    sandboxfs.create("0", [map_path(b"d/" + twice, os.fsencode(tmp_path) + b"/" + twice, False)])
    assert os.listdir(os.fsencode(sandboxfs.place / "0" / "d")) == [b"\xff"]


@pytest.mark.parametrize(
    ("mapped", "said"),
    [
        ([("a", "missing")], "missing' at 'a': it does not exist"),
        ([("a", "nowhere/x")], "nowhere/x' at 'a': it does not exist"),
        ([("a", "run.sh/x")], "run.sh/x' at 'a': Not a directory"),
        ([("a", "run.sh"), ("a", "empty")], "'a' is mapped twice"),
        ([("a", "src"), ("a", "src")], "'a' is mapped twice"),
        ([("a", "run.sh"), ("a/b", "empty")], "'a/b' is mapped inside of 'a'"),
        ([("a", "run.sh"), ("a/b/c", "src")], "'a/b/c' is mapped inside of 'a'"),
        ([("", "run.sh")], "root of a sandbox"),
    ],
)
def test_what_can_t_be_mapped_is_named_and_nothing_is_left(
    sandboxfs: Sandboxfs, host: Path, mapped: list[tuple[str, str]], said: str
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SandboxError) as caught:
        sandboxfs.create("0", [read_only(path, host / name) for path, name in mapped])
    assert said in str(caught.value)
    assert os.listdir(sandboxfs.place) == []
    assert list_below(sandboxfs.place) == [os.fsencode(sandboxfs.place)]
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the volume stays open
    sandboxfs.create("0", [read_only("a", host / "run.sh")])


# A host that moves


def rewrite_in_place(path: Path, text: str) -> None:
    with path.open("r+") as file:
        file.write(text)


def rewrite_by_rename(path: Path, text: str) -> None:
    other = path.with_suffix(".new")
    other.write_text(text)
    other.rename(path)


@pytest.mark.parametrize("rewrite", [rewrite_in_place, rewrite_by_rename])
def test_a_file_that_is_rewritten_between_sandboxes_is_never_stale(
    sandboxfs: Sandboxfs, host: Path, rewrite: Callable[[Path, str], None]
) -> None:
    # Enough of them for layers that are kept, and every third one changes each time.
    files = [host / f"f{number}" for number in range(3 * LEAST)]
    for file in files:
        file.write_text("0000")
    for turn in range(1, 60):
        for file in files[turn % 3 :: 3]:
            rewrite(file, f"{turn:04}")
        name = str(turn)
        sandboxfs.create(name, [read_only(f"d/{file.name}", file) for file in files])
        for file in files:
            shown = sandboxfs.place / name / "d" / file.name
            assert shown.read_text() == file.read_text()
            assert shown.stat().st_mtime_ns == file.stat().st_mtime_ns
        if turn > 2:
            sandboxfs.destroy(str(turn - 2))


def test_what_comes_again_is_not_laid_out_again(sandboxfs: Sandboxfs, host: Path) -> None:
    files = [host / f"f{number}" for number in range(100)]
    for file in files:
        file.write_text(file.name)
    for turn in range(5):
        own = host / f"own{turn}"
        own.write_text(f"of turn {turn}")
        sandboxfs.create(str(turn), [read_only(file.name, file) for file in [*files, own]])
        assert sorted(os.listdir(sandboxfs.place / str(turn))) == sorted(file.name for file in [*files, own])
    # Twice: when they were first seen, and when they came again.
    assert sandboxfs.layers.laid_out == 2 * 100 + 5
    assert sandboxfs.layers.taken == 3 * 100
    sandboxfs.create("fewer", [read_only(file.name, file) for file in files[:50]])
    assert sorted(os.listdir(sandboxfs.place / "fewer")) == sorted(file.name for file in files[:50])


def test_what_changed_a_little_is_not_laid_out_again(sandboxfs: Sandboxfs, host: Path) -> None:
    files = [host / f"d{number % 7}" / f"f{number}" for number in range(2 * ENOUGH)]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"0 of {file.name}")
    changed = 0

    def check(name: str, mapped: list[Path]) -> int:
        before = sandboxfs.layers.laid_out
        sandboxfs.create(name, [read_only(str(file.relative_to(host)), file) for file in mapped])
        top = sandboxfs.place / name
        assert everything(top) == sorted({str(p.relative_to(host)) for file in mapped for p in (file, file.parent)})
        for file in mapped:
            shown = top / file.relative_to(host)
            assert shown.read_text() == file.read_text()
            assert (shown.stat().st_size, shown.stat().st_mtime_ns) == (file.stat().st_size, file.stat().st_mtime_ns)
        sandboxfs.destroy(name)
        return sandboxfs.layers.laid_out - before

    assert [check(f"before {turn}", files) for turn in range(3)] == [len(files), len(files), 0]
    for turn in range(1, 12):
        for file in files[turn % 3 : turn % 3 + 10]:
            (rewrite_in_place if turn % 2 else rewrite_by_rename)(file, f"{turn:>{turn}} of {file.name}, changed")
        changed = min(10 + (turn - 1), 12)
        assert check(f"changed {turn}", files) == changed
    # Less of it is no file that hides what was there; and what is no longer wanted doesn't show through.
    assert check("fewer", files[1:]) == len(files) - 1
    # When much has changed there is a new layer.
    for file in files[::8]:
        file.write_text("many of them")
    assert [check(f"many {turn}", files) for turn in range(3)] == [len(files), len(files) // 8, 0]


def test_layers_stay_below_their_budget(tmp_path: Path, host: Path, requires: Requirements) -> None:
    requires.admin()
    (tmp_path / "mnt").mkdir()
    with Sandboxfs(tmp_path / "mnt", budget=0) as sandboxfs:
        files = [host / f"f{number}" for number in range(LEAST)]
        for file in files:
            file.write_text(file.name)
        for turn in range(4):
            sandboxfs.create(str(turn), [read_only(file.name, file) for file in files])
        assert all((sandboxfs.place / str(turn) / "f3").read_text() == "f3" for turn in range(4))
        assert sandboxfs.layers.taken == 0


def become_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("change", [Path.unlink, become_directory, become_link])
def test_a_file_that_went_away_after_it_was_mapped_is_an_error(
    sandboxfs: Sandboxfs, host: Path, change: Callable[[Path], None]
) -> None:
    sandboxfs.create("0", [read_only("a", host / "run.sh"), read_only("b", host / "src" / "a.c")])
    change(host / "run.sh")
    with pytest.raises(OSError):
        (sandboxfs.place / "0" / "a").read_bytes()
    assert (sandboxfs.place / "0" / "b").read_text() == "int a;\n"
    sandboxfs.destroy("0")


def test_a_file_that_was_cut_after_it_was_mapped_ends_there(sandboxfs: Sandboxfs, host: Path) -> None:
    sandboxfs.create("0", [read_only("a", host / "run.sh")])
    os.truncate(host / "run.sh", 4)
    assert (sandboxfs.place / "0" / "a").read_bytes() == b"#!/b"


# The place


def test_a_second_one_is_refused_and_a_dead_one_s_place_is_cleared(
    sandboxfs: Sandboxfs, host: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadMountPoint, match="at work"):
        Sandboxfs(sandboxfs.place)
    other = tmp_path / "other"
    other.mkdir()
    script = (
        "import os, sys; from pathlib import Path; from casfs.sandboxfs import Sandboxfs\n"
        "from casfs.sandboxfs_protocol import map_path\n"
        "s = Sandboxfs(Path(sys.argv[1])); s.create('0', [map_path(b'a', os.fsencode(sys.argv[2]), False)])\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, other, host / "run.sh"], check=False)
    assert len(list_below(other)) == 2
    with Sandboxfs(other) as again:
        assert os.listdir(again.place) == []
        again.create("0", [read_only("a", host / "run.sh")])
        assert [mount.source for mount in list_mounts() if mount.path == os.fsencode(other)] == [SOURCE]
    assert not list_below(other)


def test_a_place_that_can_t_be_one(tmp_path: Path, host: Path, requires: Requirements) -> None:
    requires.admin()
    for place, said in ((tmp_path / "none", "does not exist"), (host, "not empty"), (host / "run.sh", "not a dir")):
        with pytest.raises(BadMountPoint, match=said):
            Sandboxfs(place)


# A host file system that is an overlay, as in a container


@pytest.fixture
def container(tmp_path: Path, host: Path, requires: Requirements) -> Iterator[Callable[..., Path]]:
    """Makes an overlay, of the host's files or of directories that are named."""
    requires.admin()
    made: list[Path] = []

    def make(*lower: Path) -> Path:
        base = tmp_path / f"container-{len(made)}"
        for name in ("upper", "work", "root"):
            (base / name).mkdir(parents=True)
        layers = ":".join(map(str, lower or (host,)))
        # Not on the same file system: that may be an overlay itself.
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", base / "upper"], check=True)
        for name in ("u", "w"):
            (base / "upper" / name).mkdir()
        options = f"lowerdir={layers},upperdir={base}/upper/u,workdir={base}/upper/w"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, base / "root"], check=True)
        made.append(base)
        return base / "root"

    yield make
    for base in reversed(made):
        subprocess.run(["umount", "-l", base / "root", base / "upper"], check=True)


def test_files_of_an_overlay_are_mapped_like_others(
    container: Callable[..., Path], sandboxfs: Sandboxfs, host: Path, scratch: Path
) -> None:
    root = container()
    (root / "src" / "made.h").write_text("made in the container\n")
    files = [host / f"f{number}" for number in range(2 * LEAST)]
    for file in files:
        file.write_text(file.name)
    for turn in range(3):
        (root / "src" / "a.c").write_text(f"int a{turn};\n")
        mapped = [read_only("ws/a.c", root / "src" / "a.c"), read_only("ws/x/made.h", root / "src" / "made.h")]
        mapped += [read_only("run", root / "run.sh"), read_only("ws/empty", root / "empty")]
        mapped += [read_only(f"ws/f/{file.name}", file) for file in files]
        name = str(turn)
        (scratch / name).mkdir()
        sandboxfs.create(name, [writable("", scratch / name), *mapped])
        sandboxfs.create(f"{name} read-only", mapped)
        for top in (sandboxfs.place / name, sandboxfs.place / f"{name} read-only"):
            assert (top / "ws" / "a.c").read_text() == f"int a{turn};\n"
            assert (top / "ws" / "x" / "made.h").read_text() == "made in the container\n"
            assert subprocess.run([top / "run"], capture_output=True, check=True).stdout == b"ran\n"
            assert sorted(os.listdir(top / "ws")) == ["a.c", "empty", "f", "x"]
            assert all((top / "ws" / "f" / file.name).read_text() == file.name for file in files)
            with pytest.raises(FileNotFoundError):
                (top / "ws" / "undeclared.h").stat()
        top = sandboxfs.place / name
        (top / "ws" / "a.c").chmod(0o600)
        with (top / "ws" / "x" / "made.h").open("a") as made:
            made.write("more\n")
        assert (scratch / name / "ws" / "a.c").read_text() == f"int a{turn};\n", "copied whole"
        assert (root / "src" / "made.h").read_text() == "made in the container\n"
        (root / "run.sh").touch()
    # Those of the overlay are laid out each time, the others once as new and once to be kept.
    assert sandboxfs.layers.taken >= 4 * 2 * LEAST
    sandboxfs.close()


def test_a_file_of_an_overlay_that_is_rewritten_is_never_stale(
    container: Callable[..., Path], sandboxfs: Sandboxfs
) -> None:
    root = container()
    file = root / "src" / "a.c"
    for turn in range(20):
        (rewrite_in_place if turn % 2 else rewrite_by_rename)(file, f"{turn:06}\n")
        sandboxfs.create(str(turn), [read_only("a.c", file)])
        assert (sandboxfs.place / str(turn) / "a.c").read_text() == file.read_text()
    sandboxfs.close()


def test_what_an_overlay_can_not_do_is_said(
    container: Callable[..., Path], sandboxfs: Sandboxfs, host: Path, tmp_path: Path
) -> None:
    one, other = container(), container()
    with pytest.raises(MountError, match="both are overlays themselves"):
        sandboxfs.create("0", [read_only("a", one / "run.sh"), read_only("b", other / "run.sh")])
    deep = container(one)
    with pytest.raises(MountError, match="the kernel has no overlay over it"):
        sandboxfs.create("0", [read_only("a", deep / "run.sh")])
    (one / "scratch").mkdir()
    with pytest.raises(SandboxError, match="--output_base on another file system"):
        sandboxfs.create("0", [writable("", one / "scratch"), read_only("a", host / "run.sh")])
    with pytest.raises(SandboxError, match="mapped read-only itself"):
        sandboxfs.create("0", [read_only("", host), read_only("new", one / "run.sh")])
    assert os.listdir(sandboxfs.place) == []
    sandboxfs.create("0", [read_only("a", one / "run.sh"), writable("out", one / "scratch")])
    (sandboxfs.place / "0" / "out" / "made").write_text("made")
    assert (one / "scratch" / "made").read_text() == "made"
    sandboxfs.close()
