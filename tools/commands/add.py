"""``casfs add``: bytes into the store, digests out.

All or nothing as far as files go: what is named is looked at before anything
is added, and the files are published together.
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from store.digest import Digest, DigestFunction
from store.errors import BadInput
from store.importing import ScanOptions
from store.ingest import Transfer
from store.repository import Store
from tools.commands import complete
from tools.config import Settings
from tools.output import Progress, print_json, progress

EXAMPLES = """
casfs add hello.c                     # prints blake3:HEX/SIZE  hello.c
casfs add --function sha256 src       # a tree; prints the digest of its root
tar c src | casfs add --stdin --json  # a stream, and the answer for a script
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs add`` takes."""
    paths = parser.add_argument(
        "paths", metavar="PATH", nargs="*", help="a file, or a directory: its tree is added, its root's digest printed"
    )
    complete(paths, "file")
    parser.add_argument("--stdin", action="store_true", help="add what standard input has")
    add_ingest_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print a list of {path, kind, digest, size}")


def add_ingest_arguments(parser: argparse.ArgumentParser) -> None:
    """How bytes get into the store, for all verbs that bring some."""
    parser.add_argument(
        "--function", choices=[f.label for f in DigestFunction], help="hash with this (default: the configuration's)"
    )
    parser.add_argument(
        "--hardlink",
        action="store_true",
        help="don't copy: make the store's blobs further names of these files, which become read-only",
    )


@dataclass(frozen=True, slots=True)
class _Added:
    path: str
    kind: str
    digest: Digest


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Add, and print one line for each thing named, in its order."""
    if not args.paths and not args.stdin:
        raise BadInput("nothing to add: name files or directories, or use --stdin")
    directories = [_is_directory(path) for path in args.paths]
    options = ScanOptions(
        function=DigestFunction.named(args.function or settings.digest_function),
        transfer=Transfer.HARDLINK if args.hardlink else Transfer.AUTO,
    )
    with Store.open(settings.store) as store, progress("adding", "files") as advance:
        added = []
        if args.stdin:
            added.append(_add_stream(store, options))
        files = [path for path, is_directory in zip(args.paths, directories, strict=True) if not is_directory]
        digests = iter(_add_files(store, files, options, advance))
        for path, is_directory in zip(args.paths, directories, strict=True):
            if is_directory:
                root = store.importer.from_directories([(b"", Path(path))], options, advance)
                added.append(_Added(path, "directory", root.digest))
            else:
                added.append(_Added(path, "file", next(digests)))
    if args.json:
        print_json(
            [
                {"path": item.path, "kind": item.kind, "digest": str(item.digest), "size": item.digest.size}
                for item in added
            ]
        )
    else:
        for item in added:
            sys.stdout.buffer.write(f"{item.digest}  ".encode() + os.fsencode(item.path) + b"\n")
    return 0


def _is_directory(path: str) -> bool:
    """Whether it is one, or else a regular file. Raises BadInput for anything else."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise BadInput(f"can't add {path}: {error.strerror}; nothing was added") from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise BadInput(f"can't add {path}: it is no file and no directory; --stdin adds a stream; nothing was added")
    return stat.S_ISDIR(mode)


def _add_stream(store: Store, options: ScanOptions) -> _Added:
    with store.ingest() as ingest:
        digest = ingest.add_stream(sys.stdin.buffer, options.function)
    return _Added("-", "stream", digest)


def _add_files(store: Store, paths: list[str], options: ScanOptions, advance: Progress) -> list[Digest]:
    if not paths:
        return []
    digests = []
    with store.ingest() as ingest:
        for path in paths:
            try:
                # Whoever names a symbolic link means the file; the ingest follows none.
                digest = ingest.add_file(os.path.realpath(path), options.function, transfer=options.transfer)
            except OSError as error:
                raise BadInput(f"can't add {path}: {error.strerror}; none of the files was added") from error
            digests.append(digest)
            advance(1, digest.size)
    return digests
