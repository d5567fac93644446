"""A manifest for a person and for a script."""

from __future__ import annotations

import time
from typing import Any

from store.manifests import Manifest
from store.trees import Directory
from tools.output import count, format_size, print_table


def describe(manifest: Manifest, directory: Directory) -> dict[str, Any]:
    """What ``--json`` prints: counts, bytes of file contents, seconds since the epoch."""
    return {
        "name": manifest.name,
        "root": str(manifest.root),
        "files": directory.files,
        "bytes": directory.bytes,
        "nodes": directory.nodes,
        "references": directory.references,
        "missing": manifest.missing,
        "created": manifest.created,
        "source": manifest.source,
    }


def print_manifest(manifest: Manifest, directory: Directory) -> None:
    """The same as an aligned table."""
    rows: list[tuple[str, object]] = [
        ("name", manifest.name),
        ("root", manifest.root),
        ("files", f"{directory.files:,}, {format_size(directory.bytes)}"),
        ("nodes", f"{directory.nodes:,}"),
    ]
    if directory.references:
        rows.append(("references", f"{count(directory.references, 'file')} by reference"))
    if manifest.missing:
        rows.append(("missing", f"{count(manifest.missing, 'blob')} not in the store"))
    rows.append(("created", format_time(manifest.created)))
    rows.append(("source", manifest.source))
    print_table(rows)


def format_time(seconds: int) -> str:
    """A moment in the person's time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
