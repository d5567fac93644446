"""`--trace` and `casfs trace report`: what a real compiler used, missed and didn't need; as root and as any user."""

from __future__ import annotations

import os
import re
import signal

import pytest

from casfs.trace_format import decode_trace
from tests.conftest import Requirements
from tests.tools.conftest import Casfs, wait_until
from tools.exits import Exit

SOURCE = """\
#if __has_include("feature.h")
#include "feature.h"
#endif
#include "used.h"
int main(void) { return USED; }
"""
COMPILE = ("--host-root", "--output", "obj/a.o", "--", "cc", "-Iinclude", "-c", "a.c", "-o", "obj/a.o")


def with_sources(casfs: Casfs) -> Casfs:
    """The manifest ``src`` lacks one header that the host has, and has two that nobody needs."""
    for name in ("src", "host"):
        top = casfs.directory / name
        (top / "include" / "unused").mkdir(parents=True)
        (top / "a.c").write_text(SOURCE)
        (top / "include" / "used.h").write_text("#define USED 0\n")
        for number in range(2):
            (top / "include" / "unused" / f"{number}.h").write_text(f"#define UNUSED {number}\n")
    (casfs.directory / "host" / "include" / "feature.h").write_text("#define FEATURE 1\n")
    casfs.ok("manifest", "create", "src", "src")
    return casfs


@pytest.fixture
def compiler(casfs: Casfs, requires: Requirements) -> Casfs:
    """The command as root has it, and those sources."""
    requires.programs("bwrap", "cc")
    requires.admin()
    requires.fuse()
    return with_sources(casfs)


@pytest.fixture(params=["root", "nobody"])
def anybody(request: pytest.FixtureRequest, requires: Requirements) -> Casfs:
    """The same as root, and as an ordinary user."""
    if request.param == "root":
        found: Casfs = request.getfixturevalue("compiler")
        return found
    requires.programs("bwrap", "cc")
    return with_sources(request.getfixturevalue("nobody"))


def test_engine_native_sees_as_much(compiler: Casfs) -> None:
    compiler.ok("run", "src", "--trace", "t", *COMPILE)
    compiler.ok("run", "src", "--engine", "native", "--trace", "u", *COMPILE)
    reports = [compiler.ok("trace", "report", name, "--json").json for name in ("t", "u")]
    assert [report["engine"] for report in reports] == ["passthrough", "native"]
    assert reports[0]["inputs"] == reports[1]["inputs"]


def test_a_compilers_unused_and_missing_headers_are_found(anybody: Casfs) -> None:
    compiler = anybody
    compiler.ok("run", "src", "--trace", "t", *COMPILE)
    report = compiler.ok("trace", "report", "t", "--host", "host", "--json").json
    assert report["ended"] and not report["cut"]
    assert report["inputs"]["opened"] == ["a.c", "include/used.h"]
    assert report["inputs"]["untouched"] == ["include/unused/0.h", "include/unused/1.h"]
    [undeclared] = report["probably_undeclared"]
    assert (undeclared["path"], undeclared["command"]) == ("include/feature.h", "cc1")
    missed = [found["path"] for found in report["missed"]]
    assert "feature.h" in missed and "obj" not in missed and "obj/a.o" not in missed
    assert {command for found in report["processes"] for command in found["commands"]} >= {"cc", "cc1"}
    done = compiler.ok("trace", "report", "t", "--unused-inputs")
    assert (done.out, done.err) == ("include/unused/0.h\ninclude/unused/1.h\n", "")
    text = compiler.ok("trace", "report", "t").out
    assert "looked for, and not there:\n" in text and "undeclared" not in text
    text = compiler.ok("trace", "report", "t", "--host", "host").out
    assert "  include/unused/  (2 inputs)\n" in text
    assert "below host: probably undeclared inputs:\n  include/feature.h  (cc1, process " in text


