"""What an action sees and what comes of it, over a real channel."""

from __future__ import annotations

import json
import os

from store.digest import DigestFunction
from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import HTTP, HttpClient
from tests.tools.worker.conftest import Files, Link, Program, Remote, executing, remote_of
from tools.reapi.generated import code_pb2 as codes

RUN = b"#!/bin/sh\necho ran $@\n"
PLAIN: Files = {"a.txt": b"a\n", "d/b.txt": b"b\n", "d/run": Program(RUN), "link": Link("d/b.txt")}


def test_an_action_reads_its_inputs_and_makes_outputs(remote: Remote) -> None:
    response = remote.sh("cat a.txt link; d/run x; cp a.txt out/deep/c; echo e >&2", PLAIN, output_paths=["out/deep/c"])
    assert (response.status.code, response.result.exit_code) == (0, 0)
    assert remote.blob(response.result.stdout_digest) == b"a\nb\nran x\n"
    assert remote.blob(response.result.stderr_digest) == b"e\n"
    assert remote.outputs(response) == {"out/deep/c": b"a\n"}


def test_its_environment_is_what_the_command_says(remote: Remote) -> None:
    response = remote.run(["/usr/bin/env"], environment={"A": "1", "B": "x y"})
    # PWD is bubblewrap's.
    assert remote.blob(response.result.stdout_digest).splitlines() == [b"A=1", b"B=x y", b"PWD=/build"]


def test_blake3_is_as_good(remote: Remote) -> None:
    action = remote.put(["sh", "-c", "cat a.txt > o"], PLAIN, output_paths=["o"], function=DigestFunction.BLAKE3)
    response = remote.execute(action)
    [file] = response.result.output_files
    assert remote.blob(file.digest, DigestFunction.BLAKE3) == b"a\n"


def test_a_working_directory_is_where_it_begins_and_what_outputs_are_relative_to(remote: Remote) -> None:
    response = remote.sh("pwd; cat b.txt > made", PLAIN, working_directory="d", output_paths=["made"])
    assert remote.blob(response.result.stdout_digest) == b"/build/d\n"
    assert remote.outputs(response) == {"made": b"b\n"}


def test_exit_codes_and_signals_are_results(remote: Remote) -> None:
    for script, code in (("exit 7", 7), ("kill -9 $$", 137), ("kill -SEGV $$", 139)):
        response = remote.sh(script)
        assert (response.status.code, response.result.exit_code) == (0, code), script


def test_a_command_that_does_not_exist_fails_as_in_a_shell(remote: Remote) -> None:
    response = remote.run(["no-such-program"])
    assert (response.status.code, response.result.exit_code) == (0, 127)
    assert remote.blob(response.result.stderr_digest) == (
        b"casfs: can't run 'no-such-program': No such file or directory\n"
    )
    response = remote.run(["./a.txt"], PLAIN)
    assert (response.status.code, response.result.exit_code) == (0, 126)
    assert b"Permission denied" in remote.blob(response.result.stderr_digest)


def test_a_failure_is_not_cached(remote: Remote) -> None:
    action = remote.put(["sh", "-c", "exit 3"], salt=os.urandom(8))
    assert not remote.execute(action).cached_result
    assert not remote.execute(action).cached_result


def test_a_result_is_cached_unless_it_must_not_be(remote: Remote) -> None:
    script = ["sh", "-c", "head -c 8 /dev/urandom > o"]
    action = remote.put(script, output_paths=["o"], salt=os.urandom(8))
    first, second = remote.execute(action), remote.execute(action)
    assert (first.cached_result, second.cached_result) == (False, True)
    assert remote.outputs(first) == remote.outputs(second)
    third = remote.execute(action, skip_cache_lookup=True)
    assert not third.cached_result and remote.outputs(third) != remote.outputs(first)
    never = remote.put(script, output_paths=["o"], salt=os.urandom(8), do_not_cache=True)
    assert remote.outputs(remote.execute(never)) != remote.outputs(remote.execute(never))


