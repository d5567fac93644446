"""Each capability is named, with what was tried and what would help; a machine without FUSE is told so."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from casfs import doctor, fusemount, mounting, mountpoint, probes
from casfs.doctor import Finding, examine
from casfs.errors import MissingCapability
from casfs.mountinfo import list_mounts
from casfs.probes import Probe
from casfs.syscalls import CLONE_NEWNS, MS_PRIVATE, MS_REC, mount, unshare
from store.digest import Digest, DigestFunction
from store.repository import Store
from store.treebuilder import TreeBuilder
from tests.conftest import Requirements

REPOSITORY = Path(__file__).resolve().parents[2]

NAMES = {
    "fuse device",
    "privilege to mount",
    "store",
    "cores",
    "mount",
    "engine kernel",
    "engine passthrough",
    "engine fuse",
    "kernel sandbox",
    "bubblewrap",
    "user overlay",
    "reflink",
    "cached lookups",
    "auto",
}


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    named = {finding.name: finding for finding in findings}
    assert len(named) == len(findings)
    return named


def empty_tree(store: Store) -> Digest:
    with store.ingest() as ingest:
        builder = TreeBuilder(store.index, ingest, DigestFunction.BLAKE3)
        return builder.finish(builder.add_directory([])).digest


def test_every_capability_is_examined_and_says_how(tmp_path: Path, requires: Requirements) -> None:
    requires.fuse()
    requires.admin()
    found = by_name(examine(tmp_path / "store"))
    assert set(found) == NAMES
    for finding in found.values():
        assert finding.how and finding.detail
        assert finding.ok or finding.remedy, finding
    assert found["fuse device"].ok and found["mount"].ok and found["auto"].ok


def test_the_doctor_and_the_choice_of_an_engine_agree(tmp_path: Path, requires: Requirements) -> None:
    requires.fuse()
    with Store.open(tmp_path / "store") as store:
        root = empty_tree(store)
    (tmp_path / "place").mkdir()
    found = by_name(examine(tmp_path / "store"))
    report = mounting.start(mounting.Request(tmp_path / "store", root, tmp_path / "place"))
    try:
        assert found["auto"].detail == report.engine
        assert report.why
    finally:
        mountpoint.unmount(tmp_path / "place")
    for name in ("passthrough", "fuse"):
        if found[f"engine {name}"].ok:
            assert mounting.choose_engine(name, tmp_path / "store")[0] == name


def test_examining_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    before = {mount.id for mount in list_mounts()}
    examine(tmp_path / "store")
    assert os.listdir(tmp_path) == ["tmp"]
    assert os.listdir(tmp_path / "tmp") == []
    # Other tests mount beside this one in their directories, and those of another run in theirs.
    runs = [parent for parent in tmp_path.parents if parent.name.startswith("pytest-of-")]
    others = os.fsencode(runs[0] if runs else tmp_path.parent.parent)
    new = [mount for mount in list_mounts() if mount.id not in before]
    assert not [
        mount for mount in new if not mount.path.startswith(others) or mount.path.startswith(os.fsencode(tmp_path))
    ]


def test_a_store_that_is_none_or_cannot_be_used_is_named(tmp_path: Path) -> None:
    assert by_name(examine(tmp_path / "new"))["store"].ok, "it can be made"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "format").write_text("something else\n")
    found = by_name(examine(tmp_path / "broken"))["store"]
    assert not found.ok
    assert "broken" in found.detail and "--store" in found.remedy


def test_a_probe_that_crashes_or_hangs_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, requires: Requirements
) -> None:
    requires.fuse()

    def crash(file: Path) -> Probe:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def hang(file: Path) -> Probe:
        while True:
            os.read(reading, 1)

    reading, writing = os.pipe()
    monkeypatch.setattr(probes, "_PROBE_SECONDS", 1)
    try:
        for broken in (crash, hang):
            monkeypatch.setattr(probes, "_try_mount", broken)
            probe = probes.probe_mount(tmp_path / "file")
            assert not probe.ok
            assert "crashed or hung" in probe.detail
    finally:
        os.close(reading)
        os.close(writing)


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (doctor, fusemount, probes):
        monkeypatch.setattr(module, "DEVICE", str(tmp_path / "no" / "fuse"), raising=False)


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize("engine", [engine for engine in mounting.ENGINES if engine not in ("auto", "kernel")])
def test_without_a_device_every_engine_says_what_to_do(tmp_path: Path, engine: str) -> None:
    from store.importing import ScanOptions

    (tmp_path / "source").mkdir()
    (tmp_path / "place").mkdir()
    with Store.open(tmp_path / "store") as store:
        root = store.importer.from_directories([(b"", tmp_path / "source")], ScanOptions()).digest
    with pytest.raises(MissingCapability, match="fuse") as caught:
        mounting.start(mounting.Request(tmp_path / "store", root, tmp_path / "place"), engine=engine)
    assert "modprobe fuse" in str(caught.value)


EXAMINE = """
import dataclasses, json, sys
from pathlib import Path
from tests.casfs import test_doctor
test_doctor.enter_a_machine_without_fuse()
from casfs.doctor import examine
print(json.dumps([dataclasses.astuple(finding) for finding in examine(Path(sys.argv[1]))]))
"""


def enter_a_machine_without_fuse() -> None:
    """A mount namespace of our own, where /dev has next to nothing."""
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE, "")
    mount("none", "/dev", "tmpfs", 0, "mode=0755")
    for name, minor in (("null", 3), ("zero", 5), ("urandom", 9)):
        os.mknod(f"/dev/{name}", stat.S_IFCHR | 0o666, os.makedev(1, minor))


def test_on_a_machine_without_the_device_the_doctor_says_so(tmp_path: Path, requires: Requirements) -> None:
    requires.admin()
    done = subprocess.run(
        [sys.executable, "-c", EXAMINE, tmp_path / "store"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = by_name([Finding(*row) for row in json.loads(done.stdout)])
    assert set(found) == NAMES
    assert not found["fuse device"].ok
    assert "/dev/fuse" in found["fuse device"].how and "modprobe fuse" in found["fuse device"].remedy
    for name in ("mount", "engine passthrough", "engine fuse"):
        assert not found[name].ok and found[name].remedy, name
    assert found["auto"].detail == "kernel", "which needs no such device"
