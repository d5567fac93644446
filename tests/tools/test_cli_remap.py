"""`casfs remap`: what a mount shows is changed from the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tools.exits import Exit


@pytest.fixture
def mounted(casfs: Casfs, tree: Path, mountpoint: Path) -> Casfs:
    """The command, with the manifest ``m`` of the tree, mounted."""
    casfs.ok("manifest", "create", "m", tree)
    casfs.ok("mount", "m", mountpoint, "--engine", "fuse")
    return casfs


def test_paths_are_pointed_at_trees_files_blobs_and_links(mounted: Casfs, mountpoint: Path, tmp_path: Path) -> None:
    assert not (mountpoint / "new").exists()
    done = mounted.ok("remap", mountpoint, "add", "new/copy", "m/include")
    assert done.out.startswith("1 change, ") and done.out.endswith(" invalidated\n")
    assert sorted(os.listdir(mountpoint / "new" / "copy")) == ["a.h", "deep"]
    mounted.ok("remap", mountpoint, "replace", "new/copy/a.h", "m/same.h")
    assert (mountpoint / "new/copy/a.h").read_text() == (mountpoint / "same.h").read_text()
    mounted.ok("remap", mountpoint, "add", "whole", "m")
    assert (mountpoint / "whole/same.h").exists()
    host = tmp_path / "host.sh"
    host.write_text("#!/bin/sh\n")
    host.chmod(0o755)
    mounted.ok("remap", mountpoint, "add", "bin/tool", "--host", host)
    assert os.access(mountpoint / "bin/tool", os.X_OK)
    mounted.ok("remap", mountpoint, "add", "hosts", "--host", tmp_path / "tree")
    assert (mountpoint / "hosts/same.h").exists()
    digest = mounted.ok("add", "--stdin", stdin="a blob").out.split()[0]
    mounted.ok("remap", mountpoint, "add", "blob", "--blob", digest, "--executable")
    assert (mountpoint / "blob").read_text() == "a blob" and os.access(mountpoint / "blob", os.X_OK)
    mounted.ok("remap", mountpoint, "add", "lynk", "--symlink", "blob")
    assert os.readlink(mountpoint / "lynk") == "blob"
    assert mounted.ok("remap", mountpoint, "remove", "whole", "--json").json["changes"] == 1
    assert not (mountpoint / "whole").exists()


def test_many_changes_are_one_step(mounted: Casfs, mountpoint: Path) -> None:
    changes = [
        {"op": "add", "path": "one", "tree": "m/same.h"},
        {"op": "add", "path": "two", "symlink": "one"},
        {"op": "remove", "path": "include"},
    ]
    lines = "\n".join(map(json.dumps, changes))
    before = sorted(os.listdir(mountpoint))
    wrong = lines + '\n{"op": "remove", "path": "nowhere"}\n'
    assert "'nowhere'" in mounted.fails(Exit.USAGE, "remap", mountpoint, "batch", "-", stdin=wrong)
    assert sorted(os.listdir(mountpoint)) == before
    mounted.ok("remap", mountpoint, "batch", "-", stdin=lines)
    assert sorted(os.listdir(mountpoint)) == sorted({*before, "one", "two"} - {"include"})


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["remove", "nowhere"], Exit.USAGE, "it isn't there"),
        (["add", "same.h", "m/same.h"], Exit.USAGE, "it is there already"),
        (["add", "x"], Exit.USAGE, "takes one thing to put there"),
        (["remove", "same.h", "m"], Exit.USAGE, "takes nothing to put there"),
        (["add", "x", "m/nowhere"], Exit.NOT_FOUND, "nowhere"),
        (["add", "x", "nothing"], Exit.NOT_FOUND, "nothing"),
        (["add", "../x", "m"], Exit.USAGE, "'..'"),
        (["add", "x", "--host", "nowhere"], Exit.NO, "nowhere"),
        (["add", "x", "--host", "/dev/null"], Exit.USAGE, "neither a file nor a directory"),
        (["add", "x", "--blob", "blake3:" + "0" * 64 + "/3"], Exit.USAGE, "not in the store"),
    ],
)
def test_what_can_not_be_done_is_said_and_changes_nothing(
    mounted: Casfs, mountpoint: Path, arguments: list[str], code: Exit, says: str
) -> None:
    before = sorted(os.listdir(mountpoint))
    assert says in mounted.fails(code, "remap", mountpoint, *arguments)
    assert sorted(os.listdir(mountpoint)) == before


@pytest.mark.parametrize(
    "line", ["no JSON", "3", "{}", '{"op": "burn", "path": "x"}', '{"op": "add", "path": "x", "tree": 3}']
)
def test_a_batch_names_its_wrong_line(mounted: Casfs, mountpoint: Path, line: str) -> None:
    good = '{"op": "remove", "path": "same.h"}\n\n'
    assert "standard input:3" in mounted.fails(Exit.USAGE, "remap", mountpoint, "batch", "-", stdin=good + line)
    assert (mountpoint / "same.h").exists()


def test_without_a_mount_and_of_engine_kernel_it_says_so(
    casfs: Casfs, tree: Path, mountpoint: Path, requires: Requirements
) -> None:
    requires.admin()
    casfs.ok("manifest", "create", "m", tree)
    assert "no casfs mount" in casfs.fails(Exit.NOT_FOUND, "remap", mountpoint, "remove", "same.h")
    casfs.ok("mount", "m", mountpoint, "--engine", "kernel")
    assert "--engine passthrough" in casfs.fails(Exit.USAGE, "remap", mountpoint, "remove", "same.h")
