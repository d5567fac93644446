"""``casfs ls``: what a tree has, from the index; no blob is looked at."""

from __future__ import annotations

import argparse
import os
import stat
import sys
import time
from collections.abc import Iterable
from typing import Any

from casfs.tree import FIXED_MTIME_NS
from store.entries import DirectoryEntry, Entry, FileEntry, ReferenceEntry, SymlinkEntry
from store.index import View
from store.manifest_text import quote
from store.repository import Store
from store.trees import find_directory, list_entries, walk
from tools.commands._resolve import Found, Root, add_manifest_argument, get_path, get_root, split_tree_path
from tools.config import Settings
from tools.output import print_json, print_table

EXAMPLES = """
casfs ls headers                      # its top directory
casfs ls -l headers/linux             # sizes, times and digests
casfs ls -R -0 headers | xargs -0 -n1 # every path, fit for a script
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs ls`` takes."""
    add_manifest_argument(
        parser,
        "tree",
        metavar="NAME[/PATH]",
        help="a manifest's name or a root's digest, and maybe a path in it",
    )
    parser.add_argument("-l", "--long", action="store_true", help="with mode, size, time, digest or target")
    parser.add_argument("-R", "--recursive", action="store_true", help="with everything below")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "-0", "--null", action="store_true", help="end each name with a NUL and print it as it is, not with %%XX"
    )
    output.add_argument(
        "--json", action="store_true", help="print a list of {path, kind, size, executable, mtime_ns, digest, target}"
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Print the entries, in the order of their names."""
    manifest, path = split_tree_path(args.tree)
    with Store.open(settings.store, create=False, sources=settings.sources) as store:
        root = get_root(store, manifest)
        with store.index.view() as view:
            found = get_path(view, root, path, follow=path != b"" and args.tree.endswith("/"))
            entries = _list(view, root, found, args.recursive)
            if args.json:
                print_json([_as_json(where, entry) for where, entry in entries])
            elif args.long:
                rows = [_as_row(where, entry) for where, entry in entries]
                print_table(rows, right=frozenset({1}))
            else:
                _print_names(entries, args.null)
    return 0


def _list(view: View, root: Root, found: Found, recursive: bool) -> Iterable[tuple[bytes, Entry]]:
    """The entries with their paths relative to what was named; a file that was named is its own listing."""
    entry = found.entry
    if entry is not None and not isinstance(entry, DirectoryEntry):
        return [(found.path, entry)]
    if not recursive:
        return ((row.entry.name, row.entry) for row in list_entries(view, found.directory))
    directory = root.directory if entry is None else find_directory(view, entry.digest)
    # What contains a directory is interned after it and forgotten with it.
    return () if directory is None else walk(view, directory)


def _print_names(entries: Iterable[tuple[bytes, Entry]], null: bool) -> None:
    if null:
        for where, _ in entries:
            sys.stdout.buffer.write(where + b"\0")
    else:
        for where, entry in entries:
            print(quote(where) + ("/" if isinstance(entry, DirectoryEntry) else ""))


def _as_json(where: bytes, entry: Entry) -> dict[str, Any]:
    shown: dict[str, Any] = {"path": os.fsdecode(where), "kind": _KINDS[type(entry)]}
    match entry:
        case FileEntry():
            shown |= {"size": entry.digest.size, "executable": entry.executable, "digest": str(entry.digest)}
        case ReferenceEntry():
            shown |= {"size": entry.stamp.size, "executable": entry.executable, "target": os.fsdecode(entry.path)}
        case SymlinkEntry():
            shown |= {"target": os.fsdecode(entry.target)}
        case DirectoryEntry():
            shown |= {"digest": str(entry.digest)}
    shown["mtime_ns"] = _mtime_ns(entry)
    return shown


_KINDS = {FileEntry: "file", ReferenceEntry: "reference", SymlinkEntry: "symlink", DirectoryEntry: "directory"}


def _mtime_ns(entry: Entry) -> int:
    match entry:
        case FileEntry() | SymlinkEntry():
            return FIXED_MTIME_NS if entry.mtime_ns is None else entry.mtime_ns
        case ReferenceEntry():
            return entry.stamp.mtime_ns
        case DirectoryEntry():
            return FIXED_MTIME_NS


def _file_mode(executable: bool) -> int:
    return stat.S_IFREG | (0o555 if executable else 0o444)


def _as_row(where: bytes, entry: Entry) -> tuple[str, ...]:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(_mtime_ns(entry) // 1_000_000_000))
    if isinstance(entry, FileEntry):
        return (
            stat.filemode(_file_mode(entry.executable)),
            str(entry.digest.size),
            when,
            str(entry.digest),
            quote(where),
        )
    if isinstance(entry, ReferenceEntry):
        name = f"{quote(where)} = {quote(entry.path)}"
        return stat.filemode(_file_mode(entry.executable)), str(entry.stamp.size), when, "by reference", name
    if isinstance(entry, SymlinkEntry):
        name = f"{quote(where)} -> {quote(entry.target)}"
        return stat.filemode(stat.S_IFLNK | 0o777), str(len(entry.target)), when, "-", name
    return stat.filemode(stat.S_IFDIR | 0o555), "-", when, str(entry.digest), f"{quote(where)}/"
