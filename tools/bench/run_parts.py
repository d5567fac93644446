"""`casfs` with a stopwatch on the parts of ``casfs run``.

    python -m tools.bench.run_parts DESCRIPTOR ARGUMENT…

writes the seconds of each part, as JSON, into the descriptor.
`tools.bench.running_commands` starts it. What it replaces is replaced in this
process only, and casfs knows nothing of it.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()

import os  # noqa: E402 - after the interpreter's start was noted
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import Any  # noqa: E402


class _Stopwatch:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Replace a function or a method of `owner` by one that is timed."""
        found = getattr(owner, name)
        bound = getattr(found, "__func__", None)
        timed = self._timed(bound or found, part)
        setattr(owner, name, classmethod(timed) if bound else timed)

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.monotonic()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[part] = self.seconds.get(part, 0) + time.monotonic() - began

        return run


def _watch_parts(stopwatch: _Stopwatch, verb: ModuleType) -> None:
    from casfs.sandbox import Sandbox, Sandboxes
    from store.repository import Store

    stopwatch.watch(verb, "enter_namespace", "namespace")
    stopwatch.watch(Store, "open", "open store")
    stopwatch.watch(Store, "close", "close store")
    stopwatch.watch(Sandboxes, "open", "open sandbox")
    for name in ("run", "capture"):
        stopwatch.watch(Sandbox, name, f"{name} sandbox")
    stopwatch.watch(Sandboxes, "close", "close sandbox")


def main() -> int:
    """Run `casfs` with the arguments; returns its exit code."""
    import importlib

    from tools import main as program

    stopwatch = _Stopwatch()
    stopwatch.seconds["imports"] = time.monotonic() - BEGAN
    import_module = importlib.import_module

    def import_verb(name: str) -> ModuleType:
        """As the command line does it: what is replaced must have been imported as ever."""
        began = time.monotonic()
        verb = import_module(name)
        stopwatch.seconds["imports"] += time.monotonic() - began
        _watch_parts(stopwatch, verb)
        return verb

    setattr(importlib, import_module.__name__, import_verb)
    code = program.main(sys.argv[2:])
    ended = time.monotonic()
    import json

    whole = {"began": BEGAN, "ended": ended, "whole": ended - BEGAN, "parts": stopwatch.seconds}
    os.write(int(sys.argv[1]), json.dumps(whole).encode())
    return code


if __name__ == "__main__":
    sys.exit(main())
