"""``casfs manifest``: the verbs about manifests, a module each."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from tools.commands import add_verbs

VERBS: Mapping[str, str] = {
    "create": "make a manifest from a directory, a root's digest or a checklist",
    "import": "make a manifest from its text",
    "export": "write a manifest as text",
    "list": "list the manifests",
    "show": "say what a manifest is",
    "diff": "compare two manifests",
    "remove": "forget manifests; their blobs stay until they are collected",
}

EXAMPLES = """
casfs manifest create headers /usr/include
casfs manifest list
casfs manifest create --help          # and so on: each has a help of its own
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A verb of its own has to follow."""
    add_verbs(parser, __name__, VERBS)
