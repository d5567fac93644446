"""This machine's C++ compiler, the directories it finds headers in, and programs that need many of them.

The demonstration and the benchmark compile the same program: natively, and with
`-nostdinc -nostdinc++` so that every header comes out of a mount.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

COMPILER = "g++"
_TIMEOUT_SECONDS = 300
_SEARCH_PATHS = ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH")

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
    """A compiler, and its include directories in the order they are searched."""

    version: str
    directories: tuple[Path, ...]

    def tops(self) -> list[Path]:
        """The include directories that lie in no other one."""
        return [
            directory
            for directory in self.directories
            if not any(other != directory and directory.is_relative_to(other) for other in self.directories)
        ]

    def grafts(self) -> list[tuple[bytes, Path]]:
        """The top directories as `Importer.from_directories` takes them: each at its path on the host."""
        return [(os.fsencode(top)[1:], top) for top in self.tops()]

    def find_left_out(self) -> Path | None:
        """Where the header `LEFT_OUT` lies on the host."""
        found = (directory / LEFT_OUT for directory in self.directories)
        return next((path for path in found if path.is_file()), None)

    def flags(self, mount: Path) -> list[str]:
        """What makes the compiler take its headers from a mount, and from nowhere else."""
        flags = ["-nostdinc", "-nostdinc++"]
        for directory in self.directories:
            flags += ["-isystem", str(mount / str(directory)[1:])]
        return flags


@dataclass(frozen=True, slots=True)
class Compilation:
    """What came of a run of the compiler: wall time, the headers it opened (in order), and its messages."""

    ok: bool
    seconds: float
    headers: tuple[str, ...]
    messages: str


def find_toolchain() -> Toolchain:
    """Ask the compiler. Raises NoCompiler."""
    if shutil.which(COMPILER) is None:
        raise NoCompiler(f"there is no {COMPILER}: install a C++ compiler (apt-get install g++)")
    asked = _run([COMPILER, "-E", "-v", "-x", "c++", os.devnull, "-o", os.devnull])
    listed = re.search(r"search starts here:\n((?: .*\n|#include .*\n)*)End of search list", asked.stderr)
    paths = [line.strip() for line in listed[1].splitlines() if line.startswith(" ")] if listed else []
    paths.append(_run([COMPILER, "-print-file-name=include"]).stdout.strip())
    # Resolved, as compilers say /usr/lib/gcc/x/../../include; and once each.
    real = dict.fromkeys(os.path.realpath(path) for path in paths if os.path.isabs(path) and os.path.isdir(path))
    if not real:
        raise NoCompiler(f"{COMPILER} -E -v doesn't say where its headers are")
    version = _run([COMPILER, "-dumpfullversion"]).stdout.strip()
    return Toolchain(f"{COMPILER} {version}", tuple(Path(path) for path in real))


def compile_source(
    toolchain: Toolchain, source: Path, output: Path | None, *, mount: Path | None, preprocess: bool = False
) -> Compilation:
    """Compile and link `source`, with the host's headers or with those of a mount.

    Without `output` only the syntax is checked. `preprocess` reads the headers
    and does nothing more.
    """
    command = [COMPILER, "-std=c++17", "-pthread", "-H", *(toolchain.flags(mount) if mount else [])]
    if preprocess:
        command += ["-E", "-o", os.devnull]
    else:
        command += ["-fsyntax-only"] if output is None else ["-o", str(output)]
    began = time.perf_counter()
    done = _run([*command, str(source)])
    seconds = time.perf_counter() - began
    # -H writes one line a header, a dot for each level; the rest are messages.
    headers = tuple(re.findall(r"^\.+ (.*)$", done.stderr, re.MULTILINE))
    messages = "\n".join(line for line in done.stderr.splitlines() if not re.match(r"\.+ ", line))
    return Compilation(not done.returncode, seconds, headers, messages)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # The user's own search paths would bring in headers from elsewhere.
    environment = {name: value for name, value in os.environ.items() if name not in _SEARCH_PATHS}
    return subprocess.run(
        command, env={**environment, "LC_ALL": "C"}, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
    )