def test_a_mount_is_traced_for_any_user(anybody: Casfs) -> None:
    compiler = anybody
    mountpoint = compiler.directory / "mnt"
    mountpoint.mkdir()
    owner = compiler.store.stat()
    os.chown(mountpoint, owner.st_uid, owner.st_gid)
    engine = compiler.ok("mount", "src", "mnt", "--trace", "t", "--json").json["engine"]
    try:
        assert engine == ("fuse" if compiler.prefix else "passthrough")
        words = [*compiler.prefix, "cat", str(mountpoint / "include" / "used.h")]
        assert os.spawnvp(os.P_WAIT, words[0], words) == 0
    finally:
        compiler.ok("umount", "mnt")
    report = compiler.ok("trace", "report", "t", "--json").json
    assert report["inputs"]["opened"] == ["include/used.h"] and report["ended"]


def test_engine_kernel_is_refused_by_name(compiler: Casfs) -> None:
    said = compiler.fails(Exit.MOUNT, "run", "src", "--engine", "kernel", "--trace", "t", *COMPILE)
    assert "engine kernel can't be traced" in said and "passthrough or native" in said
    (compiler.directory / "mnt").mkdir()
    said = compiler.fails(Exit.MOUNT, "mount", "src", "mnt", "--engine", "kernel", "--trace", "t")
    assert "engine kernel can't be traced" in said
    assert not (compiler.directory / "t").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_a_trace_that_can_be_read(compiler: Casfs, number: int) -> None:
    process = compiler.start(
        "run", "src", "--trace", "t", "--host-root", "--", "sh", "-c", "cat include/used.h && exec sleep 1000"
    )
    trace = compiler.directory / "t"
    wait_until(lambda: trace.exists() and re.search(rb'"open", \d+, "include/used.h"\]\n', trace.read_bytes()))
    process.send_signal(number)
    process.communicate(timeout=30)
    done = compiler.ok("trace", "report", "t")
    assert ("has no end" in done.err) == (number == signal.SIGKILL)
    assert compiler.ok("trace", "report", "t", "--json").json["inputs"]["opened"] == ["include/used.h"]


def test_what_opened_means_is_said(compiler: Casfs) -> None:
    said = " ".join(compiler.ok("trace", "report", "--help").out.split())
    assert "not which were read and which mapped" in said


def test_what_is_no_trace_is_refused_and_half_a_line_is_said(compiler: Casfs) -> None:
    compiler.ok("run", "src", "--trace", "t", *COMPILE)
    trace = compiler.directory / "t"
    whole = trace.read_bytes()
    # tests/casfs/test_trace_format.py has more of these.
    for content, says in ((b"", "no trace"), (whole.replace(b'"look"', b'"look'), "line 3 of the trace is damaged")):
        (compiler.directory / "bad").write_bytes(content)
        assert says in compiler.fails(Exit.USAGE, "trace", "report", "bad")
    assert "No such file" in compiler.fails(Exit.USAGE, "trace", "report", "absent")
    assert "no such directory" in compiler.fails(Exit.USAGE, "trace", "report", "t", "--host", "nowhere")
    trace.write_bytes(whole[:-20])
    done = compiler.ok("trace", "report", "t")
    assert "last line of t is cut off" in done.err and "has no end" in done.err
    unknown = whole.replace(str(decode_trace([whole.splitlines(keepends=True)[0]]).header.root.hex).encode(), b"0" * 64)
    trace.write_bytes(unknown)
    compiler.fails(Exit.NOT_FOUND, "trace", "report", "t")


def test_a_file_that_is_no_trace_is_not_overwritten(compiler: Casfs) -> None:
    before = (compiler.directory / "src" / "a.c").read_bytes()
    said = compiler.fails(Exit.USAGE, "run", "src", "--trace", "src/a.c", *COMPILE)
    assert "is no trace" in said
    assert (compiler.directory / "src" / "a.c").read_bytes() == before
