"""``casfs cat``: the bytes of files of a tree, each checked as a mount would."""

from __future__ import annotations

import argparse
import os
import sys

from casfs.contents import Contents, PlainGateway
from store.entries import FileEntry, ReferenceEntry, printable
from store.errors import BadInput
from store.repository import Store
from tools.commands import complete
from tools.commands._resolve import get_path, get_root, split_tree_path
from tools.config import Settings

_CHUNK = 1 << 20

EXAMPLES = """
casfs cat headers/stdio.h
casfs cat headers/linux/fuse.h | grep FOPEN
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs cat`` takes."""
    files = parser.add_argument(
        "files", metavar="NAME/PATH", nargs="+", help="a manifest's name or a root's digest, and a path in it"
    )
    complete(files, "manifest")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Write them, in the order given; nothing at all if one of them isn't there."""
    with Store.open(settings.store, create=False, sources=settings.sources) as store:
        entries = [_find_file(store, text) for text in args.files]
        contents = Contents(store.blobs, PlainGateway(store.blobs), store.hydrator)
        for entry in entries:
            descriptor = contents.wait_open(entry)
            try:
                while data := os.read(descriptor, _CHUNK):
                    sys.stdout.buffer.write(data)
            finally:
                os.close(descriptor)
    return 0


def _find_file(store: Store, text: str) -> FileEntry | ReferenceEntry:
    manifest, path = split_tree_path(text)
    root = get_root(store, manifest)
    with store.index.view() as view:
        entry = get_path(view, root, path, follow=True).entry
    if not isinstance(entry, FileEntry | ReferenceEntry):
        raise BadInput(f"{printable(path) if path else 'the root'} of {root.label} is a directory; 'casfs ls' lists it")
    return entry
