"""``casfs umount``: take mounts away, also those of daemons that were killed."""

from __future__ import annotations

import argparse
from pathlib import Path

from casfs.mountpoint import unmount
from tools.commands import complete
from tools.config import Settings

EXAMPLES = """
casfs umount ./mnt
casfs umount --lazy ./mnt             # even while files are open there
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs umount`` takes."""
    complete(
        parser.add_argument("directories", metavar="MOUNTPOINT", nargs="+", help="where it is mounted"), "directory"
    )
    parser.add_argument(
        "--lazy", action="store_true", help="take the name away now, the rest when files still open there are closed"
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Unmount each, in the order given."""
    for directory in args.directories:
        daemon = unmount(Path(directory), lazy=args.lazy)
        if daemon is not None:
            print(
                f"{directory} is unmounted here; another mount namespace (a container, a sandbox) still has it, "
                f"and process {daemon} goes on serving that. 'kill {daemon}' ends it"
            )
    return 0
