"""What is wrong with the input or the place: one clear line, the right exit code, and nothing changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Requirements
from tests.tools.conftest import Casfs, Namespace
from tools.exits import Exit

HASH = "ab" * 32
HEAD = "casfs manifest 1 blake3\n"
LONG = "n" * 256


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with its bytes, but not the index, which writes of every start go to."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and "index" not in path.parts
    }


@pytest.fixture
def named(casfs: Casfs, tree: Path) -> Casfs:
    """The command, with the manifest ``m`` of the tree."""
    casfs.ok("manifest", "create", "m", tree)
    return casfs


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (f"f\t{HASH}/1\t-\t../x\n", "'..'"),
        (f"f\t{HASH}/1\t-\ta/../x\n", "'..'"),
        (f"f\t{HASH}/1\t-\t./x\n", "'.'"),
        (f"f\t{HASH}/1\t-\t/etc/passwd\n", "absolute"),
        (f"f\t{HASH}/1\t-\ta%00b\n", "NUL"),
        (f"f\t{HASH}/1\t-\t\n", "empty name"),
        (f"f\t{HASH}/1\t-\ta//b\n", "empty name"),
        (f"f\t{HASH}/1\t-\t{LONG}\n", "256 bytes, 255 is the most"),
        (f"f\t{HASH}/1\t-\ta\nf\t{HASH}/1\t-\ta\n", "'a' is there twice"),
        (f"f\t{HASH}/1\t-\ta\nf\t{HASH}/1\t-\ta/b\n", "'a' is a file and a directory at once"),
        (f"f\t{HASH[1:]}/1\t-\ta\n", "64 hexadecimal digits"),
        (f"f\t{HASH.upper()}/1\t-\ta\n", "lower case"),
        (f"f\t{HASH}\t-\ta\n", "no size"),
        (f"f\t{HASH}/-1\t-\ta\n", "no size"),
        (f"f\tsha256:{HASH}/1\t-\ta\n", "not of the manifest's function"),
        (f"f\t{HASH}/1\t{1 << 70}\ta\n", f"{1 << 70}"),
        (f"r\t1:2:3:4:{1 << 70}\t/a\ta\n", f"{1 << 70}"),
        ("r\t1:2:3:4\t/a\ta\n", "stamp"),
        ("r\t1:2:3:4:5\ta\ta\n", "absolute host path"),
        ("l\t\t-\ta\n", "target"),
        (f"z\t{HASH}/1\t-\ta\n", "not a manifest line"),
        ("f\n", "not a manifest line"),
    ],
)
def test_a_manifest_text_with_a_bad_line_is_refused(named: Casfs, lines: str, said: str) -> None:
    before = snapshot(named.store)
    message = named.fails(Exit.USAGE, "manifest", "import", "bad", "-", stdin=HEAD + lines)
    assert said in message
    assert message.startswith("casfs: standard input")
    assert named.ok("manifest", "list", "--names").out == "m\n"
    assert snapshot(named.store) == before


@pytest.mark.parametrize(
    "text", ["", "\n", "junk\n", "casfs manifest 2 blake3\n", "casfs manifest 1 md5\n", "\xff\xfe\0"]
)
def test_what_is_no_manifest_text_is_refused(casfs: Casfs, text: str) -> None:
    assert "standard input:1: " in casfs.fails(Exit.USAGE, "manifest", "import", "bad", "-", stdin=text)


def test_the_message_names_the_line(casfs: Casfs) -> None:
    (casfs.directory / "text").write_text(f"{HEAD}# a comment\nf\t{HASH}/1\t-\ta\nf\t{HASH}/1\t-\t..\n")
    assert "text:4: " in casfs.fails(Exit.USAGE, "manifest", "import", "bad", "text")


def test_a_size_that_contradicts_the_blob_is_refused(named: Casfs) -> None:
    [digest] = [entry["digest"] for entry in named.ok("ls", "m/same.h", "--json").json]
    hexadecimal = digest.partition(":")[2].partition("/")[0]
    text = f"{HEAD}f\t{hexadecimal}/13\t-\tx\n"
    assert "has 12 bytes" in named.fails(Exit.USAGE, "manifest", "import", "bad", "-", stdin=text)
    root = named.ok("manifest", "show", "m", "--json").json["root"]
    wrong = f"{root}0"
    for arguments in (("manifest", "create", "bad", "--root", wrong), ("ls", wrong), ("mount", wrong, ".")):
        assert "wrong size" in named.fails(Exit.USAGE, *arguments)
    assert named.ok("manifest", "list", "--names").out == "m\n"
    assert named.ok("verify", "--json").json["clean"] is True


@pytest.mark.parametrize(
    "digest", ["blake3:zz/1", f"blake3:{HASH}", f"blake3:{HASH}/x", f"md5:{HASH}/1", ":", f"{HASH}:1/1"]
)
def test_a_malformed_digest_is_named(named: Casfs, digest: str) -> None:
    for arguments in (("ls", digest), ("cat", f"{digest}/x"), ("manifest", "create", "bad", "--root", digest)):
        named.fails(Exit.USAGE, *arguments)
    assert named.ok("manifest", "list", "--names").out == "m\n"


def test_a_root_that_is_not_in_the_store_is_named(named: Casfs) -> None:
    assert HASH in named.fails(Exit.NOT_FOUND, "manifest", "create", "bad", "--root", f"blake3:{HASH}/5")
    [digest] = [entry["digest"] for entry in named.ok("ls", "m/same.h", "--json").json]
    assert "Directory message" in named.fails(Exit.USAGE, "manifest", "create", "bad", "--root", digest)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("junk", ":1: not a line of sha256sum or b3sum"),
        (f"{HASH}  ../x", "'..'"),
        (f"{HASH}  /etc/passwd", "absolute"),
        (f"{HASH}  a//b", "empty name"),
        (f"{HASH}  ", "not a line"),
        (f"{HASH}  {LONG}", "256 bytes"),
        (f"{HASH[1:]}  a", "not a line"),
    ],
)
def test_a_checklist_with_a_bad_line_is_refused(named: Casfs, line: str, said: str) -> None:
    assert said in named.fails(
        Exit.USAGE, "manifest", "create", "bad", "--checklist", "-", "--base", ".", stdin=f"{line}\n"
    )
    assert named.ok("manifest", "list", "--names").out == "m\n"


def test_a_checklist_whose_file_changed_is_refused(casfs: Casfs, tree: Path) -> None:
    listed = f"{hashlib.sha256(b'other').hexdigest()}  same.h\n"
    options = ("--checklist", "-", "--function", "sha256", "--base", tree)
    assert "same.h" in casfs.fails(Exit.NO, "manifest", "create", "bad", *options, stdin=listed)
    missing = f"{HASH}  nosuch\n"
    assert "nosuch" in casfs.fails(Exit.USAGE, "manifest", "create", "bad", *options, stdin=missing)
    assert casfs.ok("manifest", "list", "--names").out == ""


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_what_can_not_be_in_a_tree_is_refused_by_name(
    casfs: Casfs, tree: Path, kind: str, requires: Requirements
) -> None:
    special = tree / "include" / "special"
    if kind == "fifo":
        os.mkfifo(special)
    elif kind == "device":
        requires.condition(os.geteuid() == 0, "root, to make a device")
        os.mknod(special, 0o20666, os.makedev(1, 3))
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(special))
    message = casfs.fails(Exit.USAGE, "manifest", "create", "m", tree)
    assert str(special) in message
    assert kind in message.lower()
    assert "--exclude" in message
    assert "special" in casfs.fails(Exit.USAGE, "add", special)
    casfs.ok("manifest", "create", "m", tree, "--exclude", "special")


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "a:b", "a b", "é", "n" * 201, "..", "\udcff"])
def test_a_name_that_can_not_be_a_manifest_s(casfs: Casfs, tree: Path, name: str) -> None:
    casfs.fails(Exit.USAGE, "manifest", "create", "--", name, tree)
    casfs.fails(Exit.USAGE, "manifest", "import", "--", name, "-", stdin=HEAD)
    assert not casfs.store.exists() or casfs.ok("manifest", "list", "--names").out == ""


@pytest.mark.parametrize("name", ["nosuch", "M", "", "é" * 150, "\udcff", "n" * 600])
def test_a_manifest_that_does_not_exist(named: Casfs, mountpoint: Path, name: str) -> None:
    for arguments in (
        ("ls", name),
        ("cat", f"{name}/x"),
        ("mount", name, mountpoint),
        ("checkout", name, "out"),
        ("manifest", "show", name),
        ("manifest", "export", name, "out"),
        ("manifest", "diff", "m", name),
        ("manifest", "remove", "m", name),
    ):
        assert "there is no manifest" in named.fails(Exit.NOT_FOUND, *arguments)
    assert not (named.directory / "out").exists()
    assert named.ok("manifest", "list", "--names").out == "m\n"


def test_a_manifest_s_name_that_is_nearly_right_is_suggested(named: Casfs, tree: Path) -> None:
    named.ok("manifest", "create", "headers", tree)
    assert "did you mean 'headers'?" in named.fails(Exit.NOT_FOUND, "ls", "header")


@pytest.mark.parametrize(
    ("path", "code"),
    [("nosuch", Exit.NOT_FOUND), ("same.h/x", Exit.NOT_FOUND), ("include/..", Exit.USAGE), ("outside", Exit.USAGE)],
)
def test_a_path_that_is_not_in_the_manifest(named: Casfs, path: str, code: Exit) -> None:
    assert path.partition("/")[0] in named.fails(code, "cat", f"m/{path}") or path == "include/.."


def test_a_corrupt_blob_is_never_shown(named: Casfs) -> None:
    [digest] = [entry["digest"] for entry in named.ok("ls", "m/same.h", "--json").json]
    hexadecimal = digest.partition(":")[2].partition("/")[0]
    blob = named.store / "blobs/blake3/cas" / hexadecimal[:2] / hexadecimal
    blob.chmod(0o644)
    blob.write_bytes(b"too short")
    assert digest in named.fails(Exit.NO, "cat", "m/same.h")
    assert digest in named.fails(Exit.NOT_FOUND, "cat", "m/same.h")
    assert len(list((named.store / "quarantine").iterdir())) == 1
    assert digest in named.fails(Exit.NOT_FOUND, "checkout", "m", "out")
    assert not (named.directory / "out").exists()


# The place of the store


@pytest.mark.parametrize("verb", ["ls m", "cat m/x", "manifest list", "stats", "verify", "gc --high 1", "mount m ."])
def test_reading_verbs_make_no_store(casfs: Casfs, verb: str) -> None:
    message = casfs.fails(Exit.STORE, *verb.split())
    assert str(casfs.store) in message
    assert "--store" in message
    assert not casfs.store.exists()


def test_a_directory_that_is_no_store_is_left_alone(casfs: Casfs, tree: Path) -> None:
    before = snapshot(tree)
    for verb in ("ls m", "stats", f"add {tree}/same.h", f"manifest create m {tree}"):
        assert str(tree) in casfs.fails(Exit.STORE, "--store", tree, *verb.split())
    assert snapshot(tree) == before


def test_a_store_that_is_a_file_or_below_one(casfs: Casfs, tree: Path) -> None:
    for place in (tree / "same.h", tree / "same.h" / "store"):
        for verb in ("stats", f"add {tree}/run.sh"):
            assert str(place) in casfs.fails(Exit.STORE, "--store", place, *verb.split())
    assert (tree / "same.h").read_text() == "#define A 1\n"


def test_a_store_of_a_newer_format_says_so(named: Casfs, tree: Path) -> None:
    (named.store / "format").write_text("casfs store 99\n")
    for verb in ("ls m", f"add {tree}"):
        assert "newer casfs" in named.fails(Exit.STORE, *verb.split())
    (named.store / "format").write_text("something else\n")
    assert "is " in named.fails(Exit.STORE, "ls", "m")


@pytest.mark.parametrize("damage", ["garbage", "missing"])
def test_an_index_that_is_lost_says_how_to_get_it_back(named: Casfs, damage: str) -> None:
    data = named.store / "index" / "data.mdb"
    if damage == "garbage":
        data.write_bytes(b"garbage" * 2000)
        assert str(named.store) in named.fails(Exit.STORE, "ls", "m")
        data.unlink()
    else:
        data.unlink()
    named.ok("verify", "--rebuild")
    assert "same.h\n" in named.ok("ls", "m").out


def test_an_unwritable_store_is_named(named: Casfs, nobody: Casfs, tree: Path) -> None:
    for verb in ("ls m", f"add {tree}/same.h", "manifest remove m", "gc --high 0"):
        message = nobody.fails(Exit.STORE, "--store", named.store, *verb.split())
        assert str(named.store) in message
        assert "--store" in message
    nobody.fails(Exit.STORE, "--store", named.directory / "new", "add", tree / "same.h")
    assert not (named.directory / "new").exists()


def test_a_store_on_a_read_only_disk_is_named(named: Casfs, namespace: Namespace, tree: Path) -> None:
    namespace.run(f"mount --bind '{named.store}' '{named.store}'; mount -o remount,ro,bind '{named.store}'")
    inside = named.within(namespace)
    for verb in ("ls m", f"add {tree}/same.h"):
        assert str(named.store) in inside.fails(Exit.STORE, *verb.split())


def test_a_full_disk_stops_an_ingest_and_leaves_the_store_clean(casfs: Casfs, namespace: Namespace) -> None:
    disk = casfs.directory / "disk"
    disk.mkdir()
    namespace.run(f"mount -t tmpfs -o size=32m tmpfs '{disk}'")
    inside = casfs.within(namespace)
    inside.environment["CASFS_STORE"] = str(disk / "store")
    tree = casfs.directory / "large"
    tree.mkdir()
    for number in range(20):
        (tree / str(number)).write_bytes(os.urandom(4 << 20))
    (casfs.directory / "small").write_text("small")
    inside.ok("add", "small")
    verbs: tuple[tuple[str | Path, ...], ...] = (
        ("add", "large"),
        ("manifest", "create", "m", "large"),
        ("add", *tree.iterdir()),
    )
    for arguments in verbs:
        assert "full" in inside.fails(Exit.STORE, *arguments)
    with open(tree / "0", "rb") as stream:
        process = inside.start("add", "--stdin", stdin=stream.fileno())
        assert process.communicate(timeout=60)[0].startswith(b"blake3:")
    namespace.run(f"test -z \"$(ls '{disk}/store/tmp')\"")
    assert inside.ok("manifest", "list", "--names").out == ""
    assert inside.ok("verify", "--json").json["clean"] is True


# The place of a mount


def test_a_mount_point_that_is_missing_or_no_directory(named: Casfs, mountpoint: Path, tree: Path) -> None:
    assert "mkdir" in named.fails(Exit.MOUNT, "mount", "m", mountpoint / "nosuch")
    assert "not a directory" in named.fails(Exit.MOUNT, "mount", "m", tree / "same.h")


def test_a_mount_point_that_is_not_empty(named: Casfs, mountpoint: Path, tree: Path) -> None:
    assert "not empty" in named.fails(Exit.MOUNT, "mount", "m", tree)
    assert (tree / "same.h").exists()


def test_a_mount_point_that_is_mounted_already(named: Casfs, mountpoint: Path) -> None:
    named.ok("mount", "m", mountpoint)
    assert "casfs umount" in named.fails(Exit.MOUNT, "mount", "m", mountpoint)
    assert (mountpoint / "same.h").exists()
    named.ok("umount", mountpoint)
    assert "mount point of" in named.fails(Exit.MOUNT, "mount", "m", "/proc")


def test_what_is_no_mount_is_not_unmounted(named: Casfs, mountpoint: Path) -> None:
    for place in (mountpoint, mountpoint / "nosuch", Path("/proc")):
        for verb in ("umount", "stats"):
            assert str(place) in named.fails(Exit.NOT_FOUND, verb, place)


@pytest.mark.parametrize("place", ["not empty", "file", "in the store", "parent missing"])
def test_a_place_that_can_not_be_checked_out_to(named: Casfs, tree: Path, place: str) -> None:
    where = {
        "not empty": tree,
        "file": tree / "same.h",
        "in the store": named.store / "out",
        "parent missing": named.directory / "no" / "such",
    }[place]
    before = snapshot(named.directory)
    assert str(where) in named.fails(Exit.USAGE, "checkout", "m", where)
    assert snapshot(named.directory) == before


@pytest.mark.parametrize("cover", ["/dev/null", "/etc/passwd"])
def test_without_a_fuse_device_mounting_says_what_is_lacking(
    named: Casfs, mountpoint: Path, namespace: Namespace, cover: str
) -> None:
    namespace.run(f"mount --bind {cover} /dev/fuse")
    inside = named.within(namespace)
    for engine in ("passthrough", "fuse", "native"):
        message = inside.fails(Exit.MOUNT, "mount", "m", mountpoint, "--engine", engine)
        assert "/dev/fuse" in message
        assert "modprobe fuse" in message
    assert inside.ok("stats", "--json").json["leases"] == []
    done = inside("doctor", "--json")
    found = {finding["name"]: finding for finding in done.json}
    assert done.code == Exit.OK, "engine kernel needs no such device"
    assert not found["fuse device"]["ok"]
    assert "modprobe fuse" in found["fuse device"]["remedy"]
    assert found["auto"]["detail"] == "kernel", "which needs no such device"
    shown = inside("doctor").out
    assert "no  fuse device " in shown
    assert "to get it: load the fuse module" in shown


def test_without_a_device_directory_mounting_says_what_is_lacking(
    named: Casfs, mountpoint: Path, namespace: Namespace
) -> None:
    namespace.run("mount -t tmpfs tmpfs /mnt; cp -a /dev/null /dev/urandom /mnt; mount --bind /mnt /dev")
    inside = named.within(namespace)
    assert "there is no /dev/fuse" in inside.fails(Exit.MOUNT, "mount", "--engine", "native", "m", mountpoint)


# The command line itself


@pytest.mark.parametrize(
    "arguments",
    [
        "manifest create x",
        "manifest create x tree --root blake3:00/1",
        "mount m",
        "mount m . --engine warp",
        "gc --nosuch",
        "add --function md5 tree",
        "checkout m out --mode teleport",
        "completion fish",
    ],
)
def test_a_wrong_command_line_shows_the_usage(named: Casfs, arguments: str) -> None:
    done = named(*arguments.split())
    assert (done.code, done.out) == (Exit.USAGE, "")
    assert done.err.startswith("usage: casfs ")


@pytest.mark.parametrize(
    "arguments",
    [
        "add",
        "add nosuch",
        "add tree nosuch",
        "manifest create x nosuch",
        "manifest create x tree/same.h",
        "manifest create x --graft tree",
        "manifest create x --graft ../a=tree",
        "manifest create x --graft a=tree --graft a/b=tree",
        "manifest create x --graft a=tree --graft a=tree",
        "manifest create x --graft =tree --graft a=tree",
        "manifest create x --checklist nosuch",
        "manifest create x --checklist - --exclude a",
        "manifest create x --checklist - --base nosuch",
        "manifest create x tree --base tree",
        "manifest create x tree --reference --hardlink",
        "manifest import x nosuch",
        "manifest import x tree",
        "manifest export m no/such",
        "gc --high 10x",
        "gc --high 1G --low 2G",
        "gc --high 1G --grace soon",
        "--store= ls m",
        "--config nosuch ls m",
    ],
)
def test_an_argument_that_makes_no_sense_is_refused(named: Casfs, arguments: str) -> None:
    before = snapshot(named.directory)
    named.fails(Exit.USAGE, *arguments.split())
    assert snapshot(named.directory) == before


def test_an_ingest_by_hard_link_across_disks_says_so(casfs: Casfs, tree: Path, namespace: Namespace) -> None:
    disk = casfs.directory / "disk"
    disk.mkdir()
    namespace.run(f"mount -t tmpfs tmpfs '{disk}'; cp '{tree}/same.h' '{disk}'")
    inside = casfs.within(namespace)
    message = inside.fails(Exit.USAGE, "add", "--hardlink", disk / "same.h")
    assert str(disk / "same.h") in message


def test_a_file_that_can_not_be_read_is_named_and_nothing_is_named_after_it(nobody: Casfs, tree: Path) -> None:
    shutil.copytree(tree, nobody.directory / "copy", symlinks=True)
    (nobody.directory / "copy" / "same.h").chmod(0o000)
    for arguments in (("manifest", "create", "m", "copy"), ("add", "copy"), ("add", "copy/same.h")):
        assert "same.h" in nobody.fails(Exit.USAGE, *arguments)
    subprocess.run(["chmod", "000", nobody.directory / "copy" / "include"], check=True)
    assert "include" in nobody.fails(Exit.USAGE, "manifest", "create", "m", "copy")
    assert nobody.ok("manifest", "list", "--names").out == ""
