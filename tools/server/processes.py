"""Several processes that do the same, and one that starts and ends them.

They are forked before anything is opened: neither LMDB nor gRPC survives a fork.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from tools.exits import Exit, find_exit
from tools.server.ending import Ending, Step
from tools.server.notify import STOPPING, be_no_main_process, notify

_LATE_SECONDS = 1.0
"""What a process has to end itself at its deadline, before it is killed."""
_PR_SET_PDEATHSIG = 1

Run = Callable[[Callable[[], None]], int]
"""What a process does: it calls what it is given when it is ready, and returns its exit code."""


def say(line: str) -> None:
    """A line on standard error, if anybody reads it."""
    with suppress(OSError):
        print(f"casfs: {line}", file=sys.stderr, flush=True)


def supervise(count: int, run: Run, seconds: float, announce: Callable[[], None], explain: Callable[[int], str]) -> int:
    """Run `count` processes; when one ends by itself, all do, and a service manager begins anew.

    `seconds`: what each needs at most to end itself after SIGTERM. `announce` is called when all are ready. `explain`
    may have a line to say about a process that ended by itself with that code. Returns an exit code.
    """
    stopping = killing = False
    children: set[int] = set()

    def stop() -> None:
        nonlocal stopping
        stopping = True
        send(signal.SIGTERM)
        notify(STOPPING)

    def send(number: int) -> None:
        for child in children.copy():
            with suppress(ProcessLookupError):
                os.kill(child, number)

    def kill() -> None:
        nonlocal killing
        killing = True
        send(signal.SIGKILL)

    # Until there is somebody to hear them; each process lets them come again when it is ready for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1})
    readable, writable = os.pipe()
    parent = os.getpid()
    for _ in range(count):
        child = os.fork()
        if not child:
            os.close(readable)
            _end_with(_run_child(run, writable, parent))
        children.add(child)
    os.close(writable)
    with Ending(
        Step(stop, seconds + _LATE_SECONDS),
        reload=lambda: send(signal.SIGHUP),
        report=lambda: send(signal.SIGUSR1),
        last=kill,
        describe=lambda: f"{len(children)} of {count} processes",
    ) as ending:
        ready = 0
        while ready < count and (data := os.read(readable, 64)):
            ready += len(data)
        os.close(readable)
        if ready == count:
            announce()
        code = 0
        while children:
            child, status = os.wait()
            children.discard(child)
            while killing:
                # This process is about to be ended with a code that says why.
                signal.pause()
            ended = _exit_of(os.waitstatus_to_exitcode(status))
            code = code or ended
            if not stopping:
                code = code or Exit.NO
                # The processes don't say it themselves: it would be said as often as there are some.
                if line := explain(ended):
                    say(line)
                ending.begin(code, "a process ended by itself")
    return code


def _exit_of(code: int) -> int:
    """The code of a process as ours; one that was ended by a signal is a failure like others."""
    return code if code in list(Exit) else Exit.NO


def _run_child(run: Run, ready: int, parent: int) -> int:
    """One of the processes; returns its exit code."""
    # The parent's death ends it, however that came.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before that
        return Exit.NO
    be_no_main_process()
    try:
        return run(lambda: _tell(ready))
    except Exception as error:  # noqa: BLE001 - the process ends here
        say(str(error))
        return find_exit(error) or Exit.NO


def _tell(ready: int) -> None:
    os.write(ready, b".")
    os.close(ready)


def _end_with(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
