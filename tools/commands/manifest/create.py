"""``casfs manifest create``: a name for a tree.

What can be wrong is looked for before files are read; a tree that was added
but couldn't be named is collected some day.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path

from store.digest import Digest, DigestFunction
from store.entries import split_path
from store.errors import AlreadyExists, BadInput
from store.importing import ScanOptions
from store.ingest import Transfer
from store.manifests import Manifest, check_manifest_name
from store.repository import Store
from store.scan import exclude_globs
from store.trees import Directory
from tools.commands import complete
from tools.commands._resolve import get_root
from tools.commands.add import add_ingest_arguments
from tools.commands.manifest._describe import describe, print_manifest
from tools.config import Settings
from tools.output import print_json, progress

EXAMPLES = """
casfs manifest create headers /usr/include --exclude 'c++/*' --exclude '*.hpp'
casfs manifest create sdk /opt/sdk --reference       # the files stay where they are
casfs manifest create tools --graft include=/usr/include --graft lib/gcc=/usr/lib/gcc
casfs manifest create inputs --root sha256:HEX/SIZE  # a REAPI Directory in the store
casfs manifest create src --checklist SHA256SUMS --function sha256 --base ./src
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs manifest create`` takes."""
    parser.add_argument("name", metavar="NAME", help="the manifest's name")
    source = parser.add_mutually_exclusive_group(required=True)
    complete(source.add_argument("directory", metavar="DIR", nargs="?", help="a directory to add"), "directory")
    source.add_argument(
        "--graft", metavar="PATH=DIR", action="append", help="show the directory DIR at PATH; may be repeated"
    )
    source.add_argument("--root", metavar="DIGEST", help="a REAPI Directory that is in the store: blake3:HEX/SIZE")
    checklist = source.add_argument("--checklist", metavar="FILE", help="what sha256sum or b3sum printed; - for stdin")
    complete(checklist, "file")
    base = parser.add_argument("--base", metavar="DIR", help="add a checklist's files from there, checking each")
    complete(base, "directory")
    parser.add_argument(
        "--exclude",
        metavar="GLOB",
        action="append",
        default=[],
        help="leave out what matches: a name (*.pyc), or with a slash a path (build/*); may be repeated",
    )
    parser.add_argument(
        "--reference", action="store_true", help="leave the files where they are; one that changes can't be opened"
    )
    parser.add_argument(
        "--mtime", choices=["fixed", "keep"], default="fixed", help="show a fixed time (default), or keep each file's"
    )
    add_ingest_arguments(parser)
    add_naming_arguments(parser)


def add_naming_arguments(parser: argparse.ArgumentParser) -> None:
    """How a new manifest is named and shown."""
    parser.add_argument("--replace", action="store_true", help="replace a manifest that has this name")
    parser.add_argument("--json", action="store_true", help="print what 'manifest show --json' prints")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Make the tree, then name it."""
    _check_combination(args)
    check_manifest_name(args.name)
    function = DigestFunction.named(args.function or settings.digest_function)
    with Store.open(settings.store, sources=settings.sources) as store:
        check_is_free(store, args.name, args.replace)
        directory, source = _make_tree(store, args, function)
        name_tree(store, args, directory, source)
    return 0


def check_is_free(store: Store, name: str, replace: bool) -> None:
    """Raise AlreadyExists for a name that is taken, before there is any work that would be in vain."""
    if not replace and store.manifests.find(name) is not None:
        raise AlreadyExists(f"there is a manifest {name!r} already; --replace replaces it")


def name_tree(store: Store, args: argparse.Namespace, directory: Directory, source: str) -> Manifest:
    """Give the tree its name, and say so."""
    manifest = store.manifests.put(args.name, directory.digest, source, replace=args.replace)
    if args.json:
        print_json(describe(manifest, directory))
    else:
        print_manifest(manifest, directory)
    return manifest


def _check_combination(args: argparse.Namespace) -> None:
    scanning = args.directory is not None or args.graft is not None
    for option, given in (("--exclude", args.exclude), ("--reference", args.reference), ("--hardlink", args.hardlink)):
        if given and not scanning:
            raise BadInput(f"{option} is for manifests made from directories")
    if args.mtime == "keep" and not scanning:
        raise BadInput("--mtime keep is for manifests made from directories")
    if args.reference and args.hardlink:
        raise BadInput("--reference leaves files where they are, --hardlink brings them into the store: choose one")
    if args.base is not None and args.checklist is None:
        raise BadInput("--base is for manifests made with --checklist")


def _make_tree(store: Store, args: argparse.Namespace, function: DigestFunction) -> tuple[Directory, str]:
    if args.root is not None:
        return get_root(store, str(Digest.parse(args.root))).directory, "root"
    if args.checklist is not None:
        return _read_checklist(store, args, function), f"checklist {_absolute(args.checklist)}"
    grafts = [(b"", Path(args.directory))] if args.graft is None else [_parse_graft(text) for text in args.graft]
    for _, top in grafts:
        if not top.is_dir():
            raise BadInput(f"{top} is not a directory" if top.exists() else f"{top} does not exist")
    options = ScanOptions(
        function,
        exclude_globs(args.exclude),
        reference=args.reference,
        keep_mtime=args.mtime == "keep",
        transfer=Transfer.HARDLINK if args.hardlink else Transfer.AUTO,
    )
    with progress("adding", "files") as advance:
        directory = store.importer.from_directories(grafts, options, advance)
    return directory, "directory " + ", ".join(_absolute(str(path)) for _, path in grafts)


def _read_checklist(store: Store, args: argparse.Namespace, function: DigestFunction) -> Directory:
    base = None if args.base is None else Path(args.base)
    if base is not None and not base.is_dir():
        raise BadInput(f"--base {base} is not a directory")
    with ExitStack() as stack:
        try:
            path = "/dev/stdin" if args.checklist == "-" else args.checklist
            lines = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise BadInput(f"can't read the checklist {args.checklist}: {error.strerror}") from error
        return store.importer.from_checklist(lines, function, args.checklist, base)


def _parse_graft(text: str) -> tuple[bytes, Path]:
    at, equals, directory = text.partition("=")
    if not equals or not directory:
        raise BadInput(f"--graft {text!r}: write PATH=DIR, as in usr/include=/usr/include")
    path = os.fsencode(at).strip(b"/")
    if path:
        split_path(path, "--graft")
    return path, Path(directory)


def _absolute(path: str) -> str:
    # May hold bytes that are no UTF-8; the manifest's record is.
    return os.path.abspath(path).encode("utf-8", "backslashreplace").decode() if path != "-" else "standard input"
