"""Debian's Bazel without a network: how the benchmark and the tests run it.

Bazel's own tools load rules_cc and rules_java, which it would download. They
only pass its built-in rules on, and so do the few lines that stand in for them
here. A `Bazel` is one workspace with one output base; all it writes lies below
one directory, and with `close` its server, where it kept one, has ended.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAM = "bazel"
_TIMEOUT_SECONDS = 300
_RULES = {
    "rules_cc": (
        "cc",
        "cc_binary cc_import cc_library cc_proto_library cc_test cc_toolchain cc_toolchain_suite objc_library",
    ),
    "rules_java": ("java", "java_import java_library java_proto_library java_runtime java_toolchain"),
}
_COVERAGE = "remote_coverage_tools"
"""What every test depends on, and none uses that isn't asked for its coverage."""
_QUIET = ("--color=no", "--curses=no", "--noshow_progress", "--nosandbox_debug")


@dataclass(frozen=True, slots=True)
class Built:
    """What a build said: its exit code, its messages, seconds by its own count, and how many actions ran how."""

    code: int
    text: str

    @property
    def seconds(self) -> float:
        """Wall time, without starting Bazel itself."""
        found = re.search(r"Elapsed time: ([\d.]+)s", self.text)
        return float(found[1]) if found else 0.0

    @property
    def processes(self) -> dict[str, int]:
        """Such as {"remote cache hit": 30, "internal": 4}; what is internal ran nothing."""
        found = re.search(r"INFO: \d+ process(?:es)?: (.*)\.", self.text)
        parts = found[1].split(", ") if found else []
        return {kind: int(number) for number, _, kind in (part.partition(" ") for part in parts)}


class Bazel:
    """Builds one workspace. A context manager, at whose end no process is left."""

    def __init__(
        self, directory: Path, workspace: Path, *, stays: bool = False, prefix: Sequence[str] = (), heap: str = "512m"
    ) -> None:
        """`stays`: a server is kept from one build to the next. `prefix` is what starts it, as another user, say."""
        self._workspace = workspace
        self._prefix = prefix
        self._stays = stays
        self._home = directory
        self.output = directory / "bazel-output"
        rules = directory / "bazel-rules"
        _write_rules(rules)
        self._overrides = [f"--override_repository={name}={rules / name}" for name in (*_RULES, _COVERAGE)]
        # For builds of seconds the quick one of Java's compilers is enough.
        java = [f"-Xmx{heap}", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        self._startup = ["--nohome_rc", f"--output_user_root={self.output}", "--max_idle_secs=300"]
        self._startup += [f"--host_jvm_args={argument}" for argument in java]
        if not stays:
            self._startup.append("--batch")

    def build(self, *arguments: str, local: bool = True) -> Built:
        """Build targets, with options. `local`: actions that aren't cached run without a sandbox, which is quicker."""
        strategy = ["--spawn_strategy=local"] if local else []
        return self._run("build", *_QUIET, *self._overrides, *strategy, *arguments)

    def test(self, *arguments: str) -> Built:
        """Run tests, with options."""
        return self._run("test", *_QUIET, *self._overrides, *arguments)

    def start(self, verb: str, *arguments: str) -> subprocess.Popen[str]:
        """Begin to build, say; its messages come on standard output."""
        return subprocess.Popen(
            self._command(verb, *_QUIET, *self._overrides, *arguments),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def clean(self) -> None:
        """Forget what was built, as Bazel does; what it found out about the compiler stays."""
        done = self._run("clean")
        if done.code:
            raise RuntimeError(done.text)

    def forget(self) -> None:
        """Begin with a fresh output base."""
        self.close()
        # What Bazel makes there can't be written to.
        subprocess.run([*self._prefix, "chmod", "-R", "u+w", str(self.output)], check=False, capture_output=True)
        shutil.rmtree(self.output, ignore_errors=True)

    def close(self) -> None:
        """End the server, if there is one; harmless when repeated."""
        if self._stays and self.output.exists():
            self._run("shutdown")

    def __enter__(self) -> Bazel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _command(self, verb: str, *arguments: str) -> list[str]:
        # The prefix may lead to another mount namespace, where a working directory is lost.
        return [*self._prefix, "env", "-C", str(self._workspace), PROGRAM, *self._startup, verb, *arguments]

    def _run(self, verb: str, *arguments: str) -> Built:
        done = subprocess.run(
            self._command(verb, *arguments),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
        return Built(done.returncode, done.stdout)

    def _environment(self) -> Mapping[str, str]:
        # The rest of the caller's would become part of what Bazel takes for the compiler's configuration.
        return {"PATH": os.environ["PATH"], "HOME": str(self._home), "LC_ALL": "C.UTF-8"}


def _write_rules(directory: Path) -> None:
    coverage = directory / _COVERAGE
    coverage.mkdir(parents=True, exist_ok=True)
    (coverage / "WORKSPACE").touch()
    (coverage / "BUILD").write_text(
        'package(default_visibility = ["//visibility:public"])\n'
        'filegroup(name = "coverage_report_generator")\nfilegroup(name = "lcov_merger")\n'
    )
    for name, (package, rules) in _RULES.items():
        place = directory / name / package
        place.mkdir(parents=True, exist_ok=True)
        (directory / name / "WORKSPACE").touch()
        (place / "BUILD").touch()
        (place / "defs.bzl").write_text("".join(f"{rule} = native.{rule}\n" for rule in rules.split()))


def is_installed() -> bool:
    """Whether there is a Bazel."""
    return shutil.which(PROGRAM) is not None
