"""Forks of this process: one that says something through a pipe, and what one that stays lets go of."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection


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


def keep_only(descriptors: Collection[int]) -> None:
    """In a fork that stays: let go of all other descriptors, and of the directory it is in.

    Of standard input, output and error, those that aren't kept become /dev/null. So nobody waits for this process who
    waits for the end of a pipe that the one it was forked from had.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for standard in {0, 1, 2}.difference(descriptors):
        os.dup2(null, standard)
    first = 3
    for kept in (*sorted(kept for kept in descriptors if kept >= first), os.sysconf("SC_OPEN_MAX")):
        os.closerange(first, kept)
        first = kept + 1
    os.chdir("/")
