"""``casfs manifest import``: a manifest from its text (`store.manifest_text` says how it looks)."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from store.errors import BadInput
from store.manifests import check_manifest_name
from store.repository import Store
from tools.commands import complete
from tools.commands.manifest.create import add_naming_arguments, check_is_free, name_tree
from tools.config import Settings
from tools.output import count, warn

EXAMPLES = """
casfs manifest import headers headers.txt
casfs manifest export old | grep -v '/tests/' | casfs manifest import new -
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs manifest import`` takes."""
    parser.add_argument("name", metavar="NAME", help="the manifest's name")
    complete(parser.add_argument("file", metavar="FILE", help="its text; - for standard input"), "file")
    add_naming_arguments(parser)


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Read the text, and name its tree. Blobs that are not in the store yet are only warned of."""
    check_manifest_name(args.name)
    path = "/dev/stdin" if args.file == "-" else args.file
    source = "standard input" if args.file == "-" else args.file
    with ExitStack() as stack:
        try:
            # Names may hold what other readers take for ends of lines, and bytes that are not UTF-8.
            text = stack.enter_context(open(path, encoding="utf-8", errors="surrogateescape", newline="\n"))
        except OSError as error:
            raise BadInput(f"can't read {source}: {error.strerror}") from error
        store = stack.enter_context(Store.open(settings.store))
        check_is_free(store, args.name, args.replace)
        directory = store.importer.from_text(text, source)
        printable = source.encode("utf-8", "backslashreplace").decode()
        manifest = name_tree(store, args, directory, f"import {printable}")
    if manifest.missing:
        warn(f"{count(manifest.missing, 'blob')} of {args.name} not in the store")
    return 0
