"""``casfs trace``: the verbs about traces, which ``casfs mount --trace`` and ``casfs run --trace`` write."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from tools.commands import add_verbs

VERBS: Mapping[str, str] = {
    "report": "say which inputs were unused, and which were looked for and not there",
}

EXAMPLES = """
casfs run src --trace t --host-root --output a.o -- cc -c a.c
casfs trace report t
casfs trace report --help             # more of them
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A verb of its own has to follow."""
    add_verbs(parser, __name__, VERBS)
