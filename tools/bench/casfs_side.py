"""What the benchmark knows of casfs's engines below a sandbox, and nowhere else: their names, and what they hold.

Where the engines change, this module does.
"""

from __future__ import annotations

from casfs.errors import MissingCapability
from casfs.sandbox import Sandboxes

KERNEL = "kernel"
"""The engine that has aims; root and an ordinary user ask for it by that name."""
KERNEL_USER = f"{KERNEL}, ordinary user"
"""What the side is called where an ordinary user asks."""
ENGINES = ("passthrough", "native", KERNEL)
"""All that `Sandboxes` takes, as root."""


def warm_bytes(sandboxes: Sandboxes) -> int | None:
    """The memory of the layers that stay when a sandbox is closed, or None where the engine keeps none."""
    try:
        layouts = sandboxes.projector.get_layouts()
    except MissingCapability:
        return None
    return layouts.statistics()["bytes"]
