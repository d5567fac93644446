"""`casfs run`: a command sees the tree and nothing else, its outputs are kept, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from casfs.mountinfo import list_mounts
from casfs.projection import ENGINES
from tests.conftest import Requirements, find_children, find_processes
from tests.tools.conftest import Casfs, wait_until
from tools.commands.run import TIMED_OUT
from tools.exits import Exit


@pytest.fixture(params=["root", "nobody"])
def runner(request: pytest.FixtureRequest, tree: Path, requires: Requirements) -> Casfs:
    """The command, as root and as an ordinary user, with the manifest ``m`` of a tree that has a busybox."""
    requires.programs("bwrap", "busybox")
    if request.param == "root":
        requires.admin()
    casfs: Casfs = request.getfixturevalue("casfs" if request.param == "root" else "nobody")
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, tree / "busybox")
    casfs.ok("manifest", "create", "m", tree)
    return casfs


def leftovers(casfs: Casfs) -> list[str]:
    """What a run left: mounts, processes, scratch."""
    top = os.fsencode(casfs.directory)
    found = [os.fsdecode(mount.path) for mount in list_mounts() if mount.path.startswith(top + b"/")]
    found += running(casfs)
    scratch = casfs.store / "scratch"
    return found + (os.listdir(scratch) if scratch.exists() else [])


def running(casfs: Casfs) -> list[str]:
    """The processes that have to do with it, and are not this test's own."""
    own = find_children()
    return [text for pid, text in find_processes(os.fsencode(casfs.directory)).items() if pid not in own]


def shell(*script: str) -> tuple[str, ...]:
    """The words that run a shell of the tree."""
    return ("--", "./busybox", "sh", "-euc", "PATH=/none\n" + "\n".join(script))


COPY = shell("./busybox cat include/a.h include/deep/b.h > out/all.h")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_runs_have_the_same_outputs(runner: Casfs, engine: str) -> None:
    if engine == "passthrough" and runner.prefix:
        assert "passthrough" in runner.fails(Exit.MOUNT, "run", "m", "--engine", engine, *COPY)
        return
    reports = [
        runner.ok("run", "m", "--json", "--save", "made", "--engine", engine, "--output", "out/all.h", *COPY).json
        for _ in range(2)
    ]
    assert reports[0]["outputs"] == reports[1]["outputs"]
    assert reports[0]["root"] == reports[1]["root"]
    (output,) = reports[0]["outputs"]
    assert (output["path"], output["kind"], output["executable"]) == ("out/all.h", "file", False)
    assert runner.ok("cat", "made/out/all.h").out == "#define A 1\n#define B 2\n"
    assert engine in ("auto", reports[0]["engine"])
    assert reports[0]["upcalls"] == 0 or reports[0]["engine"] != "kernel"
    assert leftovers(runner) == []


def test_a_command_of_the_host_needs_the_host_root(runner: Casfs) -> None:
    command = ("--", "sh", "-c", "cat same.h > copy; ls / > listing; touch /usr/new || echo read-only > refused")
    assert runner("run", "m", *command).code != 0, "there is no sh in the tree"
    report = runner.ok(
        "run", "m", "--host-root", "--json", *(f"--output={name}" for name in ("copy", "refused")), *command
    ).json
    assert [output["path"] for output in report["outputs"]] == ["copy", "refused"]
    assert report["unexpected"] == ["listing"]


def test_outside_of_the_tree_there_is_nothing(runner: Casfs) -> None:
    listed = runner.ok("run", "m", *shell("echo /* /tmp/* /build/.*", "./busybox ip -o link", "./busybox env"))
    assert listed.out.splitlines()[0].split()[:5] == ["/build", "/dev", "/proc", "/tmp", "/tmp/*"]
    assert [line.split(":")[1].strip() for line in listed.out.splitlines() if "link/" in line] == ["lo"]
    assert "CASFS_STORE" not in listed.out
    assert str(runner.directory) not in listed.out.replace("PWD=/build", "")


def test_the_exit_code_passes_through_and_what_was_made_is_kept(runner: Casfs) -> None:
    done = runner("run", "m", "--output", "x", "--output", "y", "--env", "A=b c", *shell('echo "$A" > x', "exit 7"))
    assert done.code == 7
    assert done.out.startswith("x  blake3:")
    assert "'y' was not made" in done.err
    assert "exit code 7, " in done.err and "upcall" in done.err
    assert runner("run", "m", "--output", "y", *shell("true")).code == Exit.NO


