"""The lines that README.md tells users of clients to copy: what the tests of those clients use, address apart."""

from __future__ import annotations

import re

from tests.tools.conftest import REPOSITORY

_README = (REPOSITORY / "README.md").read_text()
_GRPC, _HTTP = "127.0.0.1:8980", "127.0.0.1:8080"


def bazelrc(address: str, *, http: bool = False) -> str:
    """The three lines of ``.bazelrc``, for a server at that address; `http`: with the first in its other form."""
    first, rest = _three_lines("remote_cache")
    if http:
        [first] = re.findall(r"`(build --remote_cache=http://\S+)`", _README)
    old = _HTTP if http else _GRPC
    assert first.count(old) == 1
    return f"{first.replace(old, address)}\n{rest}"


def bazelrc_to_execute(address: str) -> str:
    """The three lines of ``.bazelrc`` for a server at that address that runs the actions, too."""
    first, rest = _three_lines("remote_executor")
    assert first.count(_GRPC) == 1
    return f"{first.replace(_GRPC, address)}\n{rest}"


def _three_lines(option: str) -> list[str]:
    """The first of three lines, with that option, and the others."""
    lines: str
    [lines] = re.findall(rf"(?m)^```\n(build --{option}=.*\n(?:build --.*\n){{2}})```$", _README)
    return lines.split("\n", 1)


def ccache_conf(address: str) -> str:
    """The line of ``ccache.conf``, for a server at that address."""
    line: str
    [line] = re.findall(r"(?m)^```\n(remote_storage = .*\n)```$", _README)
    assert line.count(_HTTP) == 1
    return line.replace(_HTTP, address)
