"""``casfs manifest remove``: forget names."""

from __future__ import annotations

import argparse

from store.repository import Store
from tools.commands import complete
from tools.config import Settings

EXAMPLES = """
casfs manifest remove headers
casfs manifest remove before after    # both, or none if one doesn't exist
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs manifest remove`` takes."""
    names = parser.add_argument("names", metavar="NAME", nargs="+", help="a manifest's name")
    complete(names, "manifest")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Remove all of them, or none where one doesn't exist."""
    with Store.open(settings.store, create=False) as store:
        names = list(dict.fromkeys(args.names))
        for name in names:
            store.manifests.get(name)
        for name in names:
            store.manifests.remove(name)
    return 0
