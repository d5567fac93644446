"""The holder of `casfs.holder` as a program that knows of upstreams: what `casfs run` starts."""

from __future__ import annotations

import sys

from casfs.holder import HolderOptions, main
from store.repository import SourceOptions
from tools.upstream.options import load_upstream


def find_sources(options: HolderOptions) -> SourceOptions:
    """The directories, and the upstream if there is one."""
    upstream = load_upstream(options.upstream)
    return options.sources if upstream is None else upstream.as_source(options.sources)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], find_sources))
