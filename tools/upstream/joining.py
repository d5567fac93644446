"""An upstream as the last of a store's sources, loaded when something is missing for the first time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from store.repository import SourceOptions
from store.sources import RemoteSource
from tools.upstream.options import UpstreamOptions


def with_upstream(others: SourceOptions, upstream: UpstreamOptions | None) -> SourceOptions:
    """These sources, and then the upstream, if there is one."""
    return others if upstream is None else replace(others, remote=partial(_make_sources, upstream, others.timeout))


def _make_sources(upstream: UpstreamOptions, timeout: float) -> Sequence[RemoteSource]:
    """Nothing is connected, and grpc not imported, before they are asked."""
    from tools.upstream.sources import make_sources

    return make_sources(upstream, timeout)
