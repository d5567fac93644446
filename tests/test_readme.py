"""What the README shows runs as shown: its five lines to a mount, every `make` target, every verb, every link."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Requirements

TOP = Path(__file__).parent.parent
README = (TOP / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
_VERB = r"casfs ([a-z]+(?: create)?)\b"
VERBS = {*re.findall(rf"`{_VERB}", README), *re.findall(rf"(?m)^(?:.*&& )?{_VERB}", "\n".join(BLOCKS))}


def run_shown(lines: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    """Run lines as a shell does, with a store of their own."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CASFS_STORE": str(place / "store"),
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_its_five_lines_lead_to_a_mount(tmp_path: Path, requires: Requirements) -> None:
    requires.fuse()
    first, *lines = BLOCKS[0].splitlines()
    assert first.startswith("make setup && . .venv/bin/activate"), "what this test's environment stands for"
    assert len(lines) == 5
    shown = run_shown(lines, tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^files +[\d,]+, ", shown.stdout, re.MULTILINE)
    if "engine  kernel" in shown.stdout or "engine        passthrough" in shown.stdout:
        assert re.search(r"^  READ +0$", shown.stdout, re.MULTILINE), shown.stdout
    assert not (tmp_path / "mnt").is_mount()


def test_its_command_in_a_sandbox_runs(tmp_path: Path, requires: Requirements) -> None:
    requires.programs("bwrap", "cc")
    shown = run_shown(BLOCKS[1].splitlines(), tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^obj/a\.o +blake3:[0-9a-f]{64}/\d+$", shown.stdout, re.MULTILINE), shown.stdout
    assert re.search(r"^exit code 0, ", shown.stdout + shown.stderr, re.MULTILINE)


def test_its_trace_finds_what_is_unused_and_what_is_missing(tmp_path: Path, requires: Requirements) -> None:
    requires.programs("bwrap", "cc")
    requires.fuse()
    shown = run_shown(BLOCKS[2].splitlines(), tmp_path)
    assert shown.returncode == 0, shown.stderr
    shape = re.sub(r"process \d+|^  \d+ ", "", "\n".join(shown.stdout.splitlines()[7:]), flags=re.MULTILINE)
    assert "probably not needed:\n  old.h\n" in shape and "undeclared inputs:\n  b.h  (cc1, )" in shape, shape


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)", README))))
def test_its_make_targets_exist(target: str) -> None:
    makefile = (TOP / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_its_verbs_exist(verb: str) -> None:
    help_text = [sys.executable, "-m", "tools.main", *verb.split(), "--help"]
    subprocess.run(help_text, cwd=TOP, capture_output=True, timeout=30, check=True)


def test_its_options_of_the_server_exist() -> None:
    section = README.split("\n## A cache for Bazel\n")[1].split("\n## ")[0]
    shown = set(re.findall(r"(?<![\w-])--[a-z-]+\b", section))  # Bazel's have underscores
    command = [sys.executable, "-m", "tools.main", "serve", "--help"]
    known = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=30, check=True).stdout
    assert {"--http-listen", "--http-name", "--max-size", "--tokens", "--upstream"} <= shown
    assert shown <= set(re.findall(r"--[a-z-]+\b", known))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_what_it_links_to_is_there(target: str) -> None:
    assert (TOP / target).exists()
