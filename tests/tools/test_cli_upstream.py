"""Mounts, `casfs run` and `casfs prefetch` with an upstream: an input root that is in no manifest and not here."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from casfs.holder import find_holder
from store.digest import DigestFunction
from store.repository import SourceOptions, Store
from tests.conftest import Requirements
from tests.tools.conftest import Casfs, end_holders, wait_until
from tests.tools.server.conftest import Server, running
from tests.tools.server.odd import serving
from tools.exits import Exit
from tools.upstream.options import UpstreamOptions, dump_upstream
from tools.upstream.sources import Upstream, parts

ENGINES = ("kernel", "passthrough", "fuse")


@pytest.fixture
def above(casfs: Casfs, tree: Path) -> Casfs:
    """Another store, with a manifest m of `tree`."""
    (casfs.directory / "above").mkdir()
    other = Casfs(casfs.directory / "above")
    other.ok("manifest", "create", "m", tree)
    return other


@pytest.fixture
def server(above: Casfs) -> Iterator[Server]:
    """A server of that."""
    with running(above) as made:
        yield made


def root_of(above: Casfs) -> str:
    return str(above.ok("manifest", "show", "m", "--json").json["root"])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mount_shows_what_only_the_upstream_has(
    casfs: Casfs, above: Casfs, server: Server, tree: Path, mountpoint: Path, engine: str, requires: Requirements
) -> None:
    if engine != "fuse":
        requires.admin()
    root, url = root_of(above), f"grpc://{server.address}"
    done = casfs.ok("mount", root, mountpoint, "--engine", engine, "--upstream", url)
    assert url in done.err
    subprocess.run(["diff", "-r", "--no-dereference", tree, mountpoint], check=True)
    server.stop(signal.SIGKILL)
    subprocess.run(["diff", "-r", "--no-dereference", tree, mountpoint], check=True)
    casfs.ok("umount", mountpoint)


@pytest.mark.parametrize("engine", ENGINES)
def test_without_the_upstream_a_mount_goes_on_with_what_is_here(
    casfs: Casfs, above: Casfs, server: Server, mountpoint: Path, engine: str, requires: Requirements
) -> None:
    if engine != "fuse":
        requires.admin()
    (casfs.directory / "c.toml").write_text("[sources]\ntimeout = '2s'\n")
    upstream = ("--upstream", f"grpc://{server.address}")
    casfs.ok("--config", "c.toml", "mount", root_of(above), mountpoint, "--engine", engine, *upstream)
    (mountpoint / "include" / "a.h").read_text()
    server.stop(signal.SIGKILL)
    with pytest.raises(OSError):
        (mountpoint / "include" / "deep" / "b.h").read_text()
    assert (mountpoint / "include" / "a.h").read_text() == "#define A 1\n"
    assert "b.h" in [path.name for path in (mountpoint / "include" / "deep").iterdir()]
    with running(above, "--listen", server.address):
        for _ in range(100):
            with suppress(OSError):
                assert (mountpoint / "include" / "deep" / "b.h").read_text() == "#define B 2\n"
                break
            signal.sigtimedwait([], 0.1)
        else:
            pytest.fail("it was not found again")
    casfs.ok("umount", mountpoint)


def test_the_configuration_names_an_upstream_too(casfs: Casfs, above: Casfs, server: Server) -> None:
    (casfs.directory / "c.toml").write_text(f"[sources]\nupstream = 'grpc://{server.address}'\n")
    root = root_of(above)
    done = casfs.ok("--config", "c.toml", "prefetch", root, "--json").json
    assert (done["fetched_blobs"], done["failed"]) == (4, {})
    server.stop()
    assert casfs.ok("cat", f"{root}/run.sh").out.endswith("echo ran\n")


def test_a_root_that_nobody_has_is_not_found(casfs: Casfs, server: Server, mountpoint: Path) -> None:
    nowhere = str(DigestFunction.BLAKE3.of(b"nowhere"))
    upstream = ("--upstream", f"grpc://{server.address}")
    assert "no blob" in casfs.fails(Exit.NOT_FOUND, "mount", nowhere, mountpoint, *upstream)
    assert "no blob" in casfs.fails(Exit.NOT_FOUND, "prefetch", nowhere, *upstream)


def test_a_command_runs_on_an_input_root_of_the_upstream(casfs: Casfs, above: Casfs, server: Server) -> None:
    upstream = ("--upstream", f"grpc://{server.address}")
    done = casfs("run", root_of(above), "--host-root", *upstream, "--", "sh", "-c", "cat include/a.h include/deep/b.h")
    assert (done.code, done.out) == (0, "#define A 1\n#define B 2\n"), done.err


def test_what_finds_everything_here_never_loads_grpc(casfs: Casfs, above: Casfs, server: Server) -> None:
    root, upstream = root_of(above), ("--upstream", f"grpc://{server.address}")
    casfs.ok("prefetch", root, *upstream)
    script = (
        "import sys; from tools.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert 'grpc' not in sys.modules, 'loaded'"
    )
    casfs.environment["CASFS_CONFIG"] = str(casfs.directory / "c.toml")
    (casfs.directory / "c.toml").write_text(f"[sources]\nupstream = 'grpc://{server.address}'\n")
    for verb in (["ls", root], ["prefetch", root], ["cat", f"{root}/run.sh"]):
        done = subprocess.run(
            [casfs.command[0], "-c", script, *verb], env=casfs.environment, capture_output=True, text=True, check=False
        )
        assert "loaded" not in done.stderr, done.stderr


def test_a_tree_is_fetched_at_once_or_by_level(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number in range(300):
        path = source / f"d{number % 10}" / f"e{number}"
        path.mkdir(parents=True)
        (path / "f").write_text(str(number))
    from store.importing import ScanOptions

    with Store.open(tmp_path / "above") as above, serving(above) as url:
        root = above.importer.from_directories([(b"", source)], ScanOptions()).digest
        (source / "d0" / "new").mkdir()
        (source / "d0" / "new" / "f").write_text("new")
        second = above.importer.from_directories([(b"", source)], ScanOptions()).digest
        upstream = Upstream(UpstreamOptions(url), 5.0)
        options = SourceOptions((), 5.0, lambda: parts(upstream))
        with Store.open(tmp_path / "here", sources=options) as store:
            store.importer.from_messages(root)
            calls = upstream.statistics()
            assert (calls["GetTree"], calls["BatchReadBlobs"]) == (1, 1)
            store.importer.from_messages(second)
            calls = upstream.statistics()
            assert (calls["GetTree"], calls["BatchReadBlobs"]) == (1, 4), "the root, d0, and what is new in it"


def test_the_holder_fetches_from_the_upstream_that_it_was_started_for(
    casfs: Casfs, above: Casfs, server: Server, tmp_path: Path
) -> None:
    big = tmp_path / "big"
    for number in range(2100):
        (big / f"d{number % 7}").mkdir(parents=True, exist_ok=True)
        (big / f"d{number % 7}" / f"f{number}").write_text(str(number))
    above.ok("manifest", "create", "big", big)
    root = above.ok("manifest", "show", "big", "--json").json["root"]
    upstream = ("--upstream", f"grpc://{server.address}")
    started_for = dump_upstream(UpstreamOptions(upstream[1]))

    def run() -> None:
        done = casfs("run", root, "--host-root", *upstream, "--json", "--", "sh", "-c", "cat d3/f3 d4/f4 >&2")
        assert done.code == 0 and "34" in done.err, done.err

    def is_there() -> bool:
        holder = find_holder(casfs.store, started_for)
        if holder is not None:
            holder.close()
        return holder is not None

    try:
        run()
        wait_until(is_there, 30)
        run()
        assert find_holder(casfs.store) is None, "one without an upstream is another"
    finally:
        end_holders(casfs)
