"""``casfs mount``: show a tree at a place; returns once it can be used."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from casfs.daemon import run_apart
from casfs.mounting import ENGINES, MountReport, Request, start
from store.digest import Digest
from store.repository import Store
from tools.commands import complete
from tools.commands._resolve import add_manifest_argument, get_root
from tools.commands._trace import add_trace_argument
from tools.commands._upstream import add_upstream_arguments, apply_upstream
from tools.commands.prefetch import fetch_missing
from tools.config import Settings
from tools.output import count, print_json, warn

EXAMPLES = """
casfs mount headers ./mnt               # returns once ./mnt can be read
casfs mount -v headers ./mnt            # says why that engine was chosen
casfs mount --engine fuse headers ./mnt
casfs mount --prefetch headers ./mnt    # what is cold or missing is fetched first
casfs mount --writable ./scratch headers ./mnt  # what is written is in ./scratch/upper
casfs mount sha256:… ./mnt --upstream grpcs://cache/main  # fetched from there as it is read
casfs mount --trace t headers ./mnt     # who uses what of it: 'casfs trace report t'
casfs mount --foreground headers ./mnt  # until Ctrl-C, or for a service manager
"""


class Named(NamedTuple):
    """The tree to mount: its manifest, if it has one, its digest, and what to call it."""

    name: str | None
    root: str
    label: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs mount`` takes."""
    add_manifest_argument(parser)
    add_upstream_arguments(parser)
    mountpoint = parser.add_argument("directory", metavar="MOUNTPOINT", help="an empty directory")
    complete(mountpoint, "directory")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="kernel: nobody behind the mount, no upcalls (needs root); passthrough: the kernel reads the blobs "
        "itself, names are asked for (needs root); fuse: through pyfuse3 (any user); native: as passthrough, but "
        "reading for the kernel, to compare; auto: the first that can (default: the configuration's, else auto)",
    )
    writable = parser.add_argument(
        "--writable",
        metavar="SCRATCH",
        help="let the mount be written (needs root): what is written goes to SCRATCH/upper, and the tree never changes",
    )
    complete(writable, "directory")
    parser.add_argument(
        "--durable",
        action="store_true",
        help="with --writable: let programs sync what they write to the disk; without it scratch is never synced",
    )
    parser.add_argument(
        "--foreground", action="store_true", help="serve in this process until unmounted or told to end (Ctrl-C)"
    )
    parser.add_argument(
        "--prefetch",
        action="store_true",
        help="first bring in what the store lacks, as 'casfs prefetch' does, rather than when it is opened",
    )
    add_trace_argument(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="say why that engine was chosen")
    parser.add_argument("--json", action="store_true", help="print {mountpoint, engine, why, root, missing, pid}")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Find the tree, close the store, and mount."""
    settings = apply_upstream(args, settings)

    def find() -> dict[str, Any]:
        with Store.open(settings.store, create=settings.upstream_url is not None, sources=settings.sources) as store:
            root = get_root(store, args.manifest)
            if args.prefetch:
                fetch_missing(store, root, f"mount {args.directory}")
        return {"name": root.name, "root": str(root.directory.digest), "label": root.label}

    # `start` forks, and neither an LMDB environment nor gRPC crosses a fork: the store is closed before, and an
    # upstream is asked in another process.
    root = Named(**(run_apart(find) if settings.upstream_url else find()))

    def announce(report: MountReport) -> None:
        if report.missing:
            sources = ", ".join(settings.source_labels)
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
                    "root": root.root,
                    "missing": report.missing,
                    "pid": report.pid,
                }
            )
        else:
            why = f": {report.why}" if args.verbose else ""
            print(f"{root.label} is mounted on {args.directory} (engine {report.engine}{why})")
        sys.stdout.flush()

    request = Request(
        settings.store,
        Digest.parse(root.root),
        Path(args.directory),
        name=root.name,
        sources=settings.sources,
        writable=Path(args.writable).absolute() if args.writable else None,
        volatile=not args.durable,
        trace=None if args.trace is None else args.trace.absolute(),
    )
    start(request, engine=args.engine or settings.engine, foreground=args.foreground, ready=announce)
    return 0
