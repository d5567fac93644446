"""``casfs prefetch``: bring in every blob of a tree that the store lacks."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from store.prefetch import Prefetched, Progress, prefetch_tree
from store.repository import Store
from tools.commands._resolve import Root, add_manifest_argument, get_root
from tools.commands._upstream import add_upstream_arguments, apply_upstream
from tools.config import Settings
from tools.exits import Exit
from tools.output import count, format_size, print_json, progress, warn

EXAMPLES = """
casfs prefetch headers                # from the cold tier, and from the configured sources
casfs prefetch sha256:… --upstream grpcs://cache.example/main
casfs prefetch headers --json | jq .failed
"""

_NAMED_MOST = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs prefetch`` takes."""
    add_manifest_argument(parser)
    add_upstream_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="print {root, fetched_blobs, fetched_bytes, failed: {digest: why, …}}"
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Fetch; exits with 1 if something didn't come."""
    settings = apply_upstream(args, settings)
    with Store.open(settings.store, create=settings.upstream_url is not None, sources=settings.sources) as store:
        root = get_root(store, args.manifest)
        result = fetch_missing(store, root, "casfs prefetch", quiet=args.json)
    if args.json:
        print_json(
            {
                "root": str(root.directory.digest),
                "fetched_blobs": result.fetched_blobs,
                "fetched_bytes": result.fetched_bytes,
                "failed": {str(digest): why for digest, why in result.failed.items()},
            }
        )
    else:
        print(f"{count(result.fetched_blobs, 'blob')} with {format_size(result.fetched_bytes)} fetched")
    return Exit.NO if result.failed else Exit.OK


def fetch_missing(store: Store, root: Root, holder: str, *, quiet: bool = False) -> Prefetched:
    """Fetch with a progress bar, and a warning for each of the first blobs that didn't come unless `quiet`."""
    with ExitStack() as stack:

        def begin(blobs: int, size: int) -> Progress:
            return stack.enter_context(progress("fetching", f"of {blobs:,} blobs", size))

        result = prefetch_tree(store, root.directory, holder, begin)
    if not quiet:
        for why in list(result.failed.values())[:_NAMED_MOST]:
            warn(why)
        if len(result.failed) > _NAMED_MOST:
            warn(f"and {len(result.failed) - _NAMED_MOST:,} more")
    return result
