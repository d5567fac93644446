"""Processes that nobody watches: how one is made, and where it says what went wrong.

A daemon is a fork of this process that has let go of its terminal, and tells
once when it is ready. The caller must have one thread and no store open:
neither crosses a fork.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from casfs import errors as casfs_errors
from casfs.errors import CasfsError, MountError
from casfs.forking import hear_child
from casfs.log_file import LogFile
from store import errors as store_errors
from store.errors import StoreError

log = logging.getLogger("casfs")

Tell = Callable[[dict[str, Any]], None]


def run_daemon(serve: Callable[[Tell], object]) -> dict[str, Any]:
    """Run `serve` in a daemon; returns what it tells when it is ready, or raises what it raised before."""
    text = hear_child(lambda writing: _daemon(serve, writing))
    if not text:
        raise MountError("the daemon ended before it was ready; the store's casfs.log may say why")
    return _unpack(text)


def run_apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do `work` in a child of this process and return what it returns, or raise what it raised.

    For what leaves threads or libraries behind that don't cross a fork, where this process has to fork once more.
    """

    def attempt(writing: int) -> None:
        try:
            message: dict[str, Any] = {"report": work()}
        except (CasfsError, StoreError) as error:
            message = {"error": type(error).__name__, "text": str(error)}
        except Exception as error:  # noqa: BLE001 - told to the parent
            message = {"error": "MountError", "text": f"a process that was started for this failed: {error!r}"}
        sys.stdout.flush()
        sys.stderr.flush()
        with open(writing, "wb") as pipe:
            pipe.write(json.dumps(message).encode())

    text = hear_child(attempt)
    if not text:
        raise MountError("a process that was started for this ended before its time")
    return _unpack(text)


def _unpack(text: bytes) -> dict[str, Any]:
    message = json.loads(text)
    if "error" in message:
        raise revive(message["error"], message["text"])
    report: dict[str, Any] = message["report"]
    return report


def _daemon(serve: Callable[[Tell], object], writing: int) -> int:
    """In the first child: become a daemon. Only the grandchild does something; returns an exit code."""
    os.setsid()
    if os.fork():
        return 0
    os.chdir("/")
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)

    def tell(message: dict[str, Any]) -> None:
        nonlocal writing
        if writing >= 0:
            os.write(writing, json.dumps(message).encode())
            os.close(writing)
            writing = -1

    # What came through the fork stays as it is: a collection that looked at it would copy all its pages.
    gc.freeze()
    try:
        serve(lambda report: tell({"report": report}))
    except (CasfsError, StoreError) as error:
        tell({"error": type(error).__name__, "text": str(error)})
        return 1
    except SystemExit:
        return 0
    except BaseException as error:
        tell({"error": "MountError", "text": f"the daemon failed: {error!r}"})
        log.exception("the daemon failed")
        return 1
    return 0


def revive(kind: str, text: str) -> Exception:
    """The error of a daemon, as an exception of the same class here."""
    found = getattr(casfs_errors, kind, None) or getattr(store_errors, kind, None)
    if isinstance(found, type) and issubclass(found, CasfsError | StoreError):
        return found(text)
    return MountError(text)


@contextmanager
def logging_to(path: Path, level: int = logging.INFO) -> Iterator[None]:
    """Log lines of that level and above go to the store's log."""
    handler = LogFile(path)
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
