"""``casfs-sandboxfs`` as Bazel meets it: a process, two pipes, and every way in which it can end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from casfs.mountinfo import list_mounts
from tests.conftest import Requirements
from tests.tools.conftest import REPOSITORY, Casfs, wait_until
from tools.exits import Exit


class Process:
    """The program with nothing but PATH set, as Bazel starts it."""

    def __init__(self, place: Path, *arguments: str | Path) -> None:
        self.place = place
        self.log = place.parent / "sandboxfs.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tools.sandboxfs", *(arguments or ("--allow=self", place))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={"PATH": os.environ["PATH"]},
                cwd=REPOSITORY,
                start_new_session=True,
            )

    def send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def answer(self) -> bytes:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ask(self, request: Any) -> bytes:
        self.send(json.dumps(request).encode())
        return self.answer()

    def create(self, name: str, *mappings: tuple[str, Path | str] | tuple[str, Path | str, bool]) -> bytes:
        mapped = [{"p": path, "u": str(host), "w": bool(rest)} for path, host, *rest in mappings]
        return self.ask({"C": {"i": name, "m": mapped}})

    def close_stdin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code, after a signal."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(30)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()
        return code

    def is_mounted(self) -> bool:
        return any(mount.path.startswith(os.fsencode(self.place)) for mount in list_mounts())


@pytest.fixture
def start(tmp_path: Path, requires: Requirements) -> Iterator[Callable[[], Process]]:
    requires.admin()
    place = tmp_path / "mnt"
    place.mkdir()
    started: list[Process] = []

    def begin() -> Process:
        started.append(Process(place))
        return started[-1]

    yield begin
    for process in started:
        if process.process.poll() is None:
            process.end()
    wait_until(lambda: not any(process.is_mounted() for process in started))
    assert os.listdir(place) == []
    assert not list(tmp_path.glob("sandboxes-*"))


def ok(name: str) -> bytes:
    return b'{"id":"%s","error":null}\n' % name.encode()


def test_the_version_is_what_bazel_looks_for(casfs: Casfs) -> None:
    assert casfs.ok("sandboxfs", "--version").out.splitlines()[0] == "sandboxfs 0.2.0"


def test_sandboxes_are_made_and_destroyed(start: Callable[[], Process], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    sandboxfs = start()
    assert sandboxfs.create("empty") == ok("empty")
    assert sandboxfs.create("0", ("a/b", tmp_path / "file")) == ok("0")
    assert (sandboxfs.place / "0" / "a" / "b").read_text() == "here"
    sandboxfs.send(b'{"D":"0"}{"D":"empty"}')
    assert [sandboxfs.answer(), sandboxfs.answer()] == [ok("0"), ok("empty")]
    wait_until(lambda: os.listdir(sandboxfs.place) == [])
    assert sandboxfs.end() == Exit.TERMINATED
    assert not sandboxfs.is_mounted()


def test_an_error_has_the_request_s_name_and_says_what_is_wrong(start: Callable[[], Process], tmp_path: Path) -> None:
    sandboxfs = start()
    answer = json.loads(sandboxfs.create("0", ("a", tmp_path / "missing")))
    assert answer["id"] == "0" and f"{tmp_path}/missing' at 'a': it does not exist" in answer["error"]
    answer = json.loads(sandboxfs.ask({"D": "7"}))
    assert answer["id"] == "7" and "no sandbox '7'" in answer["error"]
    assert json.loads(sandboxfs.ask({"X": "7"}))["id"] is None
    assert sandboxfs.create("0") == ok("0")
    assert "missing" in sandboxfs.log.read_text()


def test_the_end_of_stdin_freezes_what_there_is_until_nobody_listens(
    start: Callable[[], Process], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("here")
    sandboxfs = start()
    assert sandboxfs.create("0", ("a", tmp_path / "file")) == ok("0")
    sandboxfs.close_stdin()
    with pytest.raises(subprocess.TimeoutExpired):
        sandboxfs.process.wait(0.3)
    assert (sandboxfs.place / "0" / "a").read_text() == "here"
    assert sandboxfs.process.stdout is not None
    sandboxfs.process.stdout.close()
    assert sandboxfs.wait() == 0
    assert not sandboxfs.is_mounted()


@pytest.mark.parametrize("sent", [b'{"C":{"i":"0","m":[', b"no JSON", b'{"D":"0"}}'])
def test_half_a_request_or_none_ends_it_with_a_message(start: Callable[[], Process], sent: bytes) -> None:
    sandboxfs = start()
    assert sandboxfs.create("0") == ok("0")
    sandboxfs.send(sent)
    sandboxfs.close_stdin()
    assert sandboxfs.wait() == 1
    assert not sandboxfs.is_mounted()
    assert "casfs: " in sandboxfs.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_mounted_whatever_ends_it(
    start: Callable[[], Process], tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "file").write_text("here")
    (tmp_path / "scratch").mkdir()
    sandboxfs = start()
    assert sandboxfs.create("0", ("", tmp_path / "scratch", True), ("a", tmp_path / "file")) == ok("0")
    with (sandboxfs.place / "0" / "a").open() as file:
        sandboxfs.end(number)
        wait_until(lambda: not sandboxfs.is_mounted())
        assert file.read() == "here"
    if number == signal.SIGKILL:
        wait_until(lambda: "was killed" in sandboxfs.log.read_text())
    again = start()
    assert again.create("0", ("", tmp_path / "scratch", True), ("b", tmp_path / "file")) == ok("0")
    assert os.listdir(again.place / "0") == ["b"]


def test_what_was_left_where_the_guard_died_too_is_cleared(start: Callable[[], Process], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    sandboxfs = start()
    assert sandboxfs.create("0", ("a", tmp_path / "file")) == ok("0")
    children = Path(f"/proc/{sandboxfs.process.pid}/task/{sandboxfs.process.pid}/children").read_text().split()
    for pid in map(int, children):
        os.kill(pid, signal.SIGKILL)
    sandboxfs.end(signal.SIGKILL)
    assert sandboxfs.is_mounted()
    again = start()
    assert again.create("1", ("a", tmp_path / "file")) == ok("1")
    assert os.listdir(again.place) == ["1"]


def test_a_hundred_thousand_mappings_in_one_request(start: Callable[[], Process], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    (tmp_path / "other").write_text("there")
    sandboxfs = start()
    mappings = [{"x": 1 + n // 1000, "p": f"f{n}", "y": 200, "u": "file"} for n in range(100_000)]
    mappings[77_777]["u"] = "other"
    prefixes = {str(1 + n): f"/d/{n}" for n in range(100)} | {"200": str(tmp_path)}
    for turn in range(2):
        assert sandboxfs.ask({"C": {"i": str(turn), "m": mappings, "q": prefixes}}) == ok(str(turn))
        top = sandboxfs.place / str(turn) / "d"
        assert len(os.listdir(top)) == 100
        assert len(os.listdir(top / "99")) == 1000
        assert (top / "77" / "f77777").read_text() == "there"


def test_wrong_command_lines_say_what_is_wrong(casfs: Casfs, tmp_path: Path, requires: Requirements) -> None:
    requires.admin()
    assert f"{tmp_path}/none does not exist" in casfs.fails(Exit.MOUNT, "sandboxfs", tmp_path / "none")
    assert "one directory" in casfs.fails(Exit.USAGE, "sandboxfs", tmp_path, "more")
    assert "no-such-program" in casfs.fails(Exit.USAGE, "sandboxfs", "--namespace", "no-such-program")


def test_an_ordinary_user_is_told_of_the_namespace_and_has_sandboxes_in_it(nobody: Casfs) -> None:
    (nobody.directory / "mnt").mkdir()
    os.chown(nobody.directory / "mnt", 65534, 65534)
    assert "--namespace" in nobody.fails(Exit.MOUNT, "sandboxfs", "mnt")
    # A Bazel in short: it asks for a sandbox, and runs something in it.
    script = (
        "import os, subprocess, sys\n"
        "p = subprocess.Popen(sys.argv[1:], stdin=-1, stdout=-1)\n"
        'p.stdin.write(b\'{"C":{"i":"0","m":[{"p":"/","u":"%s","w":true},{"p":"a","u":"/etc/passwd"}]}}\' % b\'S\')\n'
        "p.stdin.flush(); print(p.stdout.readline())\n"
        "print(open('mnt/0/a').read() == open('/etc/passwd').read()); open('mnt/0/made', 'w').write('x')\n"
        "p.terminate(); p.wait(); print(os.listdir('mnt'), os.getuid())\n"
    ).replace("'S'", f"b'{nobody.directory}/scratch'"[1:])
    subprocess.run([*nobody.prefix, "mkdir", "scratch"], check=True)
    command = [sys.executable, "-m", "tools.main", "sandboxfs", "--allow=self", "mnt"]
    done = nobody.ok("sandboxfs", "--namespace", sys.executable, "-c", script, *command)
    assert done.out.splitlines() == ['b\'{"id":"0","error":null}\\n\'', "True", "[] 65534"]
    assert os.listdir(nobody.directory / "scratch") == ["made"]
