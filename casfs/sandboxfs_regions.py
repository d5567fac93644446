"""What is mounted where in a sandbox of `casfs.sandboxfs`: no I/O.

A sandbox is one mount, and one more for each directory of the host that is mapped in it. A file belongs to the
innermost of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from casfs.errors import SandboxError
from casfs.host_files import HostFile, Link, Opened, Resolved
from store.entries import printable


@dataclass(slots=True)
class Region:
    """A directory of the sandbox with its own mount: the root, or where a directory of the host is mapped.

    By path in it: files, links, and `directories` and `places` (files) for other mounts.
    """

    host: Opened | None = None
    files: dict[bytes, HostFile] = field(default_factory=dict)
    links: dict[bytes, Link] = field(default_factory=dict)
    directories: set[bytes] = field(default_factory=set)
    places: set[bytes] = field(default_factory=set)

    @property
    def has_entries(self) -> bool:
        """Whether anything is in it beside what `host` has."""
        return bool(self.files or self.links or self.directories or self.places)


def divide(resolved: Resolved) -> dict[bytes, Region]:
    """The regions, by path in the sandbox. Raises SandboxError where something is mapped inside of a file."""
    regions = {path: Region(found) for path, found in resolved.opened.items() if found.directory}
    regions.setdefault(b"", Region())
    homes: dict[bytes, bytes] = {}

    def home_of(path: bytes) -> bytes:
        """The region of a directory."""
        known = homes.get(path)
        if known is None:
            known = homes[path] = path if path in regions else home_of(path.rpartition(b"/")[0])
        return known

    if len(regions) == 1:
        regions[b""].files, regions[b""].links = resolved.files, resolved.links
    else:
        for path, file in resolved.files.items():
            home = home_of(path.rpartition(b"/")[0])
            regions[home].files[_below(home, path)] = file
        for path, link in resolved.links.items():
            home = home_of(path.rpartition(b"/")[0])
            regions[home].links[_below(home, path)] = link
    for path, found in resolved.opened.items():
        if path:
            home = home_of(path.rpartition(b"/")[0])
            (regions[home].directories if found.directory else regions[home].places).add(_below(home, path))
    _check_above(resolved)
    return regions


def _below(home: bytes, path: bytes) -> bytes:
    return path[len(home) + 1 :] if home else path


def _check_above(resolved: Resolved) -> None:
    """Raise SandboxError where something is mapped inside of what is no directory."""
    inner = {path for path, found in resolved.opened.items() if not found.directory}
    leaves: Iterable[Callable[[bytes], bool]] = (
        resolved.files.__contains__,
        resolved.links.__contains__,
        inner.__contains__,
    )
    checked: set[bytes] = set()
    for paths in (resolved.files, resolved.links, resolved.opened):
        for above in {path.rpartition(b"/")[0] for path in paths}:
            while above and above not in checked:
                if any(has(above) for has in leaves):
                    path = next(path for path in paths if path.startswith(above + b"/"))
                    raise SandboxError(
                        f"{printable(path)} is mapped inside of {printable(above)}, which is mapped to no directory"
                    )
                checked.add(above)
                above = above.rpartition(b"/")[0]
    if any(has(b"") for has in leaves):
        raise SandboxError("the root of a sandbox is mapped to what is no directory")
