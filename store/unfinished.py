"""What a Bazel that was killed leaves in its disk cache: files that never got the name of a blob or a result.

Bazel writes to ``blobs/<uuid>`` (4.2, seen by its system calls) or to
``blobs/tmp/<uuid>`` (7 and newer, by its source), then renames. Its own
collection doesn't look at either.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress

from store.layout import Layout

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
UNFINISHED_SECONDS = 6 * 3600
"""What nothing was written to for so long will not be finished. A download may pause, but not for hours."""


def remove_unfinished(layout: Layout, now: int) -> int:
    """Remove such files that were last written long before `now` (seconds since the epoch); returns their bytes."""
    removed = 0
    for directory in (layout.blobs, layout.blobs / "tmp"):
        try:
            names = os.listdir(directory)
        except OSError:
            continue
        for name in filter(_UUID.fullmatch, names):
            path = directory / name
            with suppress(OSError):
                status = os.stat(path, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and status.st_mtime < now - UNFINISHED_SECONDS:
                    os.unlink(path)
                    removed += status.st_size
    return removed
