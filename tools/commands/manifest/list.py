"""``casfs manifest list``: which manifests there are."""

from __future__ import annotations

import argparse

from store.repository import Store
from store.trees import find_directory
from tools.commands.manifest._describe import describe, format_time
from tools.config import Settings
from tools.output import format_size, print_json, print_table

EXAMPLES = """
casfs manifest list
casfs manifest list --json | jq -r '.[].root'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs manifest list`` takes."""
    parser.add_argument("--names", action="store_true", help="print the names only")
    parser.add_argument("--json", action="store_true", help="print a list of what 'manifest show --json' prints")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Print one line for each, by name."""
    with Store.open(settings.store, create=False) as store:
        manifests = store.manifests.list()
        with store.index.view() as view:
            directories = [find_directory(view, manifest.root) for manifest in manifests]
    # One that was removed between the two looks is left out.
    found = [(m, directory) for m, directory in zip(manifests, directories, strict=True) if directory is not None]
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
