"""``casfs manifest export``: a manifest as text that a person can read and diff, and `import` reads."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import BinaryIO

from store.errors import BadInput
from store.manifest_text import format_manifest
from store.repository import Store
from store.trees import export_items
from tools.commands import complete
from tools.commands._resolve import add_manifest_argument, get_root
from tools.config import Settings

EXAMPLES = """
casfs manifest export headers headers.txt
casfs manifest export headers | less
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs manifest export`` takes."""
    add_manifest_argument(parser)
    file = parser.add_argument("file", metavar="FILE", nargs="?", default="-", help="default: standard output")
    complete(file, "file")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Write the lines."""
    with Store.open(settings.store, create=False) as store:
        root = get_root(store, args.manifest)
        with _writing(args.file) as out, store.index.view() as view:
            items = export_items(view, root.directory)
            out.writelines(line.encode() for line in format_manifest(items, root.directory.digest.function))
    return 0


@contextmanager
def _writing(path: str) -> Iterator[BinaryIO]:
    """Standard output, or a file that appears under its name when it is complete."""
    if path == "-":
        yield sys.stdout.buffer
        return
    partial = f"{path}.{os.getpid()}.partial"
    with ExitStack() as stack:
        try:
            out = stack.enter_context(open(partial, "xb"))
            stack.callback(_unlink, partial)
        except OSError as error:
            raise BadInput(f"can't write {path}: {error.strerror}") from error
        yield out
        out.close()
        os.replace(partial, path)


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
