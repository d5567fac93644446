"""The whole way as an ordinary user: no root, no store but one's own, mounts by fusermount3."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.tools.conftest import Casfs, Namespace
from tools.exits import Exit


@pytest.fixture
def named(nobody: Casfs, tree: Path) -> Casfs:
    """The command of an ordinary user, with the manifest ``m`` of the tree and a directory ``mnt``."""
    nobody.ok("manifest", "create", "m", tree)
    as_user(nobody, "mkdir", "mnt")
    return nobody


def as_user(casfs: Casfs, *command: str) -> str:
    """What a command prints that this user runs in their home."""
    return subprocess.run([*casfs.prefix, *command], capture_output=True, text=True, check=True).stdout


def test_without_a_store_chosen_it_is_in_the_user_s_cache(nobody: Casfs, tree: Path) -> None:
    del nobody.environment["CASFS_STORE"]
    del nobody.environment["XDG_CACHE_HOME"]
    nobody.ok("add", tree / "same.h")
    assert nobody.ok("stats", "--json").json["store"] == str(nobody.directory / ".cache" / "casfs")


@pytest.mark.parametrize("engine", ["auto", "fuse", "native"])
def test_an_ordinary_user_mounts_reads_and_unmounts(named: Casfs, tree: Path, engine: str) -> None:
    report = named.ok("mount", "m", "mnt", "--engine", engine, "--json").json
    assert report["engine"] == ("fuse" if engine == "auto" else engine)
    if engine == "auto":
        assert "CAP_SYS_ADMIN" in report["why"]
    assert as_user(named, "diff", "-r", "--no-dereference", str(tree), "mnt") == ""
    counted = named.ok("stats", "mnt", "--json").json
    assert counted["engine"] == report["engine"]
    assert counted["upcalls"]["OPEN"] >= 1
    assert "casfs mount already" in named.fails(Exit.MOUNT, "mount", "m", "mnt")
    named.ok("umount", "mnt")
    assert as_user(named, "ls", "mnt") == ""
    assert named.ok("stats", "--json").json["leases"] == []


def test_what_an_ordinary_user_may_not_says_what_would_help(named: Casfs, namespace: Namespace, tmp_path: Path) -> None:
    assert "--engine fuse" in named.fails(Exit.MOUNT, "mount", "m", "mnt", "--engine", "passthrough")
    foreign = tmp_path / "foreign"
    foreign.mkdir(mode=0o755)
    assert "directory of yours" in named.fails(Exit.MOUNT, "mount", "m", foreign)
    # A mount of root's: to be seen, not to be taken away.
    root = Casfs(tmp_path).within(namespace)
    root.ok("manifest", "create", "m", tmp_path / "tree")
    root.ok("mount", "--engine", "native", "m", foreign)
    for verb in ("stats", "umount"):
        assert str(foreign) in named.fails(Exit.MOUNT, verb, foreign)
    assert "same.h" in as_user(named, "ls", str(foreign))
    root.ok("umount", foreign)


def test_umount_clears_what_a_user_s_killed_daemon_left(named: Casfs) -> None:
    report = named.ok("mount", "m", "mnt", "--json").json
    os.kill(report["pid"], 9)
    named.ok("umount", "mnt")
    named.ok("mount", "m", "mnt")
    named.ok("umount", "mnt")


def test_checkout_as_a_user_makes_the_user_s_files(named: Casfs, tree: Path) -> None:
    done = named.ok("checkout", "m", "out", "--json").json
    assert done["files"] == 6
    assert (named.directory / "out" / "same.h").stat().st_uid == 65534
    assert as_user(named, "diff", "-r", "--no-dereference", str(tree), "out") == ""


def test_doctor_tells_an_ordinary_user_what_root_could(named: Casfs) -> None:
    found = {finding["name"]: finding for finding in json.loads(named.ok("doctor", "--json").out)}
    assert found["engine fuse"]["ok"] and found["mount"]["ok"]
    assert not found["engine passthrough"]["ok"]
    assert "root" in found["engine passthrough"]["remedy"]
    assert found["auto"]["detail"] == "fuse"
