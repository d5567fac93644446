"""The cold tier and prefetching as commands: gc --cold, prefetch, mount --prefetch, and what others say of them."""

from __future__ import annotations

import os
import pty
import subprocess
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from store.digest import DigestFunction
from store.layout import blob_path
from tests.tools.conftest import Casfs
from tools.exits import Exit

BLAKE3 = DigestFunction.BLAKE3
ENGINES = ("passthrough", "fuse")


def blob(casfs: Casfs, content: bytes) -> Path:
    return casfs.store / "blobs" / blob_path(BLAKE3.of(content))


@pytest.fixture
def cold(casfs: Casfs, tree: Path) -> Casfs:
    """A manifest m of `tree`, whose 4 distinct blobs with bytes in them are cold."""
    casfs.ok("manifest", "create", "m", tree)
    done = casfs.ok("gc", "--cold", "0", "--json").json
    assert done["cold"]["blobs"] == done["cold"]["blobs_after"] == 4
    assert done["removed_blobs"] == 0
    return casfs


def test_gc_cold_says_what_it_moves_and_needs_no_size(casfs: Casfs, tree: Path) -> None:
    casfs.ok("manifest", "create", "m", tree)
    assert "4 blobs with" in casfs.ok("gc", "--cold", "0", "--dry-run").out
    assert not (casfs.store / "cold").exists()
    assert casfs.ok("gc", "--cold", "1d").out.startswith("0 blobs")
    assert "4 blobs with" in casfs.ok("gc", "--cold", "0").out
    assert not blob(casfs, b"#define A 1\n").exists()
    assert casfs.fails(Exit.USAGE, "gc", "--cold", "soon")
    assert casfs.fails(Exit.USAGE, "gc", "--cold", "0", "--low", "5")


def test_the_configuration_says_age_and_level(casfs: Casfs, tree: Path) -> None:
    casfs.ok("manifest", "create", "m", tree)
    (casfs.directory / "c.toml").write_text("[gc]\ncold = 0\ncold-level = 19\nhigh = '1GiB'\n")
    assert casfs.ok("--config", "c.toml", "gc", "--json").json["cold"]["blobs"] == 4


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[gc]\ncold-level = 23", "1 to 22"),
        ("[sources]\ndirectories = '/x'", "a list"),
        ("[sources]\ndirectories = ['x']", "not an absolute path"),
        ("[sources]\ntimeout = 0", "at least"),
    ],
)
def test_a_wrong_value_in_the_configuration_is_named(casfs: Casfs, text: str, why: str) -> None:
    (casfs.directory / "c.toml").write_text(text)
    assert why in casfs.fails(Exit.USAGE, "--config", "c.toml", "stats")


def test_stats_and_verify_count_what_is_cold(cold: Casfs) -> None:
    found = cold.ok("stats", "--json").json
    assert found["cold"]["blobs"] == 4 and found["cold"]["bytes"] > 0
    assert "cold" in cold.ok("stats").out
    verified = cold.ok("verify", "--json").json
    assert (verified["cold"], verified["clean"]) == (4, True)
    [path] = (cold.store / "cold").rglob(BLAKE3.of(b"odd\n").hex + ".zst")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-6])
    verified = cold("verify", "--json")
    assert verified.code == Exit.NO
    assert len(verified.json["quarantined"]) == 1 and verified.json["incomplete"] == {"m": 1}


def test_cat_and_checkout_bring_back_what_is_cold(cold: Casfs, tree: Path) -> None:
    assert cold.ok("cat", "m/include/a.h").out == "#define A 1\n"
    assert blob(cold, b"#define A 1\n").exists()
    cold.ok("checkout", "m", "out")
    assert subprocess.run(["diff", "-r", "--no-dereference", tree, cold.directory / "out"], check=False).returncode == 0


