"""``casfs checkout``: a tree as ordinary files."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from casfs.checkout import CheckedOut, Mode, check_out
from store.repository import Store
from tools.commands import complete
from tools.commands._resolve import add_manifest_argument, get_root
from tools.config import Settings
from tools.output import count, format_size, print_json, progress

EXAMPLES = """
casfs checkout headers ./headers             # reflinks where the disk can, else copies
casfs checkout headers ./h --mode hardlink   # no bytes copied; the files are read-only
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs checkout`` takes."""
    add_manifest_argument(parser)
    complete(parser.add_argument("directory", metavar="DIR", help="a new or an empty directory"), "directory")
    parser.add_argument(
        "--mode",
        choices=[mode.value for mode in Mode],
        help="reflink shares blocks (btrfs, XFS), hardlink makes read-only names of the blobs, copy shares nothing, "
        "auto is reflink where possible, else copy (default: the configuration's, else auto)",
    )
    keys = "{directories, files, symlinks, bytes, reflinked, hardlinked, copied}"
    parser.add_argument("--json", action="store_true", help=f"print {keys}")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Write the files, and say how."""
    mode = Mode(args.mode or settings.checkout_mode)
    with Store.open(settings.store, create=False, sources=settings.sources) as store:
        root = get_root(store, args.manifest)
        with progress("checking out", "files", root.directory.bytes) as advance:
            done = check_out(store, root.directory.digest, Path(args.directory), mode=mode, progress=advance)
    if args.json:
        print_json(asdict(done))
    else:
        print(f"{root.label}: {_describe(done)} in {args.directory}")
    return 0


def _describe(done: CheckedOut) -> str:
    ways = [f"{getattr(done, way):,} {way}" for way in ("reflinked", "hardlinked", "copied") if getattr(done, way)]
    how = f" ({', '.join(ways)})" if ways else ""
    links = f", {count(done.symlinks, 'symbolic link')}" if done.symlinks else ""
    return f"{count(done.files, 'file')}, {format_size(done.bytes)}{how}{links}, {count(done.directories, 'directory')}"
