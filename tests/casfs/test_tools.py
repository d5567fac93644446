"""Programs that know nothing of casfs behave in a mount as they do in a directory."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from store.importing import ScanOptions
from tests.casfs.conftest import Mounted, Mounts, errno_from
from tests.conftest import Requirements

LARGE = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(40_000))


def run(*command: str | Path, **environment: str) -> str:
    """The output of a program that must succeed and complain of nothing."""
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "LC_ALL": "C", **environment},
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, ""), (command, done)
    return done.stdout


@pytest.fixture(scope="module")
def source() -> Iterator[Path]:
    """A small project: a git repository with a script, links, and files of several sizes."""
    with tempfile.TemporaryDirectory(prefix="casfs-tools-") as directory:
        top = Path(directory, "project")
        (top / "src" / "deep").mkdir(parents=True)
        (top / "empty").mkdir()
        for number in range(60):
            (top / "src" / f"file {number}.c").write_text(f"int f{number}(void) {{ return {number}; }}\n" * number)
        (top / "src" / "deep" / "large").write_bytes(LARGE)
        script = top / "run.sh"
        script.write_text('#!/bin/sh\necho "script $1"\n')
        script.chmod(0o755)
        shutil.copy2("/bin/true", top / "program")
        (top / "link").symlink_to("src/deep/large")
        (top / "dangling").symlink_to("/nonexistent/target")
        if shutil.which("git"):
            git = ("git", "-C", str(top), "-c", "user.name=x", "-c", "user.email=x@example.org")
            subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
            subprocess.run([*git, "add", "-A"], check=True)
            subprocess.run([*git, "commit", "-q", "-m", "all"], check=True)
        yield top


@pytest.fixture(scope="module")
def mounted(module_mounts: Mounts, module_engine: str, source: Path) -> Iterator[Mounted]:
    """The project as it was, times kept."""
    mounted = module_mounts.mount(module_mounts.add(source, ScanOptions(keep_mtime=True)), module_engine)
    yield mounted
    mounted.unmount()


def test_diff_finds_no_difference(mounted: Mounted, source: Path) -> None:
    """`diff -r` compares names and every byte."""
    assert run("diff", "-r", "--no-dereference", source, mounted.path) == ""


def test_find_lists_the_same_names_sizes_types_and_links(mounted: Mounted, source: Path) -> None:
    """Through fts, which reads directories and trusts link counts; `-ls` looks at every attribute."""
    for shape in ("%y %P %l\\n", "%y %P %s %T@ %l\\n"):
        kinds = [] if "%s" not in shape else ["!", "-type", "d"]
        both = [sorted(run("find", top, *kinds, "-printf", shape).splitlines()) for top in (source, mounted.path)]
        assert both[0] == both[1]
    assert len(run("find", mounted.path, "-ls").splitlines()) == len(run("find", source).splitlines())
    run("find", mounted.path, "-noleaf", "-type", "f", "-newermt", "1990-01-01", "-perm", "-u+r", "-links", "1")


def test_tar_reads_the_mount_and_compares_it_with_the_source(mounted: Mounted, source: Path, tmp_path: Path) -> None:
    """An archive of the mount is the tree; an archive of the tree has the mount's bytes."""
    archive = tmp_path / "out.tar"
    run("tar", "-cf", archive, "-C", mounted.path, ".")
    copy = tmp_path / "copy"
    copy.mkdir()
    run("tar", "-xf", archive, "-C", copy)
    assert run("diff", "-r", "--no-dereference", source, copy) == ""
    assert len(run("tar", "-tf", archive).splitlines()) == len(run("find", source).splitlines())
    # Modes differ by design (all is read-only); everything else must not.
    archive_of_source = tmp_path / "source.tar"
    run("tar", "-cf", archive_of_source, "-C", source, "--mode=a-w", "--exclude=./*/", ".")
    done = subprocess.run(
        ["tar", "--compare", "-f", archive_of_source, "-C", mounted.path], capture_output=True, text=True, check=False
    )
    complaints = [line for line in done.stdout.splitlines() if "Mode differs" not in line and "Mod time" not in line]
    assert (complaints, done.stderr) == ([], "")


