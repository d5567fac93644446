"""What a trace says about the tree that was used: values in, values out, no I/O.

Each declared input has the most that anybody did to it (`Use`). One that is
only listed was seen by its name: a tool that globs may depend on that it is
there, though not on what is in it. So only what is untouched is called unused.

What was looked for in vain may be a dependency that nobody declared, or one of
the many places where a compiler looks for a header: which of the two, only the
host can tell, where the file is there or not. Declared outputs are no
dependencies, so they are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from casfs.trace_format import Event, Kind, Trace


class Use(IntEnum):
    """The most that was done to an input."""

    UNTOUCHED = 0
    LISTED = 1
    """Its directory was listed."""
    LOOKED = 2
    """It was looked up: whether it is there, its size, its mode."""
    OPENED = 3
    """It was opened, mapped, executed, or read as a symbolic link."""


_USES = {Kind.LOOK: Use.LOOKED, Kind.OPEN: Use.OPENED, Kind.EXEC: Use.OPENED, Kind.LINK: Use.OPENED}


@dataclass(slots=True)
class Process:
    """What one process did. `commands` in order; counts of paths that it opened, only looked up, and missed."""

    process: int
    commands: list[str] = field(default_factory=list)
    opened: int = 0
    looked: int = 0
    missed: int = 0


@dataclass(frozen=True, slots=True)
class Summary:
    """`inputs`: each declared file and link, those that were used in order of their first use, then the others by path.

    `missed`: the first who looked for each path that isn't there.
    """

    inputs: Mapping[bytes, Use]
    processes: list[Process]
    missed: list[Event]

    def of(self, use: Use) -> list[bytes]:
        """The inputs to which no more was done than that."""
        return [path for path, found in self.inputs.items() if found is use]


def summarise(trace: Trace, declared: Iterable[bytes]) -> Summary:
    """`declared`: the paths of all files and links of the tree."""
    inputs = dict.fromkeys(declared, Use.UNTOUCHED)
    used: dict[bytes, Use] = {}
    listed = set()
    missed: dict[bytes, Event] = {}
    for event in trace.events:
        if event.kind is Kind.LIST:
            listed.add(event.path)
        elif event.kind is Kind.MISS:
            if not _is_output(event.path, trace.header.outputs):
                missed.setdefault(event.path, event)
        elif event.path in inputs:
            used[event.path] = max(used.get(event.path, Use.UNTOUCHED), _USES[event.kind])
    for path in inputs:
        if path.rpartition(b"/")[0] in listed:
            inputs[path] = Use.LISTED
    return Summary(
        {**used, **{p: use for p, use in inputs.items() if p not in used}}, _processes(trace), [*missed.values()]
    )


def _is_output(path: bytes, outputs: Iterable[bytes]) -> bool:
    """Whether it is one, lies in one, or is above one: the sandbox makes the directories above."""
    below = path + b"/"
    return any((output + b"/").startswith(below) or path.startswith(output + b"/") for output in outputs)


def _processes(trace: Trace) -> list[Process]:
    found: dict[int, Process] = {}
    opened: set[tuple[int, bytes]] = set()
    looked: set[tuple[int, bytes]] = set()
    for event in trace.events:
        process = found.setdefault(event.process, Process(event.process))
        if event.command and event.command not in process.commands[-1:]:
            process.commands.append(event.command)
        if event.kind is Kind.MISS:
            process.missed += 1
        elif event.kind is Kind.LOOK:
            looked.add((event.process, event.path))
        elif event.kind is not Kind.LIST:
            opened.add((event.process, event.path))
    for number, _ in opened:
        found[number].opened += 1
    for number, _ in looked - opened:
        found[number].looked += 1
    return list(found.values())


def group_untouched(inputs: Mapping[bytes, Use]) -> Counter[bytes]:
    """What is untouched, with whole untouched directories as one: ``dir/`` or a file → how many inputs that is."""
    touched = {b""}
    for path, use in inputs.items():
        if use is not Use.UNTOUCHED:
            while (path := path.rpartition(b"/")[0]) not in touched:
                touched.add(path)
    groups = Counter[bytes]()
    for path, use in inputs.items():
        if use is Use.UNTOUCHED:
            end = path.find(b"/")
            while end >= 0 and path[:end] in touched:
                end = path.find(b"/", end + 1)
            groups[path if end < 0 else path[: end + 1]] += 1
    return groups
