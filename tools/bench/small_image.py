"""A tree that brings a command with it, so that a sandbox needs nothing of the host: busybox, and some files."""

from __future__ import annotations

import shutil
from pathlib import Path

from tools.bench.scratch import Ingested, ingest
from tools.bench.workers import Refused

NAME = "image"
"""Of its manifest."""
TRUE = ["./true"]
"""The command that does nothing, in the tree."""
_FILES = 100


def ingest_image(store: Path, scratch: Path) -> Ingested:
    """The tree in a store, which is made if need be. Raises Refused without busybox."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise Refused("there is no busybox: install the Debian package busybox-static")
    source = scratch / "image"
    for number in range(_FILES):
        path = source / f"directory{number % 10}" / f"file{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {number}\n")
    shutil.copy(busybox, source / "busybox")
    (source / "true").symlink_to("busybox")
    tree = ingest(store, [(b"", source)], NAME)
    shutil.rmtree(source)
    return tree
