"""Whether the store that a server has open is still the one that its path leads to.

A store that was deleted, renamed away or replaced takes uploads into files that no name leads to. Nothing else would
notice: its descriptors stay valid.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

from store.errors import StoreUnusable
from store.layout import Layout

CHECK_SECONDS = 2.0
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class StoreWatch:
    """Knows a store by its directory and its marker. A context manager; survives a fork, until `start`."""

    def __init__(self, root: Path) -> None:
        """Raises StoreUnusable."""
        layout = Layout(root.absolute())
        self._root = layout.root
        self._closed = threading.Event()
        # Kept open, so that their inode numbers can't become another's.
        self._kept: list[int] = []
        self._known: dict[Path, os.stat_result] = {}
        try:
            for path in (layout.root, layout.marker):
                self._kept.append(os.open(path, os.O_PATH | os.O_CLOEXEC))
                self._known[path] = os.fstat(self._kept[-1])
        except OSError as error:
            self.close()
            raise StoreUnusable(f"can't open the store in {layout.root}: {error.strerror}") from error

    def find_fault(self) -> str:
        """What became of the store; nothing where it is as it was, or its disk doesn't say."""
        for path, known in self._known.items():
            try:
                there = os.stat(path)
            except OSError as error:
                if error.errno in _GONE:
                    return f"the store in {self._root} is gone: it was deleted or renamed ({path} is missing)"
                # Its disk is in trouble, which each call that needs it is told.
                continue
            if not os.path.samestat(there, known):
                return f"the store in {self._root} is gone: another one is in its place"
        return ""

    def start(self, gone: Callable[[str], object], seconds: float = CHECK_SECONDS) -> None:
        """Look every so many `seconds`, until it is gone: then call `gone` with the fault, once, in a thread."""
        # A thread, as the disk may not answer; a daemon, as nothing then ends it.
        threading.Thread(target=self._watch, args=(gone, seconds), name="store watch", daemon=True).start()

    def _watch(self, gone: Callable[[str], object], seconds: float) -> None:
        while not (fault := self.find_fault()):
            if self._closed.wait(seconds):
                return
        gone(fault)

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        while self._kept:
            os.close(self._kept.pop())

    def __enter__(self) -> StoreWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
