"""``casfs remap``: change what a mount shows, path by path, while programs use it."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from casfs.changes import Change, digests_of
from casfs.control import remap
from store.digest import Digest
from store.entries import DirectoryEntry, Entry, FileEntry, ReferenceEntry, Stamp, SymlinkEntry, check_target, printable
from store.errors import BadInput
from store.importing import ScanOptions
from store.repository import Store
from tools.commands import complete
from tools.commands._resolve import get_path, get_root, split_tree_path
from tools.config import Settings
from tools.output import count, print_json

EXAMPLES = """
casfs remap ./mnt add lib/new.h headers/stdio.h     # a file or directory of a manifest
casfs remap ./mnt replace lib headers               # a whole manifest
casfs remap ./mnt add tool --host ./build/tool      # a file or directory of the host
casfs remap ./mnt add data --blob blake3:…/12       # a blob of the store
casfs remap ./mnt add latest --symlink lib
casfs remap ./mnt remove lib/new.h
casfs remap ./mnt batch changes.jsonl               # many changes in one step, all or none
"""

_KINDS = ("tree", "blob", "host", "symlink")
"""What can be put somewhere; as options, and as keys of a batch's lines."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs remap`` takes."""
    mountpoint = parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="of engine passthrough, native or fuse")
    complete(mountpoint, "directory")
    parser.add_argument(
        "op",
        choices=("add", "replace", "remove", "batch"),
        help="add: nothing may be there, directories above are made; replace: something must be there; batch: PATH is "
        'a file (or -) with a change a line as JSON: {"op": …, "path": …} and one of "tree", "blob" (with '
        '"executable"), "host", "symlink"',
    )
    parser.add_argument("path", metavar="PATH", help="relative to the mount")
    parser.add_argument(
        "tree", metavar="TREE", nargs="?", help="what to put there: a manifest, a root's digest, or a path in one"
    )
    kinds = parser.add_mutually_exclusive_group()
    host = kinds.add_argument("--host", metavar="PATH", help="a file or directory of the host instead, where it is")
    complete(host, "file")
    kinds.add_argument("--blob", metavar="DIGEST", help="a blob of the store")
    kinds.add_argument("--symlink", metavar="TARGET", help="a symbolic link that says so")
    parser.add_argument("--executable", action="store_true", help="with --blob: the file is one")
    parser.add_argument("--json", action="store_true", help="print {changes, invalidated}")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Find what paths shall point at, and have the daemon change its tree."""
    with Store.open(settings.store, create=False) as store:
        if args.op == "batch":
            changes = list(_read_batch(store, args.path))
        else:
            wanted = {"op": args.op, "path": args.path, "executable": args.executable}
            wanted |= {kind: getattr(args, kind) for kind in _KINDS if getattr(args, kind) is not None}
            changes = [_make_change(store, wanted, f"remap {args.op}")]
        # The store stays open: until the daemon holds it, nothing of this may be collected.
        with store.leases.acquire("remap", digests_of(changes), args.mountpoint):
            told = remap(Path(args.mountpoint), changes)
    if args.json:
        print_json({"changes": len(changes), "invalidated": told})
    else:
        print(f"{count(len(changes), 'change')}, {count(told, 'cached name')} invalidated")
    return 0


def _read_batch(store: Store, name: str) -> Iterator[Change]:
    if name == "-":
        yield from _parse_batch(store, sys.stdin.buffer, "standard input")
        return
    with open(name, "rb") as file:
        yield from _parse_batch(store, file, name)


def _parse_batch(store: Store, file: IO[bytes], source: str) -> Iterator[Change]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{source}:{number}"
        try:
            wanted = json.loads(line)
        except ValueError as error:
            raise BadInput(f"{where}: not JSON: {error}") from error
        if not isinstance(wanted, dict) or not all(isinstance(wanted.get(key), str) for key in ("op", "path")):
            raise BadInput(f'{where}: a change is {{"op": …, "path": …}} and what to put there')
        yield _make_change(store, wanted, where)


def _make_change(store: Store, wanted: dict[str, Any], where: str) -> Change:
    path = os.fsencode(wanted["path"]).rstrip(b"/")
    kinds = [kind for kind in _KINDS if kind in wanted]
    op = wanted["op"]
    if op not in ("add", "replace", "remove"):
        raise BadInput(f"{where}: {op!r} is no change: add, replace or remove")
    if len(kinds) != (op != "remove"):
        takes = "nothing" if op == "remove" else "one thing"
        raise BadInput(f"{where}: {op} {printable(path)} takes {takes} to put there")
    if not kinds:
        return Change("remove", path)
    name = path.rpartition(b"/")[2]
    target = wanted[kinds[0]]
    if not isinstance(target, str):
        raise BadInput(f"{where}: {kinds[0]} has to be a text")
    entry: Entry
    match kinds[0]:
        case "tree":
            entry = _from_tree(store, name, target)
        case "blob":
            entry = FileEntry(name, Digest.parse(target), bool(wanted.get("executable")))
            if not store.blobs.has(entry.digest):
                raise BadInput(f"{where}: blob {target} is not in the store")
        case "host":
            entry = _from_host(store, name, target)
        case _:
            entry = SymlinkEntry(name, os.fsencode(target))
            check_target(entry.target, where)
    return Change(op, path, entry)


def _from_tree(store: Store, name: bytes, target: str) -> Entry:
    manifest, path = split_tree_path(target)
    root = get_root(store, manifest)
    with store.index.view() as view:
        found = get_path(view, root, path, follow=False)
    if found.entry is None:
        return DirectoryEntry(name, root.directory.digest)
    return found.entry._replace(name=name)


def _from_host(store: Store, name: bytes, target: str) -> Entry:
    path = os.path.realpath(os.fsencode(target))
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        options = ScanOptions(reference=True)
        return DirectoryEntry(name, store.importer.from_directories([(b"", Path(os.fsdecode(path)))], options).digest)
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{printable(path)} is neither a file nor a directory")
    return ReferenceEntry(name, path, Stamp.of(status), bool(status.st_mode & 0o100))