def test_undeclared_files_do_not_exist(remote: Remote) -> None:
    script = "ls -a . ..; cat ../etc/shadow 2>&1; realpath .; test ! -e /work; test ! -e /run/dbus; ls /tmp"
    response = remote.run(["sh", "-c", script], {"a": b""}, platform={"host-root": "false"})
    assert response.result.exit_code == 127, "there is no shell without the host's root"
    response = remote.sh("ls ..; ls -a /tmp; ls /build; test ! -s /run", {"a": b""})
    said = remote.blob(response.result.stdout_digest).decode().split()
    assert "a" in said and "build" in said and "root" in said


def test_nothing_can_be_written_but_where_it_should(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    script = "for d in / /etc /usr /build /tmp /dev /dev/shm; do (: > $d/new) 2>/dev/null && echo $d; done"
    with executing(casfs) as server, remote_of(server) as remote:
        # The first is set up in another way than those after it.
        for salt in (b"first", b"second", b"third"):
            response = remote.run(["sh", "-c", script], salt=salt)
            assert remote.blob(response.result.stdout_digest).split() == [b"/build", b"/tmp", b"/dev/shm"]
            setting = remote.sh("echo 1 > /proc/sys/net/ipv4/ip_forward", salt=salt)
            assert setting.result.exit_code, "its network may be another's afterwards"


def test_absolute_symbolic_links_lead_to_what_the_sandbox_has(remote: Remote) -> None:
    links: Files = {"own": Link("/build/a"), "host": Link("/etc/passwd"), "hidden": Link("/sys"), "a": b"a\n"}
    script = "cat own; test -s host; test ! -e hidden; ln -s /etc/passwd o; mkdir d; ln -s /nowhere/at/all d/l"
    response = remote.sh(script, links, output_paths=["o", "d", "own"])
    assert remote.blob(response.result.stdout_digest) == b"a\n", response
    # What a link leads to is nobody's output.
    assert [(link.path, link.target) for link in response.result.output_symlinks] == [
        ("o", "/etc/passwd"),
        ("own", "/build/a"),
    ]
    assert remote.tree(response.result.output_directories[0]) == {"l": "/nowhere/at/all"}


# Outputs


def test_an_output_directory_is_a_tree(remote: Remote) -> None:
    script = "mkdir -p o/x/y o/e; echo 1 > o/1; cp o/1 o/x/y/2; ln -s ../1 o/x/l; cp -r o/x o/z"
    response = remote.sh(script, output_paths=["o"])
    [directory] = response.result.output_directories
    assert directory.path == "o" and directory.is_topologically_sorted
    assert remote.tree(directory) == {
        "1": b"1\n", "x/y/2": b"1\n", "x/l": "../1", "z/y/2": b"1\n", "z/l": "../1"
    }  # fmt: skip


def test_older_fields_say_what_kind_an_output_has_to_be(remote: Remote) -> None:
    response = remote.sh(
        "mkdir -p d1 f2; echo 1 > f1; ln -s f1 l1; ln -s d1 l2; echo x > d3",
        output_files=["f1", "f2", "l1", "missing"],
        output_directories=["d1", "l2", "d3"],
    )
    result = response.result
    assert [file.path for file in result.output_files] == ["f1"]
    assert [directory.path for directory in result.output_directories] == ["d1"]
    assert [(link.path, link.target) for link in result.output_file_symlinks] == [("l1", "f1")]
    assert [(link.path, link.target) for link in result.output_directory_symlinks] == [("l2", "d1")]
    assert [link.path for link in result.output_symlinks] == ["l1", "l2"]
    assert "'f2' isn't kept: it is declared as a file, and is a directory" in response.message
    assert "'d3' isn't kept: it is declared as a directory, and is a file" in response.message


def test_output_paths_go_before_the_older_fields(remote: Remote) -> None:
    response = remote.sh("echo 1 > a; echo 2 > b", output_paths=["a"], output_files=["b"])
    assert remote.outputs(response) == {"a": b"1\n"}


def test_an_output_may_lie_in_another_one(remote: Remote) -> None:
    script = "mkdir -p o/x; echo 1 > o/x/f; ln -s f o/x/l"
    response = remote.sh(script, output_paths=["o", "o/x", "o/x/f", "o/x/l", "o/none"])
    assert [directory.path for directory in response.result.output_directories] == ["o", "o/x"]
    assert remote.tree(response.result.output_directories[1]) == {"f": b"1\n", "l": "f"}
    assert remote.outputs(response) == {"o/x/f": b"1\n"}
    assert [link.path for link in response.result.output_symlinks] == ["o/x/l"]


def test_an_input_may_be_an_output(remote: Remote) -> None:
    response = remote.sh("echo more >> a.txt", PLAIN, output_paths=["a.txt", "d/b.txt", "d/run", "d"])
    assert remote.outputs(response) == {"a.txt": b"a\nmore\n", "d/b.txt": b"b\n", "d/run": RUN}
    assert [file.is_executable for file in response.result.output_files] == [False, False, True]
    [directory] = response.result.output_directories
    assert set(remote.tree(directory)) == {"b.txt", "run"}


def test_inputs_that_were_moved_are_outputs_as_they_are_now(remote: Remote) -> None:
    files: Files = {"d/x": b"d's\n", "e/x": b"e's\n", "f/g/x": b"f's\n", "a": b"a\n", "b": b"b\n"}
    script = "mv e old; mv d e; mkdir d; mv f/g d/g; mv a c; mv b a; mv c b"
    response = remote.sh(script, files, output_paths=["old", "d", "e", "f", "a", "b"])
    assert remote.outputs(response) == {"a": b"b\n", "b": b"a\n"}
    trees = {one.path: remote.tree(one) for one in response.result.output_directories}
    assert trees == {"old": {"x": b"e's\n"}, "d": {"g/x": b"f's\n"}, "e": {"x": b"d's\n"}, "f": {}}


def test_writing_into_inputs_is_reported_and_nobody_else_sees_it(remote: Remote) -> None:
    response = remote.sh("echo x > a.txt; chmod +w d; rm d/b.txt; echo y > new; echo z > o", PLAIN, output_paths=["o"])
    assert response.result.exit_code == 0
    assert "changed 1 of its inputs: 'a.txt'" in response.message
    assert "removed 1 of its inputs: 'd/b.txt'" in response.message
    after = remote.sh("cat a.txt d/b.txt; test ! -e new", PLAIN)
    assert remote.blob(after.result.stdout_digest) == b"a\nb\n" and not after.message


def test_what_cannot_be_stored_is_left_out_and_said(remote: Remote) -> None:
    response = remote.sh("mkfifo o; mkdir d; mkfifo d/p; echo 1 > d/f", output_paths=["o", "d"])
    assert response.status.code == 0 and not response.result.output_files
    assert remote.tree(response.result.output_directories[0]) == {"f": b"1\n"}
    assert "'o' isn't kept: it is a FIFO" in response.message


# What an action may not be


def test_what_is_wrong_with_an_action_is_said(remote: Remote) -> None:
    wrong = [
        (remote.put([]), "no arguments"),
        (remote.put(["true"], working_directory="/etc"), "absolute"),
        (remote.put(["true"], working_directory="../x"), "'..'"),
        (remote.put(["true"], working_directory="nowhere"), "not a directory of the input root"),
        (remote.put(["true"], PLAIN, working_directory="link"), "behind the symbolic link"),
        (remote.put(["true"], output_paths=["../x"]), "'..'"),
        (remote.put(["true"], output_paths=["/x"]), "absolute"),
        (remote.put(["true"], output_paths=[""]), "output"),
        (remote.put(["true"], PLAIN, output_paths=["link/x"]), "behind the symbolic link"),
        (remote.put(["true"], PLAIN, output_paths=["a.txt/x"]), "is an input file"),
        (remote.put(["true"], output_files=["x", "x/y"]), "inside of"),
        (remote.put(["true"], output_files=["x"], output_directories=["x"]), "both"),
        (remote.put(["true"], environment={"A=B": "1"}), "environment"),
        (remote.put(["a\0b"]), "NUL"),
        (remote.put(["true"], timeout=7200), "more than"),
        (remote.put(["true"], timeout=-1), "negative"),
        (remote.put(["true", "x" * (3 << 20)]), "longer than Linux takes"),
        (remote.put(["true"], platform={"network": "perhaps"}), "true or false"),
    ]
    for action, word in wrong:
        response = remote.execute(action)
        assert response.status.code == codes.INVALID_ARGUMENT, (word, response)
        assert word in response.status.message and not response.HasField("result")


def test_what_this_worker_is_not_is_a_failed_precondition(remote: Remote) -> None:
    for name, value in (("OSFamily", "windows"), ("ISA", "vax"), ("gpu", "1"), ("network", "true")):
        response = remote.run(["true"], platform={name: value})
        assert response.status.code == codes.FAILED_PRECONDITION and name in response.status.message
    machine = {"x86_64": "x86-64"}.get(os.uname().machine, os.uname().machine)
    assert remote.run(["true"], platform={"OSFamily": "Linux", "ISA": machine}).status.code == 0


def test_the_network_is_for_those_that_ask_for_it(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    with executing(casfs, "--network") as server, remote_of(server) as remote:
        host = os.readlink(f"/proc/{server.process.pid}/ns/net")
        # The first is set up in another way than those after it.
        for salt in (b"first", b"second", b"third"):
            for wanted in ("true", "false"):
                response = remote.run(["readlink", "/proc/self/ns/net"], salt=salt, platform={"network": wanted})
                seen = remote.blob(response.result.stdout_digest).decode().strip()
                assert seen.startswith("net:[") and (seen == host) == (wanted == "true")


# What is told of actions


def test_each_action_is_a_line_of_the_log_a_number_and_a_page(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    log = casfs.directory / "log"
    with executing(casfs, *HTTP, "--action-log", log) as server, remote_of(server) as remote, HttpClient(server) as web:
        good = remote.put(["sh", "-c", "cat d/b.txt > o; echo printed"], PLAIN, output_paths=["o"])
        bad = remote.put(["sh", "-c", "echo '<b>' >&2; exit 4"], PLAIN)
        wrong = remote.put(["true"], working_directory="nowhere")
        for action in (good, good, bad, wrong):
            remote.execute(action)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert [(line["status"], line["exit_code"]) for line in lines] == [
            ("OK", 0), ("OK", 4), ("INVALID_ARGUMENT", None)
        ]  # fmt: skip
        first = lines[0]
        assert first["action"] == str(good) and first["command"].startswith("sh -c cat")
        assert (first["input_files"], first["outputs"], first["upcalls"], first["fetched_blobs"]) == (3, 1, 0, 0)
        assert all(0 < first[f"{stage}_seconds"] < 60 for stage in ("fetch", "run", "upload"))
        assert first["memory_bytes"] > 0 and first["cpu_seconds"] > 0
        numbers = web.metrics()
        assert numbers['casfs_actions_total{exit="zero",status="OK"}'] == 1
        assert numbers['casfs_actions_total{exit="other",status="OK"}'] == 1
        assert numbers['casfs_actions_total{exit="none",status="INVALID_ARGUMENT"}'] == 1
        assert numbers['casfs_action_seconds_count{stage="run"}'] == 2
        assert numbers["casfs_executions_running"] == numbers["casfs_executions_queued"] == 0
        assert numbers['casfs_action_numbers_total{what="input_files"}'] == 6
        overview = web("GET", "/").body.decode()
        assert "exit code 4" in overview and "INVALID_ARGUMENT" in overview
        assert "&lt;b&gt;" in overview and "<b>" not in overview
        page = web("GET", f"/result/sha256/{bad.hex}/{bad.size}").body.decode()
        assert "Exit code 4" in page and "stderr" in page and "input root" in page
        page = web("GET", f"/result/sha256/{good.hex}/{good.size}").body.decode()
        assert "stdout" in page and ">o<" in page and "input root" in page
