"""Bazel with a casfs store: a remote cache over gRPC and over HTTP, and its own disk cache, while that is collected."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from store.digest import DigestFunction
from store.layout import blob_path
from store.repository import Store
from tests.conftest import Requirements
from tests.tools.conftest import NOBODY, Casfs
from tests.tools.server.bazel_project import make_project, set_number
from tests.tools.server.conftest import HTTP, Server, running
from tests.tools.server.readme_lines import bazelrc
from tools.bench.bazel import Bazel, Built

EVERYTHING = "//:unpacked"
_LONG = 900


class Project(NamedTuple):
    """A workspace, and a Bazel that begins anew with each `forget`."""

    workspace: Path
    bazel: Bazel

    def output(self, name: str) -> Path:
        return self.workspace / "bazel-bin" / name


@pytest.fixture
def project(tmp_path: Path, requires: Requirements) -> Iterator[Project]:
    requires.programs("bazel")
    workspace = make_project(tmp_path, requires)
    with Bazel(tmp_path, workspace) as builder:
        yield Project(workspace, builder)


def check_everything(project: Project, built: Built) -> None:
    """It has built, and what went through both the compressor and the decompressor is what it was."""
    assert built.code == 0, built.text
    # Bazel goes on without what it couldn't read or write, over HTTP after the first try, and only warns of it.
    assert "Remote Cache:" not in built.text, built.text
    assert project.output("encode.c").read_bytes() == (project.workspace / "c/enc/encode.c").read_bytes()


def write_bazelrc(workspace: Path, server: Server, http: bool, who: str = "") -> None:
    """What README.md says, for that server."""
    address = server.http_address if http else server.address
    (workspace / ".bazelrc").write_text(bazelrc(f"{who}{address}", http=http))


def ran(built: Built) -> int:
    """How many actions ran, rather than came from a cache."""
    return built.processes.get("local", 0)


def hits(built: Built, kind: str = "remote cache hit") -> int:
    return built.processes.get(kind, 0)


def blob_of(store: Path, content: bytes) -> Path:
    return store / "blobs" / blob_path(DigestFunction.SHA256.of(content))


# Over gRPC and over HTTP, by the lines that README.md has


_VALIDATING = (*HTTP, "--http-validate-ac")
over_both = pytest.mark.parametrize(
    ("http", "options"), [(False, ()), (True, HTTP), (True, _VALIDATING)], ids=["grpc", "http", "http-validated"]
)


@pytest.mark.parametrize(("http", "options"), [(False, ()), (True, HTTP)], ids=["grpc", "http"])
def test_the_lines_of_the_readme_make_a_cleaned_workspace_a_matter_of_hits(
    tmp_path: Path, casfs: Casfs, requires: Requirements, http: bool, options: tuple[str, ...]
) -> None:
    requires.programs("bazel")
    workspace = make_project(tmp_path, requires)
    with running(casfs, *options) as server, Bazel(tmp_path, workspace, stays=True) as builder:
        write_bazelrc(workspace, server, http)
        first = builder.build("//:common")
        assert (first.code, hits(first)) == (0, 0), first.text
        builder.clean()
        second = builder.build("//:common")
        assert (second.code, hits(second), ran(second)) == (0, ran(first), 0), second.text


@pytest.mark.long
@pytest.mark.timeout(_LONG)
@over_both
def test_every_action_is_a_remote_cache_hit_for_a_bazel_that_knows_nothing(
    project: Project, casfs: Casfs, http: bool, options: tuple[str, ...]
) -> None:
    with running(casfs, *options) as server:
        write_bazelrc(project.workspace, server, http)
        first = project.bazel.build(EVERYTHING)
        check_everything(project, first)
        assert ran(first) > 30 and not hits(first)
        project.bazel.forget()
        second = project.bazel.build(EVERYTHING)
        check_everything(project, second)
        assert (hits(second), ran(second)) == (ran(first), 0), second.text
    assert casfs.ok("verify").code == 0


@pytest.mark.long
@pytest.mark.timeout(_LONG)
@over_both
def test_an_output_that_was_removed_behind_the_servers_back_is_built_again(
    project: Project, casfs: Casfs, http: bool, options: tuple[str, ...]
) -> None:
    with running(casfs, *options) as server:
        write_bazelrc(project.workspace, server, http)
        first = project.bazel.build(EVERYTHING)
        check_everything(project, first)
        packed = project.output("encode.c.br").read_bytes()
        blob_of(casfs.store, packed).unlink()
        project.bazel.forget()
        second = project.bazel.build(EVERYTHING)
        check_everything(project, second)
        assert (hits(second), ran(second)) == (ran(first) - 1, 1), second.text
        assert blob_of(casfs.store, packed).read_bytes() == packed, "it wasn't uploaded again"


@pytest.mark.long
def test_a_token_comes_in_the_address(tmp_path: Path, casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bazel")
    workspace = make_project(tmp_path, requires)
    tokens = tmp_path / "tokens"
    tokens.write_text("read reader-token\nwrite writer-token\n")
    with (
        running(casfs, *HTTP, "--tokens", tokens) as server,
        Bazel(tmp_path, workspace, stays=True) as builder,
    ):
        for who, expected in (("bazel:writer-token", 0), ("bazel:reader-token", 1)):
            write_bazelrc(workspace, server, True, f"{who}@")
            built = builder.build("//:common")
            assert (built.code, hits(built) > 0) == (0, expected), built.text
            builder.clean()


@pytest.mark.long
@pytest.mark.timeout(_LONG)
def test_a_build_without_the_bytes_fetches_only_what_was_asked_for(project: Project, casfs: Casfs) -> None:
    with running(casfs) as server:
        first = project.bazel.build(f"--remote_cache=grpc://{server.address}", EVERYTHING)
        check_everything(project, first)
        packed = project.output("encode.c.br").read_bytes()
    with running(casfs) as server:
        cache = f"--remote_cache=grpc://{server.address}"
        project.bazel.forget()
        second = project.bazel.build(cache, "--remote_download_minimal", EVERYTHING)
        assert (second.code, hits(second), ran(second)) == (0, ran(first), 0), second.text
        assert not project.output("brotli").exists() and not project.output("encode.c").exists()
        project.bazel.forget()
        third = project.bazel.build(cache, "--remote_download_toplevel", EVERYTHING)
        check_everything(project, third)
        assert not project.output("brotli").exists()
    # A server that hasn't vouched for it a moment ago.
    blob_of(casfs.store, packed).unlink()
    with running(casfs) as server:
        project.bazel.forget()
        cache = f"--remote_cache=grpc://{server.address}"
        fourth = project.bazel.build(cache, "--remote_download_minimal", EVERYTHING)
        assert (fourth.code, hits(fourth), ran(fourth)) == (0, ran(first) - 1, 1), fourth.text


@pytest.mark.long
@pytest.mark.timeout(_LONG)
def test_an_ordinary_user_builds_with_a_server_of_their_own(
    nobody: Casfs, tmp_path: Path, requires: Requirements
) -> None:
    requires.programs("bazel")
    workspace = make_project(tmp_path, requires)
    os.chown(workspace, NOBODY, NOBODY)  # for the links to what was built
    with running(nobody) as server, Bazel(nobody.directory, workspace, stays=True, prefix=nobody.prefix) as builder:
        cache = f"--remote_cache=grpc://{server.address}"
        first = builder.build(cache, "//:common")
        builder.clean()
        second = builder.build(cache, "//:common")
    assert (second.code, hits(second), ran(second)) == (0, ran(first), 0), first.text + second.text
    assert all(path.stat().st_uid == NOBODY for path in (nobody.store / "blobs").rglob("*"))


# As a disk cache


@pytest.mark.long
@pytest.mark.timeout(_LONG)
def test_the_store_is_bazels_disk_cache(project: Project, casfs: Casfs) -> None:
    Store.open(casfs.store).close()
    cache = f"--disk_cache={casfs.store / 'blobs'}"
    first = project.bazel.build(cache, EVERYTHING)
    check_everything(project, first)
    project.bazel.forget()
    second = project.bazel.build(cache, EVERYTHING)
    check_everything(project, second)
    assert (hits(second), ran(second)) == (ran(first), 0), second.text
    # What Bazel put there serves everybody, once it was hashed.
    with running(casfs) as server:
        project.bazel.forget()
        third = project.bazel.build(f"--remote_cache=grpc://{server.address}", EVERYTHING)
        check_everything(project, third)
        assert (hits(third), ran(third)) == (ran(first), 0), third.text
    packed = blob_of(casfs.store, project.output("encode.c.br").read_bytes())
    packed.unlink()
    project.bazel.forget()
    fourth = project.bazel.build(cache, EVERYTHING)
    check_everything(project, fourth)
    assert (hits(fourth), ran(fourth)) == (ran(first) - 1, 1), fourth.text
    assert packed.exists()
    assert casfs.ok("verify").code == 0


@pytest.mark.long
@pytest.mark.timeout(_LONG)
def test_a_disk_cache_is_held_under_a_limit_while_bazel_builds(project: Project, casfs: Casfs) -> None:
    Store.open(casfs.store).close()
    limit, builds = 4_500_000, 12  # a build writes 2 MB
    collector = Collecting(casfs, limit)
    cache = f"--disk_cache={casfs.store / 'blobs'}"
    written = 0
    with Bazel(project.workspace.parent, project.workspace, stays=True) as builder, collector:
        for number in range(builds):
            set_number(project.workspace, number % 9)  # some of them again, collected or not
            built = builder.build(cache, "//:newer", "//:common")
            assert built.code == 0, built.text
            content = project.output("both").read_bytes()
            assert content.endswith(f"{number % 9}\n".encode())
            written += 2 * len(content) if ran(built) else 0
            builder.clean()
    assert written > 2 * limit
    assert collector.errors == []
    assert collector.rounds > builds and collector.removed > builds
    assert casfs("gc", "--high", str(limit), "--grace", "0").code == 0
    assert casfs.ok("verify").code == 0


class Collecting:
    """`casfs gc` over and over; a context manager."""

    def __init__(self, casfs: Casfs, limit: int) -> None:
        self._casfs = casfs
        self._limit = limit
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.rounds = 0
        self.removed = 0
        self.errors: list[object] = []

    def __enter__(self) -> Collecting:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(0.1):
            done = self._casfs("gc", "--high", str(self._limit), "--grace", "0", "--json")
            if done.code or done.json["bytes_after"] > self._limit:
                self.errors.append(done)
                return
            self.rounds += 1
            self.removed += done.json["removed_blobs"]
