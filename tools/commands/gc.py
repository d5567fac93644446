"""``casfs gc``: move what is cold to the cold tier, and bring the store below a size, least recently used first."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from store.demotion import Demoted
from store.errors import BadInput
from store.gc import Collected
from store.repository import Store
from tools.config import Settings
from tools.exits import Exit
from tools.output import count, format_duration, format_size, parse_duration, parse_size, print_json, progress, warn

EXAMPLES = """
casfs gc --high 20GiB --dry-run       # what would go
casfs gc --high 20GiB --low 15GiB     # if above 20 GiB, down to 15 GiB
casfs gc --high 1G --grace 0          # also what was used just now
casfs gc --cold 30d                   # compress what was not used for a month
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs gc`` takes."""
    parser.add_argument("--high", metavar="SIZE", help="do nothing up to this size (default: the configuration's)")
    parser.add_argument(
        "--low", metavar="SIZE", help="above, remove down to this (default: the configuration's, else 4/5 of --high)"
    )
    parser.add_argument(
        "--grace",
        metavar="DURATION",
        help="keep what was used within this time (default: the configuration's, else 1h)",
    )
    parser.add_argument(
        "--cold",
        metavar="AGE",
        help="first move blobs not used for this long to the cold tier, compressed; opening one brings it back. What a "
        "mount or other lease needs stays (default: the configuration's, else none)",
    )
    parser.add_argument("-n", "--dry-run", action="store_true", help="only say what would be moved or removed")
    keys = "{blobs_before, bytes_before, removed_blobs, removed_bytes, pinned_bytes, bytes_after, cold, dry_run}"
    parser.add_argument("--json", action="store_true", help=f"print {keys}")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Collect; exits with 1 if the store is still too large."""
    high = settings.gc_high if args.high is None else parse_size(args.high)
    age = settings.gc_cold if args.cold is None else parse_duration(args.cold)
    if high is None:
        if age is None:
            raise BadInput(
                "say how large the store may be: --high 20GiB, or high under [gc] in the configuration; or --cold AGE"
            )
        if args.low is not None:
            raise BadInput("--low is where removing ends: it needs --high")
        high = sys.maxsize
    low = _choose_low(args, settings, high)
    grace = settings.gc_grace if args.grace is None else parse_duration(args.grace)
    with Store.open(settings.store, create=False) as store:
        moved = None if age is None else _demote(store, age, settings.gc_cold_level, dry_run=args.dry_run)
        with progress("removing", "batches") as advance:
            result = store.collector.collect(
                high, low, grace=grace, dry_run=args.dry_run, progress=lambda size: advance(1, size)
            )
        cold_blobs, cold_bytes = store.cold.count()
    if args.json:
        cold = {**asdict(moved or Demoted()), "blobs_after": cold_blobs, "bytes_after": cold_bytes}
        print_json({**asdict(result), "bytes_after": result.bytes_after, "cold": cold, "dry_run": args.dry_run})
    else:
        if moved is not None:
            _print_moved(moved, dry_run=args.dry_run)
        if high != sys.maxsize:
            _print_removed(result, dry_run=args.dry_run)
    _warn_if_above(result, high, grace)
    return Exit.NO if result.bytes_after > high else Exit.OK


def _print_moved(moved: Demoted, *, dry_run: bool) -> None:
    verb = "would move" if dry_run else "moved"
    where = "" if dry_run else f", where they take {format_size(moved.cold_bytes)}"
    print(f"{count(moved.blobs, 'blob')} with {format_size(moved.bytes)} {verb} to the cold tier{where}")


def _print_removed(result: Collected, *, dry_run: bool) -> None:
    verb = "would be removed" if dry_run else "removed"
    print(f"{count(result.removed_blobs, 'blob')} with {format_size(result.removed_bytes)} {verb}")
    print(f"{format_size(result.bytes_before)} before, {format_size(result.bytes_after)} after")


def _demote(store: Store, age: int, level: int, *, dry_run: bool) -> Demoted:
    with progress("compressing", "blobs") as advance:
        return store.demoter.demote(age, level=level, dry_run=dry_run, progress=advance)


def _warn_if_above(result: Collected, high: int, grace: int) -> None:
    if result.bytes_after > high:
        warn(
            f"the store keeps {format_size(result.bytes_after)}, above {format_size(high)}: manifests and mounts hold "
            f"{format_size(result.pinned_bytes)}, the rest was used in the last {format_duration(grace)}"
        )


def _choose_low(args: argparse.Namespace, settings: Settings, high: int) -> int:
    if args.low is not None:
        low = parse_size(args.low)
    elif args.high is None and settings.gc_low is not None:
        low = settings.gc_low
    else:
        low = high * 4 // 5
    if low > high:
        raise BadInput(f"the low mark ({format_size(low)}) is above the high mark ({format_size(high)})")
    return low
