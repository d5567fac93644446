"""What there is to measure: a module a scenario, imported when it is run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

from tools.bench.measuring import Outcome, Settings

MODULES = {
    "compile": "compiling",
    "files": "small_files",
    "bigfile": "big_file",
    "million": "million",
    "ingest": "ingesting",
    "polling": "polling",
    "upcall": "upcalls",
    "remap": "remapping",
    "tracing": "tracing",
    "actions": "actions",
    "sandboxes": "sandboxes",
    "run": "running_commands",
    "capture": "capturing",
    "cold": "cold_tier",
    "clones": "clones",
    "server": "server",
    "http": "server_http",
    "bazel": "bazel_rebuild",
    "execution": "remote_execution",
    "execution-memory": "execution_memory",
    "server-memory": "server_memory",
    "sandboxfs": "local_sandboxes",
    "seed": "seed_case",
    "fleet": "fleet_load",
    "fleet-bazel": "fleet_builds",
}
"""Name on the command line → module in this package."""

GROUPS = {
    "mounts": ("compile", "files", "bigfile", "million", "ingest", "polling", "upcall", "remap", "tracing"),
    "sandboxes": ("actions", "sandboxes", "run", "capture", "cold", "clones"),
    "execution": ("execution", "execution-memory"),
    "sandboxfs": ("seed", "sandboxfs"),
    "server": ("server", "http", "bazel"),
    "fleet": ("fleet", "fleet-bazel"),
}
"""What is measured in one run and written down together: each takes a quarter of an hour or more."""


class Scenario(NamedTuple):
    """A module's `run`, and what its docstring says it measures."""

    run: Callable[[Settings], Outcome]
    about: str


def load(name: str) -> Scenario:
    """The scenario of that name. Raises KeyError."""
    module = importlib.import_module(f"tools.bench.{MODULES[name]}")
    return Scenario(module.run, (module.__doc__ or "").strip())
