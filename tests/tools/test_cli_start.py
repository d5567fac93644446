"""How the command starts: help, verbs, completion; and that it loads nothing it doesn't need."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import shlex
import signal
import subprocess
import sys
from itertools import takewhile

import pytest

import tools.commands
import tools.commands.manifest
from tests.tools.conftest import Casfs
from tools.commands import VERBS, load_all
from tools.commands.manifest import VERBS as MANIFEST_VERBS
from tools.exits import Exit
from tools.main import make_parser
from tools.server.ending import GRACE_SECONDS

HEAVY = (
    "lmdb",
    "grpc",
    "google.protobuf",
    "blake3",
    "zstandard",
    "trio",
    "pyfuse3",
    "tqdm",
    "shtab",
    "platformdirs",
    "tomllib",
    "json",
    "logging",
)


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_loads_no_library_and_nothing_of_the_layers_below(casfs: Casfs, arguments: list[str]) -> None:
    program = (
        "import sys\nfrom tools.main import main\ncode = main(sys.argv[1:])\n"
        "print('LOADED', *sys.modules, file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env=casfs.environment,
        timeout=60,
        check=False,
    )
    loaded = set(done.stderr.rpartition("LOADED")[2].split())
    assert not loaded & set(HEAVY)
    assert not {name for name in loaded if name.split(".")[0] in ("casfs", "store")}
    assert not {name for name in loaded if name.startswith("tools.commands.")}


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_loads_no_other_verb(casfs: Casfs, verb: str) -> None:
    done = casfs.ok(verb, "--help")
    assert done.out.startswith(f"usage: casfs {verb}")


def test_every_verb_has_a_module_and_every_module_is_a_verb() -> None:
    for package, verbs in ((tools.commands, VERBS), (tools.commands.manifest, MANIFEST_VERBS)):
        modules = {info.name.rstrip("_") for info in pkgutil.iter_modules(package.__path__)}
        assert {name for name in modules if not name.startswith("_")} == set(verbs)


def test_every_argument_of_every_verb_says_what_it_is_for() -> None:
    parser = make_parser()
    load_all(parser)
    pending = [parser]
    while pending:
        here = pending.pop()
        for action in here._actions:
            if isinstance(action, argparse._SubParsersAction):
                pending.extend(action.choices.values())
            else:
                assert action.help, f"{here.prog}: {action.option_strings or action.dest}"


def test_help_names_every_exit_code(casfs: Casfs) -> None:
    out = casfs.ok("--help").out
    for code in Exit:
        assert f"{int(code):>3}  {code.meaning}" in out


def test_no_verb_is_a_usage_error(casfs: Casfs) -> None:
    assert casfs().code == Exit.USAGE
    assert casfs("manifest").code == Exit.USAGE
    assert casfs("frobnicate").code == Exit.USAGE


def test_version(casfs: Casfs) -> None:
    assert casfs.ok("--version").out.startswith("casfs ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_the_verbs_and_their_options(casfs: Casfs, shell: str) -> None:
    script = casfs.ok("completion", shell).out
    for word in ("manifest", "checkout", "--foreground" if shell != "tcsh" else "mount"):
        assert word in script


def test_bash_completes_verbs_options_and_manifests(casfs: Casfs, tree: object) -> None:
    casfs.ok("manifest", "create", "headers", "tree")
    script = casfs.ok("completion", "bash").out
    asked = (
        f'casfs() {{ {" ".join(casfs.command)} "$@"; }}\n'
        'complete_words() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); '
        '_shtab_casfs; echo "${COMPREPLY[*]}"; }\n'
        "complete_words casfs mani\ncomplete_words casfs manifest crea\ncomplete_words casfs mount hea\n"
        "complete_words casfs mount --eng\n"
    )
    done = subprocess.run(
        ["bash", "-c", script + asked], capture_output=True, text=True, env=casfs.environment, timeout=60, check=True
    )
    assert done.stdout.split() == ["manifest", "create", "headers", "--engine"]
    assert not done.stderr


def test_bash_accepts_the_script(casfs: Casfs) -> None:
    script = casfs.ok("completion", "bash").out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("arguments", [("manifest", "export", "many"), ("ls", "-R", "many"), ("ls", "--json", "many")])
def test_output_that_nobody_reads_any_more_is_no_failure(casfs: Casfs, arguments: tuple[str, ...]) -> None:
    names = (f"f\t{'ab' * 32}/1\t-\t{number:0100d}\n" for number in range(2000))
    casfs.ok("manifest", "import", "many", "-", stdin="casfs manifest 1 blake3\n" + "".join(names))
    process = casfs.start(*arguments)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == 0


def test_an_unexpected_error_is_one_line_and_the_traceback_comes_only_when_asked_for(casfs: Casfs) -> None:
    command = [
        sys.executable,
        "-c",
        (
            "import sys, tools.commands.add as add, tools.main\n"
            "def run(*_): raise RuntimeError('strange')\nadd.run = run\nsys.exit(tools.main.main(sys.argv[1:]))"
        ),
    ]
    quiet = subprocess.run([*command, "add"], capture_output=True, text=True, env=casfs.environment, check=False)
    assert quiet.returncode == Exit.NO
    assert quiet.stderr == "casfs: unexpected RuntimeError: strange (--debug shows where)\n"
    loud = subprocess.run(
        [*command, "--debug", "add"], capture_output=True, text=True, env=casfs.environment, check=False
    )
    assert loud.returncode == Exit.NO
    assert "Traceback" in loud.stderr


@pytest.mark.parametrize("arguments", ["--help", "manifest list", "stats --json"])
def test_output_that_can_not_be_written_is_a_failure_that_says_so(casfs: Casfs, arguments: str) -> None:
    casfs.ok("manifest", "import", "m", "-", stdin="casfs manifest 1 blake3\nd\tempty\n")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*casfs.command, *arguments.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            env=casfs.environment,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (
        Exit.STORE,
        b"casfs: can't write the output: No space left on device\n",
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_do_no_harm(casfs: Casfs, closed: str) -> None:
    (casfs.directory / "file").write_text("text")
    for arguments in ("add file", "add --stdin", "stats", "stats --json", "manifest list"):
        shell = f"'{sys.executable}' -m tools.main {arguments} {closed}"
        done = subprocess.run(
            shell, shell=True, capture_output=True, cwd=casfs.directory, env=casfs.environment, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, b""), arguments
    assert casfs.ok("verify", "--json").json["blobs"] == 2


def test_every_example_is_a_command_that_can_be_parsed() -> None:
    parser = make_parser()
    load_all(parser)
    for line in find_examples(parser):
        for part in re.split(r" \|\|? ", line.partition("#")[0]):
            words = shlex.split(part.partition(" > ")[0])
            if words[0] == "casfs" and "--help" not in words:
                parser.parse_args(words[1:])


@pytest.mark.parametrize("verb", ["serve", "worker"])
def test_exit_codes_that_a_verb_explains_are_those_that_there_are(verb: str) -> None:
    text = importlib.import_module(f"tools.commands.{verb}").EXITS
    codes = [int(line.split()[0]) for line in text.strip().splitlines()]
    assert {*codes} < {*Exit, 128 + signal.SIGALRM}
    assert {Exit.OK, Exit.STORE, Exit.OVERDUE, Exit.INTERRUPTED} < {*codes}
    if verb == "serve":
        assert f"{GRACE_SECONDS:g} s after --drain-timeout" in text


def find_examples(parser: argparse.ArgumentParser) -> list[str]:
    """The lines of the examples of a parser's verbs, and of theirs."""
    found: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                lines = (verb.epilog or "").splitlines()
                assert lines[:1] == ["examples:"], verb.prog
                assert max(map(len, lines)) <= 100, verb.prog
                # Behind an empty line there may be exit codes.
                found += [*takewhile(bool, lines[1:]), *find_examples(verb)]
    return found
