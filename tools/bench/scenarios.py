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
}
"""Name on the command line → module in this package."""


class Scenario(NamedTuple):
    """A module's `run`, and what its docstring says it measures."""

    run: Callable[[Settings], Outcome]
    about: str


def load(name: str) -> Scenario:
    """The scenario of that name. Raises KeyError."""
    module = importlib.import_module(f"tools.bench.{MODULES[name]}")
    return Scenario(module.run, (module.__doc__ or "").strip())
