"""`python -m tools.namespaces`: what real tools make of an undeclared file, in three kinds of sandbox; a table.

Each tool gets a workspace of which one file is declared too little. It runs
there, and where nothing but the declared files is, which is what it should say.
Then, with the same inputs declared, in

    symbolic links   a directory of links to the declared files, as Bazel's linux-sandbox makes it
    denied           the workspace itself, where undeclared files can't be read (bubblewrap)
    casfs            a sandbox of casfs

What says the same as where the file isn't is *right*; what says the same as in
the workspace *leaks*; anything else *breaks* the tool. Nothing here knows the
answers. Everything is made in a temporary directory and taken away again. Exit
code 0 if casfs is right everywhere, 1 if not, 2 where it can't be shown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SYMLINKS, DENIED, CASFS = "symbolic links", "denied", "casfs"
_PATH = "/usr/bin:/bin"
_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Case:
    """A tool, its workspace and what it is asked. The command prints one word or a few."""

    name: str
    programs: tuple[str, ...]
    declared: dict[str, str]
    """Texts by path."""
    undeclared: dict[str, str]
    command: tuple[str, ...]
    prepare: tuple[str, ...] = ()
    """What makes more of the workspace, undeclared."""
    hidden: tuple[str, ...] = field(default=())
    """What it makes: directories."""


CASES = (
    Case(
        "node: `require` of a package beside the program's directory",
        ("node",),
        {
            "app/main.js": """
                try { require("undeclared"); console.log("found"); } catch (error) { console.log(error.code); }
                """
        },
        {"node_modules/undeclared/index.js": "module.exports = 1;"},
        ("node", "app/main.js"),
    ),
    Case(
        "node: `realpath` of a module, and the file beside it",
        ("node",),
        {
            "lib/index.js": """
                const beside = require("path").join(require("fs").realpathSync(__filename), "..", "settings.json");
                try { console.log(require(beside).value); } catch (error) { console.log(error.code); }
                """
        },
        {"lib/settings.json": '{"value": "found"}'},
        ("node", "lib/index.js"),
    ),
    Case(
        "gcc: `__has_include` of a header",
        ("gcc",),
        {"src/main.c": '#if __has_include("extra.h")\nfound\n#else\nabsent\n#endif\n'},
        {"src/extra.h": "\n"},
        ("gcc", "-E", "-P", "src/main.c"),
    ),
    Case(
        "gcc: a header that stands in for the system's",
        ("gcc",),
        {"src/main.c": "#include <limits.h>\n#ifdef OWN\nfound\n#else\nabsent\n#endif\n"},
        {"include/limits.h": "#define OWN\n"},
        ("sh", "-c", "gcc -E -P -Iinclude src/main.c 2>/dev/null | grep -E '^(found|absent)$' || echo error"),
    ),
    Case(
        "sh: a pattern of files",
        ("sh",),
        {"src/a.c": "", "src/b.c": ""},
        {"src/old.c": ""},
        ("sh", "-c", "echo src/*.c"),
    ),
    Case(
        "git: looking for a repository from where a script is",
        ("git", "sh"),
        {
            "project/version.sh": 'cd "$(dirname "$(readlink -f "$0")")"\n'
            'if found=$(git rev-parse --is-inside-work-tree 2>&1); then echo "$found"; else\n'
            'case "$found" in *"not a git repository (or any"*) echo none;; *) echo "${found##*: }";; esac; fi\n'
        },
        {"notes": "x"},
        ("sh", "project/version.sh"),
        prepare=("git", "init", "--quiet"),
        hidden=(".git",),
    ),
    Case(
        "python: a module beside the program",
        ("python3",),
        {
            "tool/main.py": "try:\n    import speedups\n    print('found')\n"
            "except Exception as error:\n    print(type(error).__name__)\n"
        },
        {"tool/speedups.py": ""},
        ("python3", "-B", "tool/main.py"),
    ),
    Case(
        "python: what is installed in site-packages",
        ("python3",),
        {
            "site/wanted-1.dist-info/METADATA": "Name: wanted\nVersion: 1\n",
            "main.py": "from importlib.metadata import distributions\ntry:\n"
            "    print(*sorted(found.metadata['Name'] for found in distributions(path=['site'])))\n"
            "except Exception as error:\n    print(type(error).__name__)\n",
        },
        {"site/stray-1.dist-info/METADATA": "Name: stray\nVersion: 1\n"},
        ("python3", "-B", "main.py"),
    ),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a tool said in one kind of sandbox, and what that amounts to."""

    word: str
    said: str

    @property
    def text(self) -> str:
        """For the table."""
        first = (self.said.splitlines() or ["nothing"])[0]
        return f"**{self.word}**: {first}"


