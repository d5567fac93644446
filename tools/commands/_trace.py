"""``--trace``, which `casfs mount` and `casfs run` take."""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.commands import complete


def add_trace_argument(parser: argparse.ArgumentParser) -> None:
    """Declare it."""
    trace = parser.add_argument(
        "--trace",
        metavar="FILE",
        type=Path,
        help="write down who opens and looks up what, and what isn't there ('casfs trace report' reads it); "
        "not with engine kernel",
    )
    complete(trace, "file")
