"""``casfs stats``: what a mount counted since it was made, or what the store holds."""

from __future__ import annotations

import argparse
import os
import shutil
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from casfs.control import statistics
from casfs.errors import MountError
from store.blobs import unpack_row
from store.digest import DigestFunction
from store.index import Table
from store.repository import Store
from store.sessions import living_sessions
from tools.commands import complete
from tools.config import Settings
from tools.output import count, format_duration, format_size, print_json, print_table

EXAMPLES = """
casfs stats                           # what the store holds
casfs stats ./mnt                     # what a mount has counted
casfs stats ./mnt --json | jq .upcalls.READ
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs stats`` takes."""
    mountpoint = parser.add_argument(
        "mountpoint", metavar="MOUNTPOINT", nargs="?", help="of this mount; without: of the store"
    )
    complete(mountpoint, "directory")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print {engine, upcalls: {LOOKUP: n, …, READ: n}, …}, or the store's numbers",
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Print the numbers."""
    if args.mountpoint is not None:
        found = statistics(Path(args.mountpoint))
        if args.json:
            print_json(found)
        else:
            _print_mount(found)
        return 0
    with Store.open(settings.store, create=False) as store:
        numbers = collect_store_statistics(store)
    if args.json:
        print_json(numbers)
    else:
        _print_store(numbers)
    return 0


def _print_mount(found: dict[str, Any]) -> None:
    upcalls: dict[str, int] = found["upcalls"]
    rows: list[tuple[str, object]] = [("engine", f"{found['engine']}: {found['why']}")]
    if "pid" in found:
        rows.append(("root", found["root"]))
        rows.append(("daemon", _describe_daemon(found)))
        rows.append(("served", f"{format_size(found['served_bytes'])} read by the daemon for the kernel"))
        rows.append(("failed opens", found["failed_opens"]))
        rows.append(("missing", f"{count(found['missing'], 'blob')} when it was mounted"))
        rows.append(("fetched", _describe_hydration(found["hydration"])))
    print_table(rows)
    print(f"upcalls {sum(upcalls.values()):,}")
    print_table([(f"  {opcode}", f"{number:,}") for opcode, number in sorted(upcalls.items())], right=frozenset({1}))


def _describe_daemon(found: dict[str, Any]) -> str:
    return (
        f"process {found['pid']}, up {format_duration(found['seconds'])}, CPU {found['cpu_seconds']:.2f} s, "
        f"memory at most {format_size(found['peak_memory_bytes'])}"
    )


def _describe_hydration(numbers: dict[str, int]) -> str:
    failed = f"; {numbers['failed_fetches']:,} in vain" if numbers["failed_fetches"] else ""
    return f"{count(numbers['fetched_blobs'], 'blob')} with {format_size(numbers['fetched_bytes'])}{failed}"


def collect_store_statistics(store: Store) -> dict[str, Any]:
    """What the store holds: counts, and bytes where it says so."""
    blobs, sizes = _count_by_function(store)
    index = store.index.statistics()
    cold_blobs, cold_bytes = store.cold.count()
    return {
        "store": str(store.layout.root),
        "blobs": blobs.total(),
        "bytes": sizes.total(),
        "functions": {label: {"blobs": blobs[label], "bytes": sizes[label]} for label in sorted(blobs)},
        "cold": {"blobs": cold_blobs, "bytes": cold_bytes},
        "manifests": index["manifests"],
        "directories": index["directories"],
        "entries": index["entries"],
        "index_bytes": index["bytes"],
        "leases": [
            {"kind": lease.kind, "holder": lease.holder, "roots": [str(r) for r in lease.roots], "since": lease.since}
            for lease in store.leases.living()
        ],
        "adding_sessions": len(living_sessions(store.layout, clean=False)),
        "quarantined": len(os.listdir(store.layout.quarantine)),
        "disk_free_bytes": shutil.disk_usage(store.layout.root).free,
        "warm": _ask_holder(store),
    }


def _ask_holder(store: Store) -> dict[str, int] | None:
    """What the process that `casfs run` left behind keeps of this store, if there is one."""
    from casfs.holder import find_holder

    holder = find_holder(store.layout.root)
    if holder is None:
        return None
    with closing(holder), suppress(MountError):
        return {"pid": holder.pid, **holder.statistics()}
    return None


def _count_by_function(store: Store) -> tuple[Counter[str], Counter[str]]:
    blobs: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    with store.index.view() as view:
        for key, value in view.scan(Table.BLOBS):
            label = DigestFunction(key[0]).label
            blobs[label] += 1
            sizes[label] += unpack_row(value).size
    return blobs, sizes


def count_blobs(store: Store) -> tuple[int, int]:
    """How many blobs the index vouches for, and their bytes."""
    blobs, sizes = _count_by_function(store)
    return blobs.total(), sizes.total()


def _print_store(numbers: dict[str, Any]) -> None:
    functions = ", ".join(f"{label} {found['blobs']:,}" for label, found in numbers["functions"].items())
    rows = [
        ("store", numbers["store"]),
        ("blobs", f"{numbers['blobs']:,}, {format_size(numbers['bytes'])}" + (f" ({functions})" if functions else "")),
        ("manifests", f"{numbers['manifests']:,}"),
        ("trees", f"{count(numbers['directories'], 'directory')} with {numbers['entries']:,} entries"),
        ("index", format_size(numbers["index_bytes"])),
        ("disk", f"{format_size(numbers['disk_free_bytes'])} free"),
    ]
    if numbers["cold"]["blobs"]:
        cold = numbers["cold"]
        rows.insert(2, ("cold", f"{cold['blobs']:,}, {format_size(cold['bytes'])} compressed"))
    if numbers["adding_sessions"]:
        rows.append(("being added", count(numbers["adding_sessions"], "session")))
    if numbers["quarantined"]:
        rows.append(("quarantine", f"{count(numbers['quarantined'], 'file')} whose bytes were wrong"))
    if numbers["warm"]:
        warm = numbers["warm"]
        taken = f"{format_size(warm['bytes'])} of at most {format_size(warm['budget'])}"
        rows.append(("kept warm", f"{count(warm['layers'], 'layer')} in {taken}, by process {warm['pid']}"))
    rows += [("in use", f"{lease['kind']} {lease['holder']}") for lease in numbers["leases"]]
    print_table(rows)
