"""ccache with a casfs store as its remote storage, by the line that README.md has for it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import HTTP, HttpClient, Server, running
from tests.tools.server.readme_lines import ccache_conf

HIT = 'casfs_lookups_total{half="result",outcome="hit"}'
TOKENS = "read reader-token\nwrite writer-token\n"


class Ccache:
    """One user's ccache: a compiler, and what came of it by ccache's own count."""

    def __init__(self, directory: Path, server: Server, attribute: str = "") -> None:
        directory.mkdir()
        self.directory = directory
        (directory / "ccache.conf").write_text(ccache_conf(server.http_address).rstrip("\n") + f"{attribute}\n")
        (directory / "tool.h").write_text("int tool(void);\n")
        for name in ("a", "b"):
            (directory / f"{name}.c").write_text(f'#include "tool.h"\nint {name}(void) {{ return tool() + 1; }}\n')

    def compile(self, name: str, *, local: bool = False) -> dict[str, int]:
        """Compile ``<name>.c``, with nothing in the local cache unless `local`; returns ccache's counts of it."""
        if not local:
            self._run("ccache", "--clear")
        self._run("ccache", "--zero-stats")
        (self.directory / f"{name}.o").unlink(missing_ok=True)
        self._run("ccache", "gcc", "-c", f"{name}.c", "-o", f"{name}.o")
        lines = self._run("ccache", "--print-stats").splitlines()
        counts = {key: int(value) for key, value in (line.split("\t") for line in lines)}
        return {key: number for key, number in counts.items() if number}

    def output(self, name: str) -> bytes:
        return (self.directory / f"{name}.o").read_bytes()

    def _run(self, *command: str) -> str:
        # All that it knows comes from the file: none of the caller's CCACHE_… variables.
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self.directory), "CCACHE_DIR": str(self.directory)}
        done = subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def files(casfs: Casfs) -> list[Path]:
    """What is kept under ``ac/``."""
    return [path for path in (casfs.store / "blobs" / "ac").rglob("?" * 64) if path.is_file()]


def entries(casfs: Casfs) -> dict[str, Path]:
    """The same, of one compilation: its manifest and its result."""
    found = {"manifest" if is_manifest(path.read_bytes()) else "result": path for path in files(casfs)}
    assert len(found) == len(files(casfs)) == 2
    return found


def is_manifest(entry: bytes) -> bool:
    """By the header of ccache 4: magic cCaC, format version, entry type (0 result, 1 manifest)."""
    assert entry[:2] == bytes.fromhex("ccac"), entry[:8]
    return entry[3] == 1


@pytest.fixture(autouse=True)
def _installed(requires: Requirements) -> None:
    requires.programs("ccache", "gcc")


@pytest.fixture
def server(casfs: Casfs) -> Iterator[Server]:
    with running(casfs, *HTTP) as made:
        yield made


def test_a_second_compile_is_a_hit_for_who_has_nothing_locally(server: Server, tmp_path: Path) -> None:
    first, second = Ccache(tmp_path / "first", server), Ccache(tmp_path / "second", server)
    counts = first.compile("a")
    assert counts["cache_miss"] == counts["remote_storage_miss"] == 1
    assert counts["remote_storage_write"] == 2, "a result and a manifest"
    with HttpClient(server) as web:
        before = web.metrics().get(HIT, 0)
        counts = first.compile("a")
        assert counts["direct_cache_hit"] == counts["remote_storage_hit"] == 1
        assert "remote_storage_error" not in counts and "cache_miss" not in counts
        assert web.metrics()[HIT] - before == counts["remote_storage_read_hit"] == 2
    # Elsewhere the path differs, and with it what is looked up; what is preprocessed is the same.
    counts = second.compile("a")
    assert counts["remote_storage_hit"] == 1 and "cache_miss" not in counts
    assert second.output("a") == first.output("a")


def test_with_a_token_it_writes_with_one_for_reading_it_reads(casfs: Casfs, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKENS)
    with running(casfs, *HTTP, "--tokens", tokens) as server:
        nobody = Ccache(tmp_path / "nobody", server).compile("a")
        assert nobody["cache_miss"] == nobody["remote_storage_error"] == 1, "it compiled without"
        reader = Ccache(tmp_path / "reader", server, "|bearer-token=reader-token")
        assert reader.compile("b")["cache_miss"] == 1
        assert reader.compile("b")["cache_miss"] == 1, "what it may not write isn't there"
        writer = Ccache(tmp_path / "writer", server, "|bearer-token=writer-token")
        assert writer.compile("b")["remote_storage_write"] == 2
        assert reader.compile("b")["remote_storage_hit"] == 1


def test_what_was_damaged_is_compiled_again_and_replaced(server: Server, casfs: Casfs, tmp_path: Path) -> None:
    ccache = Ccache(tmp_path / "one", server)
    ccache.compile("a")
    right = ccache.output("a")
    for name, path in entries(casfs).items():
        whole = path.read_bytes()
        for damaged in (whole[:-9], bytes(40), b"", whole[:-1] + bytes((whole[-1] ^ 1,))):
            path.write_bytes(damaged)
            ccache.compile("a")
            assert ccache.output("a") == right, (name, damaged[:20])
        ccache.compile("a")
        assert ccache.compile("a")["remote_storage_hit"] == 1, name


def test_it_deletes_what_it_finds_to_be_wrong(server: Server, casfs: Casfs, tmp_path: Path) -> None:
    ccache = Ccache(tmp_path / "one", server)
    ccache.compile("a")
    of_a = entries(casfs)
    ccache.compile("b")
    manifest_of_b = next(path for path in files(casfs) if path not in of_a.values() and is_manifest(path.read_bytes()))
    right = ccache.output("b")
    # b's manifest now says what a's does, whose result is gone: preprocessing shows that it can't be right.
    manifest_of_b.write_bytes(of_a["manifest"].read_bytes())
    of_a["result"].unlink()
    # ccache 4.7 says that it removes the manifest, and removes the result that it was about to look for.
    assert ccache.compile("b")["cache_miss"] == 1
    with HttpClient(server) as web:
        assert web.metrics()['casfs_requests_total{method="DELETE ac",status="204",transport="http"}'] == 1
    assert ccache.compile("b")["remote_storage_hit"] == 1
    assert ccache.output("b") == right


def test_a_server_that_takes_only_action_results_costs_it_nothing_but_the_hits(casfs: Casfs, tmp_path: Path) -> None:
    with running(casfs, *HTTP, "--http-validate-ac") as server:
        ccache = Ccache(tmp_path / "one", server)
        assert ccache.compile("a")["cache_miss"] == 1
        assert ccache.compile("a")["cache_miss"] == 1
        assert ccache.output("a")
    assert not files(casfs)
