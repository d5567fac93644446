"""Running a scenario in a process of its own.

Not in `__main__`: a process that is started afresh finds functions by their module's name.
"""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from multiprocessing.connection import Connection

from tools.bench.measuring import Outcome, Settings
from tools.bench.scenarios import load
from tools.bench.scratch import ending_on_signals

_END_SECONDS = 30.0


def run_apart(name: str, settings: Settings) -> Outcome | None:
    """A scenario's outcome, or None where it failed (and has said why)."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run_here, args=(name, settings, theirs))
    process.start()
    theirs.close()
    try:
        outcome: Outcome = ours.recv()
        return outcome
    except EOFError:
        return None
    finally:
        if process.is_alive() and sys.exc_info()[0] is SystemExit:
            process.terminate()  # it unmounts on its way out
        process.join(_END_SECONDS)
        if process.is_alive():
            process.kill()


def _run_here(name: str, settings: Settings, results: Connection) -> None:
    with ending_on_signals():
        try:
            results.send(load(name).run(settings))
        except Exception:  # noqa: BLE001 - printed; the other scenarios go on
            traceback.print_exc()
        finally:
            results.close()
