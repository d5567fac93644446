"""``casfs manifest show``: what a manifest is; `casfs ls` says what it has."""

from __future__ import annotations

import argparse

from store.manifests import Manifest
from store.repository import Store
from tools.commands._resolve import add_manifest_argument, get_root
from tools.commands.manifest._describe import describe, print_manifest
from tools.config import Settings
from tools.output import print_json

EXAMPLES = """
casfs manifest show headers
casfs manifest show headers --json | jq .missing
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs manifest show`` takes."""
    add_manifest_argument(parser)
    keys = "{name, root, files, bytes, nodes, references, missing, created, source}"
    parser.add_argument("--json", action="store_true", help=f"print {keys}")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Print it; what is missing is counted now."""
    with Store.open(settings.store, create=False) as store:
        root = get_root(store, args.manifest)
        digest = root.directory.digest
        missing = store.manifests.count_missing(digest, root.name)
        manifest = Manifest("-", digest, 0, "a digest", missing, 0)
        if root.name is not None:
            manifest = store.manifests.get(root.name)._replace(missing=missing)
    if args.json:
        print_json(describe(manifest, root.directory))
    else:
        print_manifest(manifest, root.directory)
    return 0
