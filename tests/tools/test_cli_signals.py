"""Ctrl-C and SIGTERM, anywhere: one line, the shell's exit code, and a clean store."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.tools.conftest import REPOSITORY, Casfs, wait_until
from tools.exits import Exit

SIGNALS = [
    (signal.SIGINT, Exit.INTERRUPTED, b"casfs: interrupted\n"),
    (signal.SIGTERM, Exit.TERMINATED, b"casfs: terminated\n"),
]


def unpublished(casfs: Casfs) -> list[Path]:
    """What ingests have written and not published yet."""
    return list(casfs.store.glob("tmp/*/*"))


def assert_clean(casfs: Casfs) -> None:
    """Nothing is left over, and what is there is right."""
    assert list((casfs.store / "tmp").iterdir()) == []
    assert casfs.ok("verify", "--json").json["clean"] is True


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree whose adding takes a moment: thousands of small files."""
    top = tmp_path_factory.mktemp("tree") / "many"
    for directory in range(20):
        (top / str(directory)).mkdir(parents=True)
        for number in range(200):
            (top / str(directory) / str(number)).write_bytes(b"%d %d\n" % (directory, number) * 100)
    return top


@pytest.mark.parametrize(("number", "code", "said"), SIGNALS)
@pytest.mark.parametrize("verb", ["add {}", "manifest create m {}", "manifest create m --graft a/b={}"])
def test_a_signal_while_a_tree_is_added(
    casfs: Casfs, many: Path, verb: str, number: int, code: Exit, said: bytes
) -> None:
    process = casfs.start(*verb.format(many).split())
    wait_until(lambda: unpublished(casfs))
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (code, b"", said)
    assert_clean(casfs)
    assert casfs.ok("manifest", "list", "--names").out == ""
    casfs.ok("manifest", "create", "m", many)


@pytest.mark.parametrize(("number", "code", "said"), SIGNALS)
def test_a_signal_while_a_stream_is_added(casfs: Casfs, number: int, code: Exit, said: bytes) -> None:
    process = casfs.start("add", "--stdin", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(bytes(1 << 20))
    process.stdin.flush()
    wait_until(lambda: unpublished(casfs))
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (code, b"", said)
    assert_clean(casfs)
    assert casfs.ok("stats", "--json").json["blobs"] == 0


@pytest.mark.parametrize(("number", "code", "said"), SIGNALS)
def test_a_signal_while_files_are_checked_out(casfs: Casfs, many: Path, number: int, code: Exit, said: bytes) -> None:
    casfs.ok("manifest", "create", "m", many)
    out = casfs.directory / "out"
    process = casfs.start("checkout", "m", out)
    wait_until(lambda: out.is_dir() and any(out.iterdir()))
    process.send_signal(number)
    assert process.communicate(timeout=30) == (b"", said)
    assert process.returncode == code
    assert not out.exists()
    assert casfs.ok("stats", "--json").json["leases"] == []
    assert_clean(casfs)


@pytest.mark.parametrize(("number", "code", "said"), SIGNALS)
def test_a_signal_while_reading_a_text_from_a_terminal(casfs: Casfs, number: int, code: Exit, said: bytes) -> None:
    process = casfs.start("manifest", "import", "m", "-", stdin=subprocess.PIPE)
    wait_until((casfs.store / "format").exists)
    process.send_signal(number)
    assert process.communicate(timeout=30) == (b"", said)
    assert process.returncode == code
    assert_clean(casfs)


def test_a_killed_ingest_leaves_nothing_after_the_next_start(casfs: Casfs, many: Path) -> None:
    process = casfs.start("manifest", "create", "m", many)
    wait_until(lambda: unpublished(casfs))
    process.kill()
    process.communicate(timeout=30)
    casfs.ok("stats")
    assert_clean(casfs)


def test_signals_right_at_the_start_never_show_a_traceback(casfs: Casfs) -> None:
    # Whatever happens before `main` runs is Python's; from there on it is ours.
    program = (
        "import os, signal, sys, tools.main, tools.config as c\n"
        "def load(*_): os.kill(os.getpid(), int(sys.argv.pop())); raise AssertionError\n"
        "c.load_settings = load\nsys.exit(tools.main.main(['stats']))"
    )
    for number, code, said in SIGNALS:
        done = subprocess.run(
            [*casfs.command[:1], "-c", program, str(int(number))],
            capture_output=True,
            cwd=REPOSITORY,
            env=casfs.environment,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (code, said)


def test_what_a_shell_has_ignored_for_a_background_job_stays_ignored(casfs: Casfs) -> None:
    read, write = os.pipe()
    with open(read, "rb"), open(write, "wb", buffering=0) as out:
        command = "trap '' INT; exec \"$@\""
        process = subprocess.Popen(
            ["sh", "-c", command, "sh", *casfs.command, "add", "--stdin"],
            stdin=read,
            stdout=subprocess.PIPE,
            env=casfs.environment,
            start_new_session=True,
        )
        out.write(b"some")
        wait_until(lambda: unpublished(casfs))
        process.send_signal(signal.SIGINT)
        out.write(b" bytes")
    assert b"/10  -" in process.communicate(timeout=30)[0]
    assert process.returncode == 0