def test_rsync_finds_nothing_to_do(requires: Requirements, mounted: Mounted, source: Path) -> None:
    """Neither by checksum nor, as times were kept, by size and time."""
    requires.programs("rsync")
    for how in (("-c",), ()):
        listed = run("rsync", "-rltn", "--omit-dir-times", "--itemize-changes", *how, f"{source}/", f"{mounted.path}/")
        assert listed == ""
        listed = run("rsync", "-rltn", "--omit-dir-times", "--itemize-changes", *how, f"{mounted.path}/", f"{source}/")
        assert listed == ""


def test_git_status_says_clean(requires: Requirements, mounted: Mounted) -> None:
    """Also where git would like to refresh its index, which it can't write here."""
    requires.programs("git")
    git = ("git", "-c", "safe.directory=*", "-c", "core.fileMode=false", "-C", mounted.path)
    assert run(*git, "status", "--porcelain") == ""
    assert run(*git, "status", "--porcelain", GIT_OPTIONAL_LOCKS="0") == ""
    assert run(*git, "log", "--format=%s") == "all\n"
    assert run(*git, "diff", "--stat") == ""
    assert run(*git, "fsck", "--no-progress") == ""


def test_cp_copies_everything_with_times(mounted: Mounted, source: Path, tmp_path: Path) -> None:
    """`cp -a` uses copy_file_range, reflinks and xattr calls where it can."""
    run("cp", "-a", "--reflink=auto", mounted.path, tmp_path / "copy")
    assert run("diff", "-r", "--no-dereference", source, tmp_path / "copy") == ""
    assert (
        os.stat(tmp_path / "copy" / "src" / "deep" / "large").st_mtime_ns
        == os.stat(source / "src" / "deep" / "large").st_mtime_ns
    )


def test_programs_and_scripts_run(mounted: Mounted) -> None:
    """Binaries are mapped by the kernel, scripts read by their interpreter; what isn't executable doesn't run."""
    assert run(mounted.path / "program") == ""
    assert run(mounted.path / "run.sh", "ran") == "script ran\n"
    with pytest.raises(PermissionError):
        subprocess.run([mounted.path / "src" / "file 3.c"], check=True)


def test_a_compiler_reads_sources_and_headers(requires: Requirements, mounted: Mounted, tmp_path: Path) -> None:
    """cc1 maps and reads what it includes."""
    requires.programs("gcc")
    (tmp_path / "main.c").write_text('#include "file 1.c"\nint main(void) { return f1() - 1; }\n')
    run("gcc", "-I", mounted.path / "src", "-o", tmp_path / "main", tmp_path / "main.c")
    run(tmp_path / "main")


