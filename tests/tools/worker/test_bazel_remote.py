"""Bazel builds a real C project with every action in a sandbox of ours, and gets what it would have made itself."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tests.tools.server.bazel_project import make_project
from tests.tools.server.conftest import wait_for
from tests.tools.server.readme_lines import bazelrc_to_execute
from tests.tools.worker.conftest import executing, live_processes
from tools.bench import c_project
from tools.bench.bazel import Bazel

BROTLI = "//:unpacked"
_LONG = 900


@dataclass(frozen=True)
class Project:
    """A workspace, and the target that is all of it."""

    workspace: Path
    everything: str


@pytest.fixture(params=["tools that a build makes and uses", "over sixty translation units"])
def project(request: pytest.FixtureRequest, tmp_path: Path, requires: Requirements) -> Project:
    requires.programs("bazel", "bwrap")
    if request.param.startswith("tools"):
        return Project(make_project(tmp_path, requires), BROTLI)
    return Project(c_project.make_workspace(tmp_path), c_project.EVERYTHING)


@pytest.fixture
def builder(tmp_path: Path, project: Project) -> Iterator[Bazel]:
    with Bazel(tmp_path, project.workspace) as bazel:
        yield bazel


def outputs(workspace: Path) -> dict[str, bytes]:
    """All that was built, by path."""
    top = (workspace / "bazel-bin").resolve()
    return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}


@pytest.mark.long
@pytest.mark.timeout(_LONG)
def test_a_remote_build_has_the_outputs_of_a_local_one(project: Project, builder: Bazel, casfs: Casfs) -> None:
    local = builder.build(project.everything)
    assert local.code == 0, local.text
    made = outputs(project.workspace)
    builder.forget()
    with executing(casfs, "--action-log", casfs.directory / "actions") as server:
        (project.workspace / ".bazelrc").write_text(bazelrc_to_execute(server.address))
        remote = builder.build(project.everything, local=False)
        assert remote.code == 0, remote.text
        assert remote.processes.get("remote") == local.processes["local"], remote.text
        assert not {"local", "linux-sandbox", "processwrapper-sandbox"} & remote.processes.keys()
    # What the linker and the compiler make depends on nothing but the inputs.
    assert outputs(project.workspace) == made
    assert len((casfs.directory / "actions").read_text().splitlines()) == local.processes["local"]
    assert not live_processes(str(casfs.store))
    assert casfs.ok("verify").code == 0


# What actions of all kinds may and may not

_RULES = """
def _directory(ctx):
    made = ctx.actions.declare_directory(ctx.label.name)
    ctx.actions.run_shell(
        outputs = [made],
        command = "mkdir -p $1/x/y; echo 1 > $1/one; echo 2 > $1/x/y/two; cp $1/one $1/x/one",
        arguments = [made.path],
    )
    return [DefaultInfo(files = depset([made]))]
