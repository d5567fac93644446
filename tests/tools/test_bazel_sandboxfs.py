"""Bazel builds in sandboxes of ours: a C project, a few dozen actions of all kinds, and when the sandboxes fail."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.host_layers import SOURCE
from casfs.mountinfo import list_mounts
from tests.conftest import Requirements
from tests.tools.conftest import NOBODY, REPOSITORY, Casfs, Namespace, wait_until
from tools.bench import c_project
from tools.bench.bazel import Bazel, Built
from tools.bench.workers import Refused

_SMALL = 40
_BUILD = """
cc_library(name = "library", srcs = ["library.c"], hdrs = ["library.h"])
cc_binary(name = "program", srcs = ["program.c"], deps = [":library"])
filegroup(name = "common", srcs = glob(["common/**"]))
[genrule(
    name = "action-%d" % n,
    srcs = ["own/%d" % n, ":common"],
    outs = ["out-%d" % n],
    cmd = "cat $(location own/%d) $(locations :common) | cksum > $@; ls $$(dirname $(location own/%d)) >> $@" % (n, n),
) for n in range(SMALL)]
genrule(
    name = "ran",
    srcs = ["own/0"],
    outs = ["ran.txt"],
    exec_tools = [":program"],
    cmd = "$(location :program) > $@; ls -A . >> $@; (cat own/1 || echo absent) >> $@ 2>/dev/null",
)
genrule(name = "posix", outs = ["posix.txt"], cmd = "mkdir -p d/e; echo a > d/e/f; ln d/e/f d/g; ln -s g d/l; mv d m;"
    + " chmod 700 m/g; rm m/e/f; cat m/l > $@")
genrule(name = "slow", srcs = ["own/0"], outs = ["slow.txt"], cmd = "sleep 60; cat $< > $@")
genrule(name = "undeclared", srcs = ["own/0"], outs = ["u"], cmd = "cat own/1 > $@")
genrule(name = "named", srcs = glob(["names/**"]), outs = ["names.txt"], cmd = "cat names/* > $@; ls names >> $@")
filegroup(name = "everything", srcs = [":program", ":ran", ":posix", ":named"] +
    ["action-%d" % n for n in range(SMALL)])
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """Where Bazel's output base may be: not below /tmp, as its sandbox binds that without the mounts in it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="casfs-test-") as path:
        yield Path(path)
        subprocess.run(["chmod", "-R", "u+w", path], check=True)


@pytest.fixture
def workspace(tmp_path: Path, requires: Requirements) -> Path:
    requires.admin()
    requires.programs("bazel", "gcc")
    top = tmp_path / "workspace"
    (top / "own").mkdir(parents=True)
    (top / "common" / "deep").mkdir(parents=True)
    (top / "WORKSPACE").touch()
    (top / "BUILD").write_text(_BUILD.replace("SMALL", str(_SMALL)))
    (top / "library.h").write_text("int answer(void);\n")
    (top / "library.c").write_text('#include "library.h"\nint answer(void) { return 42; }\n')
    (top / "program.c").write_text(
        '#include <stdio.h>\n#include "library.h"\n'
        '#if __has_include("undeclared.h")\n#error the undeclared header is there\n#endif\n'
        'int main(void) { printf("%d\\n", answer()); return 0; }\n'
    )
    (top / "undeclared.h").touch()
    (top / "names").mkdir()
    (top / "names" / "grüße").write_text("odd\n")
    for number in range(_SMALL):
        (top / "own" / str(number)).write_text(f"own {number}\n")
        (top / "common" / "deep" / f"c{number}").write_text(f"common {number}\n")
    return top


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The two of README, with `casfs-sandboxfs` on the PATH, as installing makes it."""
    program = tmp_path / "bin" / "casfs-sandboxfs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{REPOSITORY}" exec "{sys.executable}" -m tools.sandboxfs "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    lines = re.findall(r"^build (--experimental_.*sandboxfs.*)$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert len(lines) == 2
    return [*lines, "--jobs=4"]


@pytest.fixture
def builder(home: Path, workspace: Path, options: list[str]) -> Iterator[Bazel]:
    with Bazel(home, workspace, stays=True) as bazel:
        yield bazel
    wait_until(lambda: not mounts_of_ours())


def mounts_of_ours() -> list[bytes]:
    return [mount.path for mount in list_mounts() if mount.source == SOURCE]