def test_prefetch_brings_in_everything(cold: Casfs) -> None:
    done = cold.ok("prefetch", "m", "--json").json
    assert (done["fetched_blobs"], done["failed"]) == (4, {})
    assert cold.ok("stats", "--json").json["cold"] == {"blobs": 0, "bytes": 0}
    assert cold.ok("prefetch", "m").out.startswith("0 blobs")


def test_prefetch_uses_the_configured_directories_and_names_what_none_has(cold: Casfs) -> None:
    content = b"#define B 2\n"
    other = Casfs(cold.directory / "other")
    other.directory.mkdir()
    other.ok("add", "--stdin", stdin=content.decode())
    for path in (cold.store / "cold").rglob("*.zst"):
        path.unlink()
    (cold.directory / "c.toml").write_text(f"[sources]\ndirectories = ['{other.store}']\ntimeout = '5s'\n")
    done = cold("--config", "c.toml", "prefetch", "m", "--json")
    assert done.code == Exit.NO
    assert done.json["fetched_blobs"] == 1 and len(done.json["failed"]) == 3
    assert blob(cold, content).read_bytes() == content
    done = cold("--config", "c.toml", "prefetch", "m")
    assert done.code == Exit.NO and done.err.count("casfs: warning: no blob") == 3


def test_prefetch_shows_its_progress_on_a_terminal(cold: Casfs) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen(
        [*cold.command, "prefetch", "m"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=cold.environment,
        cwd=cold.directory,
    ) as process:
        process.communicate(timeout=60)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # EIO: the other end is closed
        while data := os.read(ours, 4096):
            shown += data
    os.close(ours)
    assert b"fetching" in shown and process.returncode == 0


def test_prefetching_what_is_no_manifest_is_refused(cold: Casfs) -> None:
    assert "did you mean" in cold.fails(Exit.NOT_FOUND, "prefetch", "mm")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mount_reads_what_is_cold_without_a_warning(cold: Casfs, mountpoint: Path, engine: str) -> None:
    done = cold("mount", "--engine", engine, "m", mountpoint)
    assert (done.code, done.err) == (0, "")
    assert (mountpoint / "include" / "a.h").read_text() == "#define A 1\n"
    found = cold.ok("stats", mountpoint, "--json").json
    assert found["hydration"]["fetched_blobs"] == 1
    assert engine != "passthrough" or found["upcalls"]["READ"] == 0
    assert "1 blob with" in cold.ok("stats", mountpoint).out
    cold.ok("umount", mountpoint)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mount_can_prefetch(cold: Casfs, mountpoint: Path, engine: str) -> None:
    cold.ok("mount", "--prefetch", "--engine", engine, "m", mountpoint)
    assert cold.ok("stats", "--json").json["cold"]["blobs"] == 0
    assert (mountpoint / "run.sh").read_text() == "#!/bin/sh\necho ran\n"
    assert cold.ok("stats", mountpoint, "--json").json["hydration"]["fetched_blobs"] == 0
    cold.ok("umount", mountpoint)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mount_is_not_collected_into_the_cold_tier(casfs: Casfs, tree: Path, mountpoint: Path, engine: str) -> None:
    casfs.ok("manifest", "create", "m", tree)
    casfs.ok("mount", "--engine", engine, "m", mountpoint)
    assert casfs.ok("gc", "--cold", "0", "--json").json["cold"]["blobs"] == 0
    casfs.ok("umount", mountpoint)
    assert casfs.ok("gc", "--cold", "0", "--json").json["cold"]["blobs"] == 4


def test_a_mount_says_what_is_missing_and_where_it_is_looked_for(cold: Casfs, mountpoint: Path) -> None:
    for path in (cold.store / "cold").rglob("*.zst"):
        path.unlink()
    (cold.directory / "c.toml").write_text(f"[sources]\ndirectories = ['{cold.directory}/gone']\n")
    done = cold("--config", "c.toml", "mount", "--engine", "native", "m", mountpoint)
    assert "4 blobs of m not in the store" in done.err and f"is looked for in {cold.directory}/gone" in done.err
    cold.ok("umount", mountpoint)