directory = rule(implementation = _directory)
"""
_BUILD = """
load(":rules.bzl", "directory")
directory(name = "tree")
genrule(name = "of_tree", srcs = [":tree"], outs = ["listing"], cmd = "(cd $(location :tree); find . | sort) > $@")
genrule(
    name = "around",
    srcs = ["declared"],
    outs = ["seen"],
    cmd = "(ls -A . ..; realpath $(location declared); ls -A $$(dirname $$(readlink -f $(location declared)))) > $@",
)
genrule(name = "python", outs = ["py"], cmd = "python3 -c 'print(6 * 7)' > $@")
genrule(name = "node", outs = ["js"], cmd = "node -e 'console.log(6 * 7)' > $@")
genrule(name = "daemon", outs = ["d"], cmd = "(setsid sleep 987 > /dev/null 2>&1 &); echo started > $@")
genrule(name = "many", outs = ["n%d" % n for n in range(2000)], cmd = "for n in $(OUTS); do echo $$n > $$n; done")
genrule(name = "undeclared", outs = ["u"], cmd = "cat secret > $@")
genrule(name = "walks", srcs = ["declared"], outs = ["w"], cmd = "cat $$(dirname $(location declared))/secret > $@")
genrule(name = "crash", outs = ["c"], cmd = "kill -SEGV $$$$")
genrule(name = "silent", outs = ["s"], cmd = "true")
genrule(name = "slow", srcs = ["declared"], outs = ["slow_out"], cmd = "sleep 987.5; cat $< > $@")
genrule(name = "steps0", srcs = ["declared"], outs = ["step0"], cmd = "cat $< > $@")
[
    genrule(
        name = "steps%d" % n,
        srcs = ["step%d" % (n - 1)],
        outs = ["step%d" % n],
        cmd = "sleep 0.3; cat $< > $@; echo %d >> $@" % n,
    )
    for n in range(1, 11)
]
cc_binary(name = "sloppy", srcs = ["sloppy.c"])
sh_test(name = "passes", srcs = ["pass.sh"])
sh_test(name = "hangs", srcs = ["hang.sh"])
"""


@pytest.fixture
def oddities(tmp_path: Path, requires: Requirements) -> Path:
    """A workspace with actions of all kinds."""
    requires.programs("bazel", "bwrap", "python3", "node")
    workspace = tmp_path / "odd"
    workspace.mkdir()
    for name, text in {
        "WORKSPACE": "",
        "BUILD": _BUILD,
        "rules.bzl": _RULES,
        "declared": "declared\n",
        "secret": "secret\n",
        "hidden.h": "#define HIDDEN 0\n",
        "sloppy.c": '#include "hidden.h"\nint main(void) { return HIDDEN; }\n',
        "pass.sh": "#!/bin/sh\ntrue\n",
        "hang.sh": "#!/bin/sh\nsleep 987\n",
    }.items():
        (workspace / name).write_text(text)
        (workspace / name).chmod(0o755 if name.endswith(".sh") else 0o644)
    return workspace


@pytest.mark.long
@pytest.mark.timeout(_LONG)
def test_actions_of_all_kinds(oddities: Path, tmp_path: Path, casfs: Casfs) -> None:
    good = ["//:of_tree", "//:around", "//:python", "//:node", "//:daemon", "//:many"]
    bad = ["undeclared", "walks", "crash", "silent", "sloppy"]
    with executing(casfs) as server, Bazel(tmp_path, oddities, stays=True) as bazel:
        remote = (f"--remote_executor=grpc://{server.address}", "--spawn_strategy=remote", "--jobs=4")
        built = bazel.build(*remote, *good, local=False)
        assert built.code == 0, built.text
        out = oddities / "bazel-bin"
        assert (out / "listing").read_text().split() == [".", "./one", "./x", "./x/one", "./x/y", "./x/y/two"]
        seen = (out / "seen").read_text().split()
        assert "secret" not in seen and "hidden.h" not in seen and "/build/declared" in seen
        assert (out / "py").read_text() == (out / "js").read_text() == "42\n" and (out / "d").read_text() == "started\n"
        assert not live_processes("sleep\0987")
        assert sum(1 for path in out.iterdir() if path.name[1:].isdigit()) == 2000
        failed = bazel.build(*remote, "--keep_going", *(f"//:{name}" for name in bad), local=False)
        assert failed.code == 1
        for name in bad:
            assert f"//:{name} failed" in failed.text or f"{name}.c failed" in failed.text, failed.text
        assert failed.text.count("No such file or directory") >= 3
        tested = bazel.test(*remote, "--test_timeout=5", "--keep_going", "//:passes", "//:hangs")
        assert tested.code == 3, tested.text
        assert "//:passes" in tested.text and "PASSED" in tested.text and "TIMEOUT" in tested.text, tested.text
        assert not live_processes("sleep\0987")
    assert casfs.ok("verify").code == 0


@pytest.mark.long
@pytest.mark.timeout(_LONG)
def test_a_cancelled_build_leaves_nothing_running(oddities: Path, tmp_path: Path, casfs: Casfs) -> None:
    with executing(casfs) as server, Bazel(tmp_path, oddities) as bazel:
        with bazel.start(
            "build", f"--remote_executor=grpc://{server.address}", "--spawn_strategy=remote", "//:slow"
        ) as build:
            wait_for(lambda: live_processes("sleep\0987.5"), 120)
            build.send_signal(signal.SIGINT)
            build.communicate(timeout=60)
        wait_for(lambda: not live_processes("sleep\0987.5"), 30)


@pytest.mark.long
@pytest.mark.timeout(_LONG)
def test_a_build_survives_the_death_of_its_server(oddities: Path, tmp_path: Path, casfs: Casfs) -> None:
    def done() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    log = casfs.directory / "actions"
    remote = ("--spawn_strategy=remote", "--remote_retries=20", "//:steps10")
    with Bazel(tmp_path, oddities) as bazel:
        with executing(casfs, "--action-log", log) as server:
            address = server.address
            build = bazel.start("build", f"--remote_executor=grpc://{address}", *remote)
            try:
                wait_for(lambda: done() >= 4, 120)
                server.stop(signal.SIGKILL)
                # The same port again, as the option given last counts.
                with executing(casfs, "--action-log", log, "--listen", address):
                    text, _ = build.communicate(timeout=120)
                    assert build.returncode == 0, text
            finally:
                build.kill()
                build.communicate()
        assert (oddities / "bazel-bin/step10").read_text().split() == ["declared", *map(str, range(1, 11))]
    assert casfs.ok("verify").code == 0
