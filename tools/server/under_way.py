"""What the threads of this process are at, for the one line of a process that has to be ended."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import PurePath
from types import FrameType

_OURS = ("store", "casfs", "tools")
_MOST = 6
"""Places that are named."""


def describe_threads() -> str:
    """Where the threads that are at work are in our code, those at one place together. Callable in any thread."""
    others = [frame for ident, frame in sys._current_frames().items() if ident != threading.get_ident()]
    found = Counter(filter(None, map(_find_place, others))).most_common()
    said = [f"{count} thread{'s' if count > 1 else ''} in {place}" for place, count in found[:_MOST]]
    if len(found) > _MOST:
        said.append("others")
    return ", ".join(said) or "no thread of ours is at work"


def _find_place(frame: FrameType | None) -> str:
    """The innermost function of ours; nothing for a pool's thread that has nothing to do."""
    while frame is not None:
        code = frame.f_code
        if frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
            return f"{code.co_qualname} ({PurePath(code.co_filename).name}:{frame.f_lineno})"
        frame = frame.f_back
    return ""
