"""A child of this process that says something: a fork, and a pipe."""

from __future__ import annotations

import os
from collections.abc import Callable


def hear_child(work: Callable[[int], int | None]) -> bytes:
    """Fork, and return what the child wrote when it, and whoever has the descriptor of it, has ended or closed it.

    In the child `work` is called with a descriptor to write to; what it
    returns is the exit code. Nothing goes up the stack of what was forked.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            code = work(writing) or 0
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text