class Comparison:
    """One case, in a directory of its own below `scratch`."""

    def __init__(self, case: Case, scratch: Path) -> None:
        self._case = case
        self._scratch = scratch
        self._workspace = scratch / "workspace"
        self._alone = scratch / "declared"
        _write(self._workspace, case.declared | case.undeclared)
        _write(self._alone, case.declared)
        if case.prepare:
            subprocess.run(case.prepare, cwd=self._workspace, check=True, env=_environment(scratch))

    def judge(self) -> dict[str, Verdict]:
        """By kind of sandbox."""
        should, shouldnt = self._run_in(self._alone), self._run_in(self._workspace)
        if should == shouldnt:
            raise RuntimeError(f"{self._case.name}: the undeclared file makes no difference: {should!r}")
        ways: dict[str, Callable[[], str]] = {
            SYMLINKS: self._in_symlinks,
            DENIED: self._where_denied,
            CASFS: self._in_casfs,
        }
        found = {}
        for name, way in ways.items():
            said = way()
            found[name] = Verdict({should: "right", shouldnt: "leaks"}.get(said, "breaks"), said)
        return found

    def _run_in(self, directory: Path) -> str:
        return _output(self._case.command, directory, _environment(self._scratch))

    def _in_symlinks(self) -> str:
        place = self._scratch / "links"
        for path in self._case.declared:
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).symlink_to(self._workspace / path)
        return self._run_in(place)

    def _where_denied(self) -> str:
        nothing = self._scratch / "nothing"
        nothing.touch(mode=0)
        # Also root is then one who may not read it.
        words = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--cap-drop", "ALL"]
        for path in self._case.undeclared:
            words += ["--ro-bind", str(nothing), str(self._workspace / path)]
        for path in self._case.hidden:
            words += ["--perms", "0000", "--tmpfs", str(self._workspace / path)]
        words += ["--chdir", str(self._workspace), "--", *self._case.command]
        return _output(words, self._scratch, _environment(self._scratch))

    def _in_casfs(self) -> str:
        casfs = [sys.executable, "-m", "tools.main", "--store", str(self._scratch / "store")]
        top = Path(__file__).resolve().parents[1]
        name = "declared"
        subprocess.run([*casfs, "manifest", "create", name, str(self._alone)], cwd=top, check=True, capture_output=True)
        # With --json the command's output is on standard error, and the report on standard output.
        command = [*casfs, "run", "--json", "--host-root", "--env", f"PATH={_PATH}", name, "--", *self._case.command]
        done = subprocess.run(command, cwd=top, capture_output=True, text=True, timeout=_SECONDS, check=False)
        try:
            json.loads(done.stdout)
        except ValueError:
            raise RuntimeError(f"casfs run failed: {done.stderr.strip()}") from None
        return done.stderr.strip()


def compare_all(scratch: Path) -> dict[str, dict[str, Verdict]]:
    """Every case: by its name, by kind of sandbox."""
    found = {}
    for number, case in enumerate(CASES):
        place = scratch / str(number)
        place.mkdir()
        found[case.name] = Comparison(case, place).judge()
    return found


def show(found: dict[str, dict[str, Verdict]]) -> str:
    """A table in Markdown."""
    rows: list[tuple[str, ...]] = [("", SYMLINKS, DENIED, CASFS), ("---", "---", "---", "---")]
    rows += [(name, *(verdicts[kind].text for kind in (SYMLINKS, DENIED, CASFS))) for name, verdicts in found.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def missing_programs() -> list[str]:
    """What isn't on this machine."""
    needed = {program for case in CASES for program in case.programs} | {"bwrap"}
    return sorted(program for program in needed if shutil.which(program, path=_PATH) is None)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.namespaces", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.parse_args(arguments)
    missing = missing_programs()
    if missing:
        print(f"missing here: {', '.join(missing)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="casfs-namespaces-") as name:
        found = compare_all(Path(name))
    print(show(found))
    return 0 if all(verdicts[CASFS].word == "right" for verdicts in found.values()) else 1


def _write(top: Path, texts: dict[str, str]) -> None:
    for path, text in texts.items():
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_text(text)


def _environment(scratch: Path) -> dict[str, str]:
    return {"PATH": _PATH, "HOME": os.fspath(scratch), "LC_ALL": "C.UTF-8"}


def _output(command: Sequence[str], directory: Path, environment: dict[str, str]) -> str:
    """What a command prints, on both streams."""
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
