"""This machine's C++ compiler, the directories it is made of, and programs that need many headers.

The demonstration and the benchmark compile the same program: natively, and out
of a mount, with `-nostdinc -nostdinc++` so that every header comes from there,
and `-B` so that the compiler proper (cc1plus) and its start files do too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COMPILER = "g++"
_TIMEOUT_SECONDS = 300
_SEARCH_PATHS = ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX", "LIBRARY_PATH")
_COMPLAINT = re.compile(r": (?:fatal )?error: |: undefined |: cannot |: warning: ")

PROGRAM = r"""
#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <functional>
#include <future>
#include <iomanip>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <regex>
#include <sstream>
#include <string>
#include <thread>
#include <unordered_map>
#include <variant>
#include <vector>

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

int main() {
    const std::string text = "the quick brown fox jumps over the lazy dog and the cat";
    const std::regex word("[a-z]+");
    std::map<std::string, int> counts;
    for (auto it = std::sregex_iterator(text.begin(), text.end(), word); it != std::sregex_iterator(); ++it)
        ++counts[it->str()];
    std::vector<std::thread> threads;
    std::atomic<int> sum{0};
    for (int i = 1; i <= 4; ++i)
        threads.emplace_back([&sum, i] { sum += i; });
    for (auto &thread : threads)
        thread.join();
    std::cout << "the: " << counts["the"] << ", words: " << counts.size() << ", threads: " << sum.load() << std::endl;
    return counts["the"] == 3 && sum == 10 ? 0 : 1;
}
"""

PROGRAM_OUTPUT = "the: 3, words: 10, threads: 10\n"

LEFT_OUT = "wordexp.h"
"""A header that the C library has and `PROGRAM` doesn't need."""

SECOND_PROGRAM = f"#include <{LEFT_OUT}>\nint main() {{ return WRDE_NOCMD == 0; }}\n"


class NoCompiler(Exception):
    """There is no C++ compiler to be found, or it doesn't say where its headers are."""


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A compiler: its include directories in the order they are searched, and where its own programs and files lie."""

    version: str
    include: tuple[Path, ...]
    parts: tuple[Path, ...]

    def tops(self) -> list[Path]:
        """Its directories that lie in no other one."""
        every = dict.fromkeys((*self.include, *self.parts))
        return [
            directory
            for directory in every
            if not any(other != directory and directory.is_relative_to(other) for other in every)
        ]

    def grafts(self) -> list[tuple[bytes, Path]]:
        """The top directories as `Importer.from_directories` takes them: each at its path on the host."""
        return [(os.fsencode(top)[1:], top) for top in self.tops()]

    def find_left_out(self) -> Path | None:
        """Where the header `LEFT_OUT` lies on the host."""
        found = (directory / LEFT_OUT for directory in self.include)
        return next((path for path in found if path.is_file()), None)

    def exclude_unneeded(self, done: Compilation) -> Callable[[bytes], bool]:
        """For an ingest of `tops`: excludes all that the compilation on the host didn't use."""
        needed: set[bytes] = set()
        # Included before anything else, and without a line from -H; with -nostdinc the C library asks for it.
        unsaid = [str(directory / "stdc-predef.h") for directory in self.include]
        for used in (*done.headers, *done.programs, *unsaid):
            for path in (Path(os.path.normpath(used)), Path(os.path.realpath(used))):
                for top in self.tops():
                    if path.is_relative_to(top):
                        below = path.relative_to(top)
                        needed.update(os.fsencode(part) for part in (below, *below.parents))
        return lambda path: path not in needed

    def flags(self, mount: Path) -> list[str]:
        """What makes the compiler take its headers from a mount, and from nowhere else; and itself from there."""
        flags = ["-nostdinc", "-nostdinc++"]
        for directory in self.include:
            flags += ["-isystem", str(mount / str(directory)[1:])]
        return [*flags, *(f"-B{mount / str(directory)[1:]}/" for directory in self.parts)]


@dataclass(frozen=True, slots=True)
class Compilation:
    """What came of a run of the compiler: wall time, and the headers it opened (in order).

    `programs` are those that `g++`, which only drives them, started from its
    own directories; `messages` what they complained of.
    """

    ok: bool
    seconds: float
    headers: tuple[str, ...]
    programs: tuple[str, ...]
    messages: str


def find_toolchain() -> Toolchain:
    """Ask the compiler. Raises NoCompiler."""
    if shutil.which(COMPILER) is None:
        raise NoCompiler(f"there is no {COMPILER}: install a C++ compiler (apt-get install g++)")
    asked = _run([COMPILER, "-E", "-v", "-x", "c++", os.devnull, "-o", os.devnull])
    listed = re.search(r"search starts here:\n((?: .*\n|#include .*\n)*)End of search list", asked.stderr)
    paths = [line.strip() for line in listed[1].splitlines() if line.startswith(" ")] if listed else []
    paths.append(_ask("-print-file-name=include"))
    include = _directories(paths)
    if not include:
        raise NoCompiler(f"{COMPILER} -E -v doesn't say where its headers are")
    parts = [os.path.dirname(_ask(question)) for question in ("-print-prog-name=cc1plus", "-print-libgcc-file-name")]
    return Toolchain(f"{COMPILER} {_ask('-dumpfullversion')}", include, _directories(parts))


def _ask(question: str) -> str:
    return _run([COMPILER, question]).stdout.strip()


def _directories(paths: list[str]) -> tuple[Path, ...]:
    """Those that exist, resolved, as compilers say /usr/lib/gcc/x/../../include; and once each."""
    real = dict.fromkeys(os.path.realpath(path) for path in paths if os.path.isabs(path) and os.path.isdir(path))
    return tuple(Path(path) for path in real)


def compile_source(
    toolchain: Toolchain, source: Path, output: Path | None, *, mount: Path | None, preprocess: bool = False
) -> Compilation:
    """Compile and link `source`, with the compiler and the headers of the host, or with those of a mount.

    Without `output` only the syntax is checked. `preprocess` reads the headers
    and does nothing more.
    """
    command = [COMPILER, "-std=c++17", "-pthread", "-H", "-v", *(toolchain.flags(mount) if mount else [])]
    if preprocess:
        command += ["-E", "-o", os.devnull]
    else:
        command += ["-fsyntax-only"] if output is None else ["-o", str(output)]
    began = time.perf_counter()
    # Its temporary files go where they are cleaned up, should it be killed.
    done = _run([*command, str(source)], TMPDIR=str(source.parent))
    seconds = time.perf_counter() - began
    # -H writes one line a header, a dot for each level; -v one a program, after a blank; the rest are messages.
    headers = tuple(re.findall(r"^\.+ (.*)$", done.stderr, re.MULTILINE))
    programs = tuple(re.findall(r"^ (/\S*/(?:cc1plus|collect2)) ", done.stderr, re.MULTILINE))
    said = done.stderr.splitlines()
    messages = [line for line in said if _COMPLAINT.search(line)] or (said[-3:] if done.returncode else [])
    return Compilation(not done.returncode, seconds, headers, programs, "\n".join(messages))


def _run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    # The user's own search paths would bring in headers from elsewhere.
    environment = {name: value for name, value in os.environ.items() if name not in _SEARCH_PATHS}
    return subprocess.run(
        command,
        env={**environment, **variables, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )
