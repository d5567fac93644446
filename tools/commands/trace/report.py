"""``casfs trace report``: what to do about the inputs of an action, by what it really used."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from casfs.errors import BadTrace
from casfs.trace_format import BEGINNING, Event, Trace, decode_trace
from casfs.trace_summary import Process, Summary, Use, group_untouched, summarise
from store.entries import DirectoryEntry
from store.errors import BadInput
from store.manifest_text import quote
from store.repository import Store
from store.trees import get_directory, walk
from tools.commands import complete
from tools.config import Settings
from tools.output import count, print_json, warn

EXAMPLES = """
casfs trace report t                        # what was used, what wasn't, what was missed
casfs trace report t --host /usr/include    # which of the missed are there: undeclared inputs
casfs trace report t --unused-inputs > list # for Bazel's unused_inputs_list
casfs trace report t --json | jq -r '.probably_undeclared[].path'
"""

_SHOWN_MOST = 20
_WORDS = {
    Use.OPENED: "opened",
    Use.LOOKED: "only looked at",
    Use.LISTED: "only seen in a listing",
    Use.UNTOUCHED: "never touched",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs trace report`` takes."""
    parser.description = (
        f"{parser.description} 'Opened' is an input that was read, mapped into memory or executed; a trace has which "
        "were executed, but not which were read and which mapped, as the kernel tells nobody of it."
    )
    complete(parser.add_argument("file", metavar="FILE", type=Path, help="a trace"), "file")
    host = parser.add_argument(
        "--host",
        metavar="DIR",
        type=Path,
        help="where on this machine the tree comes from: what was missed and is there is probably undeclared",
    )
    complete(host, "directory")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="print all of it, as {inputs: {opened: […], …}, missed: […], …}"
    )
    form.add_argument(
        "--unused-inputs",
        action="store_true",
        help="print what was never touched, a path a line: Bazel's unused_inputs_list, if the tree is an input root",
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Read the trace and the tree it is of, and print what they say."""
    trace = _read(args.file)
    if args.host is not None and not args.host.is_dir():
        raise BadInput(f"--host {args.host}: there is no such directory")
    with Store.open(settings.store, create=False) as store, store.index.view() as view:
        tree = walk(view, get_directory(view, trace.header.root))
        summary = summarise(trace, [path for path, entry in tree if not isinstance(entry, DirectoryEntry)])
    there = None if args.host is None else [event for event in summary.missed if _is_at(args.host, event.path)]
    if args.json:
        print_json(_as_json(trace, summary, there))
        return 0
    if trace.cut:
        warn(f"the last line of {args.file} is cut off, and left out")
    if not trace.ended:
        warn(f"{args.file} has no end: its writer was killed or had no room, or still writes")
    if args.unused_inputs:
        _print_unused(summary)
    else:
        _print(trace, summary, there, args.host)
    return 0


def _read(path: Path) -> Trace:
    try:
        with open(path, "rb") as file:
            # Before a line is read: what isn't a trace may have none, of any length.
            if file.read(len(BEGINNING)) != BEGINNING:
                raise BadTrace(f"{path} is no trace: it doesn't begin as one")
            file.seek(0)
            return decode_trace(file)
    except OSError as error:
        raise BadInput(f"can't read the trace {path}: {error.strerror}") from error
    except BadTrace as error:
        raise BadTrace(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _is_at(host: Path, path: bytes) -> bool:
    return os.path.lexists(os.path.join(os.fsencode(host), path))


def _as_json(trace: Trace, summary: Summary, there: list[Event] | None) -> dict[str, Any]:
    return {
        "root": str(trace.header.root),
        "engine": trace.header.engine,
        "ended": trace.ended,
        "cut": trace.cut,
        "inputs": {use.name.lower(): [os.fsdecode(path) for path in summary.of(use)] for use in reversed(Use)},
        "missed": [_describe(event) for event in summary.missed],
        "probably_undeclared": None if there is None else [_describe(event) for event in there],
        "processes": [
            {
                "process": found.process,
                "commands": found.commands,
                "opened": found.opened,
                "looked": found.looked,
                "missed": found.missed,
            }
            for found in summary.processes
        ],
    }


def _describe(event: Event) -> dict[str, Any]:
    return {"path": os.fsdecode(event.path), "process": event.process, "command": event.command}


def _print_unused(summary: Summary) -> None:
    for path in summary.of(Use.UNTOUCHED):
        if b"\n" in path:
            warn(f"{quote(path)} is left out: a name with a line break can't be in an unused_inputs_list")
        else:
            # Bytes: whatever a name is, Bazel shall find it again.
            sys.stdout.buffer.write(path + b"\n")


def _print(trace: Trace, summary: Summary, there: list[Event] | None, host: Path | None) -> None:
    print(f"tree       {trace.header.root}, shown by engine {trace.header.engine}")
    uses = ", ".join(f"{len(summary.of(use)):,} {words}" for use, words in _WORDS.items())
    print(f"inputs     {len(summary.inputs):,}: {uses}")
    print(f"processes  {len(summary.processes):,}")
    _print_some([_process(found) for found in summary.processes])
    groups = group_untouched(summary.inputs)
    if groups:
        print("never touched, so probably not needed:")
        _print_some([_group(path, number) for path, number in groups.most_common()])
    if there:
        print(f"looked for, not there, but below {host}: probably undeclared inputs:")
        _print_some([_missed(event) for event in there])
    rest = [event for event in summary.missed if event not in (there or [])]
    if rest:
        print("looked for, and not there:" if there is None else f"looked for, and neither there nor below {host}:")
        _print_some([_missed(event) for event in rest])


def _print_some(lines: list[str]) -> None:
    for line in lines[:_SHOWN_MOST]:
        print(f"  {line}")
    if len(lines) > _SHOWN_MOST:
        print(f"  and {len(lines) - _SHOWN_MOST:,} more (--json has them)")


def _process(found: Process) -> str:
    does = f"{found.opened:,} opened, {found.looked:,} only looked at, {found.missed:,} missed"
    return f"{found.process} {' → '.join(found.commands) or '?'}: {does}"


def _group(path: bytes, number: int) -> str:
    return f"{quote(path)}  ({count(number, 'input')})" if path.endswith(b"/") else quote(path)


def _missed(event: Event) -> str:
    return f"{quote(event.path)}  ({event.command or '?'}, process {event.process})"
