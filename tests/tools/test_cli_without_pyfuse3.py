"""pyfuse3 is an extra, built from source: without it everything works but the engine it is for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tools.exits import Exit


@pytest.fixture
def without(casfs: Casfs) -> Casfs:
    """The command in an environment where the import fails, as where it isn't installed."""
    stub = casfs.directory / "stub"
    stub.mkdir()
    for name in ("pyfuse3", "trio"):
        (stub / f"{name}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\")\n")
    casfs.environment["PYTHONPATH"] = os.pathsep.join((str(stub), casfs.environment["PYTHONPATH"]))
    return casfs


def test_a_tree_is_mounted_by_our_own_session(without: Casfs, tree: Path, requires: Requirements) -> None:
    requires.fuse()
    place = without.directory / "mnt"
    place.mkdir()
    without.ok("manifest", "create", "m", tree)
    chosen = without.ok("mount", "--json", "m", place).json["engine"]
    assert chosen in ("kernel", "passthrough", "native")
    without.ok("umount", place)
    without.ok("mount", "--engine", "native", "m", place)
    try:
        assert (place / "include" / "a.h").read_text() == "#define A 1\n"
        assert without.ok("stats", place, "--json").json["engine"] == "native"
    finally:
        without.ok("umount", place)


def test_its_engine_says_how_to_get_it(without: Casfs, tree: Path, requires: Requirements) -> None:
    requires.fuse()
    place = without.directory / "mnt"
    place.mkdir()
    without.ok("manifest", "create", "m", tree)
    said = without.fails(Exit.MOUNT, "mount", "--engine", "fuse", "m", place)
    assert "pyfuse3" in said
    assert "pip install 'casfs[fuse]'" in said


def test_doctor_says_how_to_get_it(without: Casfs) -> None:
    findings = {finding["name"]: finding for finding in without("doctor", "--json").json}
    assert not findings["engine fuse"]["ok"]
    assert "casfs[fuse]" in findings["engine fuse"]["remedy"]
