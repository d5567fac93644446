"""``casfs manifest list``: which manifests there are."""

from __future__ import annotations

import argparse

from store.repository import Store
from store.trees import find_directory
from tools.commands.manifest._describe import describe, format_time
from tools.config import Settings
from tools.output import format_size, print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs manifest list`` takes."""
    parser.add_argument("--names", action="store_true", help="print the names only")
    parser.add_argument("--json", action="store_true", help="print a list of what 'manifest show --json' prints")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Print one line for each, by name."""
    with Store.open(settings.store, create=False) as store:
        found = []
        with store.index.view() as view:
            for manifest in store.manifests.list():
                directory = find_directory(view, manifest.root)
                if directory is not None:
                    found.append((manifest, directory))
    if args.names:
        for manifest, _ in found:
            print(manifest.name)
    elif args.json:
        print_json([describe(manifest, directory) for manifest, directory in found])
    elif found:
        rows: list[tuple[object, ...]] = [("NAME", "FILES", "SIZE", "MISSING", "CREATED", "SOURCE")]
        for manifest, directory in found:
            size = format_size(directory.bytes)
            missing = f"{manifest.missing:,}" if manifest.missing else "-"
            created = format_time(manifest.created)
            rows.append((manifest.name, f"{directory.files:,}", size, missing, created, manifest.source))
        print_table(rows, right=frozenset({1, 2, 3}))
    return 0
