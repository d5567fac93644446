"""A process with an `Ending` that gets into trouble: what it is told on the command line. Run by test_ending.py.

It writes a line on standard output for what happens, and ends with what `Ending` says.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tools.server.ending import Ending, Step


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def full_loop() -> int:
    """A loop in a callback that doesn't return until it is told to, and whose socket pair is full meanwhile."""
    runner = asyncio.Runner()
    loop = runner.get_loop()
    stop = asyncio.Event()

    def fill() -> None:
        wake = loop._csock  # type: ignore[attr-defined]  # only to see that it is full
        while True:
            loop.call_soon_threadsafe(lambda: None)
            try:
                wake.send(b"\0")
            except BlockingIOError:
                return

    def block() -> None:
        threads = [threading.Thread(target=fill) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        say("full")
        os.read(0, 1)

    async def run() -> None:
        loop.call_soon(block)
        await stop.wait()
        say("stopped")

    with (
        Ending(
            Step(lambda: loop.call_soon_threadsafe(stop.set), 60.0),
            reload=lambda: loop.call_soon_threadsafe(say, "reloaded"),
        ) as ending,
        runner,
    ):
        runner.run(run())
    return ending.code


def stuck_loop() -> int:
    """A loop whose callback never returns."""
    with Ending(Step(lambda: say("begun"), 0.3)) as ending:
        say("ready")
        asyncio.run(_block())
    return ending.code


async def _block() -> None:
    threading.Event().wait()


def stuck_pool() -> int:
    """A thread of a pool that never ends, and that the interpreter joins at its end."""
    begun = threading.Event()
    with Ending(Step(begun.set, 0.3)) as ending:
        ThreadPoolExecutor(1).submit(threading.Event().wait)
        say("ready")
        begun.wait()
    say("left")
    return ending.code


def held_interpreter() -> int:
    """A call that keeps the interpreter to itself, so that no thread can run Python."""
    begun = threading.Event()
    with Ending(Step(begun.set, 0.1)) as ending:
        say("ready")
        begun.wait()
        ctypes.PyDLL(None).sleep(600)
    return ending.code


def stuck_output() -> int:
    """Standard error is a pipe that is full."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writing, True)
    os.dup2(writing, 2)
    with Ending(Step(lambda: say("begun"), 0.1)):
        say("ready")
        threading.Event().wait()
    return reading


def steps() -> int:
    """Two steps that take as long as they take."""
    with Ending(Step(lambda: say("first")), Step(lambda: say("second"))) as ending:
        say("ready")
        threading.Event().wait()
    return ending.code


def patient() -> int:
    """One that doesn't insist."""
    with Ending(Step(lambda: say("first"), 60.0), insist=False) as ending:
        say("ready")
        os.read(0, 1)
    return ending.code


def by_itself() -> int:
    """Begun without a signal, and with work that never ends."""
    with Ending(Step(lambda: say("begun"), 0.1)) as ending:
        ending.begin(4, "the store is gone")
        threading.Event().wait()
    return ending.code


def left_alone() -> int:
    """No end begins inside: signals do what they did before."""
    with Ending(Step(lambda: say("begun"))):
        pass
    say("ready")
    threading.Event().wait()
    return 0


PROGRAMS: dict[str, Callable[[], int]] = {
    program.__name__: program
    for program in (
        full_loop,
        stuck_loop,
        stuck_pool,
        held_interpreter,
        stuck_output,
        steps,
        patient,
        by_itself,
        left_alone,
    )
}

if __name__ == "__main__":
    sys.exit(PROGRAMS[sys.argv[1]]())
