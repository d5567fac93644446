"""``casfs verify``: whether every blob is what its name says."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from store.repository import Store
from store.verify import Verified
from tools.commands.stats import count_blobs
from tools.config import Settings
from tools.exits import Exit
from tools.output import count, format_size, print_json, progress

EXAMPLES = """
casfs verify                          # reads and hashes every blob
casfs verify --rebuild                # and makes the index anew
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs verify`` takes."""
    parser.add_argument(
        "--rebuild", action="store_true", help="make the index anew from the blobs; nothing may be mounted"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print {clean, blobs, bytes, cold, adopted, quarantined, lost, incomplete, broken}",
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Verify; exits with 1 if anything was wrong."""
    with Store.open(settings.store, create=False) as store:
        _, total = count_blobs(store)
        with progress("verifying", "blobs", total) as advance:
            result = store.verifier.verify(rebuild=args.rebuild, progress=advance)
        quarantine = store.layout.quarantine
    if args.json:
        print_json({"clean": result.is_clean, **asdict(result)})
    else:
        _print(result, str(quarantine))
    return Exit.OK if result.is_clean else Exit.NO


def _print(result: Verified, quarantine: str) -> None:
    print(f"{count(result.blobs, 'blob')} with {format_size(result.bytes)} are right")
    if result.cold:
        print(f"{count(result.cold, 'blob')} of the cold tier are right")
    if result.adopted:
        print(f"{count(result.adopted, 'blob')} the index didn't know: added to it")
    for digest in result.quarantined:
        print(f"wrong: {digest}, now in {quarantine}")
    for digest in result.lost:
        print(f"lost: {digest}, which the index knew")
    for name, missing in result.incomplete.items():
        print(f"incomplete: manifest {name} lacks {count(missing, 'blob')}; add its files again to complete it")
    for name, why in result.broken.items():
        print(f"broken: manifest {name}: {why}")
