"""The verbs about mounts: mount, umount, stats, and checkout beside them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from casfs.mountinfo import find_mount
from tests.conftest import Requirements
from tests.tools.conftest import Casfs, wait_until
from tools.exits import Exit


@pytest.fixture
def named(casfs: Casfs, tree: Path, mountpoint: Path) -> Casfs:
    """The command, with the manifest ``m`` of the tree."""
    casfs.ok("manifest", "create", "m", tree)
    return casfs


@pytest.mark.parametrize("engine", ["kernel", "passthrough", "fuse", "native"])
def test_a_mount_shows_the_tree_until_it_is_unmounted(
    named: Casfs, tree: Path, mountpoint: Path, engine: str, requires: Requirements
) -> None:
    requires.admin()
    done = named.ok("mount", "m", mountpoint, "--engine", engine)
    assert done.out == f"m is mounted on {mountpoint} (engine {engine})\n"
    compared = subprocess.run(["diff", "-r", "--no-dereference", tree, mountpoint], capture_output=True, check=False)
    assert (compared.returncode, compared.stdout) == (0, b"")
    assert named.ok("stats", mountpoint).out.startswith("engine  ")
    assert named.ok("stats", mountpoint, "--json").json["engine"] == engine
    assert named.ok("umount", mountpoint).out == ""
    assert find_mount(str(mountpoint)) is None
    assert list(mountpoint.iterdir()) == []
    assert named.ok("stats", "--json").json["leases"] == []


def test_reads_through_passthrough_make_no_read_upcall(named: Casfs, mountpoint: Path, requires: Requirements) -> None:
    requires.admin()
    report = named.ok("mount", "m", mountpoint, "--engine", "passthrough", "--json").json
    assert set(report) == {"mountpoint", "engine", "why", "root", "missing", "pid"}
    assert (report["mountpoint"], report["engine"], report["missing"]) == (str(mountpoint), "passthrough", 0)
    assert (mountpoint / "same.h").read_text() == "#define A 1\n"
    counted = named.ok("stats", mountpoint, "--json").json
    assert (counted["engine"], counted["pid"], counted["root"]) == ("passthrough", report["pid"], report["root"])
    assert (counted["upcalls"]["OPEN"], counted["upcalls"]["READ"]) == (1, 0)
    assert counted["upcalls"]["LOOKUP"] == 1
    assert named.ok("stats", "--json").json["leases"][0]["holder"] == str(mountpoint)
    shown = named.ok("stats", mountpoint).out
    assert shown.startswith("engine  ")
    assert "  READ     0\n" in shown
    named.ok("umount", mountpoint)


def test_mount_says_why_it_chose_the_engine_when_asked(named: Casfs, mountpoint: Path) -> None:
    quiet = named.ok("mount", "m", "mnt")
    assert quiet.out.startswith("m is mounted on mnt (engine ")
    named.ok("umount", "mnt")
    loud = named.ok("mount", "-v", "m", "mnt")
    assert loud.out.startswith(quiet.out.rstrip(")\n") + ": ")
    named.ok("umount", "mnt")


def test_the_configuration_chooses_the_engine_unless_the_command_line_does(named: Casfs, mountpoint: Path) -> None:
    (named.directory / "casfs.toml").write_text('mount.engine = "native"\n')
    assert "engine native" in named.ok("mount", "--config", "casfs.toml", "m", mountpoint).out
    named.ok("umount", mountpoint)
    assert "engine fuse" in named.ok("mount", "--config", "casfs.toml", "--engine", "fuse", "m", mountpoint).out
    named.ok("umount", mountpoint)


def test_a_digest_can_be_mounted(named: Casfs, mountpoint: Path) -> None:
    digests = {entry["path"]: entry.get("digest") for entry in named.ok("ls", "m", "--json").json}
    named.ok("mount", digests["include"], mountpoint)
    assert sorted(os.listdir(mountpoint)) == ["a.h", "deep"]
    named.ok("umount", mountpoint)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_mount_in_the_foreground_ends_with_a_signal_and_leaves_nothing(
    named: Casfs, mountpoint: Path, number: int
) -> None:
    process = named.start("mount", "--foreground", "--json", "m", mountpoint)
    wait_until(lambda: os.path.exists(mountpoint / "same.h"))
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, b"")
    assert json.loads(out)["pid"] == process.pid
    assert find_mount(str(mountpoint)) is None


def test_a_mount_in_the_foreground_ends_when_it_is_unmounted(named: Casfs, mountpoint: Path) -> None:
    process = named.start("mount", "--foreground", "m", mountpoint)
    wait_until(lambda: os.path.exists(mountpoint / "same.h"))
    named.ok("umount", mountpoint)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, b"")
    assert b"is mounted on" in out


def test_what_starts_a_mount_gets_its_output_back_at_once(named: Casfs, mountpoint: Path) -> None:
    # A daemon that kept the pipe would make `out=$(casfs mount …)` hang.
    done = named.ok("mount", "m", mountpoint)
    assert "is mounted" in done.out
    named.ok("umount", mountpoint)


@pytest.mark.parametrize("engine", ["native", "fuse"])
def test_a_mount_warns_of_missing_blobs_and_opening_them_fails(named: Casfs, mountpoint: Path, engine: str) -> None:
    text = f"casfs manifest 1 blake3\nf\t{'ab' * 32}/7\t-\tgone\nf\t{'cd' * 32}/7\t-\tgone too\n"
    named.ok("manifest", "import", "holes", "-", stdin=text)
    done = named.ok("mount", "holes", mountpoint, "--engine", engine)
    assert done.err.startswith("casfs: warning: 2 blobs of holes not in the store")
    assert str(named.store / "casfs.log") in done.err
    with pytest.raises(OSError, match="Input/output error"):
        (mountpoint / "gone").read_bytes()
    [line] = [line for line in (named.store / "casfs.log").read_text().splitlines() if "ab" * 32 in line]
    assert "gone" in line
    assert named.ok("stats", mountpoint, "--json").json["missing"] == 2
    named.ok("umount", mountpoint)


def test_a_missing_blob_that_is_added_later_can_be_read(named: Casfs, tree: Path, mountpoint: Path) -> None:
    text = named.ok("manifest", "export", "m").out
    fresh = Casfs(named.directory / "fresh")
    fresh.directory.mkdir()
    fresh.ok("manifest", "import", "m", "-", stdin=text)
    assert "4 blobs of m not in the store" in fresh.ok("mount", "m", mountpoint).err
    with pytest.raises(OSError, match="Input/output error"):
        (mountpoint / "same.h").read_bytes()
    fresh.ok("add", tree / "same.h")
    assert (mountpoint / "same.h").read_text() == "#define A 1\n"
    fresh.ok("umount", mountpoint)


def test_a_file_by_reference_that_changed_is_stale(named: Casfs, tree: Path, mountpoint: Path) -> None:
    named.ok("manifest", "create", "r", tree, "--reference")
    named.ok("mount", "r", mountpoint)
    assert (mountpoint / "run.sh").read_bytes() == (tree / "run.sh").read_bytes()
    (tree / "same.h").write_text("#define A 2\n")
    with pytest.raises(OSError, match="Stale"):
        (mountpoint / "same.h").read_bytes()
    assert "same.h" in (named.store / "casfs.log").read_text()
    named.ok("umount", mountpoint)


def test_two_daemons_share_a_store(named: Casfs, tree: Path, mountpoint: Path) -> None:
    places = [mountpoint / "a", mountpoint / "b"]
    for place in places:
        place.mkdir()
        named.ok("mount", "m", place)
    assert len(named.ok("stats", "--json").json["leases"]) == 2
    (tree / "new").write_text("new")
    named.ok("manifest", "create", "n", tree)
    for place in places:
        assert (place / "same.h").read_text() == "#define A 1\n"
    named.ok("umount", places[0])
    assert (places[1] / "include/a.h").read_text() == "#define A 1\n"
    named.ok("umount", places[1])
    assert named.ok("verify", "--json").json["clean"] is True


def test_collecting_spares_what_is_mounted_though_its_manifest_was_removed(named: Casfs, mountpoint: Path) -> None:
    named.ok("mount", "m", mountpoint)
    named.ok("manifest", "remove", "m")
    assert named("gc", "--high", "0", "--grace", "0").code == Exit.NO
    assert (mountpoint / "same.h").read_text() == "#define A 1\n"
    named.ok("umount", mountpoint)


def test_the_index_is_not_rebuilt_under_a_mount(named: Casfs, mountpoint: Path) -> None:
    named.ok("mount", "m", mountpoint)
    assert str(mountpoint) in named.fails(Exit.STORE, "verify", "--rebuild")
    named.ok("verify")
    named.ok("umount", mountpoint)


def kill_daemon(casfs: Casfs, mountpoint: Path) -> None:
    """Kill the daemon of a mount, and see it gone."""
    pid = casfs.ok("stats", mountpoint, "--json").json["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"))


def test_umount_clears_what_a_killed_daemon_left(named: Casfs, mountpoint: Path) -> None:
    named.ok("mount", "--engine", "native", "m", mountpoint)
    kill_daemon(named, mountpoint)
    assert "umount" in named.fails(Exit.MOUNT, "stats", mountpoint)
    named.ok("umount", mountpoint)
    assert find_mount(str(mountpoint)) is None
    assert named.ok("stats", "--json").json["leases"] == []


def test_umount_says_when_another_namespace_keeps_the_daemon(
    named: Casfs, mountpoint: Path, requires: Requirements
) -> None:
    requires.admin()
    requires.programs("unshare")
    named.ok("mount", "--engine", "native", "m", mountpoint)
    pid = named.ok("stats", mountpoint, "--json").json["pid"]
    other = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "infinity"])
    try:
        wait_until(lambda: Path(f"/proc/{other.pid}/comm").read_text() == "sleep\n")
        said = named.ok("umount", mountpoint).out
        assert "another mount namespace" in said and f"kill {pid}" in said
        assert find_mount(str(mountpoint)) is None
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not os.path.exists(f"/proc/{pid}"))
    finally:
        other.kill()
        other.wait()


def test_the_next_mount_clears_what_a_killed_daemon_left(named: Casfs, mountpoint: Path) -> None:
    named.ok("mount", "--engine", "native", "m", mountpoint)
    kill_daemon(named, mountpoint)
    named.ok("mount", "m", mountpoint)
    assert (mountpoint / "same.h").read_text() == "#define A 1\n"
    named.ok("umount", mountpoint)


def test_umount_of_a_mount_in_use_says_so_and_lazily_takes_it_away(named: Casfs, mountpoint: Path) -> None:
    named.ok("mount", "m", mountpoint)
    with open(mountpoint / "same.h") as file:
        assert "--lazy" in named.fails(Exit.MOUNT, "umount", mountpoint)
        named.ok("umount", "--lazy", mountpoint)
        assert find_mount(str(mountpoint)) is None
        assert file.read() == "#define A 1\n"


@pytest.mark.parametrize("mode", ["auto", "copy", "hardlink"])
def test_checkout_writes_the_tree_and_says_how(casfs: Casfs, tree: Path, mode: str) -> None:
    casfs.ok("manifest", "create", "m", tree)
    done = casfs.ok("checkout", "m", "out", "--mode", mode, "--json").json
    assert (done["files"], done["symlinks"], done["directories"]) == (6, 2, 4)
    assert done["files"] == done["reflinked"] + done["hardlinked"] + done["copied"]
    if mode != "auto":
        assert done["copied" if mode == "copy" else "hardlinked"] == 6
    compared = subprocess.run(["diff", "-r", "--no-dereference", tree, casfs.directory / "out"], check=False)
    assert compared.returncode == 0
    said = casfs.ok("checkout", "m", "out2").out
    assert said.startswith("m: 6 files, ")
    assert said.endswith(" in out2\n")