def test_a_compiler_does_not_find_what_the_host_has_and_the_tree_has_not(
    requires: Requirements, mounted: Mounted, source: Path, tmp_path: Path
) -> None:
    """Neither beside the mount nor by `..`: an undeclared header is no such file."""
    requires.programs("gcc")
    (tmp_path / "main.c").write_text('#include "added later.h"\n')
    late = source / "src" / "added later.h"
    late.write_text("#error found\n")
    try:
        done = subprocess.run(
            ["gcc", "-I", mounted.path / "src", "-I", mounted.path / "src" / "deep" / "..", "-c", tmp_path / "main.c"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
    finally:
        late.unlink()
    assert done.returncode == 1
    assert "No such file" in done.stderr


def test_checksums_are_those_of_the_source(mounted: Mounted, source: Path) -> None:
    """sha256sum reads with large buffers and read-ahead."""
    path = "src/deep/large"
    assert run("sha256sum", mounted.path / path).split()[0] == run("sha256sum", source / path).split()[0]


def test_python_walks_it_as_any_directory(mounted: Mounted, source: Path) -> None:
    """os.walk, os.fwalk and scandir with d_type."""

    def walk(top: Path) -> list[tuple[str, list[str], list[str]]]:
        return [
            (os.path.relpath(here, top), sorted(names), sorted(files))
            for here, names, files, _ in sorted(os.fwalk(top, follow_symlinks=False))
        ]

    assert walk(mounted.path) == walk(source)
    assert [e.name for e in os.scandir(mounted.path) if e.is_symlink()] == [
        e.name for e in sorted(os.scandir(mounted.path), key=lambda e: e.name) if e.is_symlink()
    ]


def test_realpath_and_readlink_programs_agree(mounted: Mounted) -> None:
    """Coreutils resolve with openat and readlinkat."""
    top = os.path.realpath(mounted.path)
    assert run("realpath", mounted.path / "link").strip() == f"{top}/src/deep/large"
    assert run("readlink", mounted.path / "dangling").strip() == "/nonexistent/target"
    assert run("stat", "-c", "%F %s %a", mounted.path / "src" / "deep" / "large").strip() == (
        f"regular file {len(LARGE)} 444"
    )


def test_sendfile_and_splice_move_the_bytes(mounted: Mounted, tmp_path: Path) -> None:
    """The calls that move bytes within the kernel; copy_file_range says that it can't."""
    with open(mounted.path / "src" / "deep" / "large", "rb") as file:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            sent = os.sendfile(ours.fileno(), file.fileno(), 5, 50_000)
            received = b""
            while len(received) < sent:
                received += theirs.recv(65536)
            assert received == LARGE[5 : 5 + sent]
        with open(tmp_path / "copied", "wb") as copy:
            # The answer to everybody who copies between file systems of two kinds; cp goes on by hand.
            number = errno_from(lambda: os.copy_file_range(file.fileno(), copy.fileno(), 1000, 0, 0))
            assert number == errno.EXDEV
        reading, writing = os.pipe()
        try:
            count = os.splice(file.fileno(), writing, 40_000, offset_src=1000)
            assert os.read(reading, count) == LARGE[1000 : 1000 + count]
        finally:
            os.close(reading)
            os.close(writing)


MAP_SCRIPT = """
import mmap, sys
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
            with mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ) as mapped:
                sys.stdout.buffer.write(mapped[:])
        with mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
            mapped[0:4] = b"MINE"
            assert mapped[0:4] == b"MINE"
            sys.stdout.buffer.write(mapped[4:])
"""


def test_files_can_be_mapped_shared_and_private(mounted: Mounted) -> None:
    """Reading works in both kinds; a private mapping may be changed, and nothing outside notices."""
    path = mounted.path / "src" / "deep" / "large"
    done = subprocess.run([sys.executable, "-c", MAP_SCRIPT, path], capture_output=True, check=True, timeout=60)
    assert done.stdout == LARGE + LARGE + LARGE[4:]
    assert path.read_bytes() == LARGE
    with open(path, "rb") as file, pytest.raises(PermissionError):
        mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def test_reads_of_every_kind_give_the_right_bytes(mounted: Mounted) -> None:
    """pread, readv and O_DIRECT, at odd offsets, at the end and beyond it."""
    path = mounted.path / "src" / "deep" / "large"
    size = len(LARGE)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for offset, length in ((0, 1), (4095, 2), (size - 3, 100), (size, 10), (size + 5000, 10), (123_457, 300_001)):
            assert os.pread(descriptor, length, offset) == LARGE[offset : offset + length]
        parts = [bytearray(10), bytearray(5000)]
        assert os.preadv(descriptor, parts, 77) == 5010
        assert b"".join(parts) == LARGE[77 : 77 + 5010]
        assert os.lseek(descriptor, 0, os.SEEK_END) == size
        assert os.read(descriptor, 10) == b""
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(descriptor, 4096, 8192) == LARGE[8192:12288]
    finally:
        os.close(descriptor)


def test_holes_can_be_asked_for(mounted: Mounted) -> None:
    """SEEK_DATA and SEEK_HOLE: a file without holes is data up to its end."""
    with open(mounted.path / "src" / "deep" / "large", "rb") as file:
        assert os.lseek(file.fileno(), 100, os.SEEK_DATA) == 100
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == len(LARGE)
        assert errno_from(lambda: os.lseek(file.fileno(), len(LARGE), os.SEEK_DATA)) == errno.ENXIO


def test_syncing_and_locking_a_file_open_for_reading_work(mounted: Mounted) -> None:
    """fsync, syncfs, flock and read locks succeed, and locks exclude each other; a write lock needs a writer."""
    path = mounted.path / "src" / "deep" / "large"
    with open(path, "rb") as file, open(path, "rb") as other:
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert errno_from(lambda: fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)) == errno.EWOULDBLOCK
        fcntl.flock(file, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, 10)
        assert errno_from(lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)) == errno.EBADF
    directory = os.open(mounted.path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    run("sync", "-f", mounted.path)


def test_path_descriptors_work(mounted: Mounted) -> None:
    """O_PATH descriptors can be stat'ed, opened below, and reopened through /proc."""
    place = os.open(mounted.path / "src", os.O_PATH | os.O_DIRECTORY)
    try:
        assert os.fstat(place).st_ino == os.stat(mounted.path / "src").st_ino
        inner = os.open("deep/large", os.O_PATH, dir_fd=place)
        try:
            with open(f"/proc/self/fd/{inner}", "rb") as file:
                assert file.read() == LARGE
            assert os.readlink(f"/proc/self/fd/{inner}") == f"{os.path.realpath(mounted.path)}/src/deep/large"
        finally:
            os.close(inner)
    finally:
        os.close(place)


def test_statx_with_every_field_works(mounted: Mounted) -> None:
    """`stat %w` asks for the birth time, which is a request of its own in newer kernels."""
    assert run("stat", "-c", "%W %s %m", mounted.path / "run.sh").split()[1:] == [
        str(os.stat(mounted.path / "run.sh").st_size),
        os.path.realpath(mounted.path),
    ]


def test_there_are_no_extended_attributes_nor_acls(mounted: Mounted) -> None:
    """Asking says 'not supported' or 'none', and never fails otherwise."""
    path = mounted.path / "run.sh"
    none = (errno.EOPNOTSUPP, errno.ENODATA)
    names = ("user.x", "security.capability", "system.posix_acl_access", "trusted.overlay.opaque")
    for name in names:
        assert errno_from(lambda name=name: os.getxattr(path, name)) in none  # type: ignore[misc]
    assert errno_from(lambda: os.listxattr(path)) in (0, errno.EOPNOTSUPP)


def test_df_says_something_sensible(mounted: Mounted) -> None:
    """As large as its content, full, with a number of inodes."""
    status = os.statvfs(mounted.path)
    nodes = len(run("find", mounted.path).splitlines())
    if mounted.report.engine == "kernel":  # these are the metadata layer's own
        return
    assert status.f_files == nodes
    assert status.f_ffree == status.f_bavail == status.f_bfree == 0
    assert status.f_blocks * status.f_frsize >= len(LARGE)
    assert status.f_namemax == 255
    line = run("df", "--output=source,pcent,target", mounted.path).splitlines()[1].split()
    assert line == ["casfs", "100%", os.path.realpath(mounted.path)]


def test_watching_a_directory_does_no_harm(mounted: Mounted) -> None:
    """An inotify watch is accepted and tells of opens."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    watcher = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        assert libc.inotify_add_watch(watcher, os.fsencode(mounted.path), 0x20) > 0  # IN_OPEN
        (mounted.path / "run.sh").read_bytes()
        assert b"run.sh" in os.read(watcher, 4096)
    finally:
        os.close(watcher)


def test_unknown_ioctls_say_enotty(mounted: Mounted) -> None:
    """Lsattr and friends: 'inappropriate ioctl', as for a file system that doesn't have it."""
    with open(mounted.path / "run.sh", "rb") as file:
        for request in (0x80086601, 0x801C581F, 0x5401, 0xC020660B):  # FS_IOC_GETFLAGS, FSGETXATTR, TCGETS, FIEMAP
            number = errno_from(lambda request=request: fcntl.ioctl(file.fileno(), request, bytes(64)))  # type: ignore[misc]
            # Overlayfs knows the first and the last; EINVAL is about what it was given.
            known = {0, errno.EINVAL} if mounted.report.engine == "kernel" else set()
            assert number in {errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS, *known}, (hex(request), number)
