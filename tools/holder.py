"""The holder of `casfs.holder` as a program that knows of upstreams: what `casfs run` starts."""

from __future__ import annotations

import sys

from casfs.holder import HolderOptions, main
from store.repository import SourceOptions
from tools.upstream.joining import with_upstream
from tools.upstream.options import load_upstream


def find_sources(options: HolderOptions) -> SourceOptions:
    """The directories, and the upstream if there is one."""
    return with_upstream(options.sources, load_upstream(options.upstream))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], find_sources))
