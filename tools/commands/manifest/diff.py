"""``casfs manifest diff``: how two trees differ. Exits with 1 if they do, as diff does."""

from __future__ import annotations

import argparse

from store.compare import Difference, compare_trees
from store.entries import DirectoryEntry, Entry, FileEntry, ReferenceEntry, SymlinkEntry
from store.manifest_text import quote
from store.repository import Store
from tools.commands._resolve import add_manifest_argument, get_root
from tools.config import Settings
from tools.exits import Exit
from tools.output import print_json

EXAMPLES = """
casfs manifest diff before after      # A added, D removed, M changed
casfs manifest diff before after > /dev/null || echo they differ
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs manifest diff`` takes."""
    add_manifest_argument(parser, "old")
    add_manifest_argument(parser, "new")
    parser.add_argument("--json", action="store_true", help="print a list of {change, path, old, new}")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Print a line for each difference: A added, D removed, M changed."""
    with Store.open(settings.store, create=False) as store:
        old, new = get_root(store, args.old), get_root(store, args.new)
        with store.index.view() as view:
            differences = list(compare_trees(view, old.directory, new.directory))
    if args.json:
        print_json([_as_json(difference) for difference in differences])
    else:
        for difference in differences:
            print(_as_line(difference))
    return Exit.NO if differences else Exit.OK


def _change(difference: Difference) -> str:
    if difference.old is None:
        return "added"
    return "removed" if difference.new is None else "changed"


def _as_json(difference: Difference) -> dict[str, object]:
    return {
        "change": _change(difference),
        "path": quote(difference.path),
        "old": _describe(difference.old),
        "new": _describe(difference.new),
    }


def _as_line(difference: Difference) -> str:
    letter = {"added": "A", "removed": "D", "changed": "M"}[_change(difference)]
    what = f"  ({_describe(difference.old)} -> {_describe(difference.new)})" if letter == "M" else ""
    return f"{letter} {quote(difference.path)}{what}"


def _describe(entry: Entry | None) -> str | None:
    match entry:
        case None:
            return None
        case FileEntry():
            mtime = "" if entry.mtime_ns is None else f" mtime {entry.mtime_ns}"
            return f"{'program' if entry.executable else 'file'} {entry.digest}{mtime}"
        case SymlinkEntry():
            return f"link to {quote(entry.target)}"
        case ReferenceEntry():
            return f"reference to {quote(entry.path)}"
        case DirectoryEntry():
            return "directory"