def test_outputs_of_every_kind_become_a_manifest(runner: Casfs) -> None:
    script = shell(
        "./busybox mkdir -p d/e/f", "echo 1 > d/e/one", "./busybox cp run.sh d/e/f/", "./busybox ln -s one d/e/link",
        "./busybox mkfifo d/fifo", "./busybox ln -s d/e l",
    )  # fmt: skip
    done = runner.ok("run", "m", "--save", "made", "--output", "d", "--output", "l", "--chdir", ".", *script)
    assert "'d/fifo' is not kept: it is a FIFO" in done.err
    assert "l  -> d/e\n" in done.out
    runner.ok("checkout", "made", "copy")
    copy = runner.directory / "copy"
    assert (copy / "l" / "link").read_text() == "1\n"
    assert os.access(copy / "d" / "e" / "f" / "run.sh", os.X_OK)
    assert not (copy / "d" / "fifo").exists()


def test_inputs_never_change_and_changes_are_reported(runner: Casfs, tree: Path) -> None:
    before = runner.ok("ls", "m", "--json").json
    script = shell(
        "echo more >> same.h", "./busybox rm -r include/deep", "echo n > include/new", "./busybox chmod 600 nothing"
    )
    report = runner.ok("run", "m", "--json", *script).json
    assert report["deleted"] == ["include/deep"]
    assert report["unexpected"] == ["include/new", "nothing", "same.h"]
    assert runner.ok("ls", "m", "--json").json == before
    assert runner.ok("cat", "m/same.h").out == (tree / "same.h").read_text()
    runner.ok("verify")


REFUSED = (
    (("--output", "../x"), "'..'"),
    (("--output", "/etc/x"), "absolute"),
    (("--output", "a/../../x"), "'..'"),
    (("--output", ""), "empty"),
    (("--output", "out", "--output", "out/x"), "inside"),
    (("--output", "up/x"), "symbolic link"),
    (("--output", "same.h/x"), "input file"),
    (("--chdir", "/etc"), "--chdir"),
    (("--env", "A"), "NAME=VALUE"),
    (("--save", "a/b"), "name"),
)


def test_what_leads_out_of_the_tree_is_refused(casfs: Casfs, tree: Path, requires: Requirements) -> None:
    requires.admin()
    (tree / "up").symlink_to("..")
    casfs.ok("manifest", "create", "m", tree)
    for arguments, says in REFUSED:
        assert says in casfs.fails(Exit.USAGE, "run", "m", *arguments, "--", "true"), arguments
    assert leftovers(casfs) == []


def test_an_output_behind_a_link_that_the_command_made_is_not_kept(runner: Casfs) -> None:
    script = shell("./busybox rm -r out", "./busybox ln -s /proc/self out", "true")
    done = runner("run", "m", "--json", "--output", "out/status", *script)
    assert done.json["outputs"] == []
    assert "symbolic link" in done.json["skipped"][0]["why"]


def test_a_command_that_takes_too_long_is_ended_with_its_children(runner: Casfs) -> None:
    done = runner("run", "m", "--timeout", "0.3", *shell("./busybox sleep 1000 &", "./busybox sleep 1000"))
    assert done.code == TIMED_OUT
    assert "longer than 0.3 s" in done.err
    assert leftovers(runner) == []


def test_what_a_command_leaves_running_ends_before_its_outputs_are_kept(runner: Casfs) -> None:
    script = shell("echo begun > x", "(while true; do echo on >> x; done) &", "./busybox sleep 0.05")
    report = runner.ok("run", "m", "--json", "--save", "made", "--output", "x", *script).json
    assert report["exit_code"] == 0
    assert running(runner) == []
    runner.ok("verify")  # which hashes the blob again: nobody wrote into it since


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killing_it_leaves_nothing(runner: Casfs, number: int) -> None:
    process = runner.start("run", "m", *shell("echo begun", "./busybox sleep 1000 &", "./busybox sleep 1000"))
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    # What is started is what it becomes: nsenter, setpriv and env only exec.
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number == signal.SIGKILL:
        wait_until(lambda: not running(runner))
        assert len(leftovers(runner)) == 1, "its scratch, until the next start"
        runner.ok("run", "m", *shell("true"))
    assert leftovers(runner) == []
    assert runner.ok("stats", "--json").json["leases"] == []


def test_a_full_scratch_disk_is_named(casfs: Casfs, tree: Path, tmp_path: Path, requires: Requirements) -> None:
    requires.admin()
    requires.programs("bwrap")
    casfs.ok("manifest", "create", "m", tree)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", small], check=True)
    try:
        command = ("--scratch", small, "--host-root", "--output", "x", "--", "dd", "if=/dev/zero", "of=x", "bs=64k")
        done = casfs("run", "m", *command, "count=64")
        assert done.code == 1
        assert "No space left on device" in done.err
        assert f"the scratch disk of {small} is full" in done.err
        done = casfs.ok("run", "m", *command, "count=4")
        assert "full" not in done.err
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)