def ran_in_sandbox(built: Built, at_least: int) -> None:
    assert built.code == 0, built.text
    assert built.processes.get("linux-sandbox", 0) >= at_least, built.text
    assert not {"local", "processwrapper-sandbox"} & built.processes.keys(), built.text


def test_bazel_builds_in_our_sandboxes_and_sees_what_changes(
    workspace: Path, builder: Bazel, options: list[str]
) -> None:
    ran_in_sandbox(builder.build(*options, "//:everything", local=False), _SMALL)
    top = workspace / "bazel-bin"
    ran = (top / "ran.txt").read_text().splitlines()
    assert ran[0] == "42"
    assert "absent" in ran and "undeclared.h" not in ran
    assert (top / "posix.txt").read_text() == "a\n"
    assert (top / "names.txt").read_text() == "odd\ngrüße\n"
    first = [(top / f"out-{number}").read_text() for number in range(_SMALL)]
    assert [text.splitlines()[1] for text in first] == [str(number) for number in range(_SMALL)]
    # The server, and maybe our process, go on; files have changed in between, one of them by rename.
    (workspace / "own" / "3").write_text("new 3\n")
    other = workspace / "other"
    other.write_text("common 5, later\n")
    other.rename(workspace / "common" / "deep" / "c5")
    ran_in_sandbox(builder.build(*options, "//:everything", local=False), _SMALL)
    second = [(top / f"out-{number}").read_text() for number in range(_SMALL)]
    for number, text in enumerate(second):
        assert text != first[number]
        inputs = [workspace / "own" / str(number), *sorted((workspace / "common" / "deep").iterdir())]
        order = subprocess.run(
            ["cksum"], input=b"".join(p.read_bytes() for p in inputs), capture_output=True, check=True
        )
        assert text.splitlines()[0] == order.stdout.decode().strip()
    failed = builder.build(*options, "//:undeclared", local=False)
    assert failed.code != 0
    assert "own/1" in failed.text


def test_a_killed_sandboxfs_fails_the_build_with_a_message_and_the_next_one_works(
    workspace: Path, builder: Bazel, options: list[str]
) -> None:
    # The first build of a server starts it.
    ran_in_sandbox(builder.build(*options, "//:posix", local=False), 1)
    building = builder.start("build", *options, "//:slow", "//:everything")
    try:
        wait_until(lambda: any(b"/sandboxfs/" in path for path in mounts_of_ours()))
        for pid in find_sandboxfs():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not mounts_of_ours())
        text, _ = building.communicate(timeout=60)
    finally:
        building.kill()
    print(text[:3000])
    assert building.returncode != 0
    assert re.search("sandbox", text, re.IGNORECASE), text
    ran_in_sandbox(builder.build(*options, "//:everything", local=False), 1)


def find_sandboxfs() -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if b"tools.sandboxfs" in words and parent != "1":
                found.append((int(entry), int(parent)))
    pids = {pid for pid, _ in found}
    # Not the guard, its child: that has to do its work.
    return [pid for pid, parent in found if parent not in pids]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_an_ordinary_user_builds_in_a_namespace(
    workspace: Path, home: Path, options: list[str], nobody: Casfs, namespace: Namespace
) -> None:
    shutil.move(workspace, home / "workspace")
    shutil.move(os.environ["PATH"].partition(":")[0] + "/casfs-sandboxfs", home)
    subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", home], check=True)
    inside = (*nobody.command, "sandboxfs", "--namespace")
    with Bazel(home, home / "workspace", stays=True, prefix=inside) as bazel:
        options = [*options[:1], f"--experimental_sandboxfs_path={home}/casfs-sandboxfs"]
        ran_in_sandbox(bazel.build(*options, "//:everything", local=False), _SMALL)
    assert not mounts_of_ours()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_c_project_is_what_it_is_without_a_sandbox(
    tmp_path: Path, home: Path, options: list[str], requires: Requirements
) -> None:
    requires.admin()
    requires.programs("bazel", "gcc")
    try:
        project = c_project.make_workspace(tmp_path)
    except Refused as refused:
        requires.lacking(str(refused))
    with Bazel(home, project) as bazel:
        local = bazel.build(c_project.EVERYTHING)
        assert local.code == 0, local.text
        made = outputs(project)
        bazel.forget()
        ran_in_sandbox(bazel.build(*options, c_project.EVERYTHING, local=False), local.processes["local"])
        assert outputs(project) == made
    wait_until(lambda: not mounts_of_ours())


def outputs(workspace: Path) -> dict[str, bytes]:
    """All that was built, by path."""
    top = (workspace / "bazel-bin").resolve()
    return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}
