"""``casfs mount``: show a tree at a place; returns once it can be used."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from casfs.mounting import ENGINES, MountReport, start
from store.repository import Store
from tools.commands import complete
from tools.commands._resolve import add_manifest_argument, get_root
from tools.commands.prefetch import fetch_missing
from tools.config import Settings
from tools.output import count, print_json, warn

EXAMPLES = """
casfs mount headers ./mnt               # returns once ./mnt can be read
casfs mount -v headers ./mnt            # says why that engine was chosen
casfs mount --engine fuse headers ./mnt
casfs mount --prefetch headers ./mnt    # what is cold or missing is fetched first
casfs mount --foreground headers ./mnt  # until Ctrl-C, or for a service manager
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs mount`` takes."""
    add_manifest_argument(parser)
    mountpoint = parser.add_argument("directory", metavar="MOUNTPOINT", help="an empty directory")
    complete(mountpoint, "directory")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="passthrough: the kernel reads the blobs itself (needs root); fuse: through pyfuse3 (any user); native: "
        "as passthrough, but reading for the kernel, to compare; auto: the first of these that works here "
        "(default: the configuration's, else auto)",
    )
    parser.add_argument(
        "--foreground", action="store_true", help="serve in this process until unmounted or told to end (Ctrl-C)"
    )
    parser.add_argument(
        "--prefetch",
        action="store_true",
        help="first bring in what the store lacks, as 'casfs prefetch' does, rather than when it is opened",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say why that engine was chosen")
    parser.add_argument("--json", action="store_true", help="print {mountpoint, engine, why, root, missing, pid}")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Find the tree, close the store, and mount."""
    with Store.open(settings.store, create=False, sources=settings.sources) as store:
        root = get_root(store, args.manifest)
        if args.prefetch:
            fetch_missing(store, root, f"mount {args.directory}")
    # The store is closed: `start` forks, and an LMDB environment must not cross a fork.

    def announce(report: MountReport) -> None:
        if report.missing:
            sources = ", ".join(map(str, settings.source_directories))
            then = f"is looked for in {sources}" if sources else "fails"
            warn(
                f"{count(report.missing, 'blob')} of {root.label} not in the store: opening what needs them {then}; "
                f"{settings.store / 'casfs.log'} names each failure"
            )
        if args.json:
            print_json(
                {
                    "mountpoint": os.path.abspath(args.directory),
                    "engine": report.engine,
                    "why": report.why,
                    "root": str(root.directory.digest),
                    "missing": report.missing,
                    "pid": report.pid,
                }
            )
        else:
            why = f": {report.why}" if args.verbose else ""
            print(f"{root.label} is mounted on {args.directory} (engine {report.engine}{why})")
        sys.stdout.flush()

    start(
        settings.store,
        root.directory.digest,
        Path(args.directory),
        engine=args.engine or settings.engine,
        name=root.name,
        foreground=args.foreground,
        sources=settings.sources,
        ready=announce,
    )
    return 0
